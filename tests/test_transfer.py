"""Transfer figures against numbers worked by hand and a plain loop over the formulas."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as st_numpy

from streamsynth.evaluation import transfer

_NAN = float("nan")
# Three tasks, three turns; the worked example of the figures below.
_SCORES = np.array([
    [0.2, 0.3, 0.4],
    [0.8, 0.5, 0.4],
    [0.9, 0.7, 0.6],
    [0.6, 0.8, 0.9],
])  # fmt: skip


def test_figures_by_hand():
    figures = transfer.summary(_SCORES)
    assert figures["average_performance"] == pytest.approx((0.6 + 0.8 + 0.9) / 3)
    assert figures["forward_transfer"] == pytest.approx(((0.5 - 0.3) + (0.6 - 0.4)) / 2)
    assert figures["backward_transfer"] == pytest.approx(((0.6 - 0.8) + (0.8 - 0.7)) / 2)
    assert figures["forgetting"] == pytest.approx(((0.9 - 0.6) + (0.7 - 0.8)) / 2)
    np.testing.assert_array_equal(transfer.before_own_turn(_SCORES), [0.2, 0.5, 0.6])
    np.testing.assert_array_equal(transfer.after_own_turn(_SCORES), [0.8, 0.7, 0.9])


def test_a_stream_that_is_not_over_counts_learned_tasks_only():
    scores = _SCORES[:3]
    figures = transfer.summary(scores)
    assert figures["average_performance"] == pytest.approx((0.9 + 0.7) / 2)
    assert figures["forward_transfer"] == pytest.approx(0.5 - 0.3)
    assert figures["backward_transfer"] == pytest.approx(0.9 - 0.8)
    assert figures["forgetting"] == pytest.approx(0.8 - 0.9)
    assert math.isnan(transfer.after_own_turn(scores)[2])


@pytest.mark.parametrize("turns", [0, 1])
def test_what_cannot_be_formed_is_nan(turns):
    figures = transfer.summary(_SCORES[: turns + 1])
    assert math.isnan(figures["average_performance"]) == (turns == 0)
    for name in ("forward_transfer", "backward_transfer", "forgetting"):
        assert math.isnan(figures[name]), name


def test_missing_entries_are_left_out_of_means():
    scores = _SCORES.copy()
    scores[3, 0] = _NAN
    scores[1, 1] = _NAN
    figures = transfer.summary(scores)
    assert figures["average_performance"] == pytest.approx((0.8 + 0.9) / 2)
    assert figures["forward_transfer"] == pytest.approx(0.6 - 0.4)
    assert figures["backward_transfer"] == pytest.approx(0.8 - 0.7)
    assert figures["forgetting"] == pytest.approx(0.7 - 0.8)


def test_matrix_from_records():
    records = [
        {"turn": 0, "task": "a", "accuracy": 0.1, "valid": 0.5},
        {"turn": 2, "task": "b", "accuracy": 0.6, "valid": None},
        {"turn": 2, "task": "b", "accuracy": 0.7},
        {"turn": 5, "task": "elsewhere", "accuracy": 1.0},
    ]
    expected = [[0.1, _NAN], [_NAN, _NAN], [_NAN, 0.7]]
    np.testing.assert_array_equal(transfer.matrix(records, ["a", "b"]), expected)
    np.testing.assert_array_equal(transfer.matrix(records[:2], ["a", "b"], "valid")[0], [0.5, _NAN])
    assert transfer.matrix([], ["a", "b"]).shape == (1, 2)


@settings(max_examples=60)
@given(
    scores=st.integers(2, 5).flatmap(
        lambda tasks: st_numpy.arrays(float, (tasks + 1, tasks), elements=st.floats(0, 1, width=32))
    ),
    shift=st.floats(-1, 1),
)
def test_differences_ignore_a_shift_and_forgetting_bounds_backward_transfer(scores, shift):
    figures, shifted = transfer.summary(scores), transfer.summary(scores + shift)
    assert shifted["average_performance"] == pytest.approx(figures["average_performance"] + shift)
    for name in ("forward_transfer", "backward_transfer", "forgetting"):
        assert shifted[name] == pytest.approx(figures[name], abs=1e-9), name
    # A task's best moment is no worse than the end of its own turn.
    assert figures["forgetting"] >= -figures["backward_transfer"] - 1e-12
