"""A whole run over a mixed stream: questions and answers without a student, and a world with one."""

import json
import sys

import numpy as np
import pytest
import runs

from streamsynth import api
from streamsynth.dataset.rows import read_rows
from streamsynth.tasks import files
from streamsynth.tasks.question_answer import normalise_number
from streamsynth.tasks.splits import normalise

pytestmark = pytest.mark.slow


def load(folder, examples_per_label):
    return files.load_task(str(folder), examples_per_label=examples_per_label)


@pytest.fixture(scope="module")
def mixed(tmp_path_factory, quick_xla):
    """The smallest run over a question-answer task and a world; its policy has read other such questions."""
    root = tmp_path_factory.mktemp("mixed")
    rng = np.random.default_rng(0)
    for name, count in (("sums", 120), ("read_before", 300)):
        (root / name).mkdir()
        rows = []
        for _ in range(count):
            who, what = rng.choice(["Tom", "Ann", "Sam", "Eva"]), rng.choice(["pens", "cups", "books"])
            a, b = map(int, rng.integers(2, 100, 2))
            question = f"{who} has {a} {what} and gets {b} more. How many {what} now?"
            rows.append({"question": question, "answer": f"{a + b}.0"})
        lines = "".join(json.dumps(row) + "\n" for row in rows)
        (root / name / "train.jsonl").write_text(lines)
    (root / "sum_checks.py").write_text(
        "import re\n"
        "def plausible(question, answer):\n"
        "    given = [int(n) for n in re.findall(r'\\d+', question)]\n"
        "    return bool(given) and answer.isdigit() and int(answer) > max(given)\n"
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(root)
        config = runs.config(
            root / "cache",
            stream__tasks=f"files:{root}/sums?verifier=sum_checks:plausible,worlds:market_1",
            pretrain__sources=f"files:{root}/read_before",
            learner__steps="1",
            supervised__rounds="1",
        )
        yield root, api.train(config, root / "run")
    sys.modules.pop("sum_checks", None)


def test_a_mixed_stream_is_scored_by_validity_and_accuracy(mixed):
    root, results = mixed
    assert results["score"] == {"sums": "validity", "market_1": "student accuracy"}
    matrix = np.array(results["transfer_matrix"], float)
    assert matrix.shape == (3, 2) and np.isfinite(matrix).all()
    assert results["student"]["sums"] == dict.fromkeys(results["student"]["sums"])
    assert None not in results["student"]["market_1"].values()
    for record in runs.read_jsonl(root / "run" / "evaluations.jsonl"):
        assert matrix[record["turn"], results["tasks"].index(record["task"])] == record[record["score"]]
        assert record["validity"] <= min(record["gate_pass"], record["valid"])
        assert ("questions" in record) is (record["task"] == "sums")
    assert 0 < results["validity"]["sums"]["last"] < results["gate_pass"]["sums"]["last"] <= 1
    assert "sums" in results["questions"] and "market_1" not in results["questions"]


def test_kept_questions_have_passed_the_gates(mixed):
    root, results = mixed
    kept = read_rows(root / "run" / "kept" / "sums.jsonl")
    assert len(kept) > 20
    examples = {normalise(e.fields[0]) for e in load(root / "sums", 8).examples}
    for row in kept:
        assert normalise_number(row.fields[1]) == row.fields[1]
        assert normalise(row.fields[0]) not in examples
    task = load(root / "run" / "datasets" / "sums", 4)
    assert task.kind == "qa" and results["datasets"]["sums"]["rows"] == len(
        (root / "run" / "datasets" / "sums" / "train.jsonl").read_text().splitlines()
    )


def test_the_report_says_which_score_it_shows(mixed):
    root, _ = mixed
    markdown = (root / "run" / "report" / "report.md").read_text()
    assert "the score of sums is the validity" in markdown and "## Questions and answers" in markdown
    page = (root / "run" / "report" / "index.html").read_text()
    assert "the score of sums is the validity" in page and "words of a question" in page


def test_such_a_run_evaluates_and_synthesizes(mixed, capsys):
    root, results = mixed
    cells = api.evaluate(root / "run")
    out = capsys.readouterr().out
    assert f"sums: validity {cells['sums']['validity']:.3f}" in out and "market_1: student" in out
    assert cells["sums"]["validity"] == results["validity"]["sums"]["last"]
    summary = api.synthesize(root / "run", "sums", rows=12, output=root / "rows")
    assert 0 < summary["rows"] <= 12
    assert load(root / "rows", 2).kind == "qa"
