"""The parts of a task's data: what holds for any rows."""

import unicodedata

import pytest
from hypothesis import given
from hypothesis import strategies as st

from streamsynth.errors import UserError
from streamsynth.tasks import splits
from streamsynth.tasks.task import Example

TEXTS = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=12).filter(str.strip)
# Few words and signs, so that equal and nearly equal texts are common.
SMALL_TEXTS = st.lists(st.sampled_from(["a", "A", "b", "c.", "d"]), min_size=1, max_size=3).map(" ".join)


@st.composite
def rows(draw, labels="xyz"):
    pairs = draw(st.lists(st.tuples(SMALL_TEXTS, st.sampled_from(labels)), max_size=40))
    return [Example(f"train:{i}", (text,), label) for i, (text, label) in enumerate(pairs)]


def keys(examples):
    return {splits.normalise(example.text) for example in examples}


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("  Isn't it \n GOOD? ", "isn t it good"),
        ("STRASSE", "strasse"),
        ("Straße", "strasse"),
        ("ﬁne", "fine"),
        ("snake_case", "snake case"),
        ("हिन्दी", "हिन्दी"),  # vowel signs are marks, not letters, and make the word
        (" :-)  !", ":-) !"),
    ],
)
def test_normalise(text, expected):
    assert splits.normalise(text) == expected


@given(TEXTS)
def test_normalise_is_idempotent_and_blind_to_unicode_forms(text):
    once = splits.normalise(text)
    assert once
    assert splits.normalise(once) == once
    assert splits.normalise(unicodedata.normalize("NFD", text)) == once


@given(rows(), st.floats(0.05, 0.6))
def test_cut_is_a_partition_without_a_shared_text(examples, share):
    rest, part = splits.cut(examples, share)
    assert sorted(e.id for e in rest + part) == sorted(e.id for e in examples)
    assert not keys(rest) & keys(part)


@given(rows(), st.randoms(use_true_random=False))
def test_cut_does_not_depend_on_the_order(examples, random):
    shuffled = random.sample(examples, len(examples))
    assert {e.id for e in splits.cut(examples, 0.3)[1]} == {e.id for e in splits.cut(shuffled, 0.3)[1]}


def test_cut_takes_the_share_of_every_label():
    examples = [Example(f"train:{i}", (f"text {i}",), "rare" if i < 10 else "common") for i in range(110)]
    _, part = splits.cut(examples, 0.2)
    assert sum(e.label == "rare" for e in part) == 2
    assert sum(e.label == "common" for e in part) == 20


@given(rows(), st.integers(0, 5), st.integers(1, 3))
def test_examples_are_different_unambiguous_texts(examples, seed, k):
    labels_of = {}
    for e in examples:
        labels_of.setdefault(splits.normalise(e.text), set()).add(e.label)
    usable = {label: {t for t, owners in labels_of.items() if owners == {label}} for label in "xyz"}
    if any(len(texts) < k for texts in usable.values()):
        with pytest.raises(UserError, match="examples_per_label"):
            splits.draw_examples("t", examples, "xyz", k, seed)
        return
    drawn = splits.draw_examples("t", examples, "xyz", k, seed)
    assert [e.label for e in drawn] == [label for label in "xyz" for _ in range(k)]
    assert len(keys(drawn)) == 3 * k
    assert all(splits.normalise(e.text) in usable[e.label] for e in drawn)


def test_a_smaller_budget_is_part_of_a_larger_one_and_seeds_differ():
    examples = [Example(f"train:{i}", (f"text {i}",), "xy"[i % 2]) for i in range(200)]
    small = splits.draw_examples("t", examples, "xy", 4, seed=7)
    large = splits.draw_examples("t", examples, "xy", 8, seed=7)
    assert set(small) < set(large)
    assert set(large) != set(splits.draw_examples("t", examples, "xy", 8, seed=8))


@given(rows(), st.integers(0, 40), st.integers(0, 40), st.integers(0, 3))
def test_limit_is_nested_and_keeps_the_order(examples, one, other, seed):
    small, large = (splits.limit(examples, count, seed) for count in sorted((one, other)))
    assert len(small) == min(min(one, other), len(examples))
    assert set(small) <= set(large)
    positions = [examples.index(e) for e in large]
    assert positions == sorted(positions)


def test_limit_keeps_the_shares_of_the_labels_and_what_must_stay():
    examples = [Example(f"train:{i}", (f"text {i}",), "rare" if i < 25 else "common") for i in range(100)]
    limited = splits.limit(examples, 40, seed=0)
    assert sum(e.label == "rare" for e in limited) == 10
    assert set(examples[90:]) <= set(splits.limit(examples, 40, seed=0, always=examples[90:]))


def test_commonest_labels_keep_their_order():
    examples = [Example(str(i), (str(i),), label) for i, label in enumerate("aabbbcd")]
    assert splits.commonest_labels("t", examples, ["d", "c", "b", "a"], 3) == ["d", "b", "a"]
    with pytest.raises(UserError, match="commonest=5"):
        splits.commonest_labels("t", examples, ["d", "c", "b", "a"], 5)


@pytest.mark.parametrize("name", ["a/b", "..", ".hidden", "-x", "", "two words"])
def test_a_name_that_cannot_be_a_folder_is_refused(name):
    with pytest.raises(UserError, match="name=NAME"):
        splits.check_name(name, "the spec")
