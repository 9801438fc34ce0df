"""The learned distribution over strategies."""

import json

import jax
import numpy as np
import pytest
from flax import serialization
from hypothesis import given, settings
from hypothesis import strategies as st

from streamsynth.errors import UserError
from streamsynth.stream import patterns
from streamsynth.workdir import Workdir

S = len(patterns.STRATEGIES)
MEANS = np.full(S, 0.45)
MEANS[[0, 3]] = 0.3, 0.75
EACH_CHOICE = pytest.mark.parametrize("choice", patterns.CHOICES)

# Of three tasks: (task, strategies of the prompts, rewards of two samples each).
batches = st.lists(
    st.tuples(
        st.integers(0, 2),
        st.lists(
            st.tuples(st.integers(0, S - 1), st.tuples(*[st.floats(-5, 5, width=32)] * 2)),
            min_size=1,
            max_size=10,
        ),
    ).map(lambda batch: (batch[0], *map(np.array, zip(*batch[1], strict=True)))),
    max_size=6,
)


def remembered(history, config):
    state = patterns.empty(3)
    for task, strategy, reward in history:
        state = patterns.record(state, task, strategy, reward.ravel(), config)
    return state


def play(state, task, means, steps, config, seed, prompts=16, samples=8):
    """A bandit with 0-or-1 rewards, in the loop's order: draw strategies, G samples each, record."""
    rng = np.random.default_rng(seed)
    for step in range(steps):
        drawn = patterns.draw(state, task, np.random.default_rng((seed, step)), prompts, config)
        # The policy gets better at everything while it learns, which must not mislead.
        chance = means[np.repeat(drawn, samples)] + 0.2 * step / steps
        reward = (rng.random(chance.size) < chance).astype(np.float32)
        state = patterns.record(state, task, drawn, reward, config)
    return state


@EACH_CHOICE
@pytest.mark.parametrize("seed", range(3))
def test_concentrates_on_the_better_strategy_and_keeps_the_floor(seed, choice):
    config = patterns.Config(choice=choice)
    state = play(patterns.empty(1), 0, MEANS, 25, config, seed)
    p = patterns.probabilities(state, 0, config)
    assert p.argmax() == 3 and p[3] > 0.5
    assert p.min() >= config.floor / S


def test_tasks_without_a_difference_stay_near_uniform():
    config = patterns.Config()
    worst = max(
        patterns.probabilities(play(patterns.empty(1), 0, np.full(S, 0.6), 25, config, seed), 0, config).max()
        for seed in range(10)
    )
    assert worst < 0.5


def test_experience_carries_over_to_unseen_tasks_and_yields_to_their_own():
    config = patterns.Config()
    state = patterns.empty(3)
    for task in range(2):
        state = play(state, task, MEANS, 25, config, task)
    unseen = patterns.probabilities(state, 2, config)
    assert unseen.argmax() == 3 and unseen[3] > 1.5 / S
    state = play(state, 2, np.roll(MEANS, 1), 25, config, 7)
    assert patterns.probabilities(state, 2, config).argmax() == 4
    assert patterns.probabilities(state, 0, config).argmax() == 3


def test_inherit_keeps_the_shared_estimates_alone():
    config = patterns.Config()
    old = play(patterns.empty(2), 1, MEANS, 20, config, 0)
    new = patterns.inherit(old, 4)
    assert new.num_tasks == 4 and new.count.shape == (4, S) and new.count.sum() == 0
    for task in range(4):
        for got, wanted in zip(
            patterns.posterior(new, task, config), patterns.posterior(old, 0, config), strict=True
        ):
            np.testing.assert_array_equal(got, wanted)


def test_experience_in_a_workdir_is_exact_and_an_older_versions_is_refused(tmp_path):
    state = play(patterns.empty(2), 1, MEANS, 5, patterns.Config(), 0)
    place = Workdir(tmp_path)
    assert place.experience() is None
    place.write_experience(state)
    for name in patterns.SHARED:
        restored = getattr(place.experience(), name)
        assert restored.dtype == np.float32
        np.testing.assert_array_equal(restored, getattr(state, name))
    path = tmp_path / "experience.json"
    written = json.loads(path.read_text())
    fewer = written | {"shared_count": written["shared_count"][:-1]}
    older = {name: written[name] for name in ("shared_count", "shared_advantage")}
    for shared, name in ((fewer, "shared_count"), (older, "shared_square")):
        path.write_text(json.dumps(shared))
        with pytest.raises(UserError, match=f"does not hold {name} of {S} strategies"):
            place.experience()


