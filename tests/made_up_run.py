"""A made-up run whose figures are known, and a reader of pages that checks them."""

from __future__ import annotations

import html.parser
import json
from pathlib import Path

import numpy as np

from streamsynth.evaluation import diversity

TASKS = ("market_1", "kitchen_1", "bank_2", "weather_1", "film_3")
STEPS = 30
STRATEGIES = (
    "label_only",
    "imitate",
    "vary_one",
    "combine_two",
    "contrast",
    "imitate_elites",
    "change_form",
)
TEXTS = (
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
    write_lines(folder / "metrics.jsonl", metrics)
    write_lines(folder / "evaluations.jsonl", evaluations)
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
        "advantage/quality": 0.8,
        "advantage/quality_weighted": 0.8 - 0.6 * progress,
        "advantage/utility": 0.3,
        "advantage/utility_weighted": 0.03,
        "sigma/quality": 0.4,
        "entropy": 2.4 - progress,
        "group/dead": 0.25,
        "completion/truncated": 0.0,
        "logprob/gap": 3e-5,
        "loss/policy": rng.normal(0, 0.02),
        "kept": 80.0,
    }
    # The strategy at the turn's own place gains on the others.
    gain = 0.3 * progress
    for i, name in enumerate(STRATEGIES):
        record[f"pattern/{name}"] = 1 / 7 + gain if i == turn - 1 else 1 / 7 - gain / 6
    if step % 10 == 3:
        record |= {"scorer/http/timeout": 2, "reject/no_label": 1}
    if turn > 1:
        record |= {"replay/effective_samples": 20.0 + rng.normal(), "replay/gradient_share": 0.2}
    return record


def _strategy(probability: float, place: int) -> dict:
    return {
        "probability": probability,
        "mean_reward": 0.4 + 0.01 * place,
        "standard_error": 0.011 + 0.001 * place,
        "count": 1200 + place,
    }


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
            {"text": TEXTS[i % 3], "label": f"label {i % 4}", "valid": bool(i % 3)} for i in range(20)
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
            "stream": {name: _strategy(0.12 + 0.01 * i, i) for i, name in enumerate(STRATEGIES)},
            "tasks": {
                task: {name: _strategy(1 / 7, 7 * j + i) for i, name in enumerate(STRATEGIES)}
                for j, task in enumerate(tasks)
            },
        },
        "elites": {task: 31 + j for j, task in enumerate(tasks)},
        "judges": {task: {"verifier": {"auc": 1.0, "weight": 1.0}} for task in tasks},
        "seconds": {"pretrain": 130.4, "stream": 251.0, "summary": 12.0},
        "commit": "0123456789abcdef0123",
        "best_samples": {
            task: [
                {"text": TEXTS[i % 3], "label": f"label {i % 4}", "quality": 1.0 - 0.01 * i}
                for i in range(20)
            ]
            for task in tasks
        },
    }


def write_lines(path: Path, records: list[dict]) -> None:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))


class Page(html.parser.HTMLParser):
    """Checks that tags nest, and collects text, ids, links and whatever would be loaded from elsewhere."""

    _VOID = {"meta", "br", "hr", "img", "link"}

    def __init__(self, source: str):
        super().__init__()
        self.open: list[str] = []
        self.ids: list[str] = []
        self.loads: list[str] = []
        self.links: list[str] = []
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
                (self.links if tag == "a" else self.loads).append(value)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.words.append(data)
