"""The report of a made-up run: figures worked by hand, a page that parses, mistakes that are said."""

from __future__ import annotations

import html.parser
import json
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import numpy as np
import pytest

from streamsynth.errors import UserError
from streamsynth.evaluation import diversity, figures, report

TASKS = ("market_1", "kitchen_1", "bank_2", "weather_1", "film_3")
STEPS = 30
_TEXTS = (
    "the soup came with bread on friday",
    "i was told that the tea was cold",
    "we asked for rice at dawn",
)


def make_run(folder: Path, turns: int = len(TASKS), tasks: tuple[str, ...] = TASKS) -> Path:
    """A workdir like one that `train` leaves after so many turns; with a summary after the last."""
    rng = np.random.default_rng(0)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps({"seed": 0, "stream": {"tasks": list(tasks)}}))
    metrics = [
        _metrics(turn * (STEPS + 1) + step, turn + 1, tasks[turn], step / STEPS, rng)
        for turn in range(turns)
        for step in range(STEPS)
    ]
    evaluations = [
        _evaluation(turn, j, task, rng) for turn in range(turns + 1) for j, task in enumerate(tasks)
    ]
    _write_lines(folder / "metrics.jsonl", metrics)
    _write_lines(folder / "evaluations.jsonl", evaluations)
    if turns == len(tasks):
        (folder / "summary.json").write_text(json.dumps(_summary(tasks, rng)))
    return folder


def accuracy(turn: int, j: int) -> float:
    """The made-up transfer matrix: 0.02 more a turn, a leap at the own one, 0.03 less for each later one."""
    return 0.6 + 0.02 * turn + (0.15 if turn > j else 0.0) - (0.03 * (turn - j - 1) if turn > j else 0.0)


def _metrics(step: int, turn: int, task: str, progress: float, rng: np.random.Generator) -> dict:
    valid = 0.5 + 0.04 * turn + 0.3 * progress + rng.normal(0, 0.04)
    record = {
        "step": step,
        "turn": turn,
        "task": task,
        "reward/verifier": valid,
        "reward/verifier_weighted": 0.9 * valid,
        "reward/quality": 0.85 * valid,
        "gate/parses": 0.99,
        "gate/not_copied": 0.97 + rng.normal(0, 0.01),
        "gate/length": 1.0,
        "diversity/statistic": 2.0 - 0.2 * progress + rng.normal(0, 0.05),
        "diversity/target": 1.9,
        "diversity/credit": 0.4 - 0.2 * progress,
        "alpha": 0.5 + 0.3 * progress,
        "kl": 0.02 * progress,
        "entropy": 2.4 - progress,
        "loss/policy": rng.normal(0, 0.02),
        "kept": 80.0,
    }
    if turn > 1:
        record |= {"replay/effective_samples": 20.0 + rng.normal(), "replay/gradient_share": 0.2}
    return record


def _evaluation(turn: int, j: int, task: str, rng: np.random.Generator) -> dict:
    learned = turn > j
    spread = dict.fromkeys(diversity.METRICS, 0.1)
    return {
        "turn": turn,
        "task": task,
        "accuracy": accuracy(turn, j),
        "macro_f1": accuracy(turn, j) - 0.01,
        "rows": 160,
        "gate_pass": 0.9 + 0.01 * turn,
        "valid": 0.45 + 0.03 * j + 0.02 * turn + 0.2 * learned,
        "copy_rate": 0.03,
        "diversity": spread
        | {"vendi": 40 - 2 * j - 3 * learned + rng.normal(), "distinct_2": 0.6 - 0.02 * j - 0.02 * learned},
        "samples": [
            {"text": _TEXTS[i % 3], "label": f"label {i % 4}", "valid": bool(i % 3)} for i in range(20)
        ],
    }


