"""The journal of a scorer: every answer and every failure, on disk before it is used.

One record for each attempt at a text:

    {"purpose": "rollout", "steps": [3], "sample": 17, "digest": ..., "score": 0.7, "request": 1}
    {"purpose": "rollout", "steps": [3], "sample": 18, "digest": ..., "failed": "timeout", "attempt": 1,
     "again": true, "request": 0}

Sample n belongs to prompt n // G. "again" says that another attempt was to follow; "request" is 1 in the
first record of a request, so that their sum is what was spent. Unlike a run's other journals it is not cut
back to the last checkpoint: a resumed run finds its answers here and does not ask again.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any

from streamsynth.runtime import journal
from streamsynth.runtime.files import PathLike

Where = tuple[str | int, ...]  # (purpose, *steps)
Record = Mapping[str, Any]


class Records:
    """What one scorer has answered so far. The newest record of a place counts."""

    def __init__(self, path: PathLike | None):
        """Reads the journal at `path`, where there is one; None keeps nothing on disk."""
        self._path, self._journal = path, None
        self._found: dict[Where, Record] = {}
        self.requests = 0
        for record in journal.read(path) if path else ():
            self._take(record)

    def find(self, where: Where, sample: int, digest: str) -> Record | None:
        """The newest record of a sample, if it is about the same text."""
        record = self._found.get((*where, sample))
        return record if record is not None and record["digest"] == digest else None

    def write(self, records: Iterable[Record]) -> None:
        """Takes in records; when it returns, they are on disk. Those of no place are only counted."""
        records = list(records)
        placed = [record for record in records if record["purpose"]]
        if self._path is not None and placed:
            if self._journal is None:
                self._journal = journal.Journal(self._path)
            for record in placed:
                self._journal.append(record)
            self._journal.flush()
        for record in records:
            self._take(record)

    def _take(self, record: Record) -> None:
        self.requests += record["request"]
        if record["purpose"]:
            self._found[(record["purpose"], *record["steps"], record["sample"])] = record


def digest(text: str, label: str) -> str:
    """32 hex digits that follow from what was scored."""
    return hashlib.sha256(json.dumps([text, label]).encode()).hexdigest()[:32]


def tally(records: Iterable[Record]) -> dict[str, Any]:
    """For the report, from a journal: {"asked", "scored", "failed": {reason: texts}, "requests"}.

    A text that was scored in the end did not fail.
    """
    newest, requests = {}, 0
    for record in records:
        requests += record["request"]
        newest[(record["purpose"], *record["steps"], record["sample"])] = record
    failed = Counter(record["failed"] for record in newest.values() if "failed" in record)
    return {
        "asked": len(newest),
        "scored": len(newest) - failed.total(),
        "failed": dict(sorted(failed.items())),
        "requests": requests,
    }
