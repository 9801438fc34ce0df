"""How a turn begins: what it measures, what it writes and keeps, and what it is tuned to."""

from __future__ import annotations

import jax
import numpy as np
import pytest
import runs

from streamsynth import assemble, tuning, turn
from streamsynth.feedback import diversity
from streamsynth.policy.store import load_policy
from streamsynth.runtime import mesh as mesh_lib
from streamsynth.stream.kept import Kept


def begin(finished, **overrides):
    """The first step of a run's first turn: the fixed parts, the states around it, and what it returned."""
    config = runs.config(finished.cache, **overrides)
    setting = assemble.assemble(
        config, assemble.load_tasks(config), load_policy(finished.workdir / "policy"), None
    )
    seen = Kept(setting.tasks[0], config.dataset.near_duplicate, config.rollout.best_kept)
    with mesh_lib.use(setting.mesh):
        before = assemble.first_state(setting)
        state, figures, rows = turn.begin_turn(setting, before, seen)
    return setting, state, figures, rows, seen


def distance(one, other):
    return max(float(np.abs(a - b).max()) for a, b in zip(*map(jax.tree.leaves, (one, other)), strict=True))


@pytest.fixture(scope="module")
def begun(finished):
    return begin(finished)


def test_a_turn_begins_by_keeping_what_passes_and_remembering_it(begun):
    setting, state, figures, rows, seen = begun
    task = setting.tasks[0]
    assert len(rows) == figures["kept"] == int(state.tasks[0].kept) > 5
    assert all(row.scores["quality"] >= setting.config.feedback.accept for row in rows)
    assert all(row.label in task.labels and seen.seen(row.text) for row in rows)
    assert len({row.text for row in rows}) == len(rows)
    # The base policy's batch, and two rounds: the second is written by a policy that was tuned once.
    assert {row.policy_version for row in rows} == {0, 2}
    assert int(state.policy_version) == runs.TUNING
    assert (int(state.turn_step), int(state.step)) == (1, 1)
    # The archive holds the kept rows, and the buffer all that was written.
    assert float(state.tasks[0].archive.count.sum()) == len(rows)
    assert int(state.tasks[0].buffer.seen) == 3 * 40
    assert float(state.balance.target) == pytest.approx(figures["diversity/target"], rel=1e-6)
    assert figures["diversity/target"] == pytest.approx(
        figures["diversity/statistic"] + np.log(setting.config.balance.factor)
    )


def test_the_policy_is_tuned_and_then_the_reference_is_taken(begun):
    setting, state, *_ = begun
    assert distance(state.params, setting.policy.variables) > 1e-4
    assert distance(state.params, state.reference) == 0


def test_the_reference_may_be_the_base_policy(finished):
    setting, state, *_ = begin(finished, learner__kl_reference="base")
    assert distance(state.params, setting.policy.variables) > 1e-4
    assert distance(state.reference, setting.policy.variables) == 0


def test_what_is_held_is_the_base_policys_diversity_whatever_it_is_tuned_to(begun, finished):
    _, other, figures, rows, _ = begin(finished, supervised__batches="0", supervised__rows="0")
    assert {row.policy_version for row in rows} == {0}
    assert figures["diversity/target"] == begun[2]["diversity/target"]
    # With the examples alone it is tuned as often, to something else.
    assert int(other.policy_version) == runs.TUNING
    assert distance(other.params, begun[1].params) > 1e-4


def test_without_tuning_the_policy_stays(finished):
    setting, state, _, rows, _ = begin(finished, supervised__steps="0")
    assert rows
    assert distance(state.params, setting.policy.variables) == 0
    assert int(state.policy_version) == 0


def test_a_turn_without_initialization_writes_only_what_measures(finished):
    _, other, figures, rows, _ = begin(finished, phases__initialization="False")
    assert {row.policy_version for row in rows} == {0}
    assert int(other.tasks[0].buffer.seen) == 40
    assert int(other.policy_version) == runs.TUNING  # to the examples alone


def test_a_turn_without_any_phase_writes_and_leaves_the_policy_alone(finished):
    phases = {f"phases__{name}": "False" for name in ("initialization", "tuning", "reward")}
    setting, state, _, rows, seen = begin(finished, **phases)
    assert int(state.policy_version) == 0
    with mesh_lib.use(setting.mesh):
        after, figures, more = turn.learn(setting, state, seen)
    assert more and len(more) == figures["kept"]
    assert distance(after.params, setting.policy.variables) == 0
    assert distance(after.opt_state, state.opt_state) == 0
    assert (int(after.policy_version), int(after.step), int(after.turn_step)) == (0, 2, 2)
    assert int(after.tasks[0].kept) == len(rows) + len(more)
    assert int(after.tasks[0].buffer.seen) == 2 * 40
    assert not any(name.startswith(("gradient/", "loss/")) for name in figures)


def test_tuning_stops_early_and_keeps_what_measured_best(finished, monkeypatch):
    """Losses after 0, 2, 4, 6 and 8 steps; two without a gain end it at 8, and 4 steps stay."""
    losses = iter([3.0, 2.0, 1.0, 1.5, 1.0, 0.0])
    measured = []

    def loss(model, variables, exam, *rest, **more):
        measured.append(jax.tree.map(np.array, variables))
        return next(losses)

    monkeypatch.setattr(tuning, "held_out_nll", loss)
    settings = dict(rounds="1", steps="30", held_out="2", early_stop="2", measure_every="2")
    _, state, figures, *_ = begin(finished, **{f"supervised__{key}": v for key, v in settings.items()})
    assert len(measured) == 5
    assert (figures["supervised/held_out_before"], figures["supervised/held_out"]) == (3.0, 1.0)
    assert int(state.policy_version) == 4
    assert distance(state.params, measured[2]) == 0
    assert min(distance(state.params, measured[i]) for i in (0, 1, 3, 4)) > 0
    # The optimizer stands where it stood then.
    assert {int(leaf) for leaf in jax.tree.leaves(state.opt_state) if leaf.dtype == np.int32} >= {4}


def test_of_the_kept_rows_the_most_spread_out_are_tuned_to(begun):
    setting, _, _, rows, _ = begun
    features = setting.featurize([row.text for row in rows], None, None)
    label = rows[0].label
    own = [row for row in rows if row.label == label]
    most = setting.config.supervised.rows
    chosen = tuning.chosen_rows(setting, 0, rows, [features])
    of_label = [row for row in chosen if row.label == label]
    assert len(of_label) == min(len(own), most)
    assert len(chosen) == sum(
        min(most, n) for n in map([r.label for r in rows].count, setting.tasks[0].labels)
    )
    # The first of them adds most to the examples.
    examples, labels = setting.examples[0]
    given = np.asarray(examples)[labels == setting.tasks[0].labels.index(label)]
    [first] = diversity.spread_out(
        np.asarray(features)[[row.label == label for row in rows]], 1, setting.config.feedback.ridge, given
    )
    assert of_label[0] == own[first]
    assert tuning.chosen_rows(setting, 0, [], []) == []
