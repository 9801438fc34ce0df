"""The report's tables as plain values: what `markdown` and the pages both show.

A cell is a name, a float, a count (int), or None for "not measured".
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from streamsynth.evaluation import learning
from streamsynth.evaluation.diversity import METRICS

_MOMENTS = {"before": "before anything", "after": "after its turn", "last": "last"}
_QUESTIONS = {
    "numeric": "numeric answers",
    "commonest_answer": "commonest answer",
    "question_words": "words of a question",
    "answer_words": "words of an answer",
}
QUESTION_HEADS = ("task", "texts", *_QUESTIONS.values(), "test questions", "near test questions")

_METRIC_NAMES = {
    "distinct_1": "distinct-1",
    "distinct_2": "distinct-2",
    "self_bleu": "self-BLEU",
    "self_repetition": "self-repetition",
    "vendi": "Vendi",
    "mean_distance": "mean distance",
    "novel_sum": "NovelSum",
    "coverage": "coverage",
    "compression_ratio": "compression",
    "exact_duplicates": "duplicates",
    "near_duplicates": "near-duplicates",
}
DIVERSITY_HEADS = ("task", "texts", *(_METRIC_NAMES[metric] for metric in METRICS))
STRATEGY_HEADS = ("strategy", "probability", "samples", "mean reward", "standard error", "")
PART_HEADS = ("part", "first", "last", "first, weighted", "last, weighted")
FAILURE_HEADS = ("task", "what", "times")
SCORER_HEADS = ("scorer", "texts", "scored", "failed", "why", "requests")


def questions(found: Mapping[str, Any]) -> list[list[Any]]:
    """Of each task with questions: what was written at each moment, and the real test set beside it."""
    rows = []
    for task, moments in found["questions"].items():
        for moment, name in _MOMENTS.items():
            figures = moments[moment]
            if figures is not None:
                shares = [figures["written"][key] for key in _QUESTIONS]
                rows.append([task, name, *shares, figures["test_exact"], figures["test_near"]])
        real = moments["last"]["real"]
        rows.append([task, "real test set", *(real[key] for key in _QUESTIONS), None, None])
    return rows


def diversity(found: Mapping[str, Any]) -> list[list[Any]]:
    """All metrics of each task's unselected texts at each moment at which they were measured."""
    return [
        [task, moment, *(values[metric] for metric in METRICS)]
        for task, moments in found["diversity"].items()
        for moment, values in moments.items()
        if any(value is not None for value in values.values())
    ]


def strategies(figures: Mapping[str, Mapping[str, Any]]) -> list[list[Any]]:
    """Of one task, or of the stream: each strategy's figures, the likeliest first; the winner says so."""
    keys = ("probability", "count", "mean_reward", "standard_error")
    won = learning.winner(figures)
    rows = [
        [name, *(of_one.get(key) for key in keys), "won" if name == won else ""]
        for name, of_one in figures.items()
    ]
    return sorted(rows, key=lambda row: -(row[1] or 0.0))


def parts(figures: Mapping[str, Mapping[str, float]]) -> list[list[Any]]:
    """Of one task: each part of the reward at the beginning and the end, before and after its weight."""
    groups = (*learning.REWARD_GROUPS, learning.ALPHA)
    names = [name for name in figures if learning.unweighted(name) not in figures]
    names.sort(key=lambda name: groups.index(name.partition("/")[0]))
    none = {"first": None, "last": None}
    rows = []
    for name in names:
        weighted = figures.get(name + learning.WEIGHTED, none)
        rows.append([name, *(figures[name][end] for end in none), *(weighted[end] for end in none)])
    return rows


def training_heads(found: Mapping[str, Any]) -> list[str]:
    """Of `training`: the metrics that any task has."""
    known = [
        key for key in learning.TRAINING if any(key in of_task for of_task in found["training"].values())
    ]
    return ["task", *known]


def training(found: Mapping[str, Any]) -> list[list[Any]]:
    """The last values of each task's training metrics."""
    return [
        [task, *(figures.get(key) for key in training_heads(found)[1:])]
        for task, figures in found["training"].items()
    ]


def failures(found: Mapping[str, Any]) -> list[list[Any]]:
    """What was counted, task by task."""
    return [[task, key, count] for task, counts in found["failures"].items() for key, count in counts.items()]


def scorers(found: Mapping[str, Any]) -> list[list[Any]]:
    """Of each scorer: the texts it was asked about, those it failed on and why, and the requests it took."""
    return [
        [
            name,
            counts["asked"],
            counts["scored"],
            counts["asked"] - counts["scored"],
            ", ".join(f"{reason} {count}" for reason, count in counts["failed"].items()) or "–",
            counts["requests"],
        ]
        for name, counts in found["scorers"].items()
    ]
