"""The journal of a scorer: every answer and every failure, on disk before it is used.

One record for each attempt at a text:

    {"purpose": "rollout", "steps": [3], "sample": 17, "digest": ..., "score": 0.7, "request": 1}
    {"purpose": "rollout", "steps": [3], "sample": 18, "digest": ..., "failed": "timeout", "attempt": 1,
     "again": true, "request": 0}

Sample n belongs to prompt n // G. "again" says that another attempt was to follow; "request" is 1 in the
first record of a request, so that their sum is what was spent. Unlike a run's other journals it is not cut
back to the last checkpoint: a resumed run finds its answers here and does not ask again.

Each process of a run has a file of its own and writes there what it asked; on starting all read all files, so
that their number may change.
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
    """What one scorer has answered so far. The newest record of a place counts.

    requests: made so far, by all processes before this one started and since then by this one.
    """

    def __init__(self, path: PathLike | None, process: int = 0):
        """Reads the journal at `path`, where there is one, and those of other processes beside it.

        None keeps nothing on disk.
        """
        self._path, self._journal = path and of_process(path, process), None
        self._found: dict[Where, Record] = {}
        self.requests = 0
        self.spent: dict[int, int] = {}  # requests by process, before this one started
        for other, file in files_of(path).items() if path else ():
            before = self.requests
            for record in journal.read(file):
                # Of two processes' records of one text, the later in the order of attempts is newer.
                if not _newer(self._found.get(_place(record)), record):
                    self._take(record)
                else:
                    self.requests += record["request"]
            self.spent[other] = self.requests - before

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
            self._found[_place(record)] = record


def _place(record: Record) -> Where:
    return (record["purpose"], *record["steps"], record["sample"])


def _newer(known: Record | None, record: Record) -> bool:
    """Whether what is known of a place is newer than another record of the same text."""
    if known is None or known["digest"] != record["digest"]:
        return False
    if "score" in known or "score" in record:
        return "score" in known
    return known["attempt"] > record["attempt"]


def of_process(path: Any, process: int) -> Any:
    """Where a process writes the journal at `path`: NAME.jsonl, NAME.1.jsonl, NAME.2.jsonl ..."""
    return path.with_suffix(f".{process}.jsonl") if process else path


def files_of(path: Any) -> dict[int, Any]:
    """The files of the journal at `path` that there are, by process."""
    numbered = {file.suffixes[-2][1:]: file for file in path.parent.glob(f"{path.stem}.*.jsonl")}
    others = {int(number): file for number, file in numbered.items() if number.isdecimal()}
    return {0: path, **dict(sorted(others.items()))}


def read_all(path: Any) -> list[Record]:
    """The records of all processes' files of the journal at `path`."""
    return [record for file in files_of(path).values() for record in journal.read(file)]


def quota(spent: Mapping[int, int], most: int, process: int, count: int) -> int:
    """How many requests a process may still make of `most` in the whole run.

    Each of `count` processes has an equal part, of which is taken what it spent before, and what processes
    spent that are no more. All parts together never come to more than is left.
    """
    parts = [most // count + (p < most % count) for p in range(count)]
    for other, requests in spent.items():
        parts[other % count] -= requests
    parts = [max(0, part) for part in parts]
    left, claimed = max(0, most - sum(spent.values())), sum(parts)
    return parts[process] * left // claimed if claimed > left else parts[process]


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
        if not _newer(newest.get(_place(record)), record):
            newest[_place(record)] = record
    failed = Counter(record["failed"] for record in newest.values() if "failed" in record)
    return {
        "asked": len(newest),
        "scored": len(newest) - failed.total(),
        "failed": dict(sorted(failed.items())),
        "requests": requests,
    }
