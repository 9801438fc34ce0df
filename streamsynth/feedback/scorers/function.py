"""Asks a Python function, in a process of its own.

A process and not a thread: a thread that hangs cannot be ended, keeps its memory and the interpreter's lock,
and a crash in it would take the run along. A process can be killed with all that it started, and the next
request begins with a fresh one. What it costs is that the function must be importable by name, which
"module:function" asks for anyway.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
import weakref
from collections.abc import Sequence
from typing import Any

from streamsynth.errors import UserError
from streamsynth.feedback.scorers.reply import Reply, failure, read_scores
from streamsynth.tasks.task import Task

# To import a function's module, which may load a model.
_START_SECONDS = 600.0


class Function:
    """The function of a spec "package.module:function"; its process starts with the first request."""

    concurrency = 1

    def __init__(self, spec: str, *, batch: int, timeout: float):
        self.spec, self.batch, self.timeout = spec, batch, timeout
        self._process: subprocess.Popen | None = None
        self._end: weakref.finalize | None = None

    def probe(self) -> None:
        """Starts the process and ends it. Raises UserError where the function cannot be imported."""
        reply = self._start()
        self._stop()
        if reply is None or not reply.get("ready"):
            said = (reply or {}).get("error", "its process ended, or took too long")
            raise UserError(
                f"feedback.scorers: cannot import {self.spec} ({said}): check the name, that its folder is "
                "on PYTHONPATH, and that it takes (texts) or (texts, labels)"
            )

    def ask(self, task: Task, texts: Sequence[str], labels: Sequence[str]) -> Reply:
        """The function's scores of some texts; whatever it does, within the timeout."""
        del task
        if self._process is None and not (self._start() or {}).get("ready"):
            self._stop()
            return failure("died", len(texts), "its process did not start")
        request = json.dumps({"texts": list(texts), "labels": list(labels)}).encode() + b"\n"
        said, late = self._exchange(request, self.timeout)
        if said is None:
            self._stop()
            reason = "timeout" if late else "died"
            return failure(reason, len(texts), f"no answer in {self.timeout:g} s" if late else "")
        if "error" in said:
            return failure("raised", len(texts), said["error"])
        return read_scores(said["scores"], len(texts))

    def _start(self) -> dict[str, Any] | None:
        """A fresh process, and the first that it says."""
        self._process = subprocess.Popen(
            # -P: the folder that the run was started in is on the path only if it is on the run's.
            [sys.executable, "-P", "-m", "streamsynth.feedback.scorers.worker", self.spec],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
            start_new_session=True,  # a group of its own, to be killed as one
        )
        self._end = weakref.finalize(self, _kill, self._process)  # also at the run's end
        return self._exchange(b"", _START_SECONDS)[0]

    def _stop(self) -> None:
        self._end()
        self._process = None

    def _exchange(self, request: bytes, seconds: float) -> tuple[dict[str, Any] | None, bool]:
        """The next line that the process says (None: it ended first), and whether it was killed for time."""
        late = threading.Event()

        def give_up() -> None:
            late.set()
            _kill_group(self._process)

        timer = threading.Timer(seconds, give_up)
        timer.daemon = True
        timer.start()
        try:
            self._process.stdin.write(request)
            self._process.stdin.flush()
            line = self._process.stdout.readline()
        except OSError:  # its end of the pipe is closed
            line = b""
        finally:
            timer.cancel()
        return (json.loads(line) if line.endswith(b"\n") else None), late.is_set()


def _kill(process: subprocess.Popen) -> None:
    """Ends a process and whatever it started, and waits for its end."""
    _kill_group(process)
    process.wait()
    for pipe in (process.stdin, process.stdout):
        with contextlib.suppress(OSError):  # a request that it did not take
            pipe.close()


def _kill_group(process: subprocess.Popen) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
