"""Replay on the path that a run takes: what `turn.learn` does with it, and what it does without."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import runs
import tiny
from runs import TASKS

from streamsynth import assemble, turn
from streamsynth.learner.state import from_tree, new_buffer, to_tree
from streamsynth.runtime import mesh as mesh_lib
from streamsynth.stream import scheduler
from streamsynth.stream.kept import Kept

SIZE = 10  # replayed samples of a step: a quarter of 40


@pytest.fixture(scope="module")
def third(finished, quick_xla):
    return runs.third_turn(finished)


@pytest.fixture(scope="module")
def learned(third):
    """Takes the same step of the third turn with changed keys, from a state with changed tasks."""
    setting, state = third

    def step(state=state, **changes):
        changed = {
            name: dataclasses.replace(getattr(setting, name), **keys) for name, keys in changes.items()
        }
        mine = dataclasses.replace(setting, **changed)
        # The update gives away what it is given.
        given = {name: assemble.copy(getattr(state, name)) for name in ("params", "opt_state")}
        with mesh_lib.use(mine.mesh):
            kept = Kept(mine.tasks[int(state.turn)], 0.8, 4)
            after, figures, _ = turn.learn(mine, state.replace(**given), kept)
        return after, figures

    return step


@pytest.fixture(scope="module")
def on(learned):
    return learned()


@pytest.fixture(scope="module")
def off(learned):
    return learned(scheduler=dict(strategy="current_only"))


def moved(one, other):
    """How far apart two states' parameters are."""
    return np.abs(tiny.flat(one.params) - tiny.flat(other.params)).max()


def with_samples(state, **changes):
    """The state with other values in the samples of both past tasks."""
    tasks = list(state.tasks)
    for j in range(len(TASKS)):
        samples = tasks[j].buffer.samples
        values = {name: jnp.full_like(getattr(samples, name), value) for name, value in changes.items()}
        tasks[j] = tasks[j].replace(buffer=tasks[j].buffer.replace(samples=samples.replace(**values)))
    return state.replace(tasks=tuple(tasks))


def test_the_update_is_another_with_replay_than_without(third, on, off):
    before, (after, figures), (without, bare) = third[1], on, off
    assert not any(name.startswith("replay/") for name in bare)
    # Everything before the update is the same.
    for name in ("reward/quality", "loss/policy", "gradient/fresh", "diversity/statistic"):
        assert figures[name] == bare[name]
    assert moved(without, before) > 1e-5
    assert moved(after, without) > 0.01 * moved(without, before)
    assert figures["gradient/norm"] != bare["gradient/norm"] == bare["gradient/fresh"]


def test_no_share_is_no_replay(learned, off):
    """A program without the replayed part moves the parameters as one whose replayed rows are all empty."""
    without, figures = learned(scheduler=dict(share=0.0))
    assert not any(name.startswith(("replay/", "scheduler/")) for name in figures)
    np.testing.assert_allclose(tiny.flat(without.params), tiny.flat(off[0].params), rtol=1e-4, atol=1e-6)


def test_figures_of_replay(on):
    _, figures = on
    assert figures["replay/samples"] == SIZE
    kept = SIZE - figures["replay/dropped"]
    assert 1 < figures["replay/effective_samples"] <= kept + 1e-4
    assert 0 < figures["replay/gradient_share"] < 1
    assert figures["replay/loss"] != 0 and figures["replay/cloning"] == 0
    assert sum(figures.get(f"scheduler/{name}", 0) for name in TASKS) == SIZE


def test_elites_are_cloned_where_cloning_has_a_weight(third, learned, on):
    state = with_samples(third[1], quality=1.0)
    plain, _ = learned(state)
    cloned, figures = learned(state, objective=dict(cloning_weight=0.5))
    assert figures["replay/cloning"] > 0
    assert moved(cloned, plain) > 1e-5
    # Without an elite among them the weight changes nothing.
    poor = with_samples(third[1], quality=0.5)
    plain, _ = learned(poor)
    cloned, figures = learned(poor, objective=dict(cloning_weight=0.5))
    assert figures["replay/cloning"] == 0
    np.testing.assert_allclose(tiny.flat(cloned.params), tiny.flat(plain.params), rtol=1e-4, atol=1e-6)