def _summary(tasks: tuple[str, ...], rng: np.random.Generator) -> dict:
    return {
        "tasks": list(tasks),
        "anchors": {
            task: {"examples": 0.55, "real": 0.97, "synthetic": 0.86, "synthetic_all": 0.91}
            | {"base": 0.7, "base_best_of_n": 0.81}
            for task in tasks
        },
        "datasets": {
            task: {"rows": 1200, "kept": 1500, "near_duplicates": 200, "test_overlap": 3, "unbalanced": 97}
            for task in tasks
        },
        "patterns": {
            name: {"probability": 0.2, "mean_reward": float(rng.uniform()), "count": 500.0}
            for name in ("label_only", "imitate", "vary_one", "combine_two", "contrast")
        },
        "judges": {task: {"verifier": {"auc": 1.0, "weight": 1.0}} for task in tasks},
        "seconds": {"pretrain": 130.4, "stream": 251.0, "summary": 12.0},
        "commit": "0123456789abcdef0123",
        "best_samples": {
            task: [
                {"text": _TEXTS[i % 3], "label": f"label {i % 4}", "quality": 1.0 - 0.01 * i}
                for i in range(20)
            ]
            for task in tasks
        },
    }


def _write_lines(path: Path, records: list[dict]) -> None:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))


class _Page(html.parser.HTMLParser):
    """Checks that tags nest, and collects text, ids and whatever would be loaded from elsewhere."""

    _VOID = {"meta", "br", "hr", "img", "link"}

    def __init__(self, source: str):
        super().__init__()
        self.open: list[str] = []
        self.ids: list[str] = []
        self.loads: list[str] = []
        self.words: list[str] = []
        self.tags: set[str] = set()
        self.feed(source)
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.handle_startendtag(tag, attrs)
        if tag not in self._VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.add(tag)
        for name, value in attrs:
            if name == "id":
                self.ids.append(value)
            if name in ("src", "href", "xlink:href") and not value.startswith("#"):
                self.loads.append(value)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.words.append(data)


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> tuple[Path, dict]:
    folder = make_run(tmp_path_factory.mktemp("finished"))
    return folder, report.write(folder)


def test_results_hold_the_figures(finished):
    folder, found = finished
    assert json.loads((folder / "report" / "results.json").read_text()) == found
    assert found["tasks"] == list(TASKS) and found["turns"] == 5
    expected = [[accuracy(turn, j) for j in range(5)] for turn in range(6)]
    np.testing.assert_allclose(found["transfer_matrix"], expected)
    # Before its own turn task j has seen j turns of 0.02 each: the mean over j = 1 .. 4.
    assert found["forward_transfer"] == pytest.approx(0.02 * (1 + 2 + 3 + 4) / 4)
    # Each later turn takes 0.03 and gives 0.02.
    assert found["backward_transfer"] == pytest.approx(-0.01 * (4 + 3 + 2 + 1) / 4)
    assert found["forgetting"] == pytest.approx(0.01 * (4 + 3 + 2 + 1) / 4)
    assert found["average_performance"] == pytest.approx(np.mean(expected[5]))
    assert found["student"]["bank_2"] == {
        "examples": 0.55, "base": 0.7, "base_best_of_n": 0.81, "synthetic": 0.86,
        "synthetic_all": 0.91, "real": 0.97,
    }  # fmt: skip
    assert found["verifier"]["film_3"] == pytest.approx({"before": 0.57, "after": 0.87, "last": 0.87})
    assert found["diversity"]["kitchen_1"]["after"]["distinct_2"] == pytest.approx(0.56)
    assert found["commit"].startswith("0123") and found["seconds"]["stream"] == 251.0


def test_page_stands_alone(finished):
    folder, _ = finished
    page = _Page((folder / "report" / "index.html").read_text())
    assert page.loads == [] and not page.tags & {"script", "link", "img", "iframe"}
    assert len(set(page.ids)) == len(page.ids)
    words = " ".join(page.words)
    for expected in (
        *TASKS,
        "reward/verifier",
        "diversity/credit",
        "alpha",
        "replay/gradient_share",
        "after turn 5",
    ):
        assert expected in words, expected
    assert "nan" not in words.lower().split()


