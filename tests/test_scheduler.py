"""The order of the stream."""

import jax
import numpy as np
import pytest
from flax import serialization
from hypothesis import given, settings
from hypothesis import strategies as st

from streamsynth.errors import UserError
from streamsynth.stream import scheduler

unit = st.floats(0, 1, width=32)
records = st.lists(st.tuples(st.integers(0, 5), st.sampled_from(["quality", "probe"]), unit), max_size=30)


def rng(*seed):
    return np.random.default_rng(seed)


def filled(num_tasks, history, config):
    state = scheduler.empty(num_tasks)
    for task, kind, value in history:
        if kind == "quality":
            state = scheduler.record(state, task % num_tasks, value, config)
        else:
            state = scheduler.record_probe(state, task % num_tasks, value, step=0)
    return state


def mean_counts(state, turn, step, config, draws=4000):
    """Average replayed samples by task over many plans from one state."""
    return np.mean(
        [scheduler.next(state, turn, step, rng(n), config)[0].replay_counts for n in range(draws)], axis=0
    )


@settings(deadline=None, max_examples=200)
@given(
    st.lists(st.floats(1e-6, 1e3), min_size=1, max_size=12),
    st.integers(0, 300),
    st.integers(0, 2**32 - 1),
)
def test_allocate_rounds_exact_shares_up_or_down(weights, total, seed):
    counts = scheduler.allocate(np.array(weights), total, rng(seed))
    share = np.array(weights) / np.sum(weights) * total
    assert counts.dtype == np.int32
    assert counts.sum() == total and counts.min() >= 0
    assert np.all(np.abs(counts - share) < 1 + 1e-9)


def test_allocate_is_unbiased():
    weights = np.array([0.11, 0.5, 0.02, 0.3, 0.07])

    class Fixed:
        def __init__(self, value):
            self.value = value

        def random(self):
            return self.value

    # Its one uniform number, taken over a fine grid, integrates the mean exactly up to 1/grid.
    grid = 10_000
    counts = np.mean([scheduler.allocate(weights, 13, Fixed((i + 0.5) / grid)) for i in range(grid)], axis=0)
    np.testing.assert_allclose(counts, 13 * weights, atol=2 / grid)


@pytest.mark.parametrize("strategy", scheduler.STRATEGIES)
def test_the_share_grows_from_nothing(strategy):
    config = scheduler.Config(strategy=strategy, samples=64, share=0.5, ramp=4)
    state, totals = scheduler.empty(7), []
    for turn in range(7):
        plan, state = scheduler.next(state, turn, turn, rng(turn), config)
        assert plan.fresh_task == turn
        totals.append(int(plan.replay_counts.sum()))
    assert totals == ([0] * 7 if strategy == "current_only" else [0, 8, 16, 24, 32, 32, 32])
    assert config.max_replayed == 32


@settings(deadline=None, max_examples=60)
@given(records, records, st.integers(0, 4), st.sampled_from(sorted(scheduler.STRATEGIES)), st.integers(0, 99))
def test_only_the_past_is_replayed_and_the_future_is_not_looked_at(history, later, turn, strategy, seed):
    config = scheduler.Config(strategy=strategy, samples=40, share=1.0, ramp=1, staleness=5)
    state = filled(turn + 1, history, config)
    alone, alone_after = scheduler.next(state, turn, 3, rng(seed), config)
    longer = scheduler.extend(state, 6)
    for task, _, value in later:
        if task > turn:
            longer = scheduler.record_probe(scheduler.record(longer, task, value, config), task, value, 9)
    plan, after = scheduler.next(longer, turn, 3, rng(seed), config)
    np.testing.assert_array_equal(plan.replay_counts[: turn + 1], alone.replay_counts)
    assert plan.replay_counts[turn:].sum() == 0
    np.testing.assert_array_equal(after.visits[: turn + 1], alone_after.visits)
    assert after.visits[turn + 1 :].sum() == 0


@settings(deadline=None, max_examples=50)
@given(records, st.integers(2, 6), st.integers(0, 99))
def test_no_past_task_waits_longer_than_the_staleness(history, num_tasks, seed):
    config = scheduler.Config(samples=16, share=0.5, ramp=1, staleness=7, floor=1e-3, optimism=0.0)
    state, step = filled(num_tasks, history, config), 0
    for turn in range(num_tasks):
        for _ in range(12):
            plan, state = scheduler.next(state, turn, step, rng(seed, step), config)
            assert plan.replay_counts.sum() == (8 if turn else 0)
            if turn:
                assert np.all(step - state.last_step[: turn + 1] < config.staleness)
            step += 1


def test_the_stalest_come_first_where_not_all_fit():
    config = scheduler.Config(samples=4, share=0.5, ramp=1, staleness=3)
    state = scheduler.empty(5).replace(last_step=np.array([6, 2, 4, 1, 9], np.int32))
    plan, _ = scheduler.next(state, 4, 10, rng(0), config)
    np.testing.assert_array_equal(plan.replay_counts, [0, 1, 0, 1, 0])


def test_weights_by_hand():
    config = scheduler.Config(samples=100, share=1.0, ramp=1, floor=0.1, optimism=0.3, forgetting=2.0)
    state = scheduler.empty(5)
    state = state.replace(visits=np.array([0, 8, 3, 0, 5], np.int32), last_step=np.full(5, 9, np.int32))
    state = scheduler.record(scheduler.record(state, 1, 0.2, config), 1, 0.6, config)  # fast .32, slow .22
    state = scheduler.record_probe(scheduler.record_probe(state, 2, 0.9, 7), 2, 0.5, 8)
    # floor + progress + 2 * forgetting + 0.3 / sqrt(1 + visits)
    weights = np.array([0.1 + 0.3, 0.1 + 0.1 + 0.1, 0.1 + 0.8 + 0.15, 0.1 + 0.3])
    expected = [*(100 * weights / weights.sum()), 0]
    np.testing.assert_allclose(mean_counts(state, 4, 10, config), expected, atol=0.05)


