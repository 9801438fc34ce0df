"""A whole run of two processes: stopped, killed, failing, and beside the run of one process."""

from __future__ import annotations

import dataclasses
import random
import signal
import subprocess
import textwrap
import time
from pathlib import Path
from typing import Any

import numpy as np
import processes
import pytest
import runs

pytestmark = pytest.mark.slow

# Half the time to compile, which is nearly all that a process does each time it starts.
_QUICK = {"JAX_DISABLE_MOST_OPTIMIZATIONS": "1"}
_KILLS = 20
_SEEDS = 3  # of the moments


@dataclasses.dataclass(frozen=True)
class Whole:
    """The run of two processes that nothing interrupted."""

    workdir: Path
    cache: Path
    seconds: float

    def start(self, workdir: Path) -> list[subprocess.Popen]:
        """The same command for another folder."""
        argv = processes.train(self.cache, workdir, **processes.FEWER_PROGRAMS)
        return processes.start(argv, logs(workdir), **_QUICK)


def logs(workdir: Path) -> Path:
    return workdir.with_name(f"{workdir.name}_logs")


def said(workdir: Path, process: int) -> str:
    return (logs(workdir) / f"{process}.log").read_text()


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Whole:
    folder = tmp_path_factory.mktemp("two")
    made = Whole(folder / "run", folder / "cache", 0.0)
    start = time.monotonic()
    assert processes.finish(made.start(made.workdir), 900) == [0, 0], said(made.workdir, 0)[-3000:]
    return dataclasses.replace(made, seconds=time.monotonic() - start)


def last_step(workdir: Path) -> int:
    steps = [int(path.name) for path in (workdir / "checkpoints").glob("*") if path.name.isdecimal()]
    return max(steps, default=-1)


def running(started: list[subprocess.Popen]) -> bool:
    return all(process.poll() is None for process in started)


def until(started: list[subprocess.Popen], workdir: Path, step: int) -> None:
    """Waits for checkpoint `step` or a later one."""
    while last_step(workdir) < step:
        assert running(started), said(workdir, 0)[-3000:]
        time.sleep(0.02)


def test_rows_are_written_once_and_by_the_first_process(whole):
    rows = (whole.workdir / "kept" / "market_1.jsonl").read_text().splitlines()
    assert rows and len(set(rows)) == len(rows)
    steps = [record["step"] for record in runs.read_jsonl(whole.workdir / "metrics.jsonl")]
    assert steps == sorted(set(steps))
    assert len(list((whole.workdir / "tensorboard").iterdir())) == 1
    assert "turn 1/1 market_1 3/3" in said(whole.workdir, 0)
    assert "turn 1/1" not in said(whole.workdir, 1)


def test_sigterm_to_one_stops_all_after_the_same_step_and_the_same_command_goes_on(whole, tmp_path):
    workdir = tmp_path / "run"
    for process, step in ((1, 2), (0, 4)):
        started = whole.start(workdir)
        until(started, workdir, step)
        started[process].send_signal(signal.SIGTERM)
        assert processes.finish(started, 600) == [75, 75]
        sentence = f"streamsynth: stopped by SIGTERM after step {last_step(workdir) - 1}, which is saved"
        assert all(sentence in said(workdir, p) for p in range(2))
        assert not (workdir / "summary.json").exists()
    assert processes.finish(whole.start(workdir), 600) == [0, 0]
    assert runs.outcome(workdir) == runs.outcome(whole.workdir)


def test_sigterm_to_another_one_while_the_first_pretrains(tmp_path):
    workdir = tmp_path / "run"
    argv = processes.train(tmp_path / "cache", workdir, pretrain__steps="5000")
    started = processes.start(argv, logs(workdir), **_QUICK)
    while "pretraining" not in said(workdir, 0):
        assert running(started), said(workdir, 0)[-3000:]
        time.sleep(0.05)
    started[1].send_signal(signal.SIGTERM)
    assert processes.finish(started, 60) == [75, 75]
    assert "stopped by SIGTERM while pretraining, of which nothing is saved" in said(workdir, 1)


