"""The report of a run: results.json, index.html and report.md, from what the run wrote down.

Everything in it is read from the workdir, so that it can be written anew at any time, also of a run that
is not over: then the tasks whose turn is over count, and what only a finished run knows is left out.
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from streamsynth.errors import UserError
from streamsynth.evaluation import figures, markdown, page, transfer
from streamsynth.evaluation.diversity import METRICS
from streamsynth.runtime import journal
from streamsynth.runtime.files import atomic_write

ANCHORS = ("examples", "base", "base_best_of_n", "synthetic", "synthetic_all", "real")
# What the report calls the score that an evaluation names.
SCORES = {"accuracy": "student accuracy", "validity": "validity"}
_PLOTTED_DIVERSITY = {"vendi": "Vendi score", "distinct_2": "distinct-2"}
_GROUPS = {"alpha": "diversity", "kl": "policy", "entropy": "policy", "kept": "gate"}
_GROUPS |= dict.fromkeys(("completion/truncated", "group/dead", "logprob/gap"), "policy")
_FIRST_GROUPS = ("reward", "diversity", "gate", "policy", "replay")


@dataclasses.dataclass(frozen=True)
class Run:
    """What a run wrote down.

    tasks: names in the order of their turns.   config: resolved.
    metrics: one record a step.   evaluations: one record for each (turn, task).
    summary: of the finished run; empty before its end.
    """

    tasks: tuple[str, ...]
    config: Mapping[str, Any]
    metrics: list[dict[str, Any]]
    evaluations: list[dict[str, Any]]
    summary: Mapping[str, Any]


def write(workdir: str | os.PathLike[str]) -> dict[str, Any]:
    """Writes report/ of a workdir.

    Returns:
      What report/results.json holds; see `results`.

    Raises:
      UserError: there is no run, or none that was evaluated yet; or one of its files is damaged.
    """
    run = load(workdir)
    found = results(run)
    drawn = draw(run, found)
    directory = Path(workdir) / "report"
    for name, svg in drawn.items():
        atomic_write(directory / f"{name}.svg", svg)
    atomic_write(directory / "index.html", page.render(found, drawn, samples(run)))
    atomic_write(directory / "report.md", markdown.render(found, tuple(drawn), samples(run)))
    text = json.dumps(found, indent=1, ensure_ascii=False, allow_nan=False)
    atomic_write(directory / "results.json", text + "\n")
    return found


def load(workdir: str | os.PathLike[str]) -> Run:
    """Reads a workdir. Raises UserError as `write` does."""
    folder = Path(workdir)
    config = _read_json(folder / "config.json")
    if config is None:
        raise UserError(f"{folder} holds no run (no config.json): give the --workdir of a train command.")
    evaluations = journal.read(folder / "evaluations.jsonl")
    if not evaluations:
        raise UserError(f"{folder} has no evaluation yet: let `streamsynth train` get past its first one.")
    summary = _read_json(folder / "summary.json") or {}
    # A stream that goes on has tasks that the summary of its shorter self does not know yet.
    names = [*summary.get("tasks", ()), *(record["task"] for record in evaluations)]
    metrics = journal.read(folder / "metrics.jsonl")
    return Run(tuple(dict.fromkeys(names)), config, metrics, evaluations, summary)


def _read_json(path: Path) -> dict[str, Any] | None:
    if not path.is_file():
        return None
    try:
        return json.loads(path.read_text())
    except ValueError:
        raise UserError(f"{path} is not JSON: it was edited or damaged; put the original back.") from None


def results(run: Run) -> dict[str, Any]:
    """The figures of a run, fit for JSON: null is "not measured".

    Returns:
      "tasks": names in stream order; "turns": how many are over.
      "score": {task: "student accuracy"; or, for questions and answers, "validity", the share of unselected
        texts that pass the gates and, where there is one, the verifier}.
      "transfer_matrix": [turns + 1][tasks] of that score, the first row before anything.
      "average_performance", "forward_transfer", "backward_transfer", "forgetting": see `transfer`.
      "student": {task: {anchor: accuracy}} over ANCHORS, with "synthetic" of as many rows of the data set as
        "base" has (of a run that is not over: of the last evaluation's rows); null where there is no student.
      "diversity": {task: {"before", "after", "last": {metric: value}}}: before anything, after the
        task's own turn, and at the last evaluation.
      "verifier", "gate_pass", "validity", "copy_rate": {task: {"before", "after", "last": share}}.
      "questions": {task with questions: {"before", "after", "last": figures}}, see `questions.measure`.
      "judges", "patterns", "datasets": as the run summed them up.
      "config", "commit", "seconds": {phase: seconds}.
    """
    scores = transfer.matrix(run.evaluations, run.tasks)
    moments = {task: _moments(run, task) for task in run.tasks}
    anchors = run.summary.get("anchors", {})

    def over_moments(key: str) -> dict[str, Any]:
        return {
            task: {name: record.get(key) for name, record in of_task.items()}
            for task, of_task in moments.items()
        }

    student = {}
    for task in run.tasks:
        last = moments[task]["last"].get("accuracy")
        student[task] = dict.fromkeys(ANCHORS) | {"synthetic": last} | anchors.get(task, {})
    return {
        "tasks": list(run.tasks),
        "turns": len(scores) - 1,
        "score": {
            task: SCORES[of_task["last"].get("score", "accuracy")] for task, of_task in moments.items()
        },
        "transfer_matrix": [[_finite(value) for value in row] for row in scores.tolist()],
        **{name: _finite(value) for name, value in transfer.summary(scores).items()},
        "student": student,
        "diversity": {
            task: {name: _diversity(record) for name, record in of_task.items()}
            for task, of_task in moments.items()
        },
        "verifier": over_moments("valid"),
        "gate_pass": over_moments("gate_pass"),
        "validity": over_moments("validity"),
        "copy_rate": over_moments("copy_rate"),
        "questions": {
            task: {name: record.get("questions") for name, record in of_task.items()}
            for task, of_task in moments.items()
            if "questions" in of_task["last"]
        },
        "judges": run.summary.get("judges", {}),
        "patterns": run.summary.get("patterns", {}),
        "datasets": run.summary.get("datasets", {}),
        "config": dict(run.config),
        "commit": run.summary.get("commit"),
        "seconds": run.summary.get("seconds", {}),
    }


def _moments(run: Run, task: str) -> dict[str, dict[str, Any]]:
    """The evaluations of a task before anything, after its own turn and the last one; {} for none."""
    by_turn = {record["turn"]: record for record in run.evaluations if record["task"] == task}
    return {
        "before": by_turn.get(0, {}),
        "after": by_turn.get(run.tasks.index(task) + 1, {}),
        "last": by_turn[max(by_turn)] if by_turn else {},
    }


def _diversity(record: Mapping[str, Any]) -> dict[str, float | None]:
    return dict.fromkeys(METRICS) | record.get("diversity", {})


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


def samples(run: Run) -> dict[str, dict[str, list]]:
    """{task: {"unselected", "best"}}: texts of the last evaluation as they came, and the best kept rows."""
    best = run.summary.get("best_samples", {})
    return {
        task: {"unselected": _moments(run, task)["last"].get("samples", []), "best": best.get(task, [])}
        for task in run.tasks
    }


def draw(run: Run, found: Mapping[str, Any]) -> dict[str, str]:
    """The figures by name, as SVG text; a figure without data is left out."""
    drawn = {"transfer": figures.heat_map(_matrix(found), run.tasks, score_names(found))}
    valid = transfer.matrix(run.evaluations, run.tasks, "valid")
    if not np.isnan(valid).all():
        drawn["transfer_valid"] = figures.heat_map(valid, run.tasks, "verifier: share of valid texts")
    quality = "verifier" if "transfer_valid" in drawn else "gate_pass"
    points = {
        task: {
            moment: {"quality": found[quality][task][moment], **found["diversity"][task][moment]}
            for moment in ("before", "after", "last")
        }
        for task in run.tasks
    }
    if any(points[task]["last"][metric] is not None for task in run.tasks for metric in _PLOTTED_DIVERSITY):
        axis = "share of valid texts" if quality == "verifier" else "share of texts that pass the gates"
        drawn["diversity"] = figures.diversity_against_quality(points, _PLOTTED_DIVERSITY, axis)
    for group, keys in curve_groups(run.metrics).items():
        drawn[f"curves_{group}"] = figures.learning_curves(run.metrics, keys, run.tasks)
    return drawn


def score_names(found: Mapping[str, Any]) -> str:
    """What the tasks are scored by, such as "student accuracy or validity" in a mixed stream."""
    return " or ".join(dict.fromkeys(found["score"].values()))


def _matrix(found: Mapping[str, Any]) -> np.ndarray:
    return np.array(found["transfer_matrix"], float)


def curve_groups(records: list[dict[str, Any]]) -> dict[str, list[str]]:
    """{group: quantities} of metrics.jsonl; a group is what stands before the slash."""
    keys = sorted(
        {
            key
            for record in records
            for key, value in record.items()
            if isinstance(value, (int, float)) and key not in ("step", "turn")
        }
    )
    groups: dict[str, list[str]] = {name: [] for name in _FIRST_GROUPS}
    for key in keys:
        name, slash, _ = key.partition("/")
        groups.setdefault(_GROUPS.get(key, name if slash else "other"), []).append(key)
    return {name: of_group for name, of_group in groups.items() if of_group}
