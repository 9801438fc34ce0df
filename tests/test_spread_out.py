"""The greedy choice of texts that are spread out, against log-determinants in float64."""

import dataclasses
import itertools

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from streamsynth.dataset.balance import balanced
from streamsynth.dataset.rows import Row
from streamsynth.defaults import default_config
from streamsynth.feedback.diversity import spread_out
from streamsynth.feedback.selection import selection

RIDGE = 0.1


def vectors(rng, count, width):
    rows = rng.normal(size=(count, width))
    return (rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float32)


def volume(rows, width):
    rows = np.asarray(rows, np.float64).reshape(-1, width)
    return np.linalg.slogdet(RIDGE * np.eye(width) + rows.T @ rows)[1]


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 10**6), st.integers(1, 12), st.integers(0, 14), st.integers(0, 5), st.integers(2, 6))
def test_every_choice_is_the_one_that_adds_most(seed, candidates, count, given_rows, width):
    rng = np.random.default_rng(seed)
    rows, there = vectors(rng, candidates, width), vectors(rng, given_rows, width)
    order = spread_out(rows, count, RIDGE, there)
    assert len(order) == len(set(order)) == min(count, candidates)
    for place, chosen in enumerate(order):
        so_far = np.concatenate([there, rows[order[:place]]])
        left = [i for i in range(candidates) if i not in order[:place]]
        worth = {i: volume(np.concatenate([so_far, rows[[i]]]), width) for i in left}
        assert worth[chosen] >= max(worth.values()) - 1e-9


def test_greedy_is_near_the_best_choice_of_all():
    rng = np.random.default_rng(0)
    empty, none = volume([], 4), np.zeros((0, 4), np.float32)
    for _ in range(20):
        rows = vectors(rng, 9, 4)
        best = max(volume(rows[list(some)], 4) for some in itertools.combinations(range(9), 4)) - empty
        found = volume(rows[spread_out(rows, 4, RIDGE, none)], 4) - empty
        assert found >= (1 - 1 / np.e) * best


def test_a_repeated_text_comes_after_everything_new():
    rows = np.eye(4, dtype=np.float32)[[0, 0, 0, 1, 2]]
    order = spread_out(rows, 5, RIDGE, np.eye(4, dtype=np.float32)[[3]])
    assert set(order[:3]) == {0, 3, 4} and set(order[3:]) == {1, 2}
    # What the given vectors say already is new to nobody.
    assert spread_out(rows, 1, RIDGE, rows[:1])[0] == 3


def test_a_data_set_of_the_most_spread_out_rows():
    """Of a label's rows first the best, then what is unlike it, though a near copy of the best is better."""
    texts = {
        "the red fox ran over the hill": 1.0,
        "the red fox ran over the hills": 0.9,
        "a quiet lake lay under snow": 0.6,
        "seven ships sailed at dawn": 0.5,
    }
    rows = [Row((text,), "a", "imitate", 0, 0, (), {"quality": quality}) for text, quality in texts.items()]
    config = default_config()
    config.dataset.select = "best"
    best = balanced(rows, 2, selection(config))
    assert [row.quality for row in best] == [1.0, 0.9]
    config.dataset.select = "spread_out"
    spread = balanced([*rows, dataclasses.replace(rows[2], label="b")], 2, selection(config))
    assert [(row.label, row.quality) for row in spread] == [("a", 1.0), ("b", 0.6)]
    spread = balanced(rows, 3, selection(config))
    assert [row.quality for row in spread] == [1.0, 0.6, 0.5]
    assert balanced(rows, None, selection(config))[3] == rows[1]
