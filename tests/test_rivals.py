"""Every rival's formula on numbers worked by hand; on one batch all rewards and all objectives differ."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from runs import QUICKSTART

from streamsynth import api, assemble
from streamsynth.errors import UserError
from streamsynth.feedback import diversity
from streamsynth.learner import advantages, balance, objective, rivals
from streamsynth.learner.choices import OBJECTIVES
from streamsynth.learner.objective import Fresh, ObjectiveConfig
from streamsynth.learner.rivals import REWARDS, Batch, RivalConfig
from streamsynth.learner.update import PARTS, assess
from streamsynth.policy.logprobs import TokenStatistics
from streamsynth.pytrees import Prompts, Scores

pytestmark = pytest.mark.usefixtures("quick_xla")

# A group of four. The cosines: 12: 1, 13: 0, 14: 0.6, 23: 0, 24: 0.6, 34: 0.8.
FOUR = np.array([[1, 0], [1, 0], [0, 1], [0.6, 0.8]], np.float32)


def batch_of(quality, features=FOUR, **changes):
    quality = np.array(quality, np.float32)
    rest = dict(gate=(quality > 0).astype(np.float32), value=0.0, novelty=0 * quality, share=0.5, samples=4)
    rest["scored"] = np.ones(len(quality), bool)
    return Batch(quality=quality, features=np.array(features, np.float32), **(rest | changes))


def reward(name, batch, **constants):
    paid = jax.jit(REWARDS[name], static_argnums=1)(batch, RivalConfig(**constants))
    return np.asarray(sum(paid.weights[part] * paid.parts[part] for part in paid.parts))


@pytest.mark.parametrize(
    ("same", "distinct"),
    [
        (0.9, [2 / 3, 2 / 3, 1, 1]),  # clusters {1, 2}, {3}, {4}: (4 - 2) / 3 and (4 - 1) / 3
        (0.75, [2 / 3] * 4),  # {1, 2}, {3, 4}
        (0.5, [0.1] * 4),  # 1 is like 4 and 4 like 3: one cluster, (4 - 4) / 3, and the least is 0.1
    ],
)
def test_darling_multiplies_quality_by_distinctness(same, distinct):
    quality = np.array([1, 0.5, 0.8, 0.2])
    np.testing.assert_allclose(reward("darling", batch_of(quality), same=same), quality * distinct, rtol=1e-6)


def test_darling_sees_a_long_chain_and_only_its_own_group():
    """Eight unit vectors 20 degrees apart, each like its neighbours only; then the same in pairs."""
    angles = np.deg2rad(20 * np.arange(8))
    chain = np.stack([np.cos(angles), np.sin(angles)], axis=1)
    ones = np.ones(8)
    np.testing.assert_allclose(reward("darling", batch_of(ones, chain, samples=8), same=0.93), 0.1)
    # In groups of two each is like the other: max(0.1, (2 - 2) / 1); unlike at 0.95: (2 - 1) / 1.
    np.testing.assert_allclose(reward("darling", batch_of(ones, chain, samples=2), same=0.93), 0.1)
    np.testing.assert_allclose(reward("darling", batch_of(ones, chain, samples=2), same=0.95), 1.0)


def test_dqo_pays_what_a_sample_adds_to_the_log_volume():
    """Twins: logdet [[2, 1], [1, 2]] - log 2 = log 1.5; at right angles: log 4 - log 2."""
    pairs = np.array([[1, 0], [1, 0], [1, 0], [0, 1]])
    paid = reward("dqo", batch_of([0.9, 0.4, 0.0, 1.0], pairs, samples=2), dqo_alpha=0.5)
    added = np.log([1.5, 1.5, 2, 2])
    np.testing.assert_allclose(paid, np.array([0.9, 0.4, 0, 1]) + 0.5 * added, rtol=1e-5)


def test_dqo_equals_determinants_in_float64():
    rng = np.random.default_rng(0)
    features = rng.normal(size=(10, 3))
    features /= np.linalg.norm(features, axis=1, keepdims=True)

    def volume(rows):
        return np.linalg.slogdet(features[rows] @ features[rows].T + np.eye(len(rows)))[1]

    groups = [list(range(5)), list(range(5, 10))]
    expected = [volume(group) - volume([j for j in group if j != i]) for group in groups for i in group]
    paid = reward("dqo", batch_of(np.zeros(10), features, samples=5))
    np.testing.assert_allclose(paid, expected, rtol=1e-5)


def test_mmr_lowers_what_is_like_a_sample_chosen_before():
    """The deviation of q is sqrt(0.3675 / 4) = 0.303109, so lambda = 0.575202 and 1 - lambda = 0.424798.

    1 is the best and keeps 1. Then 2 would have 0.287601 - 0.424798, 3 has 0.8 lambda - 0 = 0.460162, 4 would
    have 0.115040 - 0.6 * 0.424798 = -0.139839: 3 is next. Now 4 is nearest to 3: 0.115040 - 0.8 * 0.424798 =
    -0.224798, so 2 with -0.137197 comes first, and 4 last.
    """
    expected = [1, -0.137197, 0.460162, -0.224798]
    batch = batch_of([1, 0.5, 0.8, 0.2])
    np.testing.assert_allclose(reward("mmr", batch), expected, atol=2e-6)
    # Group by group, in any order of the samples.
    order = np.array([3, 1, 0, 2])
    twice = batch_of(np.tile(batch.quality, 2)[[0, 1, 2, 3, *order]], FOUR[[0, 1, 2, 3, *order]])
    np.testing.assert_allclose(reward("mmr", twice), np.array(expected)[[0, 1, 2, 3, *order]], atol=2e-6)


def test_the_release_adds_four_parts():
    """rho: (1 + 0.36) / 1.6 = 0.85 for 1 and 2, 0.64 / 0.8 = 0.8 for 3, (2 * 0.36 + 0.64) / 2 = 0.68 for 4.

    With c = 3 the distinctness is 0.45, 0.45, 0.6 and 0.96.
    """
    batch = batch_of([1, 0.5, 0.8, 0], attribute=np.array([0.5, 0, 1, 1], np.float32))
    # 0.1 gate + 0.1 attribute + 0.5 quality + 0.3 distinctness
    expected = [0.1 + 0.05 + 0.5 + 0.135, 0.1 + 0.25 + 0.135, 0.1 + 0.1 + 0.4 + 0.18, 0.1 + 0.288]
    np.testing.assert_allclose(reward("release", batch), expected, rtol=1e-5)
    without = reward("release", batch_of([1, 0.5, 0.8, 0]))
    np.testing.assert_allclose(expected - without, [0.05, 0, 0.1, 0.1], atol=1e-6)
    # c = 10 clips 1.5 and more to 1; orthogonal texts are wholly distinct.
    paid = rivals.release(batch, RivalConfig(release_slope=10.0))
    np.testing.assert_allclose(paid.shown["distinct"], 1.0)
    np.testing.assert_allclose(
        rivals.release(batch_of([1] * 4, np.eye(4)), RivalConfig()).shown["distinct"], 1
    )


def test_a_shared_reward_is_compared_with_earlier_batches():
    """Means 0.5, then 0.75: the level is 0.5 and the difference 0.25 for all; the next level is 0.5125."""
    spread = advantages.initial_spread(PARTS)
    one, two = (rivals.shared(batch_of(q), RivalConfig()).parts for q in ([1, 0, 1, 0], [1, 1, 1, 0]))
    assert (advantages.from_level(spread, "quality", one["quality"]) == 0).all()
    everyone = dict.fromkeys(one, np.ones(4, bool))
    spread = advantages.update_level(spread, one, everyone)
    np.testing.assert_allclose(advantages.from_level(spread, "quality", two["quality"]), 0.25)
    np.testing.assert_allclose(advantages.update_level(spread, two, everyone).level["quality"], 0.5125)


def test_a_sample_without_a_score_has_no_say_in_the_shared_reward():
    """The mean of 1, 0 and 1 is 2 / 3, whatever stands in the place of the fourth."""
    scored = np.array([True, True, True, False])
    paid = rivals.shared(batch_of([1, 0, 1, 0], scored=scored), RivalConfig())
    np.testing.assert_allclose(paid.parts["quality"], 2 / 3, rtol=1e-6)


# --- One fixed scored batch ---

N, G, T = 12, 4, 5
LABEL = np.repeat([0, 1, 0], G).astype(np.int32)
# The last group is dead: all are as good.
QUALITY = np.array([1, 0, 0.5, 0.75, 0.25, 0, 1, 1, 0.5, 0.5, 0.5, 0.5], np.float32)


@functools.cache
def assessed(name, choices):
    rng = np.random.default_rng(1)
    # Texts of three kinds, each like those of its own.
    features = np.eye(6)[rng.integers(3, size=N)] + 0.4 * np.abs(rng.normal(size=(N, 6)))
    features /= np.linalg.norm(features, axis=1, keepdims=True)
    scores = Scores(
        (QUALITY > 0).astype(np.float32), QUALITY, features.astype(np.float32), {}, np.ones(N, bool)
    )
    # A batch of one kind came before; the parts differ in size.
    sizes = {"quality": 0.1, "diversity": 0.04, "reward": 0.3}
    level = dict.fromkeys(PARTS, jnp.float32(0.4))
    spread = advantages.Spread({k: jnp.float32(v) for k, v in sizes.items()}, level)
    setting = dict(samples=G, floor=0.0, power=1.0, eta=0.5, alpha_max=4.0, weighted=True, neutral=True)
    return assess(
        diversity.empty(2, 6),
        scores,
        LABEL,
        spread,
        balance.initial(1.0, 1.0),
        remembered=0.0,
        reward=name,
        choices=choices,
        **setting,
    )


@pytest.fixture(scope="module")
def by_reward():
    return {name: assessed(name, OBJECTIVES["rloo"]) for name in REWARDS}


def test_every_reward_gives_its_own_advantages(by_reward):
    found = {name: np.asarray(result.advantage, np.float64) for name, result in by_reward.items()}
    assert all(np.isfinite(a).all() and np.linalg.norm(a) > 0.1 for a in found.values())
    for one, other in itertools.combinations(found, 2):
        a, b = found[one], found[other]
        # Not even the same direction.
        assert a @ b / np.linalg.norm(a) / np.linalg.norm(b) < 0.99, (one, other)


def test_what_is_measured_does_not_depend_on_what_is_paid(by_reward):
    ours = by_reward["credit"]
    for result in by_reward.values():
        np.testing.assert_array_equal(result.credit, ours.credit)
        assert result.balance.alpha == ours.balance.alpha
        assert result.metrics["diversity/statistic"] == ours.metrics["diversity/statistic"]


def test_all_parts_of_a_reward_are_logged(by_reward):
    metrics = by_reward["release"].metrics
    weighed = [metrics[f"paid/{part}_weighted"] for part in ("label", "attribute", "quality", "distinct")]
    plain = [metrics[f"paid/{part}"] for part in ("label", "attribute", "quality", "distinct")]
    np.testing.assert_allclose(weighed, np.array([0.1, 0.1, 0.5, 0.3]) * plain, rtol=1e-6)
    assert {"advantage/quality", "advantage/diversity_weighted"} <= by_reward["shared"].metrics.keys()
    assert by_reward["quality"].metrics["advantage/dead_groups"] == pytest.approx(1 / 3)
    assert by_reward["credit"].metrics["advantage/dead_groups"] == 0


@pytest.mark.parametrize("name", OBJECTIVES)
def test_advantages_of_an_objective_by_definition(name):
    """Of quality alone, group by group: [1, 0, 0.5, 0.75], [0.25, 0, 1, 1], and a dead one."""
    result = assessed("quality", OBJECTIVES[name])
    groups = QUALITY.reshape(-1, G).astype(np.float64)
    others = (groups.sum(-1, keepdims=True) - groups) / (G - 1)
    mean, deviation = groups.mean(-1, keepdims=True), groups.std(-1, ddof=1, keepdims=True)
    expected = {
        "streamsynth": (groups - others) / np.sqrt(0.1),
        "rloo": groups - others,
        "grpo": (groups - mean) / (deviation + 1e-4),
        "dr_grpo": groups - mean,
        "dapo": (groups - mean) / (deviation + 1e-4),
    }[name]
    np.testing.assert_allclose(result.advantage, expected.ravel(), rtol=1e-5, atol=1e-6)
    dropped = np.repeat([False, False, True], G) if name == "dapo" else np.zeros(N, bool)
    np.testing.assert_array_equal(result.counted, ~dropped)


@pytest.fixture(scope="module")
def ratio():
    """[N, T] of learner to sampler for texts of unlike lengths, and their mask."""
    rng = np.random.default_rng(2)
    mask = np.arange(T) < rng.integers(1, T + 1, size=N)[:, None]
    ratio = np.where(mask, rng.uniform(0.7, 1.4, size=(N, T)), 1)
    ratio[0, 0], ratio[5, 0] = 1.25, 0.75  # beyond 1.2 but not 1.28 with A > 0; below 0.8 with A < 0
    return ratio, mask


@pytest.fixture(scope="module")
def learned(ratio):
    """By objective the loss, its gradient in the log-probabilities and the mask; the network is a table."""
    ratio, mask = ratio
    table = jnp.full((N, T), -2.0)

    def statistics(model, variables, *rest):
        return TokenStatistics(variables["table"], jnp.zeros((N, T)))

    def of(name):
        result = assessed("quality", OBJECTIVES[name])
        fresh = Fresh(
            prompts=Prompts(*(np.zeros((0, 0)),) * 4),
            tokens=np.zeros((N, T), int),
            mask=mask & np.asarray(result.counted)[:, None],
            behaviour=table - np.log(ratio).astype(np.float32),
            reference=table,
            advantage=result.advantage,
        )
        config = ObjectiveConfig(choices=OBJECTIVES[name], kl_weight=0.0)

        @tiny.quick_jit
        def loss(table, fresh):
            return jax.value_and_grad(
                lambda t: objective.fresh_loss(None, {"table": t}, fresh, 1.0, config)[0]
            )(table)

        return (*map(np.asarray, loss(table, fresh)), fresh.mask)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(objective, "group_logprobs", statistics)
        return {name: of(name) for name in OBJECTIVES}


def test_every_objective_has_its_own_gradient(learned):
    for one, other in itertools.combinations(learned, 2):
        a, b = learned[one][1], learned[other][1]
        assert np.abs(a - b).max() > 0.02 * np.abs(a).max(), (one, other)


@pytest.mark.parametrize("name", OBJECTIVES)
def test_the_loss_of_an_objective_by_definition(name, learned, ratio):
    value, _, mask = learned[name]
    c, ratio = OBJECTIVES[name], ratio[0]
    advantage = np.asarray(assessed("quality", c).advantage, np.float64)[:, None]
    clipped = np.clip(ratio, 1 - c.clip_low, 1 + c.clip_high)
    per_token = np.minimum(ratio * advantage, clipped * advantage)
    own = [per_token[n][mask[n]] for n in range(N)]
    total = sum(map(np.sum, own))
    expected = {
        "streamsynth": total / (N * T),
        "rloo": total / (N * T),
        "grpo": sum(tokens.sum() / max(tokens.size, 1) for tokens in own) / N,
        "dr_grpo": total / (N * T),
        "dapo": total / mask.sum(),  # of the two groups that are not dead
    }[name]
    np.testing.assert_allclose(value, -expected, rtol=1e-5)


def test_grpo_is_rlax_of_each_text(learned, ratio):
    """Its loss is a mean over T steps; with the advantages of padding at 0, T / length makes it a text's."""
    rlax = pytest.importorskip("rlax")
    value, _, mask = learned["grpo"]
    advantage = np.asarray(assessed("quality", OBJECTIVES["grpo"]).advantage)[:, None] * mask
    losses = jax.vmap(lambda r, a: rlax.clipped_surrogate_pg_loss(r, a, 0.2))(ratio[0], advantage)
    np.testing.assert_allclose(value, np.mean(losses * T / mask.sum(-1)), rtol=1e-5)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"objective.name": "grpo"}, "objective.name = 'grpo' centres or scales .* streamsynth or rloo"),
        ({"learner.reward": "shared", "objective.name": "dr_grpo", "replay.share": "0"}, "dr_grpo"),
        ({"learner.reward": "darling"}, "set replay.share to 0"),
        ({"learner.reward": "novelty"}, "learner.reward = 'novelty' is not known: choose one of credit"),
        ({"objective.name": "ppo"}, "objective.name = 'ppo' is not known: choose one of streamsynth"),
        ({"supervised.early_stop": "2"}, "set supervised.held_out"),
        ({"rivals.same": "1.5"}, "rivals.same"),
        ({"rivals.release_slope": "-1"}, "rivals.release_slope"),
        ({"dataset.select": "random"}, "dataset.select"),
    ],
)
def test_what_does_not_fit_is_refused(overrides, message):
    with pytest.raises(UserError, match=message):
        assemble.check(api.load(f"{QUICKSTART}:tiny", overrides))


def test_a_clip_in_the_config_takes_the_objectives_place():
    own = objective.objective_config(api.load(str(QUICKSTART)).objective).choices
    assert (own.clip_low, own.clip_high) == (0.2, 0.28)
    changed = api.load(str(QUICKSTART), {"objective.name": "dapo", "objective.clip_high": "0.4"})
    assert objective.objective_config(changed.objective).choices.clip_high == 0.4
    assert objective.objective_config(changed.objective).choices.clip_low == 0.2
