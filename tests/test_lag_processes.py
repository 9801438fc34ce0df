"""Two processes with a lag and length buckets: killed while a batch is written, and gone on with."""

from __future__ import annotations

import subprocess
import time

import processes
import pytest
import runs

from streamsynth.runtime.checkpoint import Checkpoints

pytestmark = pytest.mark.slow

_KEYS = {
    **processes.FEWER_PROGRAMS,
    "rollout__lag": "1",
    "rollout__buckets": "40,45",
    "checkpoint__every": "1",
}
_SECOND, _LAST = 3, 5  # checkpoints: after the first step by reward, and after the third and last one


def test_what_two_processes_were_writing_is_taken_up_again(tmp_path):
    def start(name: str) -> list[subprocess.Popen]:
        argv = processes.train(tmp_path / "cache", tmp_path / name, **_KEYS)
        return processes.start(argv, tmp_path / f"{name}_logs", JAX_DISABLE_MOST_OPTIMIZATIONS="1")

    def said(name: str) -> str:
        return (tmp_path / f"{name}_logs" / "0.log").read_text()[-3000:]

    assert processes.finish(start("whole"), 900) == [0, 0], said("whole")
    started, checkpoints = start("run"), Checkpoints(tmp_path / "run" / "checkpoints")
    while (checkpoints.latest_step() or 0) < _SECOND:
        assert all(process.poll() is None for process in started), said("run")
        time.sleep(0.01)
    for process in started:
        process.kill()
    processes.finish(started)
    last = checkpoints.latest_step()
    assert ("pending" in checkpoints.shapes(last)) == (last < _LAST)
    assert processes.finish(start("run"), 900) == [0, 0], said("run")
    assert "pending" not in checkpoints.shapes(checkpoints.latest_step())
    assert runs.outcome(tmp_path / "run") == runs.outcome(tmp_path / "whole")
