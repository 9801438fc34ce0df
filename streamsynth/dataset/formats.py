"""A data set's files: train.jsonl with provenance, and task.json, so that the folder loads as `files:DIR`."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from typing import Any

from streamsynth.dataset.rows import Row, to_jsonl
from streamsynth.runtime.files import as_path, atomic_write
from streamsynth.tasks.task import Task


def write_dataset(directory: str | os.PathLike[str], rows: Sequence[Row], task: Task) -> Any:
    """Writes the rows and the task's description into a folder; each file is there whole or not at all.

    A line of train.jsonl holds the task's fields by name, "label" (not beside a question and its answer),
    "pattern", "step", "policy_version", "examples" (ids of the examples shown), "scores" (by part) and, where
    the task has attributes, "attributes" (the values asked for, by name).

    Returns:
      The path of train.jsonl.
    """
    directory = as_path(directory)
    labelled = task.kind != "qa"
    records = (
        dict(zip(task.fields, row.fields, strict=True))
        | ({"label": row.label} if labelled else {})
        | row.provenance()
        for row in rows
    )
    card = {
        "name": task.name,
        "kind": task.kind,
        "description": task.description,
        "labels": list(task.labels) if labelled else [],
        "fields": list(task.fields),
    }
    train = directory / "train.jsonl"
    atomic_write(train, to_jsonl(records))
    atomic_write(directory / "task.json", json.dumps(card, indent=1, ensure_ascii=False) + "\n")
    return train
