"""Question-answer tasks: numbers in one form, what answers must look like, verifiers and judges."""

import csv
import dataclasses
import gzip
import json
import sys
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from streamsynth.dataset.export import export, select
from streamsynth.dataset.rows import Row
from streamsynth.errors import UserError
from streamsynth.evaluation import questions
from streamsynth.feedback import gates, reward
from streamsynth.tasks import files, sources
from streamsynth.tasks.question_answer import (
    answer_form,
    fields_of,
    normalise_number,
    number,
    wrongly_answered,
)
from streamsynth.tasks.splits import normalise
from streamsynth.tasks.task import QUESTION, Example, Task, join_fields

REAL = ("gsm8k", "svamp", "asdiv", "commonsense_qa")


# --- Numbers ---


@pytest.mark.parametrize(
    ("text", "form"),
    [
        ("18", "18"),
        (" 1,234.50 ", "1234.5"),
        ("$18", "18"),
        ("-$3", "-3"),
        ("$ -3.00", "-3"),
        ("\N{MINUS SIGN}3", "-3"),
        ("+007", "7"),
        ("50%", "50"),
        ("18.", "18"),
        (".5", "0.5"),
        ("1/2", "0.5"),
        ("4/6", "2/3"),
        ("-0.0", "0"),
        ("1/0", None),
        ("18 apples", None),
        ("1,23", None),
        ("1 2", None),
        ("-$-3", None),
        ("1e5", None),
        ("\N{ARABIC-INDIC DIGIT THREE}", None),
        ("", None),
        (".", None),
        ("$", None),
        ("9" * 31, None),
    ],
)
def test_one_form_for_a_number(text, form):
    assert normalise_number(text) == form


NUMBERS = (
    st.from_regex(r"\A[+-]?[$]?(?:[0-9]{1,30}|[0-9]{1,3}(?:,[0-9]{3}){1,4})?(?:\.[0-9]{0,30})?%?\Z")
    | st.from_regex(r"\A-?[0-9]{1,30}/[0-9]{1,6}\Z")
    | st.text("0123456789.,-+/%$ ", max_size=9)
)


@given(NUMBERS)
def test_the_form_of_a_number_keeps_its_value_and_is_its_own_form(text):
    form = normalise_number(text)
    if form is None:
        assert number(text) is None
    else:
        assert Fraction(form) == number(text)
        assert normalise_number(form) == form


@given(st.integers(-(10**12), 10**12), st.integers(1, 10**6))
def test_equal_numbers_have_equal_forms(numerator, denominator):
    value = Fraction(numerator, denominator)
    assert number(f"{numerator}/{denominator}") == value
    assert normalise_number(f"{numerator}/{denominator}") == normalise_number(normalise_number(str(value)))


@given(st.decimals(allow_nan=False, allow_infinity=False, places=4, min_value=-(10**9), max_value=10**9))
def test_a_decimal_is_read_as_python_reads_it(value):
    assert number(f"{value:f}") == number(f"{value:,f}") == Fraction(value)


# --- Loading ---


def sums(count, start=0):
    return [
        {"question": f"Ann has {i} pens and gets {i + 3} more. How many now?", "answer": f"{2 * i + 3}.0"}
        for i in range(start, start + count)
    ]