@pytest.mark.parametrize("seed", range(_SEEDS))
def test_killed_at_random_moments(whole, tmp_path, seed):
    """Of all seeds together `_KILLS` SIGKILLs. The process that is left ends by itself within a minute.

    Half of them come while the processes start and compile, the others once they have saved a step.
    """
    rng = random.Random(seed)
    kills = _KILLS // _SEEDS + (seed < _KILLS % _SEEDS)
    killed, attempt, after_steps = 0, 0, 0
    workdir = tmp_path / "run_0"
    while killed < kills:
        before, started = last_step(workdir), whole.start(workdir)
        if killed % 2:
            while running(started) and last_step(workdir) == before:
                time.sleep(0.02)
        moment = time.monotonic() + rng.uniform(0, 3 if killed % 2 else whole.seconds / 2)
        while running(started) and time.monotonic() < moment:
            time.sleep(0.02)
        victim, saved = rng.randrange(2), last_step(workdir) > before
        started[victim].kill()
        start = time.monotonic()
        codes = processes.finish(started, 100)
        if codes[victim] == -signal.SIGKILL:
            assert time.monotonic() - start < 60, said(workdir, 1 - victim)[-3000:]
            killed, after_steps = killed + 1, after_steps + saved
            continue
        # It was done before it could be killed: the next kills are of another run.
        assert codes == [0, 0], said(workdir, 1 - victim)[-3000:]
        assert runs.outcome(workdir) == runs.outcome(whole.workdir)
        attempt += 1
        workdir = tmp_path / f"run_{attempt}"
    assert after_steps
    assert processes.finish(whole.start(workdir), 900) == [0, 0], said(workdir, 0)[-3000:]
    assert runs.outcome(workdir) == runs.outcome(whole.workdir)


def test_one_process_with_as_many_devices_gives_the_same(tmp_path):
    """Texts, rows and data sets to the byte; sums are taken in another order, so that numbers are close."""
    found = {}
    for count in (1, 2):
        workdir = tmp_path / f"run_{count}"
        argv = processes.train(tmp_path / "cache", workdir)
        started = processes.start(argv, logs(workdir), count, **_QUICK)
        assert processes.finish(started, 900) == [0] * count, said(workdir, 0)[-3000:]
        found[count] = {name: load(workdir) for name, load in _READ.items()}
    one, two = found[1], found[2]
    assert len(one["rows"]) > 20
    assert [without_scores(row) for row in one["rows"]] == [without_scores(row) for row in two["rows"]]
    assert one["evaluations"] == two["evaluations"]
    assert one["state"].keys() == two["state"].keys()
    for name in one["state"]:
        if name != "journals":  # bytes of numbers that are written with all their digits
            np.testing.assert_allclose(one["state"][name], two["state"][name], atol=1e-5, err_msg=name)
    for before, after in zip(one["metrics"], two["metrics"], strict=True):
        assert before.keys() == after.keys()
        for name, value in before.items():
            if isinstance(value, float):
                assert after[name] == pytest.approx(value, abs=1e-5, rel=1e-4), name


def without_scores(row: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in row.items() if name != "scores"}


_READ = {
    "rows": lambda folder: runs.read_jsonl(folder / "kept" / "market_1.jsonl"),
    "evaluations": lambda folder: runs.read_jsonl(folder / "evaluations.jsonl"),
    "metrics": lambda folder: runs.read_jsonl(folder / "metrics.jsonl"),
    "state": runs.state,
}


_FAILING = """
    import sys, time
    from streamsynth.runtime import hosts

    asked = hosts.stop_asked

    def fails(what, facts=None):
        if hosts.index() == 1 and what == "step 1":
            time.sleep(8.0)  # while the other one waits for it
            raise OSError("the disk of this host is full")
        return asked(what, facts)

    hosts.stop_asked = fails
    from streamsynth.main import main

    sys.exit(main(sys.argv[1:]))
"""


def test_a_process_that_stalls_and_then_raises_ends_the_run_with_its_message(whole, tmp_path):
    workdir = tmp_path / "run"
    keys = {**processes.FEWER_PROGRAMS, "hosts__stall_seconds": "4"}
    command = processes.train(whole.cache, workdir, **keys)[2:]
    started = processes.start(["-c", textwrap.dedent(_FAILING), *command], logs(workdir), **_QUICK)
    assert processes.finish(started, 600) == [1, 1]
    for process in range(2):
        assert f"no progress for 4 s; process {process} is here:" in said(workdir, process)
    assert "in fails" in said(workdir, 1) and "in stop_asked" in said(workdir, 0)
    assert "process 1 failed: OSError: the disk of this host is full" in said(workdir, 0)


def test_two_processes_synthesize_and_evaluate(whole, tmp_path):
    output = tmp_path / "rows"
    argv = ["-m", "streamsynth.main", "synthesize", f"--workdir={whole.workdir}", "--task=market_1"]
    started = processes.start([*argv, "--rows=8", f"--output={output}"], tmp_path / "synthesize", **_QUICK)
    assert processes.finish(started, 600) == [0, 0]
    rows = runs.read_jsonl(output / "train.jsonl")
    assert len(rows) >= 8 and len({row["text"] for row in rows}) == len(rows)
    argv = ["-m", "streamsynth.main", "evaluate", f"--workdir={whole.workdir}"]
    assert processes.finish(processes.start(argv, tmp_path / "evaluate", **_QUICK), 600) == [0, 0]
    printed = [(tmp_path / "evaluate" / f"{process}.log").read_text() for process in range(2)]
    assert "market_1: student" in printed[0] and "market_1: student" not in printed[1]