def test_progress_up_and_down_and_forgetting_recovered():
    config = scheduler.Config()
    state = filled(2, [(0, "quality", 0.5)], config)
    assert state.progress[0] == 0
    rising = scheduler.record(state, 0, 0.9, config)
    falling = scheduler.record(state, 0, 0.1, config)
    assert rising.progress[0] > 0 and rising.progress[0] == pytest.approx(falling.progress[0])
    for _ in range(200):
        rising = scheduler.record(rising, 0, 0.9, config)
    assert rising.progress[0] < 1e-4
    lost = filled(2, [(1, "probe", 0.8), (1, "probe", 0.3)], config)
    assert lost.forgetting[1] == pytest.approx(0.5) and lost.forgetting[0] == 0
    assert scheduler.record_probe(lost, 1, 0.9, 4).forgetting[1] == 0


def test_uniform_shares_evenly():
    config = scheduler.Config(strategy="uniform", samples=7, share=1.0, ramp=1)
    state = filled(4, [(1, "probe", 0.9), (1, "probe", 0.0)], config)
    np.testing.assert_allclose(mean_counts(state, 3, 0, config), [7 / 3] * 3 + [0], atol=0.05)


def test_round_robin_takes_turns():
    config = scheduler.Config(strategy="round_robin", samples=4, share=1.0, ramp=1)
    state, chosen = scheduler.empty(4), []
    for step in range(9):
        plan, state = scheduler.next(state, 3, step, rng(step), config)
        assert plan.replay_counts.sum() == 4
        chosen.append(int(np.flatnonzero(plan.replay_counts)[0]))
    assert chosen == [0, 1, 2] * 3


def test_the_plan_follows_from_state_and_generator_alone():
    config = scheduler.Config(samples=33, share=1.0, ramp=1)
    state = filled(4, [(0, "quality", 0.1), (0, "quality", 0.9), (2, "probe", 0.4)], config)
    before = jax.tree.map(np.array, state)
    first, after = scheduler.next(state, 3, 2, rng(5), config)
    again, after_again = scheduler.next(state, 3, 2, rng(5), config)
    np.testing.assert_array_equal(first.replay_counts, again.replay_counts)
    jax.tree.map(np.testing.assert_array_equal, after, after_again)
    jax.tree.map(np.testing.assert_array_equal, state, before)


def test_a_restored_state_goes_on_as_if_nothing_had_happened():
    config = scheduler.Config(samples=16, share=1.0, ramp=1, staleness=4)

    def steps(state, numbers):
        for step in numbers:
            plan, state = scheduler.next(state, 2, step, rng(step), config)
            state = scheduler.record(state, 2, 1 / (1 + step), config)
            state = scheduler.record_probe(state, step % 2, np.cos(step), step)
        return plan, state

    _, middle = steps(scheduler.empty(3), range(10))
    stored = jax.tree.map(jax.numpy.asarray, serialization.to_state_dict(middle))
    restored = serialization.from_state_dict(scheduler.empty(3), stored)
    plan, straight = steps(middle, range(10, 20))
    resumed_plan, resumed = steps(restored, range(10, 20))
    np.testing.assert_array_equal(plan.replay_counts, resumed_plan.replay_counts)
    for one, other in zip(jax.tree.leaves(straight), jax.tree.leaves(resumed), strict=True):
        assert one.dtype == other.dtype
        np.testing.assert_array_equal(one, other)


def test_probes_go_round_and_a_task_is_probed_at_the_end_of_its_turn():
    config = scheduler.Config(probe_every=2)
    state, probed = scheduler.empty(4), []
    for turn in range(4):
        for steps in range(1, 6):
            step = 10 * turn + steps
            for task in scheduler.to_probe(state, turn, steps, steps == 5, config):
                state = scheduler.record_probe(state, task, 0.5, step)
                probed.append((turn, steps, task))
    assert probed == [
        *[(0, 5, 0)],
        *[(1, 2, 0), (1, 4, 0), (1, 5, 1)],
        *[(2, 2, 0), (2, 4, 1), (2, 5, 2)],  # 0 has waited longest, then 1
        *[(3, 2, 0), (3, 4, 1), (3, 5, 3)],
    ]
    assert state.probes.tolist() == [5, 3, 1, 1] and state.probed.tolist() == [32, 34, 25, 35]
    # One that was never probed comes first, and both at once where both are due.
    never = scheduler.empty(3).replace(probed=np.array([5, -1, -1], np.int32))
    assert scheduler.to_probe(never, 2, 4, True, config) == (1, 2)
    assert scheduler.to_probe(never, 2, 4, True, scheduler.Config(probe_every=0)) == ()


def test_misuse_is_refused():
    state, config = scheduler.empty(2), scheduler.Config()
    with pytest.raises(ValueError):
        scheduler.next(state, 2, 0, rng(0), config)
    with pytest.raises(ValueError):
        scheduler.extend(state, 1)
    with pytest.raises(ValueError):
        scheduler.record(state, 0, float("nan"), config)


@pytest.mark.parametrize(
    "changes",
    [
        {"strategy": "random"},
        {"share": -0.5},
        {"samples": 0},
        {"ramp": 0},
        {"floor": 0.0},
        {"staleness": 0},
        {"fast": 0.99},
        {"probe_every": -1},
        {"optimism": float("inf")},
    ],
)
def test_a_bad_setting_is_named(changes):
    with pytest.raises(UserError, match=f"scheduler.{next(iter(changes))}"):
        scheduler.Config(**changes)