def write_jsonl(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def load(folder, **options):
    return files.load_task(str(folder), **({"examples_per_label": 4} | options))


@pytest.fixture
def folder(tmp_path):
    write_jsonl(tmp_path / "train.jsonl", sums(40))
    return tmp_path


@pytest.mark.parametrize("form", ["jsonl", "csv"])
@pytest.mark.parametrize("kind", [None, "qa", "math"])
def test_two_columns_are_enough(tmp_path, form, kind):
    rows = [row | {"rationale": "count them"} for row in sums(40)]
    if form == "jsonl":
        write_jsonl(tmp_path / "train.jsonl", rows)
    else:
        with open(tmp_path / "train.csv", "w", newline="") as file:
            writer = csv.DictWriter(file, list(rows[0]))
            writer.writeheader()
            writer.writerows(rows)
    if kind:
        (tmp_path / "task.json").write_text(json.dumps({"kind": kind, "labels": []}))
    task = load(tmp_path)
    assert (task.kind, task.fields, task.labels) == ("qa", ("question", "answer"), (QUESTION,))
    assert (len(task.train), len(task.test), len(task.examples)) == (29, 8, 4)
    assert {e.fields[1] for e in (*task.train, *task.test)} <= {str(2 * i + 3) for i in range(40)}
    assert task.examples_of(QUESTION) == task.examples
    assert task.brief.kind == "qa"


def test_a_label_beside_question_and_answer_makes_a_classification_task(tmp_path):
    write_jsonl(tmp_path / "train.jsonl", [row | {"label": "ab"[i % 2]} for i, row in enumerate(sums(40))])
    assert load(tmp_path).kind == "classification"


def test_the_same_question_is_never_on_both_sides(folder):
    write_jsonl(folder / "test.jsonl", [row | {"answer": "1"} for row in sums(5)])
    task = load(folder)
    assert not {e.fields[0] for e in task.train} & {e.fields[0] for e in task.test}
    assert len(task.train) == 31  # of 35, 4 are cut for validation


def test_malformed_rows_are_named_or_skipped(folder):
    write_jsonl(folder / "train.jsonl", [*sums(40), {"question": "And?"}, {"question": "So?", "answer": 3}])
    with pytest.raises(UserError, match="train.jsonl, line 41, is bad: it has no 'answer'"):
        load(folder)
    assert load(folder, on_bad_row="skip").skipped_rows == 2


@pytest.mark.parametrize(
    ("card", "options", "message"),
    [
        ({"kind": "qa", "fields": ["problem", "solution"]}, {}, "'fields' of .* must be question and answer"),
        ({}, {"commonest": 2}, "no labels: leave out commonest"),
        ({}, {"examples_per_label": 30}, "29 usable training question.*examples_per_label=30"),
    ],
)
def test_mistakes(folder, card, options, message):
    (folder / "task.json").write_text(json.dumps(card))
    with pytest.raises(UserError, match=message):
        load(folder, **options)


# --- The form of answers ---


def task_of(*pairs, test=()):
    rows = tuple(Example(f"train:{i}", pair, QUESTION) for i, pair in enumerate(pairs))
    tests = tuple(Example(f"test:{i}", pair, QUESTION) for i, pair in enumerate(test))
    return Task("asked", "Questions.", (QUESTION,), rows, rows, tests, ("question", "answer"), "qa")


SUMS = task_of(
    ("Tom has 2 pens and buys two more. How many now?", "4"), ("Half of eight birds fly. How many?", "4")
)
CHOICES = task_of(
    ("Where is soup kept? Choices: bowl; hat", "bowl"), ("What burns? Choices: ice; dry wood", "dry wood")
)


def check(task, *texts):
    return gates.check(
        texts,
        [True] * len(texts),
        [""] * len(texts),
        task=task,
        min_words=1,
        max_words=30,
        seen=lambda text: text == "A seen one with 3 pens?",
    )


@pytest.mark.parametrize(
    ("task", "text", "gate"),
    [
        (SUMS, "Ann has 3 cups. How many? <field> 3", None),
        (SUMS, "Ann has three cups. How many? <field> $3.00", None),
        (SUMS, "Ann has cups. How many? <field> 3", "answer"),  # nothing to count with
        (SUMS, "Ann has 3 cups. How many? <field> 3 cups", "answer"),
        (SUMS, "Ann has 3 cups. How many? 3", "answer"),
        (SUMS, "Tom has 2 pens and buys two more. How many now? <field> 5", "not_copied"),
        (SUMS, "So tom has 2 pens and buys two more! How many now? <field> 5", "not_copied"),
        (SUMS, "A seen one with 3 pens? <field> 17", "not_seen"),
        (CHOICES, "Where is milk kept? Choices: jug; shoe <field> jug", None),
        (CHOICES, "Where is milk kept? Choices: jug; shoe <field> cup", "answer"),
        (
            CHOICES,
            f"What? Choices: {'so ' * 7}; a <field> {'so ' * 7}",
            "answer",
        ),  # the longest has two words
    ],
)
def test_the_gates_of_questions(task, text, gate):
    result = check(task, text)
    assert {name for name, count in result.rejections().items() if count} == ({gate} if gate else set())
    assert tuple(result.by_name) == gates.GATES


def test_kept_answers_are_numbers_in_one_form():
    assert fields_of(SUMS, "How many are 2 pens? <field> $2.0") == ("How many are 2 pens?", "2")
    assert fields_of(SUMS, "How many are 2 pens? 2") is None
    assert fields_of(CHOICES, "Which? Choices: 2.0; 3 <field> 2.0") == ("Which? Choices: 2.0; 3", "2.0")


@pytest.mark.parametrize("name", REAL)
def test_real_rows_pass_the_gate(shared, name):
    task = sources.load(f"files:{shared / 'data' / name}", examples_per_label=8, seed=0)
    form = answer_form(task.examples)
    assert form.numeric is (name != "commonsense_qa") and form.quoted is (name == "commonsense_qa")
    rows = (*task.train, *task.test)
    assert np.mean([form.accepts(*row.fields) for row in rows]) > 0.999
    # The answers of these sets are in the one form already, and stay what they were.
    with gzip.open(shared / "data" / name / "test.jsonl.gz", "rt") as file:
        raw = {normalise(row["question"]): row["answer"] for row in map(json.loads, file)}
    assert all(row.fields[1] == " ".join(raw[normalise(row.fields[0])].split()) for row in task.test)
    if name == "commonsense_qa":
        wrong = [
            form.accepts(row.fields[0], other.fields[1]) for row, other in zip(rows, rows[1:], strict=False)
        ]
        assert np.mean(wrong) < 0.05  # the answer to another question is hardly ever among the choices


# --- Verifiers and judges ---


@pytest.fixture
def checks(tmp_path, monkeypatch):
    """A module of verifiers that Python can import."""
    (tmp_path / "own_checks.py").write_text(
        "import re\n"
        "def right(question, answer):\n"
        "    return sum(map(int, re.findall(r'\\d+', question))) == int(answer)\n"
        "def either(text, label):\n"
        "    return label in text\n"
        "def silent(question, answer):\n"
        "    pass\n"
        "LIMIT = 3\n"
    )
    (tmp_path / "broken_checks.py").write_text("1 / 0\n")
    monkeypatch.syspath_prepend(tmp_path)
    yield
    for name in ("own_checks", "broken_checks"):
        sys.modules.pop(name, None)


def with_verifier(folder, verifier):
    return sources.load(f"files:{folder}?verifier={verifier}", examples_per_label=4, seed=0)


def test_a_verifier_of_ones_own(folder, checks):
    task = with_verifier(folder, "own_checks:right")
    assert all(task.verifier(e.text, QUESTION) for e in task.examples)
    assert not any(task.verifier(text, QUESTION) for text in wrongly_answered(task.examples))
    assert task.verifier("2 and 3? <field> $5.0", QUESTION)  # it is given the answer as it is kept
    assert not task.verifier("no answer", QUESTION)
    with pytest.raises(UserError, match="own_checks:right of the task .* failed on .*four.*ValueError"):
        task.verifier("2 and 2? <field> four", QUESTION)


def test_a_verifier_of_labelled_texts(tmp_path, checks):
    folder = tmp_path / "texts"
    folder.mkdir()
    write_jsonl(folder / "train.jsonl", [{"text": f"text {i}", "label": "ab"[i % 2]} for i in range(40)])
    task = with_verifier(folder, "own_checks:either")
    assert task.verifier("an a", "a") and not task.verifier("one", "a")


@pytest.mark.parametrize(
    ("verifier", "message"),
    [
        ("own_checks", "verifier=own_checks must have the form"),
        ("no_such_module:right", "cannot import no_such_module .*PYTHONPATH"),
        ("broken_checks:right", "cannot import broken_checks .ZeroDivisionError"),
        ("own_checks:wrong", "own_checks has no function 'wrong'"),
        ("own_checks:LIMIT", "own_checks has no function 'LIMIT'"),
    ],
)
def test_a_verifier_that_is_not_there(folder, checks, verifier, message):
    with pytest.raises(UserError, match=message):
        with_verifier(folder, verifier)


def test_a_verifier_has_to_say_something(folder, checks):
    task = with_verifier(folder, "own_checks:silent")
    with pytest.raises(UserError, match="own_checks:silent .* said None .* return True or False"):
        task.verifier("1 and 1? <field> 2", QUESTION)


def context_of(task):
    encode = lambda texts: (np.zeros((len(texts), 1), np.int32), np.ones((len(texts), 1), bool))  # noqa: E731
    return reward.JudgeContext(task, None, None, None, task.examples, encode)


def test_a_judge_of_answers_is_measured_by_wrong_ones(folder, checks):
    task = with_verifier(folder, "own_checks:right")
    context = context_of(task)
    knows = reward.make_reward(context, {"verifier": 0.5}).summary()["verifier"]
    assert knows == {"auc": 1.0, "weight": 0.5}

    def reads_well(texts, label, tokens, mask):
        return np.array([len(text.partition("<field>")[0]) for text in texts], np.float32)

    assert reward.measure(context, reads_well) == 0.5  # the same questions on both sides
    assert (
        reward.measure(context, lambda texts, *_: 1 - np.array([task.verifier(t, "") for t in texts])) == 0.0
    )


def test_wrong_answers_are_other_answers():
    rows = [Example(str(i), (f"q{i}", answer), QUESTION) for i, answer in enumerate(("2", "2.0", "3"))]
    assert wrongly_answered(rows) == ["q0 <field> 3", "q1 <field> 3", "q2 <field> 2"]
    assert wrongly_answered(rows[:2]) == []


# --- Data sets and figures ---


def row_of(question, answer, quality):
    return Row((question, answer), QUESTION, "imitate", 3, 1, ("train:1",), {"quality": quality})


def test_a_data_set_of_questions_is_a_task_again(tmp_path, folder):
    task = load(folder)
    rows = [row_of(f"Eva sees {i} birds and {i} cats, how many?", str(2 * i), i / 50) for i in range(40)]
    summary = export(task, rows, tmp_path / "out", threshold=1.0, config_summary={})
    assert summary["rows"] == 40
    line = json.loads((tmp_path / "out" / "train.jsonl").read_text().splitlines()[0])
    assert (line["question"], line["answer"]) == (rows[-1].fields) and "label" not in line
    card = (tmp_path / "out" / "README.md").read_text()
    assert "Kind: questions and answers (qa). The answers are numbers" in card and "label |" not in card
    again = load(tmp_path / "out")
    assert (again.kind, again.name, again.fields) == ("qa", task.name, task.fields)
    assert {e.fields for e in (*again.train, *again.test)} <= {row.fields for row in rows}


def test_a_question_with_another_answer_is_the_same_text(folder):
    task = load(folder)
    rows = [row_of("Who has 7 pens?", "7", 0.5), row_of("Who has 7 pens?", "8", 0.9)]
    rows.append(row_of(task.test[0].fields[0], "no", 1.0))
    chosen, summary = select(task, rows)
    assert [row.fields[1] for row in chosen] == ["8"]
    assert (summary["test_overlap"], summary["near_duplicates"]) == (1, 1)


def test_figures_of_questions_without_a_student():
    long = "Sam had 4 red pens and 3 blue pens and 2 old pens in his big bag at home. How many?"
    task = dataclasses.replace(SUMS, test=task_of((long, "9"), ("Is 2 odd?", "0")).train)
    texts = [
        join_fields((long.replace("Sam", "Tom"), "9")),
        "is 2 odd <field> $1.0",
        "Are 3 pens 4? <field> 1",
        "Is it? <field> no idea",
        "not a question",
    ]
    found = questions.measure(task, texts, threshold=0.75)
    assert (found["parsed"], found["test_exact"], found["test_near"]) == (4, 0.25, 0.5)
    assert found["written"] == {
        "numeric": 0.75, "commonest_answer": 0.5, "question_words": 3.5, "answer_words": 1.0,
    }  # fmt: skip
    assert found["real"]["numeric"] == 1.0
    nothing = questions.measure(task, ["nothing"], threshold=0.75)
    assert nothing["test_exact"] is None and set(nothing["written"].values()) == {None}