@EACH_CHOICE
@settings(deadline=None, max_examples=25)
@given(history=batches, floor=st.floats(0, 1))
def test_probabilities_are_a_distribution_above_the_floor(choice, history, floor):
    config = patterns.Config(choice=choice, floor=floor)
    state = remembered(history, config)
    for task in range(3):
        p = patterns.probabilities(state, task, config)
        assert abs(p.sum() - 1) < 1e-12
        assert p.min() >= floor / S - 1e-12
    if floor == 1:
        np.testing.assert_allclose(p, 1 / S)


@EACH_CHOICE
@settings(deadline=None, max_examples=25)
@given(history=batches, shift=st.floats(-3, 3, width=32))
def test_shifting_all_rewards_of_a_batch_changes_nothing(choice, history, shift):
    config = patterns.Config(choice=choice)
    plain = remembered(history, config)
    moved = [(task, strategy, reward + shift * i) for i, (task, strategy, reward) in enumerate(history)]
    shifted = remembered(moved, config)
    for task in range(3):
        np.testing.assert_allclose(
            patterns.advantages(plain, task, config), patterns.advantages(shifted, task, config), atol=1e-4
        )
        np.testing.assert_allclose(
            patterns.probabilities(plain, task, config),
            patterns.probabilities(shifted, task, config),
            atol=2e-3,
        )


@EACH_CHOICE
@settings(deadline=None, max_examples=25)
@given(history=batches, order=st.permutations(range(S)))
def test_strategies_have_no_rank_of_their_own(choice, history, order):
    config, order = patterns.Config(choice=choice), np.array(order)
    plain = remembered(history, config)
    renamed = remembered([(task, order[strategy], reward) for task, strategy, reward in history], config)
    for task in range(3):
        np.testing.assert_allclose(
            patterns.probabilities(plain, task, config),
            patterns.probabilities(renamed, task, config)[order],
            atol=1e-5,
        )


def reference(history, task, config):
    """The posterior of a task, spelled out over the whole history in float64."""
    compared = [batch for batch in history if len(set(batch[1])) > 1]
    sums, counts = np.zeros((2, S)), np.zeros((2, S))  # shared, own
    square, freedom = config.noise**2, 1.0
    for age, (of, strategy, reward) in enumerate(reversed(compared)):
        later = sum(1 for batch in compared[len(compared) - age :] if batch[0] == of)
        decays = (config.shared_decay**age, config.task_decay**later if of == task else 0.0)
        means = {s: float(np.mean(reward[strategy == s], dtype=np.float64)) for s in set(strategy.tolist())}
        centre = sum(means.values()) / len(means)
        for s, row in zip(strategy.tolist(), reward.astype(np.float64).tolist(), strict=True):
            for level, decay in enumerate(decays):
                sums[level, s] += decay * sum(value - centre for value in row)
                counts[level, s] += decay * len(row)
            square += decays[0] * len(row) * (sum(row) / len(row) - means[s]) ** 2
        freedom += decays[0] * (len(strategy) - len(means))
    variance, prior = square / freedom, config.prior
    shared_mean, shared_variance = sums[0] / (counts[0] + prior), variance / (counts[0] + prior)
    keep = prior / (counts[1] + prior)
    mean = sums[1] / (counts[1] + prior) + keep * shared_mean
    return mean, np.sqrt(variance / (counts[1] + prior) + keep**2 * shared_variance), variance**0.5


@settings(deadline=None, max_examples=50)
@given(batches, st.floats(0.5, 1), st.floats(0.5, 1), st.floats(0.5, 500))
def test_the_posterior_is_that_of_the_whole_history(history, task_decay, shared_decay, prior):
    config = patterns.Config(task_decay=task_decay, shared_decay=shared_decay, prior=prior)
    state = remembered(history, config)
    for task in range(3):
        for got, wanted in zip(
            patterns.posterior(state, task, config), reference(history, task, config), strict=True
        ):
            np.testing.assert_allclose(got, wanted, rtol=1e-5, atol=1e-5)


