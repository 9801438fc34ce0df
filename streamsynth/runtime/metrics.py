"""Metric writers with the method names of clu's `MetricWriter`.

clu's own writers need TensorFlow. These take the same calls (`write_scalars`, `write_texts`,
`write_histograms`, `write_hparams`, `flush`, `close`), so a clu writer can stand in for them.
All values are host values: fetch from the device before, in one place.
"""

from __future__ import annotations

import os
import pathlib
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import numpy as np

from streamsynth.runtime import files
from streamsynth.runtime.journal import Journal


class MetricWriter(Protocol):
    """What a writer can do."""

    def write_scalars(self, step: int, scalars: Mapping[str, float]) -> None:
        """Writes numbers by name; a name once per step."""

    def write_texts(self, step: int, texts: Mapping[str, str]) -> None:
        """Writes short texts by name; a name once per step."""

    def write_histograms(
        self, step: int, arrays: Mapping[str, np.ndarray], num_buckets: Mapping[str, int] | None = None
    ) -> None:
        """Writes the distributions of arrays of any shape; 30 buckets unless `num_buckets` says otherwise."""

    def write_hparams(self, hparams: Mapping[str, Any]) -> None:
        """Writes the flat config of the run; once."""

    def flush(self) -> None:
        """Brings everything written so far to disk."""

    def close(self) -> None:
        """Flushes and closes; no call may follow."""


class TensorBoardWriter:
    """Event files that TensorBoard reads.

    A bucket gets a file as a whole with every `flush`, from a temporary folder.

    Args:
      directory: where the event files go.
      purge_step: on resume, the first step that is written anew: TensorBoard then hides what an
        earlier process wrote from that step on.
    """

    def __init__(self, directory: files.PathLike, purge_step: int | None = None):
        from tensorboardX import SummaryWriter  # slow to import, and needed by training alone

        self._bucket = None if files.is_local(directory) else files.as_path(directory)
        self._local = tempfile.mkdtemp(prefix="streamsynth-") if self._bucket else os.fspath(directory)
        self._writer = SummaryWriter(self._local, purge_step=purge_step)

    def write_scalars(self, step: int, scalars: Mapping[str, float]) -> None:
        for name, value in scalars.items():
            self._writer.add_scalar(name, value, step)

    def write_texts(self, step: int, texts: Mapping[str, str]) -> None:
        for name, text in texts.items():
            self._writer.add_text(name, text, step)

    def write_histograms(
        self, step: int, arrays: Mapping[str, np.ndarray], num_buckets: Mapping[str, int] | None = None
    ) -> None:
        for name, array in arrays.items():
            self._writer.add_histogram(name, array, step, bins=(num_buckets or {}).get(name, 30))

    def write_hparams(self, hparams: Mapping[str, Any]) -> None:
        rows = "\n".join(f"| {name} | `{value}` |" for name, value in sorted(hparams.items()))
        # A table, not the hparams plug-in: that one opens a second event file with metrics of its own.
        self._writer.add_text("hparams", f"| key | value |\n| --- | --- |\n{rows}", 0)

    def flush(self) -> None:
        self._writer.flush()
        self._upload()

    def close(self) -> None:
        self._writer.close()
        self._upload()
        if self._bucket:
            shutil.rmtree(self._local)

    def _upload(self) -> None:
        for name in files.names_within(pathlib.Path(self._local)) if self._bucket else ():
            files.atomic_write(self._bucket / name, pathlib.Path(self._local, name).read_bytes())


class JournalWriter:
    """Scalars and texts as one journal line a step: `{"step": 3, "task": "mood", "reward/quality": 0.5}`.

    What is written for one step is merged; the line is appended when the next step begins, or on
    `flush`. Histograms and hyperparameters have their place elsewhere and are not written.
    """

    def __init__(self, journal: Journal):
        self._journal = journal
        self._record: dict[str, Any] = {}

    def write_scalars(self, step: int, scalars: Mapping[str, float]) -> None:
        self._merge(step, scalars)

    def write_texts(self, step: int, texts: Mapping[str, str]) -> None:
        self._merge(step, texts)

    def write_histograms(
        self, step: int, arrays: Mapping[str, np.ndarray], num_buckets: Mapping[str, int] | None = None
    ) -> None:
        del step, arrays, num_buckets

    def write_hparams(self, hparams: Mapping[str, Any]) -> None:
        del hparams

    def flush(self) -> None:
        self._append()
        self._journal.flush()

    def close(self) -> None:
        self._append()
        self._journal.close()

    def _merge(self, step: int, values: Mapping[str, Any]) -> None:
        if self._record and self._record["step"] != step:
            self._append()
        repeated = self._record.keys() & values.keys()
        if repeated:
            raise ValueError(f"step {step}: {', '.join(sorted(repeated))} written twice")
        self._record = {"step": step, **self._record, **values}

    def _append(self) -> None:
        if self._record:
            self._journal.append(self._record)
            self._record = {}


class MultiWriter:
    """Hands every call on to several writers."""

    def __init__(self, writers: Sequence[MetricWriter]):
        self._writers = tuple(writers)

    def write_scalars(self, step: int, scalars: Mapping[str, float]) -> None:
        for writer in self._writers:
            writer.write_scalars(step, scalars)

    def write_texts(self, step: int, texts: Mapping[str, str]) -> None:
        for writer in self._writers:
            writer.write_texts(step, texts)

    def write_histograms(
        self, step: int, arrays: Mapping[str, np.ndarray], num_buckets: Mapping[str, int] | None = None
    ) -> None:
        for writer in self._writers:
            writer.write_histograms(step, arrays, num_buckets)

    def write_hparams(self, hparams: Mapping[str, Any]) -> None:
        for writer in self._writers:
            writer.write_hparams(hparams)

    def flush(self) -> None:
        for writer in self._writers:
            writer.flush()

    def close(self) -> None:
        for writer in self._writers:
            writer.close()