def test_figures_are_valid_svg_and_the_same_again(finished):
    folder, _ = finished
    run = report.load(folder)
    drawn = report.draw(run, report.results(run))
    assert {"transfer", "transfer_valid", "diversity", "curves_reward", "curves_replay"} <= drawn.keys()
    for name, svg in drawn.items():
        assert ElementTree.fromstring(svg).tag.endswith("svg")
        assert (folder / "report" / f"{name}.svg").read_text() == svg


def test_markdown_tables_are_rectangular_and_figures_exist(finished):
    folder, _ = finished
    lines = (folder / "report" / "report.md").read_text().split("\n")
    for line, following in zip(lines, lines[1:], strict=False):
        if line.startswith("|") and following.startswith("|"):
            assert line.count("|") == following.count("|")
    images = [line.split("(")[1].rstrip(")") for line in lines if line.startswith("![")]
    assert images and all((folder / "report" / image).is_file() for image in images)


@pytest.mark.parametrize("turns", [0, 2])
def test_a_run_that_is_not_over(tmp_path, turns):
    found = report.write(make_run(tmp_path / "run", turns=turns))
    assert found["turns"] == turns and len(found["transfer_matrix"]) == turns + 1
    assert (found["average_performance"] is None) == (turns == 0)
    assert found["student"]["bank_2"]["real"] is None
    assert found["student"]["bank_2"]["synthetic"] == pytest.approx(accuracy(turns, 2))
    _Page((tmp_path / "run" / "report" / "index.html").read_text())


def test_tasks_without_verifier_and_too_few_texts(tmp_path):
    folder = make_run(tmp_path / "run", turns=1)
    records = [json.loads(line) for line in (folder / "evaluations.jsonl").read_text().splitlines()]
    for record in records:
        record |= {"valid": None, "diversity": dict.fromkeys(diversity.METRICS)}
    _write_lines(folder / "evaluations.jsonl", records)
    found = report.write(folder)
    assert found["verifier"]["bank_2"] == dict.fromkeys(("before", "after", "last"))
    assert not (folder / "report" / "transfer_valid.svg").exists()


def test_hostile_texts_and_names_stay_text(tmp_path):
    name = "a|b <b>$x^{</b>"
    folder = make_run(tmp_path / "run", turns=1, tasks=(name,))
    records = [json.loads(line) for line in (folder / "evaluations.jsonl").read_text().splitlines()]
    records[-1]["samples"] = [{"text": "<script>alert(1)</script> | x\ny", "label": "&", "valid": None}]
    _write_lines(folder / "evaluations.jsonl", records)
    report.write(folder)
    page = _Page((folder / "report" / "index.html").read_text())
    assert "script" not in page.tags
    assert any("<script>alert(1)</script>" in words for words in page.words)
    assert name in page.words
    assert "&lt;script>alert(1)&lt;/script> \\| x y" in (folder / "report" / "report.md").read_text()


def test_a_stream_that_goes_on_shows_its_new_tasks(tmp_path):
    folder = make_run(tmp_path / "run", turns=2, tasks=TASKS[:2])
    summary = (folder / "summary.json").read_text()
    make_run(folder, turns=2, tasks=TASKS[:3])
    (folder / "summary.json").write_text(summary)
    found = report.write(folder)
    assert found["tasks"] == list(TASKS[:3]) and found["turns"] == 2
    assert found["student"]["bank_2"]["synthetic"] == pytest.approx(accuracy(2, 2))


def test_turn_segments_part_equal_tasks_of_different_turns():
    records = [{"turn": turn, "step": step} for step, turn in enumerate((1, 1, 2, 2, 2, 3))]
    assert [len(segment) for segment in figures.turn_segments(records)] == [2, 3, 1]


def test_no_run(tmp_path):
    with pytest.raises(UserError, match="holds no run"):
        report.write(tmp_path / "nowhere")
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(UserError, match="no evaluation yet"):
        report.write(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(UserError, match="config.json is not JSON"):
        report.write(tmp_path)
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "evaluations.jsonl").write_text('{"turn": 0, "task": "a"}\nbroken\n')
    with pytest.raises(UserError, match="evaluations.jsonl, line 2"):
        report.write(tmp_path)
