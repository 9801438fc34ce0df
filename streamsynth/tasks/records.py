"""From a raw record of a file or a data source to an Example, and what becomes of malformed ones."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping
from typing import Any

from streamsynth.errors import UserError
from streamsynth.tasks.task import FIELD_SEPARATOR, Example

# Columns of a data set that this package wrote; they are no text fields when such a set is read again.
PROVENANCE_COLUMNS = ("pattern", "step", "policy_version", "examples", "scores")


class BadRecord(Exception):
    """Why a record is no example, as the end of a sentence."""


class BadRows:
    """Stops at the first malformed row, or leaves such rows out and counts them.

    Attributes:
      count: rows left out so far.
    """

    def __init__(self, on_bad_row: str):
        self.count = 0
        self._skip = on_bad_row == "skip"

    def found(self, place: str, problem: BadRecord) -> None:
        """Counts the row at `place`, or raises UserError naming it."""
        if not self._skip:
            raise UserError(f'{place}, is bad: {problem}; mend it, or skip such rows with on_bad_row="skip"')
        self.count += 1


def examples_from(
    records: Iterable[tuple[int, Mapping[str, Any] | BadRecord]],
    *,
    part: str,
    place: str,
    fields: tuple[str, ...],
    labels: Collection[str] | None,
    bad_rows: BadRows,
) -> Iterator[Example]:
    """Turns numbered records into examples; the example of record 7 of "train" has the id "train:7".

    Args:
      records: number of the line or row, and the record or what is wrong with it.
      part: name of the split, for the ids.
      place: what comes before the number in a message, such as "news/train.jsonl, line".
      fields: the columns of the text.
      labels: the labels that may occur; None where all may.
      bad_rows: takes the malformed ones.
    """
    for number, record in records:
        try:
            if isinstance(record, BadRecord):
                raise record
            texts = tuple(_text(record, field) for field in fields)
            label = _text(record, "label")
            if labels is not None and label not in labels:
                raise BadRecord(f"the label {label!r} is not among the labels of the task")
        except BadRecord as problem:
            bad_rows.found(f"{place} {number}", problem)
        else:
            yield Example(id=f"{part}:{number}", fields=texts, label=label)


def _text(record: Mapping[str, Any], column: str) -> str:
    """The text in a column, white space collapsed: a prompt shows one example a line."""
    value = record.get(column)
    if value is None:
        raise BadRecord(f"it has no {column!r}")
    if not isinstance(value, str):
        raise BadRecord(f"its {column!r} has the type {type(value).__name__}, not string")
    text = " ".join(value.split())
    if not text:
        raise BadRecord(f"its {column!r} is empty")
    if FIELD_SEPARATOR in text:
        raise BadRecord(f"its {column!r} contains {FIELD_SEPARATOR!r}, which separates the fields of a pair")
    if not text.isascii():
        try:
            text.encode()
        except UnicodeEncodeError as error:  # JSON can write half of a surrogate pair
            raise BadRecord(f"its {column!r} contains a character that UTF-8 cannot hold") from error
    return text
