"""From the kept rows of a task to its data set."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from streamsynth.dataset import card
from streamsynth.dataset.balance import Select, balanced, best, best_first
from streamsynth.dataset.formats import write_dataset
from streamsynth.dataset.near_duplicates import NearDuplicates
from streamsynth.dataset.rows import Row
from streamsynth.runtime.files import as_path, atomic_write
from streamsynth.tasks.splits import normalise
from streamsynth.tasks.task import Task


def select(
    task: Task,
    rows: Sequence[Row],
    *,
    per_label: int | None = None,
    threshold: float = 0.8,
    choose: Select = best,
) -> tuple[list[Row], dict[str, Any]]:
    """Drops test texts and near-duplicates, and balances the labels.

    A pure function of its arguments. Of two near-duplicates, whatever their labels, the better one stays. The
    test texts have no say in anything but this: a row that repeats one is dropped and counted. A question
    with another answer is the same text.

    Args:
      task: the task that the rows were written for.
      rows: the kept rows, in the order in which they were written.
      per_label: at most so many rows a label; None takes as many as the scarcest label has.
      threshold: word-bigram Jaccard similarity from which two texts are near-duplicates.
      choose: which rows of a label are taken, where there are more than are wanted.

    Returns:
      The rows as they are written, and a summary that fits into JSON: "kept" (rows given), "test_overlap",
      "near_duplicates" and "unbalanced" (rows dropped by each), "rows" (left), "per_label" (left by label),
      "missing_labels", "threshold", "chosen_by" ("quality" or "log-volume") and "mean_quality" (None without
      rows).
    """
    test_texts = {normalise(task.identity(example.text)) for example in task.test}
    own = [row for row in rows if normalise(task.identity(row.text)) not in test_texts]
    index = NearDuplicates(threshold)
    different = []
    for row in best_first(own):
        identity = task.identity(row.text)
        if not index.seen(identity):
            index.add(identity)
            different.append(row)
    chosen = balanced(different, per_label, choose)
    counts = Counter(row.label for row in chosen)
    summary = {
        "kept": len(rows),
        "test_overlap": len(rows) - len(own),
        "near_duplicates": len(own) - len(different),
        "unbalanced": len(different) - len(chosen),
        "rows": len(chosen),
        "per_label": {label: counts[label] for label in task.labels},
        "missing_labels": [label for label in task.labels if not counts[label]],
        "threshold": threshold,
        "chosen_by": "quality" if choose is best else "log-volume",
        "mean_quality": sum(row.quality for row in chosen) / len(chosen) if chosen else None,
    }
    return chosen, summary


def export(
    task: Task,
    rows: Sequence[Row],
    directory: str | os.PathLike[str],
    *,
    per_label: int | None = None,
    threshold: float = 0.8,
    choose: Select = best,
    config_summary: Mapping[str, Any],
) -> dict[str, Any]:
    """Writes the data set of a task: train.jsonl, task.json and README.md.

    Args:
      task, rows, per_label, threshold, choose: as in `select`.
      directory: the folder to write into; what it holds under these names is replaced.
      config_summary: what the card tells of the config, by key.

    Returns:
      The summary of `select`.
    """
    chosen, summary = select(task, rows, per_label=per_label, threshold=threshold, choose=choose)
    write_dataset(directory, chosen, task)
    atomic_write(as_path(directory) / "README.md", card.render(task, chosen, summary, config_summary))
    return summary
