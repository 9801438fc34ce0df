"""The transfer matrix of a stream and the figures that sum it up.

R is [turns + 1, tasks]: R[t, j] is the score on task j after t turns; row 0 is before anything. Task j
(counted from 0) has its turn as number j + 1, so its score just before its turn is R[j, j] and just
after it R[j + 1, j]. NaN means not measured; a figure is the mean over the tasks for which it can be
formed, and NaN where there is none. Only tasks whose turn is over count.

Formulas: Lopez-Paz and Ranzato 2017 (GEM, arXiv 1706.08840) for the average, forward and backward
transfer; Chaudhry et al. 2018 (arXiv 1801.10112) for forgetting.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import numpy as np


def matrix(evaluations: Iterable[Mapping], tasks: Sequence[str], measure: str | None = None) -> np.ndarray:
    """R from evaluation records.

    Args:
      evaluations: records with "turn" (0 is before anything), "task" and `measure`; of several for the
        same turn and task the last holds. A measure that is absent or None stays NaN.
      tasks: task names in the order of their turns; records of other tasks are left out.
      measure: the key of the score; None takes the one that each record names under "score", or "accuracy".

    Returns:
      [turns + 1, tasks] float64, where `turns` is the last turn that was evaluated.
    """
    columns = {task: column for column, task in enumerate(tasks)}
    records = [record for record in evaluations if record["task"] in columns]
    turns = max((record["turn"] for record in records), default=0)
    scores = np.full((turns + 1, len(tasks)), np.nan)
    for record in records:
        value = record.get(measure or record.get("score", "accuracy"))
        scores[record["turn"], columns[record["task"]]] = np.nan if value is None else value
    return scores


def before_own_turn(scores: np.ndarray) -> np.ndarray:
    """R[j, j] for every task j, NaN where that row was not reached: [tasks]."""
    return _shifted_diagonal(scores, 0)


def after_own_turn(scores: np.ndarray) -> np.ndarray:
    """R[j + 1, j] for every task j, NaN where its turn is not over: [tasks]."""
    return _shifted_diagonal(scores, 1)


def _shifted_diagonal(scores: np.ndarray, shift: int) -> np.ndarray:
    rows, tasks = scores.shape
    return np.array([scores[j + shift, j] if j + shift < rows else np.nan for j in range(tasks)])


def average_performance(scores: np.ndarray) -> float:
    """Mean over learned tasks j of R[last, j]: how good the stream is at what it has seen."""
    return _mean(scores[-1, : len(scores) - 1])


def forward_transfer(scores: np.ndarray) -> float:
    """Mean over tasks j > 0 whose turn is over of R[j, j] - R[0, j].

    The jumpstart: what turns on other tasks were worth to a task before its own turn. The first task
    has no predecessor and does not count.
    """
    learned = min(len(scores) - 1, scores.shape[1])
    return _mean((before_own_turn(scores) - scores[0])[1:learned])


def backward_transfer(scores: np.ndarray) -> float:
    """Mean over learned tasks j but the last of R[last, j] - R[j + 1, j].

    What later turns did to earlier tasks; below 0 is loss. The last task has had no later turn.
    """
    return _mean((scores[-1] - after_own_turn(scores))[: max(len(scores) - 2, 0)])


def forgetting(scores: np.ndarray) -> float:
    """Mean over learned tasks j but the last of max over t in j + 1 .. last - 1 of R[t, j] - R[last, j].

    The loss since a task's best moment after its own turn; below 0 if it is better than ever.
    """
    last = len(scores) - 1
    losses = []
    for j in range(min(last - 1, scores.shape[1])):
        earlier = scores[j + 1 : last, j]
        measured = earlier[~np.isnan(earlier)]
        losses.append(measured.max() - scores[last, j] if len(measured) else np.nan)
    return _mean(np.array(losses))


def summary(scores: np.ndarray) -> dict[str, float]:
    """The four figures by name; NaN where a figure cannot be formed."""
    return {
        "average_performance": average_performance(scores),
        "forward_transfer": forward_transfer(scores),
        "backward_transfer": backward_transfer(scores),
        "forgetting": forgetting(scores),
    }


def _mean(values: np.ndarray) -> float:
    measured = values[~np.isnan(values)]
    return float(measured.mean()) if len(measured) else float("nan")
