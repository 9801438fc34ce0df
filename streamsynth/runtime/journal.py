"""Append-only journals: one JSON object a line.

A checkpoint remembers the byte lengths of a run's journals. What a killed run wrote after its last
checkpoint is cut off with `Journal.truncate` on resume and written again, so that a resumed run leaves
the very bytes of an uninterrupted one.
"""

from __future__ import annotations

import json
import math
import os
import pathlib
import tempfile
from collections.abc import Mapping
from typing import Any, Self

import numpy as np

from streamsynth.errors import UserError
from streamsynth.runtime import files


class Journal:
    """An append-only JSONL file. Use it as a context manager, or call `close`.

    A line without its newline at the end of an existing file (a crash in the middle of a write) is cut
    off on opening, since the next record would otherwise be glued to it.

    A bucket cannot append: there the journal grows in a local temporary file, and every `flush` replaces
    the object by the whole of it.
    """

    def __init__(self, path: files.PathLike):
        self.path = files.as_path(path)
        self._local = self.path  # what is appended to
        is_new = not self.path.exists()
        if files.is_local(self.path):
            self.path.parent.mkdir(parents=True, exist_ok=True)
        else:
            descriptor, name = tempfile.mkstemp(prefix="streamsynth-", suffix=".jsonl")
            os.close(descriptor)
            self._local = pathlib.Path(name)
            if not is_new:
                self._local.write_bytes(self.path.read_bytes())
        self._stored = None if is_new else files.size(self.path)  # length of the object in a bucket
        self._file = open(self._local, "ab")  # noqa: SIM115 (closed by `close`)
        if not is_new:
            os.ftruncate(self._file.fileno(), _whole_lines(self._local))
        elif files.is_local(self.path):
            files.sync_folder(self.path.parent)

    def append(self, record: Mapping[str, Any]) -> None:
        """Appends one record; it is on disk for sure after the next `flush`.

        Numpy scalars and arrays become plain numbers and lists. NaN and infinities become null, since
        JSON knows neither. Raises TypeError for anything else that JSON does not know; a `jax.Array`
        is among that, so that no record hides a fetch from the device.
        """
        line = json.dumps(_plain(record), ensure_ascii=False, allow_nan=False, separators=(",", ":"))
        self._file.write(line.encode() + b"\n")

    def flush(self) -> None:
        """Brings all appended records to disk, or to the bucket."""
        if files.is_local(self.path):
            self._file.flush()
            os.fsync(self._file.fileno())
        elif self.size() != self._stored:  # lengths tell: it only grows, but for `truncate`, which flushes
            files.atomic_write(self.path, self._local.read_bytes())
            self._stored = self.size()

    def size(self) -> int:
        """Length in bytes, all appended records counted."""
        self._file.flush()
        return os.fstat(self._file.fileno()).st_size

    def truncate(self, length: int) -> None:
        """Cuts the journal back to `length` bytes, a value that `size` once gave.

        Raises UserError where the file is shorter than that, or where `length` does not end a line.
        """
        size = self.size()
        if size < length:
            raise UserError(
                f"{self.path} has {size} bytes but the checkpoint counts on {length}: the file was cut "
                "or replaced; put the original back or start in a new workdir."
            )
        if length > 0:
            with open(self._local, "rb") as file:
                file.seek(length - 1)
                if file.read(1) != b"\n":
                    raise UserError(
                        f"{self.path} has no line end at byte {length}, where the checkpoint expects one: "
                        "the file was edited; put the original back or start in a new workdir."
                    )
        os.ftruncate(self._file.fileno(), length)
        self.flush()

    def close(self) -> None:
        self.flush()
        self._file.close()
        if self._local is not self.path:
            self._local.unlink()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc_info) -> None:
        self.close()


def read(path: files.PathLike) -> list[dict[str, Any]]:
    """All records of a journal, in order; none where the file does not exist.

    A last line without its newline is a torn write and is left out. Raises UserError naming file and
    line for any other line that is not a JSON object.
    """
    path = files.as_path(path)
    if not path.exists():
        return []
    records = []
    # Not splitlines(): a text field may hold characters that Python takes for line ends.
    for number, line in enumerate(path.read_bytes().split(b"\n")[:-1], start=1):
        try:
            record = json.loads(line)
        except ValueError:
            record = None
        if not isinstance(record, dict):
            raise UserError(
                f"{path}, line {number} is not a JSON object: the journal was edited or damaged; put the "
                "original back or remove that line."
            )
        records.append(record)
    return records


def _whole_lines(path: pathlib.Path) -> int:
    """Bytes up to and including the last newline."""
    block = 1 << 16
    with open(path, "rb") as file:
        end = file.seek(0, os.SEEK_END)
        while end > 0:
            start = max(0, end - block)
            file.seek(start)
            newline = file.read(end - start).rfind(b"\n")
            if newline >= 0:
                return start + newline + 1
            end = start
    return 0


def _plain(value: Any) -> Any:
    """The same value out of what `json` writes without a hook, with null for NaN and infinities."""
    if isinstance(value, (np.ndarray, np.generic)):
        return _plain(value.tolist())
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    return value
