"""What is kept of a task: near-duplicates, the best of each cell, and prompts that show them."""

from __future__ import annotations

import dataclasses

import numpy as np
import tiny
from hypothesis import given, settings
from hypothesis import strategies as st

from streamsynth.dataset.rows import Row
from streamsynth.stream.kept import Kept
from streamsynth.stream.markers import MarkerFormat
from streamsynth.stream.patterns import STRATEGIES
from streamsynth.stream.prompts import render
from streamsynth.tasks.attributes import by_length

FORM = MarkerFormat(tiny.tokenizer(), 240, 24)
TASK = tiny.world_task()


def row(number: int, label: str, quality: float, credit: float, **attributes: str) -> Row:
    scores = {"quality": quality, "diversity": credit}
    return Row((f"text number {number}",), label, "imitate", 0, 0, (), scores, attributes)


rows = st.lists(
    st.builds(
        row,
        st.integers(0, 999),
        st.sampled_from(TASK.labels),
        st.sampled_from([0.5, 0.75, 1.0]),
        st.sampled_from([0.0, 0.5, 2.0]),
    ),
    max_size=30,
)


@settings(max_examples=50)
@given(rows, st.integers(1, 5))
def test_the_best_are_those_of_a_sort_by_hand_however_they_came(found, best):
    kept = Kept(TASK, 0.8, best)
    for one in found:
        kept.remember(one)
    again = Kept(TASK, 0.8, best, found)
    for k, label in enumerate(TASK.labels):
        own = [(i, one) for i, one in enumerate(found) if one.label == label]
        own.sort(key=lambda pair: (-pair[1].quality, -pair[1].scores["diversity"], pair[0]))
        expected = [(f"{TASK.name}/kept/{i}", one.text) for i, one in own[:best]]
        assert [(e.id, e.text) for e in kept.best(k, 0)] == expected
        assert kept.best(k, 0) == again.best(k, 0)
    assert kept.counts() == {
        label: min(best, sum(one.label == label for one in found)) for label in TASK.labels
    }


def test_cells_are_kept_apart():
    task = dataclasses.replace(TASK, attributes=(by_length([e.text for e in TASK.examples]),))
    kept = Kept(task, 0.8, 4)
    kept.remember(row(1, task.labels[0], 1.0, 0.0, length="long"))
    kept.remember(row(2, task.labels[0], 1.0, 0.0, length="short"))
    assert [e.text for e in kept.best(0, 0)] == ["text number 2"]
    assert [e.text for e in kept.best(0, 1)] == ["text number 1"]
    assert kept.best(1, 0) == ()


def test_near_duplicates_are_seen():
    kept = Kept(TASK, 0.8, 4, [row(1, TASK.labels[0], 1.0, 0.0)])
    assert kept.seen("text number 1") and not kept.seen("another one of them")
    kept.add("another one of them")
    assert kept.seen("another one of them")


def test_the_strategy_of_the_best_shows_them_and_examples_where_they_are_few():
    """Label 0 has eight kept texts, label 1 two: six and two are shown, and four examples beside the two."""
    kept = Kept(TASK, 0.8, 8)
    for number in range(8):
        kept.remember(row(number, TASK.labels[0], 1.0, 0.0))
    for number in range(2):
        kept.remember(row(100 + number, TASK.labels[1], 1.0, 0.0))
    label = np.array([0, 1, 0])
    strategy = np.array([STRATEGIES.index(name) for name in ("imitate_best", "imitate_best", "imitate")])
    shown = render(FORM, TASK, label, strategy, np.random.default_rng(0), best=kept.best).shown
    of_kept = [sum("/kept/" in one for one in ids) for ids in shown]
    assert of_kept == [6, 2, 0] and [len(ids) for ids in shown] == [6, 6, 6]
    assert len(set(shown[0])) == 6
    other = render(FORM, TASK, label, strategy, np.random.default_rng(1), best=kept.best).shown
    assert set(other[0]) != set(shown[0])
