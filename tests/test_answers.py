"""Answers in words: any text is a sample or has a named fault."""

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from streamsynth.stream.answers import REJECTIONS, field_names, parse, values, write
from streamsynth.tasks.task import FIELD_SEPARATOR, join_fields, split_fields

ONE, TWO = ("Text",), ("Premise", "Hypothesis")
NAMES = st.sampled_from([ONE, TWO, ("Sentence 1", "Sentence 2"), ("a.b", "a")])
# What answers are made of, in any order.
PARTS = st.lists(
    st.one_of(
        st.sampled_from(["Premise:", "Hypothesis:", "Text:", " ", "\n", FIELD_SEPARATOR, "\x00", "\ufffd"]),
        st.text(max_size=8),
    ),
    max_size=8,
).map("".join)
WORD = st.text(st.characters(exclude_categories=["Z", "C"]), min_size=1, max_size=8).filter(
    lambda word: (
        not word.endswith(":") and "\ufffd" not in word and FIELD_SEPARATOR not in word and ":" not in word
    )
)
CLEAN = st.lists(WORD, min_size=1, max_size=5).map(" ".join)


@settings(max_examples=400)
@given(names=NAMES, text=PARTS)
@example(TWO, "a\nHypothesis: b")
@example(ONE, "\ud800")
def test_any_text_gives_fields_or_a_named_rejection(names, text):
    answer = parse(names, text)
    if answer.rejection:
        assert answer.rejection in REJECTIONS and answer.text == text
    else:
        fields = split_fields(answer.text, len(names))
        assert fields is not None and all(" ".join(field.split()) == field for field in fields)
        # What was read can be written, and is then read as the same.
        assert parse(names, write(names, answer.text, "\n").removeprefix(f"{names[0]}:")) == answer


@settings(max_examples=200)
@given(fields=st.tuples(CLEAN, CLEAN), separator=st.sampled_from([" ", "\n"]), count=st.integers(1, 2))
def test_what_is_written_is_read(fields, separator, count):
    names, fields = (ONE, TWO)[count - 1], fields[:count]
    written = write(names, join_fields(fields), separator)
    assert written.startswith(f"{names[0]}: ") and written.count("\n") == (count - 1) * (separator == "\n")
    answer = parse(names, written.removeprefix(f"{names[0]}:"))
    assert (answer.rejection, answer.text) == ("", join_fields(fields))


@pytest.mark.parametrize(
    ("names", "text", "rejection"),
    [
        (ONE, "", "empty"),
        (ONE, " \n\t", "empty"),
        (ONE, "a\x07", "unreadable"),
        (ONE, "caf\ufffd", "unreadable"),
        (ONE, f"a {FIELD_SEPARATOR} b", "field_separator"),
        (ONE, " Text: a", "repeated_field"),
        (ONE, "one. Text: two.", "repeated_field"),
        (ONE, "one\nText: two", "repeated_field"),
        (ONE, "one\n\nI hope that this helps!", "several_lines"),
        (TWO, "a", "missing_field"),
        (TWO, "a\nhypothesis: b", "missing_field"),
        (TWO, "a\nHypothesis: b\nHypothesis: c", "repeated_field"),
        (TWO, "a\nHypothesis: b\nPremise: c\nHypothesis: d", "repeated_field"),
        (TWO, "a\nHypothesis:", "empty_field"),
        (TWO, " \nHypothesis: b", "empty_field"),
        (TWO, "a\nb\nHypothesis: c", "several_lines"),
        (("X", "Y", "Z"), "a Z: b Y: c", "wrong_order"),
    ],
)
def test_faults_have_names(names, text, rejection):
    answer = parse(names, text)
    assert (answer.text, answer.rejection) == (text, rejection)


@pytest.mark.parametrize(
    ("names", "text", "fields"),
    [
        (ONE, " my  card\t\n", ("my card",)),
        (ONE, "Texts: Context: sub-Text:ure", ("Texts: Context: sub-Text:ure",)),
        (TWO, " a \n\n  Hypothesis:b\n", ("a", "b")),
        (TWO, "so: it is Hypothesis: b: c", ("so: it is", "b: c")),
    ],
)
def test_blanks_do_not_count(names, text, fields):
    answer = parse(names, text)
    assert answer.rejection == "" and split_fields(answer.text, len(names)) == fields


def test_names_of_fields_and_values():
    assert field_names(("text", "sentence_1", "URL")) == ("Text", "Sentence 1", "URL")
    assert values(f" a\n b {FIELD_SEPARATOR}c") == ("a b", "c")
    # As many as there are names for: examples of a task always have theirs.
    assert write(ONE, join_fields(("a", "b")), "\n") == "Text: a"
