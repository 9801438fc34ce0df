"""Kept rows: their file form, near-duplicates, balance, and the exported data set."""

import dataclasses
import json
import math
import random
from collections import Counter

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from streamsynth.dataset import export, formats, near_duplicates
from streamsynth.dataset import rows as rows_lib
from streamsynth.dataset.balance import balanced
from streamsynth.dataset.near_duplicates import NearDuplicates
from streamsynth.dataset.rows import Row
from streamsynth.errors import UserError
from streamsynth.tasks import sources
from streamsynth.tasks.task import Example, Task

TEXTS = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=12).filter(str.strip)
NUMBERS = st.floats(allow_nan=False, allow_infinity=False)
ROWS = st.builds(
    Row,
    fields=st.tuples(TEXTS) | st.tuples(TEXTS, TEXTS),
    label=st.sampled_from(["bad", "good", "new"]),
    pattern=st.sampled_from(["label_only", "imitate"]),
    step=st.integers(0, 10**6),
    policy_version=st.integers(0, 10**6),
    examples=st.lists(TEXTS, max_size=3).map(tuple),
    scores=st.dictionaries(st.sampled_from(["quality", "fluency"]), NUMBERS),
)


def row(text="a text", label="bad", quality=0.5, **changes):
    values = {"pattern": "imitate", "step": 3, "policy_version": 2, "examples": ("train:7",)}
    return Row(fields=(text,), label=label, scores={"quality": quality}, **(values | changes))


def task(labels=("bad", "good"), test=(), fields=("text",)):
    examples = tuple(Example(f"train:{i}", ("x",) * len(fields), label) for i, label in enumerate(labels))
    return Task(
        name="reviews",
        description="Short reviews.",
        labels=labels,
        examples=examples,
        train=examples,
        test=tuple(Example(f"test:{i}", (text,), labels[0]) for i, text in enumerate(test)),
        fields=fields,
    )


# Rows


@given(st.lists(ROWS, max_size=5))
def test_rows_survive_their_file(tmp_path_factory, rows):
    path = tmp_path_factory.mktemp("rows") / "rows.jsonl"
    rows_lib.write_rows(path, rows)
    assert rows_lib.read_rows(path) == rows


def test_numbers_of_numpy_become_plain():
    record = row(quality=np.float32(0.25), step=np.int32(4), policy_version=np.int64(5)).to_json()
    assert json.loads(json.dumps(record)) == record
    assert Row.from_json(record) == row(quality=0.25, step=4, policy_version=5)


def test_a_score_that_is_no_number_is_not_written(tmp_path):
    with pytest.raises(ValueError, match="JSON compliant"):
        rows_lib.write_rows(tmp_path / "rows.jsonl", [row(quality=math.nan)])
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("line", ["{", "[]", "3", '{"label": "good"}'])
def test_a_line_that_is_no_row_is_named(tmp_path, line):
    path = tmp_path / "rows.jsonl"
    rows_lib.write_rows(path, [row()])
    path.write_text(path.read_text() + line + "\n")
    with pytest.raises(UserError, match=r"rows\.jsonl, line 2, is no row"):
        rows_lib.read_rows(path)
    with pytest.raises(UserError, match="cannot read"):
        rows_lib.read_rows(tmp_path / "none.jsonl")


# Near-duplicates


def test_jaccard_by_hand():
    # ^a ab bc c$ against ^a ab bd d$: 2 of 6.
    left, right = near_duplicates.bigrams("A b, c"), near_duplicates.bigrams("a b d")
    assert near_duplicates.jaccard(left, right) == pytest.approx(2 / 6)


@pytest.mark.parametrize(("count", "is_near"), [(16, False), (17, True)])
def test_one_exchanged_word_is_near_from_17_words_on(count, is_near):
    words = [f"w{i}" for i in range(count)]
    index = NearDuplicates(0.8, [" ".join(words)])
    assert index.seen(" ".join([*words[:5], "other", *words[6:]])) is is_near


@pytest.mark.parametrize(("count", "is_near"), [(11, False), (12, True)])
def test_one_more_word_is_near_from_12_words_on(count, is_near):
    words = [f"w{i}" for i in range(count)]
    index = NearDuplicates(0.8, [" ".join(words)])
    assert index.seen(" ".join([*words[:5], "more", *words[5:]])) is is_near


@given(
    st.lists(st.lists(st.sampled_from("abcd"), max_size=9).map(" ".join), max_size=25),
    st.sampled_from([0.1, 0.3, 0.5, 0.6, 2 / 3, 0.8, 1.0]),
)
def test_the_index_agrees_with_comparing_all_pairs(texts, threshold):
    index = NearDuplicates(threshold)
    for i, text in enumerate(texts):
        own = near_duplicates.bigrams(text)
        near = any(near_duplicates.jaccard(own, near_duplicates.bigrams(t)) >= threshold for t in texts[:i])
        assert index.seen(text) is near
        index.add(text)
    assert len(index) == len(texts)


def test_long_texts_agree_with_comparing_all_pairs():
    rng = random.Random(0)
    words = [f"w{i}" for i in range(60)]
    originals = [[rng.choice(words) for _ in range(rng.randint(20, 60))] for _ in range(40)]
    index = NearDuplicates(0.8, [" ".join(words) for words in originals])
    known = [near_duplicates.bigrams(" ".join(words)) for words in originals]
    answers = []
    for words_of in originals:
        changed = list(words_of)
        for _ in range(rng.randint(0, 5)):
            changed[rng.randrange(len(changed))] = rng.choice(words)
        own = near_duplicates.bigrams(" ".join(changed))
        answers.append(index.seen(" ".join(changed)))
        assert answers[-1] is any(near_duplicates.jaccard(own, other) >= 0.8 for other in known)
    assert 5 < sum(answers) < 40  # both answers occur