def test_the_deviation_is_the_error_that_is_made():
    """On tasks drawn from the prior, the posterior's errors have the deviation that it states."""
    config = patterns.Config(task_decay=1.0, shared_decay=1.0, prior=20.0)
    rng, errors = np.random.default_rng(0), []
    for _ in range(150):
        shared = rng.normal(0, 20**-0.5, S)
        means = shared + rng.normal(0, 20**-0.5, S)
        state, strategy = patterns.empty(2), np.tile(np.arange(S), 3)
        for task, truth in ((0, means), (1, shared + rng.normal(0, 20**-0.5, S))):
            state = patterns.record(state, task, strategy, rng.normal(truth[strategy], 1.0), config)
        belief = patterns.posterior(state, 0, config)
        errors.append((belief.mean - (means - means.mean())) / belief.deviation)
    assert 0.8 < np.std(errors) < 1.1


def test_advantages_by_hand():
    config = patterns.Config(prior=2.0, task_decay=0.5, shared_decay=0.5)
    # Means 0.5 (twice) and 1.5 (once): the centre is 1, whatever the counts are.
    state = patterns.record(patterns.empty(2), 0, [0, 0, 1], [0.25, 0.75, 1.5], config)
    shared = np.zeros(S)
    shared[:2] = -1.0 / 4, 0.5 / 3
    np.testing.assert_allclose(patterns.advantages(state, 1, config), shared, rtol=1e-6)
    own = np.zeros(S)
    own[:2] = (-1 + 2 * shared[0]) / 4, (0.5 + 2 * shared[1]) / 3
    np.testing.assert_allclose(patterns.advantages(state, 0, config), own, rtol=1e-6)
    # Half of it is left after the next batch, of which strategies 2 and 3 make centre 1 too.
    state = patterns.record(state, 0, [2, 3], [0.0, 2.0], config)
    np.testing.assert_allclose(state.task_advantage[0][:4], [-0.5, 0.25, -1, 1], rtol=1e-6)
    np.testing.assert_allclose(state.task_count[0][:4], [1, 0.5, 1, 1], rtol=1e-6)
    assert not state.task_count[0][4:].any()
    np.testing.assert_array_equal(state.task_count[1], 0)


def test_a_batch_of_one_strategy_compares_nothing_but_is_counted():
    config = patterns.Config()
    before = play(patterns.empty(2), 0, MEANS, 3, config, 0)
    state = patterns.record(before, 1, [2, 2], [0.0, 1.0, 1.0, 1.0], config)
    for task in range(2):
        for one, other in zip(
            patterns.posterior(before, task, config), patterns.posterior(state, task, config), strict=True
        ):
            np.testing.assert_array_equal(one, other)
    assert state.count[1, 2] == 4 and state.reward[1, 2] == 3


def test_samples_of_a_prompt_that_are_alike_say_less():
    config = patterns.Config()
    strategy = np.repeat([0, 1], 20)
    of_prompt = np.random.default_rng(0).random(40)
    alike = patterns.record(patterns.empty(1), 0, strategy, np.repeat(of_prompt, 8), config)
    apart = patterns.record(patterns.empty(1), 0, np.repeat(strategy, 8), np.repeat(of_prompt, 8), config)
    one, other = (patterns.posterior(state, 0, config) for state in (alike, apart))
    np.testing.assert_allclose(one.mean, other.mean)
    assert one.noise == pytest.approx(8**0.5 * other.noise, rel=0.05)


def test_summary_agrees_with_numpy():
    config = patterns.Config()
    rng = np.random.default_rng(0)
    strategy, reward = rng.integers(0, 3, 300), rng.random(300)
    strategy[17] = 3
    state = patterns.empty(2)
    for part in range(3):
        rows = slice(100 * part, 100 * part + 100)
        state = patterns.record(state, part % 2, strategy[rows], reward[rows], config)
    summary = patterns.summary(state, 1, config)
    assert tuple(summary) == patterns.STRATEGIES
    for index, name in enumerate(patterns.STRATEGIES[:3]):
        mine = reward[strategy == index]
        assert summary[name]["count"] == mine.size
        assert summary[name]["mean_reward"] == pytest.approx(mine.mean(), rel=1e-5)
        assert summary[name]["standard_error"] == pytest.approx(mine.std(ddof=1) / mine.size**0.5, rel=1e-3)
    assert summary["combine_two"]["mean_reward"] == pytest.approx(reward[17])
    assert summary["combine_two"]["standard_error"] is None
    assert summary["contrast"]["mean_reward"] is None
    assert sum(row["probability"] for row in summary.values()) == pytest.approx(1)
    report = patterns.report(state, config)
    for name in ("count", "mean_reward", "standard_error"):
        assert {k: row[name] for k, row in report["stream"].items()} == {
            k: row[name] for k, row in summary.items()
        }
    # Parts 0 and 2 were of task 0, part 1 of task 1.
    for task, rows in ((0, np.r_[0:100, 200:300]), (1, np.r_[100:200])):
        figures = report["tasks"][task]
        for index, name in enumerate(patterns.STRATEGIES[:3]):
            mine = reward[rows][strategy[rows] == index]
            assert figures[name]["count"] == mine.size
            assert figures[name]["mean_reward"] == pytest.approx(mine.mean(), rel=1e-5)
        chances = {f"pattern/{name}": row["probability"] for name, row in figures.items()}
        assert chances == patterns.metrics(state, task, config)


