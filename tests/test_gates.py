"""Gates: each rejects what it is for, and none looks at the rest of the batch."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from streamsynth.errors import UserError
from streamsynth.feedback import gates
from streamsynth.tasks.task import Example, Task, split_fields

EXAMPLES = ("The soup came with fresh bread.", "thank you")


def make_task(*examples, fields=("text",)):
    rows = tuple(Example(f"train:{i}", split_fields(e, len(fields)), "a") for i, e in enumerate(examples))
    return Task("talk", "Talk.", ("a", "b"), rows, rows, rows, fields)


def check(texts, finished=None, task=None, **changes):
    """The gates on texts that parse where they have the task's fields, as those of our own policies do."""
    task = task or make_task(*EXAMPLES)
    settings_ = {"min_words": 2, "max_words": 8, "seen": lambda text: False}
    finished = [True] * len(texts) if finished is None else finished
    rejections = ["" if split_fields(text, len(task.fields)) else "fields" for text in texts]
    return gates.check(texts, finished, rejections, task=task, **(settings_ | changes))


@pytest.mark.parametrize(
    ("text", "gate"),
    [
        ("the rice came with warm beans", None),
        ("", "parses"),
        ("   ", "parses"),
        ("one <field> two", "parses"),
        ("short", "length"),
        ("one two three four five six seven eight nine", "length"),
        ("the soup  came with FRESH bread", "not_copied"),
        ("well the soup came with fresh bread!", "not_copied"),
        ("thank you", "not_copied"),
        ("thank you for nothing", None),  # a short example may stand inside a text
        ("bathe soup came with fresh bread", None),  # words, not letters
    ],
)
def test_each_gate(text, gate):
    result = check([text])
    assert bool(result.passed[0]) is (gate is None)
    rejected = {name for name, count in result.rejections().items() if count}
    assert rejected == ({gate} if gate else set())


def test_finished_and_seen():
    kept = {"we already have this one"}
    result = check(
        ["we already have this one", "a new one", "cut off in the"],
        [True, True, False],
        seen=kept.__contains__,
    )
    np.testing.assert_array_equal(result.by_name["not_seen"], [False, True, True])
    np.testing.assert_array_equal(result.by_name["finished"], [True, True, False])
    np.testing.assert_array_equal(result.passed, [False, True, False])


def test_pairs_of_texts():
    task = make_task("a man sleeps on grass <field> a man rests", fields=("premise", "hypothesis"))
    texts = [
        "a dog runs <field> an animal moves",
        "a dog runs and an animal moves",
        "a dog runs <field> ",
        "a man sleeps on <field> grass a man rests",  # the border has moved, the words are copied
    ]
    result = check(texts, task=task, max_words=20)
    np.testing.assert_array_equal(result.by_name["parses"], [True, False, False, True])
    np.testing.assert_array_equal(result.by_name["not_copied"], [True, True, True, False])


def test_equal_texts_of_a_batch_do_not_gate_each_other():
    """A gate that looked at the batch would make the diversity credit biased."""
    assert check(["the same text again"] * 4).passed.all()


def test_a_rejection_is_counted_once_and_shares_are_independent():
    result = check(["", "fine by me", "thank you"], [False, True, True])
    assert result.rejections() == {"finished": 1, "parses": 0, "length": 0, "not_copied": 1, "not_seen": 0}
    assert result.shares() == pytest.approx(
        {
            "finished": 2 / 3,
            "parses": 2 / 3,
            "length": 2 / 3,
            "not_copied": 2 / 3,
            "not_seen": 1.0,
            "all": 1 / 3,
        }
    )


@settings(max_examples=50, deadline=None)
@given(st.lists(st.tuples(st.text("ab <field>.", max_size=12), st.booleans()), max_size=10))
def test_rejections_and_passes_add_up(samples):
    texts, finished = [text for text, _ in samples], [ended for _, ended in samples]
    result = check(texts, finished, seen=lambda text: "ab" in text)
    assert sum(result.rejections().values()) + result.passed.sum() == len(samples)
    np.testing.assert_array_equal(
        result.passed,
        [check([text], [ended], seen=lambda text: "ab" in text).passed[0] for text, ended in samples],
    )


def test_impossible_limits():
    with pytest.raises(UserError, match="min_words"):
        check(["a text"], min_words=9, max_words=3)