@pytest.mark.parametrize("threshold", [0, -1, 1.5, math.nan])
def test_a_threshold_out_of_range_is_refused(threshold):
    with pytest.raises(UserError, match="threshold"):
        NearDuplicates(threshold)


# Balance


@given(st.lists(ROWS, max_size=30), st.none() | st.integers(0, 5))
def test_balanced_takes_as_many_of_each_label_and_the_best(rows, per_label):
    chosen = balanced(rows, per_label)
    scarcest = min(Counter(r.label for r in rows).values(), default=0)
    expected = scarcest if per_label is None else min(scarcest, per_label)
    labels = {r.label for r in rows}
    assert Counter(r.label for r in chosen) == Counter(dict.fromkeys(labels, expected)) + Counter()
    for label in labels:
        qualities = sorted((r.quality for r in rows if r.label == label), reverse=True)
        assert [r.quality for r in chosen if r.label == label] == qualities[:expected]
    for start in range(0, len(chosen), max(len(labels), 1)):
        assert {r.label for r in chosen[start : start + len(labels)]} == labels


def test_equal_qualities_keep_their_order():
    rows = [row(f"text {i}", "bad") for i in range(3)]
    assert balanced(rows, 2) == rows[:2]


# Export


def export_rows():
    different = ["one two three", "four five six", "seven eight nine", "ten eleven twelve"]
    good = [row(text, "good", quality=0.1 * i) for i, text in enumerate(different)]
    bad = [row(f"bad {text}", "bad", quality=0.9) for text in different[:2]]
    copies = [row("One, two three!", "good", quality=0.95), row("Known test text.", "bad")]
    return good + bad + copies


def test_select_counts_what_it_drops():
    chosen, summary = export.select(task(test=["known TEST text"]), export_rows())
    assert summary == {
        "kept": 8,
        "test_overlap": 1,
        "near_duplicates": 1,
        "unbalanced": 2,
        "rows": 4,
        "per_label": {"bad": 2, "good": 2},
        "missing_labels": [],
        "threshold": 0.8,
        "chosen_by": "quality",
        "mean_quality": pytest.approx((0.9 + 0.9 + 0.95 + 0.3) / 4),
    }
    # The better one of two near-duplicates stays.
    assert [r.text for r in chosen if r.label == "good"] == ["One, two three!", "ten eleven twelve"]


@given(st.lists(ROWS.filter(lambda r: len(r.fields) == 1), max_size=15))
def test_an_export_has_no_near_duplicates_and_no_test_text(rows):
    test = [r.text for r in rows[::4]]
    chosen, summary = export.select(task(labels=("bad", "good", "new"), test=test), rows, threshold=0.6)
    again, _ = export.select(task(labels=("bad", "good", "new"), test=test), chosen, threshold=0.6)
    assert again == chosen
    dropped = summary["test_overlap"] + summary["near_duplicates"] + summary["unbalanced"]
    assert dropped + summary["rows"] == summary["kept"] == len(rows)
    assert not {r.text for r in chosen} & set(test)


def test_an_exported_folder_is_a_source(tmp_path):
    rows = [row(f"text {i} of many", ("bad", "good")[i % 2], quality=i / 100) for i in range(60)]
    summary = export.export(task(), rows, tmp_path / "reviews", per_label=25, config_summary={"seed": 0})
    lines = [json.loads(line) for line in (tmp_path / "reviews" / "train.jsonl").read_text().splitlines()]
    assert len(lines) == summary["rows"] == 50
    assert list(lines[0]) == ["text", "label", "pattern", "step", "policy_version", "examples", "scores"]
    assert lines[0]["scores"] == {"quality": 0.58}
    loaded = sources.load(f"files:{tmp_path / 'reviews'}", examples_per_label=4, seed=0)
    assert (loaded.name, loaded.description, loaded.labels) == ("reviews", "Short reviews.", ("bad", "good"))
    written = {(line["text"], line["label"]) for line in lines}
    assert {(e.text, e.label) for e in loaded.train + loaded.test} < written


def test_pairs_are_written_by_field(tmp_path):
    pair = dataclasses.replace(row(), fields=("it rains", "it is wet"))
    formats.write_dataset(tmp_path, [pair], task(fields=("premise", "hypothesis")))
    line = json.loads((tmp_path / "train.jsonl").read_text())
    assert (line["premise"], line["hypothesis"], line["label"]) == ("it rains", "it is wet", "bad")
    assert "text" not in line


def test_the_card_tells_counts_provenance_and_scores(tmp_path):
    export.export(
        task(test=["known TEST text"]),
        export_rows(),
        tmp_path,
        config_summary={"policy | kind": "small", "steps": 20, "mesh": {"data": -1}},
    )
    card = (tmp_path / "README.md").read_text()
    for expected in (
        "# reviews: synthetic training data",
        "| bad | 2 |",
        "dropped 1 whose text is also in the real test set",
        "dropped 1 near-duplicates",
        "| policy \\| kind | small |",
        '| mesh | {"data": -1} |',
        "| patterns | imitate 4 |",
        "| quality | 4 | 0.300 | 0.900 | 0.762 | 0.950 |",
        "## Terms",
    ):
        assert expected in card
    assert "No row was kept" not in card


def test_an_export_without_rows_says_so(tmp_path):
    summary = export.export(task(), [], tmp_path, config_summary={})
    assert summary["rows"] == 0
    assert summary["mean_quality"] is None
    assert (tmp_path / "train.jsonl").read_text() == ""
    assert "No row was kept for: bad, good." in (tmp_path / "README.md").read_text()
