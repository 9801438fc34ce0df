"""The parts of a step on the path of a run: secondary parts, student utility, and what strategies earn."""

from __future__ import annotations

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest
import runs

from streamsynth import step
from streamsynth.feedback.utility import utility
from streamsynth.runtime import mesh as mesh_lib
from streamsynth.stream import patterns
from streamsynth.stream.kept import Kept
from streamsynth.tasks.attributes import by_length

ALPHA = 0.5


@pytest.fixture(scope="module")
def third(finished, quick_xla):
    """The fixed parts of a run and its state in its third turn, where the scale of utility is known."""
    setting, state = runs.third_turn(finished)
    known = {name: jnp.float32(0.01) for name in state.spread.mean_square}
    level = {**state.spread.level, "utility": jnp.float32(0)}
    spread = state.spread.replace(mean_square=known, level=level)
    return setting, state.replace(spread=spread, balance=state.balance.replace(alpha=jnp.float32(ALPHA)))


def sampled(setting, state, attributes=(), **weights):
    """A batch with the given weights of secondary parts."""
    config = setting.config.copy_and_resolve_references().unlock()
    config.feedback.secondary = weights
    turn = int(state.turn)
    tasks = list(setting.tasks)
    tasks[turn] = dataclasses.replace(tasks[turn], attributes=attributes)
    setting = dataclasses.replace(setting, config=config.lock(), tasks=tuple(tasks))
    kept = Kept(tasks[turn], 0.8, 4)
    with mesh_lib.use(setting.mesh):
        return setting, step.sampled_batch(setting, state, tasks[turn], kept, "rollout", 99)


@pytest.fixture(scope="module")
def plain(third):
    return sampled(*third)[1]


def test_utility_is_that_of_accepted_samples_and_moves_advantages(third, plain):
    setting, with_utility = sampled(*third, utility=2.0)
    turn = int(third[1].turn)
    scores = plain.scored.scores
    np.testing.assert_array_equal(scores.quality, with_utility.scored.scores.quality)
    accepted = np.asarray(scores.quality) >= setting.config.feedback.accept
    assert 3 < accepted.sum() < len(accepted)
    features, label = setting.examples[turn]
    expected = utility(
        scores.features,
        plain.written.label,
        accepted,
        features,
        label,
        len(setting.tasks[turn].labels),
        setting.student,
    )
    moved = np.asarray(with_utility.assessment.advantage - plain.assessment.advantage)
    # Its level is not known yet, so that this first batch only says what it is.
    np.testing.assert_allclose(moved, 0.0, atol=1e-6)
    level = float(with_utility.assessment.spread.level["utility"])
    assert level == pytest.approx(float(np.mean(expected)), rel=1e-4)
    # From then on: w_u (u - level) / sigma, at the share that diversity leaves.
    state = third[1].replace(
        spread=third[1].spread.replace(level={**third[1].spread.level, "utility": level})
    )
    _, later = sampled(third[0], state, utility=2.0)
    moved = np.asarray(later.assessment.advantage - plain.assessment.advantage)
    by_hand = 2.0 / (1.0 + ALPHA) * (np.asarray(expected) - level) / 0.1
    np.testing.assert_allclose(moved, by_hand, rtol=1e-3, atol=1e-5)
    assert np.abs(moved).max() > 1e-3


def test_adherence_counts_among_accepted_samples_alone(third, plain):
    length = by_length([text for text in plain.written.texts if text.strip()])
    _, found = sampled(*third, attributes=(length,), attribute=1.0)
    part = np.asarray(found.scored.scores.secondary["attribute"])
    accepted = np.asarray(found.scored.scores.quality) >= third[0].config.feedback.accept
    assert (np.isfinite(part) == accepted).all() and set(part[accepted]) == {0.0, 1.0}
    asked = [
        length.values[c].holds(text) for c, text in zip(found.written.cell, found.written.texts, strict=True)
    ]
    np.testing.assert_array_equal(part[accepted], np.array(asked, float)[accepted])
    assert found.weights == {"attribute": 1.0}
    # A task without attributes has none to be paid for.
    assert sampled(*third, attribute=1.0)[1].weights == {}


def test_strategies_are_compared_by_what_their_samples_earned(third, plain):
    setting, state = third
    turn, assessment, scores = int(state.turn), plain.assessment, plain.scored.scores
    quality = np.asarray(scores.quality)
    earned = np.asarray(assessment.earned)
    # Quality at its weight, and novelty at its own in the unit of quality: sigma is 0.1 for both.
    novelty = earned - quality / (1 + ALPHA)
    group = setting.config.rollout.samples
    centred = quality.reshape(-1, group) - quality.reshape(-1, group).mean(1, keepdims=True)
    own = centred.reshape(-1) * group / (group - 1) / (1 + ALPHA)
    np.testing.assert_allclose(np.asarray(assessment.advantage) * 0.1, own + novelty, atol=1e-5)
    after = step._recorded(setting, state.patterns, turn, plain)
    by_hand = patterns.record(state.patterns, turn, plain.written.strategy[::group], earned, setting.patterns)
    np.testing.assert_allclose(after.task_advantage, by_hand.task_advantage)