def test_the_streams_figures_are_those_of_a_task_never_seen():
    config = patterns.Config()
    state = play(patterns.empty(1), 0, MEANS, 10, config, 0)
    report = patterns.report(state, config)
    assert list(report["tasks"]) == [0]
    for name, chance in patterns.metrics(patterns.inherit(state, 1), 0, config).items():
        assert report["stream"][name.removeprefix("pattern/")]["probability"] == pytest.approx(chance)


@EACH_CHOICE
def test_draw_follows_the_probabilities_and_the_generator(choice):
    config = patterns.Config(choice=choice)
    state = play(patterns.empty(1), 0, MEANS, 10, config, 0)
    drawn = patterns.draw(state, 0, np.random.default_rng(1), 20_000, config)
    assert drawn.dtype == np.int32
    np.testing.assert_allclose(
        np.bincount(drawn, minlength=S) / drawn.size, patterns.probabilities(state, 0, config), atol=0.02
    )
    np.testing.assert_array_equal(drawn, patterns.draw(state, 0, np.random.default_rng(1), 20_000, config))


def test_extend_keeps_what_was_learned_and_the_old_state():
    config = patterns.Config()
    state = play(patterns.empty(2), 1, MEANS, 5, config, 0)
    before = jax.tree.map(np.array, state)
    longer = patterns.extend(state, 5)
    assert longer.num_tasks == 5
    np.testing.assert_array_equal(
        patterns.probabilities(longer, 1, config), patterns.probabilities(state, 1, config)
    )
    np.testing.assert_array_equal(
        patterns.probabilities(longer, 4, config), patterns.probabilities(state, 0, config)
    )
    patterns.record(longer, 1, [0, 1], [0.0, 1.0], config)
    jax.tree.map(np.testing.assert_array_equal, state, before)
    with pytest.raises(ValueError):
        patterns.extend(longer, 2)


def test_state_goes_through_a_state_dict_and_through_jax_arrays():
    config = patterns.Config()
    state = play(patterns.empty(2), 0, MEANS, 5, config, 0)
    stored = jax.tree.map(jax.numpy.asarray, serialization.to_state_dict(state))
    restored = serialization.from_state_dict(patterns.empty(2), stored)
    batch = ([0, 1, 1], [0.5, 0.25, 1.0])
    straight = patterns.record(state, 1, *batch, config)
    resumed = patterns.record(restored, 1, *batch, config)
    for one, other in zip(jax.tree.leaves(straight), jax.tree.leaves(resumed), strict=True):
        assert one.dtype == other.dtype == np.float32
        np.testing.assert_array_equal(one, other)


def test_non_finite_rewards_are_refused():
    with pytest.raises(ValueError):
        patterns.record(patterns.empty(1), 0, [0, 1], [0.0, np.nan], patterns.Config())


def test_rewards_that_do_not_go_by_prompt_are_refused():
    with pytest.raises(ValueError):
        patterns.record(patterns.empty(1), 0, [0, 1], [0.0, 1.0, 0.5], patterns.Config())


@pytest.mark.parametrize(
    "changes",
    [
        {"choice": "greedy"},
        {"floor": -0.1},
        {"floor": 1.5},
        {"temperature": 0},
        {"bonus": -1},
        {"noise": 0},
        {"prior": float("nan")},
        {"task_decay": 2},
    ],
)
def test_a_bad_setting_is_named(changes):
    with pytest.raises(UserError, match=f"patterns.{next(iter(changes))}"):
        patterns.Config(**changes)
