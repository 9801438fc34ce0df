"""What metrics.jsonl says of learning: reward parts, training health, failures, the strategies' chances."""

from __future__ import annotations

import collections
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

Record = Mapping[str, Any]

# What a reward is made of, by what stands before the slash, and what the diversity in it is weighed by.
REWARD_GROUPS = ("reward", "advantage", "sigma", "diversity", "gate")
ALPHA = "alpha"
# Counted at the steps where they happen, and nowhere else.
COUNTED = ("scorer", "reject")
TRAINING = (
    "entropy",
    "group/dead",
    "completion/truncated",
    "logprob/gap",
    "ratio/mean",
    "ratio/effective_share",
    "replay/effective_samples",
    "replay/gradient_share",
)
WEIGHTED = "_weighted"

_PATTERN = "pattern/"
_SHARE = 5  # the first and the last fifth of a turn's steps


def reward_parts(records: Sequence[Record]) -> dict[str, dict[str, dict[str, float]]]:
    """{task: {part: {"first", "last"}}}: means over the first and the last fifth of its steps."""
    found: dict[str, dict[str, dict[str, float]]] = {}
    for task, series in by_task(records).items():
        parts = {key: values for key, values in series.items() if is_reward_part(key)}
        if parts:
            found[task] = {
                key: dict(zip(("first", "last"), ends(v), strict=True)) for key, v in parts.items()
            }
    return found


def is_reward_part(key: str) -> bool:
    return key == ALPHA or key.partition("/")[0] in REWARD_GROUPS


def unweighted(part: str) -> str | None:
    """The name of a weighted part before its weight; None for any other."""
    return part.removesuffix(WEIGHTED) if part.endswith(WEIGHTED) else None


def training(records: Sequence[Record]) -> dict[str, dict[str, float]]:
    """{task: {metric: mean over the last fifth of the steps}}, over those of TRAINING that were recorded."""
    found = {
        task: {key: ends(series[key])[1] for key in TRAINING if key in series}
        for task, series in by_task(records).items()
    }
    return {task: figures for task, figures in found.items() if figures}


def failures(records: Sequence[Record]) -> dict[str, dict[str, int]]:
    """{task: {"scorer/NAME/REASON" or "reject/NAME": how often}}, without what never happened."""
    found = {
        task: {key: round(sum(values)) for key, values in series.items() if key.partition("/")[0] in COUNTED}
        for task, series in by_task(records).items()
    }
    nonzero = {task: {key: count for key, count in counts.items() if count} for task, counts in found.items()}
    return {task: counts for task, counts in nonzero.items() if counts}


def with_zeros(records: Sequence[Record], keys: Iterable[str]) -> list[Record]:
    """The records with 0 where a counted thing did not happen."""
    return [{**dict.fromkeys(keys, 0), **record} for record in records]


def patterns(records: Sequence[Record], summary: Mapping[str, Any]) -> dict[str, Any]:
    """Of every strategy its chance and its rewards, for each task and over the stream.

    Args:
      records: with each strategy's chance at each step as "pattern/NAME".
      summary: of the run, {"stream": {strategy: figures}, "tasks": {task: {strategy: figures}}} with the
        figures "probability", "mean_reward", "standard_error" and "count"; or {}.

    Returns:
      The same form. A task's chances are those at the end of its own turn where they were recorded; of a run
      without a summary they are all there is.
    """
    tasks = {task: dict(of_task) for task, of_task in summary.get("tasks", {}).items()}
    for task, series in by_task(records).items():
        for key, values in series.items():
            if is_pattern(key):
                name = key.removeprefix(_PATTERN)
                known = tasks.setdefault(task, {}).get(name, {})
                tasks[task][name] = {**known, "probability": values[-1]}
    return {"stream": dict(summary.get("stream", {})), "tasks": tasks}


def is_pattern(key: str) -> bool:
    return key.startswith(_PATTERN)


def strategies(found: Mapping[str, Any]) -> list[str]:
    """Names of all strategies in what `patterns` found, in the order of their first appearance."""
    groups = [found["stream"], *found["tasks"].values()]
    return list(dict.fromkeys(name for of_group in groups for name in of_group))


def winner(figures: Mapping[str, Mapping[str, float | None]]) -> str | None:
    """The strategy with the highest chance; None where two share it, as before anything is learned."""
    chances = {name: of_one.get("probability") for name, of_one in figures.items()}
    known = sorted((chance, name) for name, chance in chances.items() if chance is not None)
    if not known or (len(known) > 1 and math.isclose(known[-1][0], known[-2][0])):
        return None
    return known[-1][1]


def by_task(records: Sequence[Record]) -> dict[str, dict[str, list[float]]]:
    """{task: {quantity: its finite values in the order of steps}}."""
    found: dict[str, dict[str, list[float]]] = {}
    for record in records:
        series = found.setdefault(record["task"], collections.defaultdict(list))
        for key, value in record.items():
            if key not in ("step", "turn") and isinstance(value, (int, float)) and math.isfinite(value):
                series[key].append(float(value))
    return found


def ends(values: Sequence[float]) -> tuple[float, float]:
    """Means of the first and of the last fifth, of one value at least."""
    width = max(1, len(values) // _SHARE)
    return sum(values[:width]) / width, sum(values[-width:]) / width
