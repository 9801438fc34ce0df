"""A batch is written while the one before is judged: with a lag of one step, whatever takes how long."""

from __future__ import annotations

import dataclasses
import time

import jax
import numpy as np
import pytest
import runs

from streamsynth import assemble, step, turn
from streamsynth.runtime import mesh as mesh_lib
from streamsynth.stream.kept import Kept
from streamsynth.workdir import Workdir


@dataclasses.dataclass
class Steps:
    """The steps by reward of a turn: the states around them, and what each returned."""

    states: list
    figures: list
    rows: list
    events: list


@pytest.fixture(scope="module")
def third(finished, quick_xla):
    return runs.third_turn(finished, rollout__lag="1")


def taken(setting, state, until=runs.STEPS, rows=(), dispatched=step.dispatched, judged=step.judged):
    """The turn from `state` on up to that step by reward; `rows` are those kept before."""
    config, now = setting.config, int(state.turn)
    kept = Kept(setting.tasks[now], config.dataset.near_duplicate, config.rollout.best_kept, rows)
    # The state is given again and again: steps give its parameters away.
    state = state.replace(**{name: assemble.copy(getattr(state, name)) for name in ("params", "opt_state")})
    found = Steps([state], [], [], [])

    def recorded(name, function):
        def call(*arguments):
            found.events.append((name, arguments[-1]))
            return function(*arguments)

        return call

    with pytest.MonkeyPatch.context() as patch, mesh_lib.use(setting.mesh):
        patch.setattr(turn, "dispatched", recorded("dispatch", dispatched))
        patch.setattr(turn, "judged", recorded("judge", judged))
        while int(state.turn_step) <= until:
            state, figures, rows = turn.learn(setting, state, kept)
            pending = jax.tree.map(np.asarray, state.pending)  # copies: the next step gives the state away
            arrays = {name: jax.tree.map(np.asarray, getattr(state, name)) for name in ("params", "tasks")}
            found.states.append(state.replace(pending=pending, **arrays))
            found.figures.append(figures)
            found.rows.append(rows)
    return found


def assert_same(one: Steps, other: Steps):
    assert one.figures == other.figures
    assert [list(map(vars, rows)) for rows in one.rows] == [list(map(vars, rows)) for rows in other.rows]
    jax.tree.map(np.testing.assert_array_equal, one.states[-1], other.states[-1])


@pytest.fixture(scope="module")
def lagged(third):
    return taken(*third)


def test_the_next_batch_is_dispatched_before_one_is_judged(third, lagged):
    first = int(third[1].step)
    expected = [("dispatch", first)]
    for k in range(first, first + runs.STEPS):
        expected += [("dispatch", k + 1), ("judge", k)] if k < first + runs.STEPS - 1 else [("judge", k)]
    assert lagged.events == expected
    assert [state.pending is None for state in lagged.states] == [True, False, False, True]


def test_how_long_anything_takes_changes_nothing(third, lagged):
    """Once each batch is waited for as it is dispatched, and once its judges take their time."""

    def waits(*arguments):
        return jax.block_until_ready(step.dispatched(*arguments))

    def slow(*arguments):
        time.sleep(0.3)
        return step.judged(*arguments)

    assert_same(taken(*third, dispatched=waits), lagged)
    assert_same(taken(*third, judged=slow), lagged)


def test_a_batch_is_what_was_known_when_it_was_dispatched(third, lagged):
    setting, state = third
    version, first = int(state.policy_version), int(state.step)
    assert [int(s.policy_version) for s in lagged.states] == [version + i for i in range(runs.STEPS + 1)]
    # The first two by the policy of the turn's beginning, the third by the one after the first update.
    assert [int(s.pending.version) for s in lagged.states[1:-1]] == [version, version + 1]
    assert {row.step for rows in lagged.rows for row in rows} <= set(range(first, first + runs.STEPS))
    for rows, wrote in zip(lagged.rows, (version, version, version + 1), strict=True):
        assert {row.policy_version for row in rows} <= {wrote}
    buffer = lagged.states[-1].tasks[int(state.turn)].buffer
    stored = np.asarray(buffer.samples.step)[buffer.number >= 0]
    assert set(stored) == {version, version + 1}
    # The samples of the second step are those that the same policy writes for it without a lag.
    kept = Kept(setting.tasks[int(state.turn)], 0.8, setting.config.rollout.best_kept)
    with mesh_lib.use(setting.mesh):
        again = step.dispatched(setting, state, setting.tasks[int(state.turn)], kept, "rollout", first + 1)
    found = lagged.states[1].pending
    jax.tree.map(np.testing.assert_array_equal, again, found)
    assert (again.shown, again.dropped) == (found.shown, found.dropped)


def test_the_importance_weight_is_that_of_one_update(lagged):
    first, *later = lagged.figures
    assert first["ratio/mean"] == pytest.approx(1, abs=1e-4) and first["logprob/gap"] < 1e-4
    assert first["ratio/effective_share"] == pytest.approx(1, abs=1e-5)
    for figures in later:
        assert figures["logprob/gap"] > 1e-3
        assert figures["ratio/mean"] == pytest.approx(1, abs=0.2) and figures["ratio/mean"] != 1
        assert 0.5 < figures["ratio/effective_share"] < 1 - 2e-5


def test_a_pending_batch_is_stored_and_taken_up_again(third, lagged, tmp_path):
    setting, state = third
    half = taken(setting, state, until=1)
    workdir = Workdir(tmp_path / "run")
    workdir.save(half.states[-1], {"tasks": 3})
    restored = workdir.restore(assemble.first_state(setting), setting.mesh)
    waiting, found = half.states[-1].pending, restored.pending
    jax.tree.map(np.testing.assert_array_equal, waiting, found)
    assert (waiting.shown, waiting.dropped) == (found.shown, found.dropped) and any(found.shown)
    with mesh_lib.use(setting.mesh):
        fresh = step.dispatched(
            setting, state, setting.tasks[2], Kept(setting.tasks[2], 0.8, 1), "rollout", 0
        )
    placed, lies = (jax.tree.map(lambda leaf: leaf.sharding, p.rollouts) for p in (fresh, found))
    assert placed == lies  # or the next step would compile everything again
    rest = taken(setting, assemble.on_mesh(setting, restored), rows=half.rows[0])
    both = Steps(half.states + rest.states[1:], half.figures + rest.figures, half.rows + rest.rows, [])
    assert_same(both, lagged)


def test_without_a_lag_nothing_is_pending(finished, third, lagged):
    """And the turn's first step is the same, as it lags behind nothing."""
    setting, state = third
    config = setting.config.copy_and_resolve_references().unlock()
    config.rollout.lag = 0
    plain = dataclasses.replace(setting, config=config.lock())
    found = taken(plain, state)
    first = int(state.step)
    steps = range(first, first + runs.STEPS)
    assert found.events == [(name, k) for k in steps for name in ("dispatch", "judge")]
    assert all(state.pending is None for state in found.states)
    assert list(map(vars, found.rows[0])) == list(map(vars, lagged.rows[0]))
    assert found.figures[1]["reward/quality"] != lagged.figures[1]["reward/quality"]
