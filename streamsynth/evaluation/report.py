"""The report of a run: results.json, its pages and report.md, from what the run wrote down.

Everything in it is read from the workdir, so that it can be written anew at any time, also of a run that
is not over: then the tasks whose turn is over count, and what only a finished run knows is left out.
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
from collections.abc import Mapping
from typing import Any

import numpy as np

from streamsynth.errors import UserError
from streamsynth.evaluation import figures, learning, learning_pages, markdown, page, transfer
from streamsynth.evaluation.diversity import METRICS
from streamsynth.feedback.scorers.records import tally
from streamsynth.runtime import journal
from streamsynth.runtime.files import as_path, atomic_write

ANCHORS = ("examples", "base", "base_best_of_n", "synthetic", "synthetic_all", "real")
# What the report calls the score that an evaluation names.
SCORES = {"accuracy": "student accuracy", "validity": "validity"}
_PLOTTED_DIVERSITY = {"vendi": "Vendi score", "distinct_2": "distinct-2"}
_OVERVIEW = ("reward/quality", "diversity/statistic", "diversity/target", learning.ALPHA)
_GROUPS = {
    learning.ALPHA: "diversity",
    "kl": "policy",
    "clip_share": "policy",
    "kept": "gate",
    **dict.fromkeys(learning.TRAINING, "health"),
}
_FIRST_GROUPS = ("overview", "health", *learning.REWARD_GROUPS, *learning.COUNTED, "policy", "replay")


@dataclasses.dataclass(frozen=True)
class Run:
    """What a run wrote down.

    tasks: names in the order of their turns.   config: resolved.
    metrics: one record a step.   evaluations: one record for each (turn, task).
    summary: of the finished run; empty before its end.
    scorers: by name what they answered, see `records.tally`.
    """

    tasks: tuple[str, ...]
    config: Mapping[str, Any]
    metrics: list[dict[str, Any]]
    evaluations: list[dict[str, Any]]
    summary: Mapping[str, Any]
    scorers: Mapping[str, Any] = dataclasses.field(default_factory=dict)


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
    directory = as_path(workdir) / "report"
    for name, svg in drawn.items():
        atomic_write(directory / f"{name}.svg", svg)
    atomic_write(directory / "index.html", page.render(found, drawn, samples(run)))
    atomic_write(directory / "patterns.html", learning_pages.patterns(found, drawn))
    atomic_write(directory / "rewards.html", learning_pages.rewards(found, drawn))
    atomic_write(directory / "report.md", markdown.render(found, tuple(drawn), samples(run)))
    text = json.dumps(found, indent=1, ensure_ascii=False, allow_nan=False)
    atomic_write(directory / "results.json", text + "\n")
    return found


def load(workdir: str | os.PathLike[str]) -> Run:
    """Reads a workdir. Raises UserError as `write` does."""
    folder = as_path(workdir)
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
    scorers = {path.stem: tally(journal.read(path)) for path in sorted((folder / "scores").glob("*.jsonl"))}
    return Run(tuple(dict.fromkeys(names)), config, metrics, evaluations, summary, scorers)


def _read_json(path: Any) -> dict[str, Any] | None:
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
      "patterns": {"stream": {strategy: figures}, "tasks": {task: {strategy: figures}}}, see
        `learning.patterns`.
      "elites": {task: samples in its elite archive}.
      "attributes": {task: {attribute: [value]}} that prompts asked for.
      "reward_parts": {task: {part: {"first", "last"}}}, see `learning.reward_parts`.
      "training": {task: {metric: last value}}, see `learning.training`.
      "failures": {task: {what: how often}}, see `learning.failures`.
      "judges", "datasets": as the run summed them up.
      "scorers": {name: {"asked", "scored", "failed": {reason: texts}, "requests"}}, all tasks together.
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
        "patterns": learning.patterns(run.metrics, run.summary.get("patterns", {})),
        "elites": run.summary.get("elites", {}),
        "attributes": run.summary.get("attributes", {}),
        "reward_parts": learning.reward_parts(run.metrics),
        "training": learning.training(run.metrics),
        "failures": learning.failures(run.metrics),
        "judges": run.summary.get("judges", {}),
        "scorers": dict(run.scorers),
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
    drawn |= _draw_patterns(run, found["patterns"])
    for group, keys in curve_groups(run.metrics).items():
        records = learning.with_zeros(run.metrics, keys) if group in learning.COUNTED else run.metrics
        drawn[f"curves_{group}"] = figures.learning_curves(records, keys, run.tasks)
    return drawn


def _draw_patterns(run: Run, patterns: Mapping[str, Any]) -> dict[str, str]:
    names, drawn = learning.strategies(patterns), {}
    if any(learning.is_pattern(key) for record in run.metrics for key in record):
        winners = {task: learning.winner(of_task) for task, of_task in patterns["tasks"].items()}
        drawn["pattern_chances"] = figures.strategy_chances(run.metrics, names, winners)
    rewarded = {
        task: of_task
        for task, of_task in patterns["tasks"].items()
        if any(of_one.get("mean_reward") is not None for of_one in of_task.values())
    }
    if rewarded:
        drawn["pattern_rewards"] = figures.strategy_rewards(rewarded, names)
    return drawn


def score_names(found: Mapping[str, Any]) -> str:
    """What the tasks are scored by, such as "student accuracy or validity" in a mixed stream."""
    return " or ".join(dict.fromkeys(found["score"].values()))


def _matrix(found: Mapping[str, Any]) -> np.ndarray:
    return np.array(found["transfer_matrix"], float)


def curve_groups(records: list[dict[str, Any]]) -> dict[str, list[str]]:
    """{group: quantities} of metrics.jsonl; a group is what stands before the slash, but for a few.

    The strategies' chances have a figure of their own.
    """
    keys = sorted({key for of_task in learning.by_task(records).values() for key in of_task})
    groups: dict[str, list[str]] = {name: [] for name in _FIRST_GROUPS}
    groups["overview"] = [key for key in _OVERVIEW if key in keys]
    for key in keys:
        if not learning.is_pattern(key):
            name, slash, _ = key.partition("/")
            groups.setdefault(_GROUPS.get(key, name if slash else "other"), []).append(key)
    return {name: of_group for name, of_group in groups.items() if of_group}
