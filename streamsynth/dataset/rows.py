"""One kept row: a synthetic text, its label, and where both came from."""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Iterable, Mapping
from typing import Any

from streamsynth.errors import UserError
from streamsynth.runtime.files import as_path, atomic_write
from streamsynth.tasks.task import join_fields


@dataclasses.dataclass(frozen=True)
class Row:
    """A text that passed the gates, with its provenance.

    Attributes:
      fields: the text, or the two texts of a pair.
      label: the label that was asked for.
      pattern: name of the synthesis strategy.
      step: training step at which the row was written.
      policy_version: number of updates that the writing policy had seen.
      examples: ids of the examples that the prompt showed.
      scores: every part of the score by name; finite numbers only.
      attributes: the values of the task's attributes that were asked for, by name.
    """

    fields: tuple[str, ...]
    label: str
    pattern: str
    step: int
    policy_version: int
    examples: tuple[str, ...]
    scores: dict[str, float]
    attributes: dict[str, str] = dataclasses.field(default_factory=dict)

    @property
    def text(self) -> str:
        """The fields as one string, as the policy wrote them."""
        return join_fields(self.fields)

    @property
    def quality(self) -> float:
        """The score part "quality", 0 where the row has none."""
        return self.scores.get("quality", 0.0)

    def to_json(self) -> dict[str, Any]:
        """Plain JSON types only (numbers of NumPy become Python's), equal again after `from_json`."""
        return {
            "fields": list(self.fields),
            "label": self.label,
            **self.provenance(),
        }

    def provenance(self) -> dict[str, Any]:
        """Everything but the text and its label, in plain JSON types."""
        return {
            "pattern": self.pattern,
            "step": int(self.step),
            "policy_version": int(self.policy_version),
            "examples": list(self.examples),
            "scores": {name: float(value) for name, value in self.scores.items()},
            **({"attributes": dict(self.attributes)} if self.attributes else {}),
        }

    @classmethod
    def from_json(cls, record: Mapping[str, Any]) -> Row:
        """Inverse of `to_json`. Raises KeyError where a key is missing; other keys are ignored."""
        return cls(
            fields=tuple(record["fields"]),
            label=record["label"],
            pattern=record["pattern"],
            step=record["step"],
            policy_version=record["policy_version"],
            examples=tuple(record["examples"]),
            scores=dict(record["scores"]),
            attributes=dict(record.get("attributes", {})),
        )


def to_jsonl(records: Iterable[Mapping[str, Any]]) -> str:
    """One JSON object a line. Raises ValueError for NaN and infinity, which JSON does not have."""
    return "".join(json.dumps(record, ensure_ascii=False, allow_nan=False) + "\n" for record in records)


def write_rows(path: str | os.PathLike[str], rows: Iterable[Row]) -> None:
    """Writes rows to a JSONL file; the file is there whole or not at all."""
    atomic_write(path, to_jsonl(row.to_json() for row in rows))


def read_rows(path: str | os.PathLike[str]) -> list[Row]:
    """Reads what `write_rows` wrote. Raises UserError with file and line for anything else."""
    rows = []
    try:
        lines = as_path(path).read_bytes().split(b"\n")
    except OSError as error:
        raise UserError(f"cannot read the rows in {path}: {error.strerror or error}") from error
    for number, line in enumerate(lines, start=1):
        if not line:
            continue
        try:
            rows.append(Row.from_json(json.loads(line)))
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(f"{path}, line {number}, is no row of a data set: remove it") from error
    return rows
