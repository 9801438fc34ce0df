"""Probes on the path that a run takes: what they measure, what they cost, and what they leave alone."""

from __future__ import annotations

import jax
import numpy as np
import pytest
import runs
from runs import TASKS

from streamsynth.learner.collect import write
from streamsynth.policy.rollout import rollout
from streamsynth.probe import probe
from streamsynth.runtime import mesh as mesh_lib
from streamsynth.stream import scheduler

BATCH = 40


@pytest.fixture(scope="module")
def third(finished, quick_xla):
    """Two steps by reward into the third turn: a probe of a past task is due, and no turn is over."""
    setting, state = runs.third_turn(finished)
    return setting, state.replace(turn_step=np.int32(3))


def probed(setting, state):
    with mesh_lib.use(setting.mesh):
        return probe(setting, state)


@pytest.fixture
def texts(monkeypatch):
    """The texts of each probe, in the order in which they were written."""
    found: list[tuple[str, ...]] = []

    def recording(*arguments, **keywords):
        written = write(*arguments, **keywords)
        found.append(tuple(written.texts))
        return written

    monkeypatch.setattr("streamsynth.probe.write", recording)
    return found


def test_a_probe_is_recorded_and_counts_in_the_budget_and_leaves_the_rest_alone(third, texts):
    setting, state = third
    before = jax.device_get(state)
    # The first task was probed in the second turn; the second, at its end, has waited less.
    assert before.scheduler.probed.tolist() == sorted(before.scheduler.probed[:2]) + [-1]
    after, figures = probed(setting, state)
    [(name, value)] = figures.items()
    assert name == f"probe/{TASKS[0]}" and 0 < value < 1
    s = after.scheduler
    assert (s.probes - before.scheduler.probes).tolist() == [1, 0, 0]
    assert s.probed[0] == int(state.step) - 1 and s.last_probe[0] == np.float32(value)
    assert s.best_probe[0] == max(before.scheduler.best_probe[0], np.float32(value))
    assert int(after.samples) == int(before.samples) + BATCH
    rest = jax.device_get(after.replace(scheduler=state.scheduler, samples=state.samples))
    jax.tree.map(np.testing.assert_array_equal, rest, before)
    # Nothing but state and config says what it finds, and the next one asks the other task anew.
    assert probed(setting, state)[1] == figures
    later = after.replace(step=np.int32(state.step + 2), turn_step=np.int32(5 - 2))
    assert set(probed(setting, later)[1]) == {f"probe/{TASKS[1]}"}
    again = state.replace(step=np.int32(state.step + 2))
    assert set(probed(setting, again)[1]) == {name}
    first, repeated, _, other = texts
    assert first == repeated != other


def test_only_every_so_many_steps_and_at_the_end_of_a_turn(third):
    setting, state = third
    for steps, asked in ((1, []), (2, [0]), (3, [2])):
        _, figures = probed(setting, state.replace(turn_step=np.int32(steps + 1)))
        assert list(figures) == [f"probe/{setting.tasks[j].name}" for j in asked]


def test_a_probe_runs_the_program_of_a_step(third):
    setting, state = third
    probed(setting, state)
    before = rollout._cache_size()
    probed(setting, state.replace(scheduler=state.scheduler.replace(probed=np.array([9, 1, -1]))))
    assert rollout._cache_size() == before


def test_what_is_lost_is_seen_and_brings_the_task_back(third):
    """A policy that forgot how to write: the probe falls, and replay turns to the task it asked for."""
    setting, state = third
    kept, _ = probed(setting, state)
    rng = np.random.default_rng(0)
    noise = jax.tree.map(lambda leaf: np.float32(0.5 * rng.normal(size=leaf.shape)), state.params)
    due = kept.scheduler.replace(probed=np.array([0, 1, -1], np.int32))
    lost, figures = probed(setting, kept.replace(params=noise, scheduler=due))
    [value] = figures.values()
    forgotten = lost.scheduler.forgetting
    assert value < 0.5 * kept.scheduler.last_probe[0]
    np.testing.assert_allclose(forgotten[0], kept.scheduler.best_probe[0] - value, rtol=1e-5)

    def share(s):
        """Of the first task in the replayed samples, over many plans."""
        config = setting.scheduler
        plans = (
            scheduler.next(s, 2, int(state.step), np.random.default_rng(n), config)[0] for n in range(300)
        )
        return np.mean([plan.replay_counts[0] / plan.replay_counts.sum() for plan in plans])

    assert share(lost.scheduler) > share(kept.scheduler) + 0.1