def test_bad_samples_that_the_policy_has_left_are_dropped(third, learned, off):
    """As if the policy that wrote them had been certain of them (log mu = 0), and they were worth nothing."""
    state = with_samples(third[1], logprobs=0.0, quality=0.0, weight=0.0)
    after, figures = learned(state)
    assert figures["replay/samples"] == figures["replay/dropped"] == SIZE
    assert figures["replay/effective_samples"] == figures["replay/gradient_share"] == 0
    np.testing.assert_allclose(tiny.flat(after.params), tiny.flat(off[0].params), rtol=1e-4, atol=1e-6)
    # Good ones stay, however far they are.
    _, figures = learned(with_samples(third[1], logprobs=0.0, quality=1.0, weight=0.0))
    assert figures["replay/dropped"] == 0


def test_advantages_know_todays_archive(third, learned):
    """What was kept since the samples were written makes them less of a novelty, and the update another."""
    _, state = third
    state = state.replace(balance=state.balance.replace(alpha=jnp.float32(2.0)))
    on = learned(state)
    tasks = list(state.tasks)
    for j in range(len(TASKS)):
        archive = tasks[j].archive
        tasks[j] = tasks[j].replace(archive=archive.replace(matrix=archive.matrix + 5 * jnp.eye(32)))
    after, figures = learned(state.replace(tasks=tuple(tasks)))
    assert figures["gradient/fresh"] == on[1]["gradient/fresh"]
    assert figures["replay/loss"] != on[1]["replay/loss"]
    assert moved(after, on[0]) > 1e-7


# --- Who is replayed ---


def drawn_from(before, after):
    """The past tasks whose samples were in the batch: their baselines moved."""
    return [float(a.credit) != float(b.credit) for a, b in zip(before.tasks, after.tasks, strict=True)][:2]


@pytest.mark.parametrize("strategy", scheduler.STRATEGIES)
def test_the_strategy_says_which_tasks_are_replayed(third, learned, strategy):
    """The first task was lost, says its probe, and the second has waited longer."""
    _, state = third
    s = state.scheduler
    for value in (0.9, 0.1):
        s = scheduler.record_probe(s, 0, value, step=20)
    s = s.replace(
        best_probe=s.best_probe * [1, 0, 0],
        last_step=np.array([int(state.step) - 2, int(state.step) - 5, -1], np.int32),
        fast=s.slow,
    )
    after, figures = learned(
        state.replace(scheduler=s), scheduler=dict(strategy=strategy, forgetting=1000.0, probe_every=0)
    )
    counts = [int(figures.get(f"scheduler/{name}", 0)) for name in TASKS]
    assert (
        counts
        in {
            "progress": ([SIZE, 0], [SIZE - 1, 1]),
            "uniform": ([SIZE // 2, SIZE // 2],),
            "round_robin": ([0, SIZE],),
            "current_only": ([0, 0],),
        }[strategy]
    )
    assert figures.get("replay/samples", 0) == sum(counts)
    assert drawn_from(state, after) == [count > 0 for count in counts]
    visits = np.asarray(after.scheduler.visits) - state.scheduler.visits
    assert visits.tolist() == [int(count > 0) for count in counts] + [1]


# --- What is remembered ---


def test_every_kind_of_slot_is_filled_by_a_run(third):
    for task in third[1].tasks[:2]:
        buffer = jax.device_get(task.buffer)
        assert (buffer.capacity, buffer.elite, buffer.leverage) == (64, 16, 16)
        reservoir, elite, leverage = np.split(buffer.number, [32, 48])
        assert int(buffer.seen) == 6 * 40
        assert len(set(reservoir)) == 32 and reservoir.max() > 64  # not just the first
        quality = np.split(buffer.samples.quality, [32, 48])
        assert (elite >= 0).all() and len(set(elite)) == 16
        assert (np.diff(quality[1]) <= 0).all() and quality[1].min() >= np.median(quality[0])
        assert quality[1][0] == buffer.samples.quality.max()
        assert len(set(leverage)) == 16 and leverage.min() >= 0
        assert 0 < buffer.samples.counted.sum() <= 64  # some are in the archive


def test_a_run_without_buffers(third, learned, finished):
    setting, state = third
    config = runs.config(finished.cache, replay__capacity="0", replay__share="0")
    assemble.check(config)
    none = new_buffer(config)
    assert none.capacity == 0
    state = state.replace(tasks=tuple(task.replace(buffer=none) for task in state.tasks))
    after, figures = learned(state, scheduler=dict(share=0.0))
    assert int(after.tasks[2].buffer.seen) == 40 and after.tasks[2].buffer.capacity == 0
    assert figures["kept"] == int(after.tasks[2].kept) > 0
    restored = from_tree(state, to_tree(after))
    jax.tree.map(np.testing.assert_array_equal, restored.tasks, after.tasks)
