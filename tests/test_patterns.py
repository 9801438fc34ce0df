"""The learned distribution over strategies."""

import jax
import numpy as np
import pytest
from flax import serialization
from hypothesis import given, settings
from hypothesis import strategies as st

from streamsynth.errors import UserError
from streamsynth.stream import patterns

S = len(patterns.STRATEGIES)
MEANS = np.array([0.3, 0.5, 0.45, 0.75, 0.4])

batches = st.lists(
    st.tuples(
        st.integers(0, 2),
        st.lists(st.tuples(st.integers(0, S - 1), st.floats(-5, 5, width=32)), min_size=1, max_size=20),
    ),
    max_size=12,
)


def play(state, task, means, steps, config, seed, prompts=16, samples=8):
    """A bandit with 0-or-1 rewards, in the loop's order: draw strategies, G samples each, record."""
    rng = np.random.default_rng(seed)
    for step in range(steps):
        drawn = patterns.draw(state, task, np.random.default_rng((seed, step)), prompts, config)
        strategy = np.repeat(drawn, samples)
        # The policy gets better at everything while it learns, which must not mislead.
        reward = (rng.random(strategy.size) < means[strategy] + 0.2 * step / steps).astype(np.float32)
        state = patterns.record(state, task, strategy, reward, config)
    return state


@pytest.mark.parametrize("seed", range(5))
def test_concentrates_on_the_better_strategy_and_keeps_the_floor(seed):
    config = patterns.Config()
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
    state = play(state, 2, MEANS[::-1], 25, config, 7)
    assert patterns.probabilities(state, 2, config).argmax() == 1
    assert patterns.probabilities(state, 0, config).argmax() == 3


def test_inherit_keeps_the_shared_estimates_alone():
    config = patterns.Config()
    old = play(patterns.empty(2), 1, MEANS, 20, config, 0)
    new = patterns.inherit(old, 4)
    assert new.num_tasks == 4 and new.count.sum() == 0
    for task in range(4):
        np.testing.assert_array_equal(
            patterns.advantages(new, task, config), patterns.advantages(old, 0, config)
        )


@settings(deadline=None, max_examples=100)
@given(batches, st.floats(0, 1))
def test_probabilities_are_a_distribution_above_the_floor(history, floor):
    config = patterns.Config(floor=floor)
    state = patterns.empty(3)
    for task, batch in history:
        state = patterns.record(state, task, *map(np.array, zip(*batch, strict=True)), config)
    for task in range(3):
        p = patterns.probabilities(state, task, config)
        assert abs(p.sum() - 1) < 1e-12
        assert p.min() >= floor / S - 1e-12
    if floor == 1:
        np.testing.assert_allclose(p, 1 / S)


@settings(deadline=None, max_examples=100)
@given(batches, st.floats(-3, 3, width=32))
def test_shifting_all_rewards_of_a_batch_changes_nothing(history, shift):
    config = patterns.Config()
    plain, shifted = patterns.empty(3), patterns.empty(3)
    for index, (task, batch) in enumerate(history):
        strategy, reward = map(np.array, zip(*batch, strict=True))
        plain = patterns.record(plain, task, strategy, reward, config)
        shifted = patterns.record(shifted, task, strategy, reward + shift * index, config)
    for task in range(3):
        np.testing.assert_allclose(
            patterns.advantages(plain, task, config), patterns.advantages(shifted, task, config), atol=1e-4
        )


def test_advantages_by_hand():
    config = patterns.Config(prior=2.0, task_decay=0.5, shared_decay=0.5)
    # Means 0.5 (twice) and 1.5 (once): the centre is 1, whatever the counts are.
    state = patterns.record(patterns.empty(2), 0, [0, 0, 1], [0.25, 0.75, 1.5], config)
    shared = np.array([-1.0 / 4, 0.5 / 3, 0, 0, 0])
    np.testing.assert_allclose(patterns.advantages(state, 1, config), shared, rtol=1e-6)
    own = np.array([(-1 + 2 * shared[0]) / 4, (0.5 + 2 * shared[1]) / 3, 0, 0, 0])
    np.testing.assert_allclose(patterns.advantages(state, 0, config), own, rtol=1e-6)
    # Half of it is left after the next batch, of which strategies 2 and 3 make centre 1 too.
    state = patterns.record(state, 0, [2, 3], [0.0, 2.0], config)
    np.testing.assert_allclose(state.task_advantage[0], [-0.5, 0.25, -1, 1, 0], rtol=1e-6)
    np.testing.assert_allclose(state.task_count[0], [1, 0.5, 1, 1, 0], rtol=1e-6)
    np.testing.assert_array_equal(state.task_count[1], 0)


def test_a_batch_of_one_strategy_compares_nothing_but_is_counted():
    config = patterns.Config()
    state = patterns.record(patterns.empty(1), 0, [2, 2], [0.0, 1.0], config)
    np.testing.assert_array_equal(patterns.advantages(state, 0, config), 0)
    assert state.count[2] == 2


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


def test_draw_follows_the_probabilities_and_the_generator():
    config = patterns.Config()
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


@pytest.mark.parametrize(
    "changes",
    [{"floor": -0.1}, {"floor": 1.5}, {"temperature": 0}, {"prior": float("nan")}, {"task_decay": 2}],
)
def test_a_bad_setting_is_named(changes):
    with pytest.raises(UserError, match=f"patterns.{next(iter(changes))}"):
        patterns.Config(**changes)
