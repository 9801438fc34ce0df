"""From scores to advantages with lagged scales, and one step of the learner."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from streamsynth.defaults import optimizer as optimizer_keys
from streamsynth.feedback import diversity
from streamsynth.learner import advantages, balance
from streamsynth.learner.objective import Fresh, ObjectiveConfig, gradients
from streamsynth.learner.optimizer import make_optimizer
from streamsynth.learner.update import FLOORS, PARTS, assess, update
from streamsynth.pytrees import Scores

pytestmark = pytest.mark.usefixtures("quick_xla")

LABELS, D, RIDGE = 2, 3, 0.1


def scores_of(rng, quality):
    features = rng.normal(size=(len(quality), D))
    features /= np.linalg.norm(features, axis=1, keepdims=True)
    quality = np.asarray(quality, np.float32)
    features = features.astype(np.float32)
    return Scores((quality > 0).astype(np.float32), quality, features, {}, np.ones(len(quality), bool))


def unit_rows(rng, count):
    rows = rng.normal(size=(count, D))
    return (rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float32)


def run(scores, label, spread, balanced, archive=None, **changes):
    setting = dict(samples=2, floor=0.0, power=1.0, eta=0.5, alpha_max=4.0)
    setting |= dict(weighted=True, neutral=False, remembered=1.0)
    archive = diversity.empty(LABELS, D, RIDGE) if archive is None else archive
    return assess(archive, scores, np.asarray(label, np.int32), spread, balanced, **(setting | changes))


def credit_by_hand(scores, label, before=0.0):
    """Leave-one-out log-volumes on top of `before`, and their baselines, by determinants in float64."""
    e = np.sqrt(np.asarray(scores.quality, np.float64))[:, None] * np.asarray(scores.features, np.float64)
    start = RIDGE * np.eye(D) + before

    def volume(rows):
        return np.linalg.slogdet(start + e[rows].T @ e[rows])[1] - np.linalg.slogdet(start)[1]

    def credit(i, rows):
        return volume(rows) - volume([j for j in rows if j != i])

    own, base = np.zeros(len(label)), np.zeros(len(label))
    for i, k in enumerate(label):
        rows = [j for j, other in enumerate(label) if other == k]
        rest = [j for j in rows if j != i]
        own[i], base[i] = credit(i, rows), np.mean([credit(j, rest) for j in rest])
    return own, base


LABEL = [0, 0, 1, 1, 0, 0]
FIRST, SECOND = [1.0, 0.5, 0.0, 0.25, 0.75, 0.75], [0.2, 1.0, 0.6, 0.6, 0.0, 0.8]


def test_the_first_batch_is_not_learned_from_and_scales_lag():
    rng = np.random.default_rng(0)
    spread, balanced = advantages.initial_spread(PARTS), balance.initial(0.5, 1.0)
    one, two = scores_of(rng, FIRST), scores_of(rng, SECOND)
    first = run(one, LABEL, spread, balanced)
    assert (first.advantage == 0).all()
    assert first.metrics["advantage/quality"] == first.metrics["advantage/diversity"] == 0

    # Groups of two: a quality less that of its neighbour.
    quality = np.array([0.5, -0.5, -0.25, 0.25, 0.0, 0.0])
    credit, baseline = credit_by_hand(one, LABEL)
    np.testing.assert_allclose(first.credit, credit, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(first.spread.mean_square["quality"], np.mean(quality**2), rtol=1e-5)
    np.testing.assert_allclose(
        first.spread.mean_square["diversity"], np.mean((credit - baseline) ** 2), rtol=1e-3
    )

    second = run(two, LABEL, first.spread, balanced)
    sigma = np.sqrt(np.mean(quality**2)), np.sqrt(np.mean((credit - baseline) ** 2))
    quality = np.array([-0.8, 0.8, 0.0, 0.0, -0.8, 0.8]) / sigma[0]
    credit, baseline = credit_by_hand(two, LABEL)
    novelty = (credit - baseline) / sigma[1]
    np.testing.assert_allclose(second.advantage, (quality + 0.5 * novelty) / 1.5, rtol=1e-3, atol=1e-4)
    # Every part before and after its weight.
    m = second.metrics
    np.testing.assert_allclose(m["advantage/quality"], np.abs(quality).mean(), rtol=1e-4)
    np.testing.assert_allclose(m["advantage/quality_weighted"], np.abs(quality).mean() / 1.5, rtol=1e-4)
    np.testing.assert_allclose(m["advantage/diversity"], np.abs(novelty).mean(), rtol=1e-3)
    np.testing.assert_allclose(m["advantage/diversity_weighted"], np.abs(novelty).mean() / 3, rtol=1e-3)
    np.testing.assert_allclose([m["sigma/quality"], m["sigma/diversity"]], sigma, rtol=1e-3)
    np.testing.assert_allclose(m["diversity/credit"], credit.mean(), rtol=1e-4)
    # The scale moves only now.
    assert second.spread.mean_square["quality"] > first.spread.mean_square["quality"]


def test_rloo_on_numbers_worked_by_hand():
    """Groups of four with known scale 1: r_i minus the mean of the three others (Kool et al. 2019)."""
    quality = [1.0, 0.0, 0.0, 0.0, 0.9, 0.6, 0.3, 0.0]
    expected = [1, -1 / 3, -1 / 3, -1 / 3, 0.6, 0.2, -0.2, -0.6]
    spread = advantages.Spread({name: jnp.float32(1.0) for name in PARTS})
    scores = scores_of(np.random.default_rng(0), quality)
    result = run(scores, [0] * 8, spread, balance.initial(0.0, 0.0), samples=4)
    np.testing.assert_allclose(result.advantage, expected, atol=1e-6)


def test_neutral_diversity_is_what_credit_exceeds_its_rate():
    """Diversity then pays novelty that quality does not explain, and nothing for a gated sample."""
    scores = scores_of(np.random.default_rng(6), SECOND)
    spread = advantages.Spread({name: jnp.float32(1.0) for name in PARTS})
    result = run(scores, LABEL, spread, balance.initial(3.0, 0.0), neutral=True)
    e = diversity.weighted(scores.features, scores.quality)
    _, novelty = diversity.neutral_credit(diversity.empty(LABELS, D, RIDGE), e, np.array(LABEL))
    quality = np.array([-0.8, 0.8, 0.0, 0.0, -0.8, 0.8])
    np.testing.assert_allclose(
        result.advantage, (quality + 3.0 * np.asarray(novelty)) / 4, rtol=1e-4, atol=1e-5
    )
    assert novelty[4] == 0.0


def test_the_archive_counts_as_much_as_the_config_says():
    scores = scores_of(np.random.default_rng(7), SECOND)
    other = diversity.weighted(scores_of(np.random.default_rng(8), FIRST).features, jnp.ones(len(FIRST)))
    kept = diversity.absorb(
        diversity.empty(LABELS, D, RIDGE), other, np.zeros(len(FIRST), int), np.ones(len(FIRST), bool)
    )
    half = kept.replace(matrix=(kept.matrix + diversity.empty(LABELS, D, RIDGE).matrix) / 2)
    spread, balanced = advantages.initial_spread(PARTS), balance.initial(1.0, 1.0)

    def credit(archive, remembered):
        return np.asarray(run(scores, LABEL, spread, balanced, archive, remembered=remembered).credit)

    full, none = credit(kept, 1.0), credit(kept, 0.0)
    np.testing.assert_allclose(none, credit(None, 1.0), rtol=1e-5)
    np.testing.assert_allclose(credit(kept, 0.5), credit(half, 1.0), rtol=1e-5)
    assert (full <= none).all() and (full < none).any()


def test_what_other_tasks_kept_counts_under_every_label():
    """S_k + others * sum over past tasks and their labels of (S - ridge I), in float64."""
    rng = np.random.default_rng(9)
    past, sums = [], np.zeros((D, D))
    for labels in (2, 3):
        rows = diversity.weighted(unit_rows(rng, 8), rng.random(8).astype(np.float32))
        archive = diversity.empty(labels, D, RIDGE)
        past.append(diversity.absorb(archive, rows, np.arange(8) % labels, np.arange(8) != 3))
        sums += np.asarray(rows, np.float64)[np.arange(8) != 3].T @ np.asarray(rows)[np.arange(8) != 3]
    np.testing.assert_allclose(sum(diversity.kept(archive) for archive in past), sums, atol=1e-6)
    scores = scores_of(rng, SECOND)
    spread, balanced = advantages.initial_spread(PARTS), balance.initial(1.0, 1.0)
    result = run(scores, LABEL, spread, balanced, elsewhere=np.float32(0.3 * sums))
    credit, _ = credit_by_hand(scores, LABEL, 0.3 * sums)
    np.testing.assert_allclose(result.credit, credit, rtol=1e-4)
    alone = run(scores, LABEL, spread, balanced)
    paid = scores.quality > 0
    assert (np.asarray(alone.credit)[paid] > np.asarray(result.credit)[paid]).all()


def test_gated_samples_have_no_weight_and_no_credit_and_change_nobodys():
    rng = np.random.default_rng(1)
    scores = scores_of(rng, [0.9, 0.0, 0.4, 0.7, 0.0, 0.5])
    spread, balanced = advantages.initial_spread(PARTS), balance.initial(0.5, 1.0)
    result = run(scores, LABEL, spread, balanced)
    gated = scores.quality == 0
    assert (np.asarray(result.weight)[gated] == 0).all() and (np.asarray(result.credit)[gated] == 0).all()
    other = scores.replace(
        features=np.where(gated[:, None], scores_of(rng, FIRST).features, scores.features).astype(np.float32)
    )
    again = run(other, LABEL, spread, balanced)
    np.testing.assert_allclose(again.credit, result.credit, atol=1e-6)
    np.testing.assert_allclose(
        again.metrics["diversity/statistic"], result.metrics["diversity/statistic"], rtol=1e-5
    )


def test_a_filled_archive_leaves_less_to_earn():
    scores = scores_of(np.random.default_rng(2), SECOND)
    label = np.array(LABEL)
    archive = diversity.empty(LABELS, D, RIDGE)
    e = diversity.weighted(scores.features, scores.quality)
    full = diversity.absorb(archive, e, label, np.ones(6, bool))
    spread, balanced = advantages.initial_spread(PARTS), balance.initial(0.5, 1.0)
    before, after = (run(scores, label, spread, balanced, a) for a in (archive, full))
    positive = scores.quality > 0
    assert (np.asarray(after.credit)[positive] < np.asarray(before.credit)[positive]).all()
    assert after.metrics["diversity/value"] < before.metrics["diversity/value"]


def test_alpha_moves_towards_its_target_and_is_logged_as_it_was_used():
    scores = scores_of(np.random.default_rng(3), SECOND)
    spread = advantages.initial_spread(PARTS)
    found = float(run(scores, LABEL, spread, balance.initial(0.5, 0.0)).metrics["diversity/statistic"])
    for target, expected in ((found + 0.4, 0.7), (found - 0.4, 0.3), (found - 9.0, 0.0), (found + 90.0, 4.0)):
        result = run(scores, LABEL, spread, balance.initial(0.5, target))
        assert float(result.balance.alpha) == pytest.approx(expected, abs=1e-5)
        assert result.metrics["alpha"] == 0.5
        assert float(result.metrics["diversity/target"]) == pytest.approx(target)


def test_the_statistic_counts_all_that_passed_where_it_is_not_weighted():
    scores = scores_of(np.random.default_rng(4), SECOND)
    spread, balanced = advantages.initial_spread(PARTS), balance.initial(0.5, 1.0)
    for weighted, weight in ((True, scores.quality), (False, scores.gate)):
        expected, _ = diversity.statistic(scores.features, weight, np.array(LABEL), LABELS)
        result = run(scores, LABEL, spread, balanced, weighted=weighted)
        np.testing.assert_allclose(result.metrics["diversity/statistic"], expected, rtol=1e-5)


def test_no_part_is_divided_by_less_than_its_floor():
    spread = advantages.Spread({name: jnp.float32(1e-12) for name in PARTS})
    scores = scores_of(np.random.default_rng(5), [0.5, 0.4, 0.5, 0.4, 0.5, 0.5])
    result = run(scores, LABEL, spread, balance.initial(0.0, 0.0))
    np.testing.assert_allclose(result.advantage, np.array([1, -1, 1, -1, 0, 0]) * 0.1 / 0.05, rtol=1e-4)
    for name in ("quality", "diversity"):
        np.testing.assert_allclose(result.metrics[f"sigma/{name}"], FLOORS[name])


# --- The step ---


@pytest.fixture(scope="module")
def batch():
    rng = np.random.default_rng(0)
    tokens, mask = tiny.completions(rng, 4, 3)
    behaviour = np.where(mask, -2.0, 0.0).astype(np.float32)
    advantage = np.array([1.0, -1.0, 0.5, -0.5], np.float32)
    return Fresh(tiny.prompts(rng, 2, 3), tokens, mask, behaviour, behaviour, advantage)


def copied(tree):
    return jax.tree.map(jnp.array, tree)


def test_a_step_is_that_of_the_optimizer_and_one_that_is_not_finite_is_skipped(batch):
    keys = optimizer_keys(name="sgd", b1=0.0, learning_rate=0.1, warmup=0, clip_norm=0.01)
    optimizer = make_optimizer(keys, 10)
    objective = ObjectiveConfig(chunk=8)

    def step(params, opt_state, fresh):
        return update(tiny.MODEL, optimizer, objective, params, {}, opt_state, fresh, None, np.float32(1.0))

    start = copied(tiny.params())
    opt_state = optimizer.init(start)
    for skipped, bad in enumerate((np.nan, np.inf), start=1):
        before = copied(opt_state.inner_state)
        params, opt_state, metrics = step(
            copied(start), opt_state, batch.replace(advantage=np.float32([1, bad, 0, 0]))
        )
        assert metrics["update/skipped"] == skipped
        jax.tree.map(np.testing.assert_array_equal, params, start)
        jax.tree.map(np.testing.assert_array_equal, opt_state.inner_state, before)
    params, opt_state, metrics = step(copied(start), opt_state, batch)
    assert metrics["update/skipped"] == 2

    @tiny.quick_jit
    def expected_gradients(params):
        return gradients(tiny.MODEL, params, {}, batch, None, np.float32(1.0), objective)[0]

    grads = tiny.flat(expected_gradients(start))
    norm = np.linalg.norm(grads)
    assert norm > 0.01
    np.testing.assert_allclose(metrics["gradient/norm"], norm, rtol=1e-4)
    moved = tiny.flat(params) - tiny.flat(start)
    np.testing.assert_allclose(moved, -0.1 * 0.01 * grads / norm, atol=3e-7)
