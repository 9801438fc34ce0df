"""A run that is killed and started again leaves what it would have left, bit for bit."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import runs

from streamsynth.runtime.checkpoint import Checkpoints

# The steps of the smallest run: 0 evaluates, 1 measures, 2-4 learn, 5 ends turn 1, 6 evaluates, 7 measures,
# 8-10 learn, 11 ends turn 2, 12 evaluates. Every second one, and each that is no step of a turn, is saved.
MID_TURN, MID_SECOND_TURN = 4, 10


def kill(process: subprocess.Popen, workdir: Path, until: Callable[[], bool], delay: float = 0.0) -> None:
    """Kills a command that was started once `until` is true."""
    while not until():
        assert process.poll() is None, process.stderr.read()[-3000:]
        time.sleep(0.001)
    time.sleep(delay)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert process.returncode == -signal.SIGKILL
    assert not (workdir / "summary.json").exists()


def complete(workdir: Path) -> list[int]:
    """The complete checkpoints, oldest first."""
    names = [path.name for path in (workdir / "checkpoints").glob("*")]
    return sorted(int(name) for name in names if name.isdecimal())


def in_flight(workdir: Path) -> list[int]:
    """The checkpoints that are being written, or that a kill left half-written."""
    return [int(path.name.partition(".")[0]) for path in (workdir / "checkpoints").glob("*-tmp")]


def kill_after_checkpoint(argv: list[str], workdir: Path, step: int, delay: float = 0.0) -> None:
    """Starts the command and kills it once checkpoint `step` or a later one is there."""
    kill(runs.start(argv), workdir, lambda: max(complete(workdir), default=-1) >= step, delay)


def kill_in_checkpoint(argv: list[str], workdir: Path, step: int) -> None:
    """Starts the command and kills it while checkpoint `step` or a later one is written."""
    kill(runs.start(argv), workdir, lambda: max(in_flight(workdir), default=-1) >= step)
    [half] = [step for step in in_flight(workdir) if step > max(complete(workdir), default=-1)]
    assert half >= step


def test_three_kills_and_a_half_written_checkpoint(finished, tmp_path):
    """While a checkpoint is written, at a random moment, while another is; then the newest is damaged."""
    workdir = tmp_path / "run"
    argv = runs.arguments(finished.cache, workdir)
    kill_in_checkpoint(argv, workdir, MID_TURN)
    kill_after_checkpoint(argv, workdir, MID_TURN + 1, delay=random.Random(0).uniform(0, 0.5))
    kill_in_checkpoint(argv, workdir, MID_SECOND_TURN)
    _, newest = complete(workdir)[-2:]
    arrays = workdir / "checkpoints" / str(newest) / "state"
    largest = max(
        (path for path in arrays.rglob("*") if path.is_file()), key=lambda path: path.stat().st_size
    )
    os.truncate(largest, largest.stat().st_size // 2)
    said = runs.finish(argv)
    assert f"damaged: checkpoint {newest} (state/" in said
    assert (workdir / "checkpoints" / f"{newest}.damaged").is_dir()
    assert runs.outcome(workdir) == runs.outcome(finished.workdir)


@pytest.mark.slow
def test_stopped_by_sigterm(finished, tmp_path):
    argv = runs.arguments(finished.cache, tmp_path / "run")
    process = runs.start(argv)
    while not (tmp_path / "run" / "checkpoints" / str(MID_TURN)).exists():
        assert process.poll() is None, process.stderr.read()[-3000:]
        time.sleep(0.005)
    process.send_signal(signal.SIGTERM)
    _, stderr = process.communicate()
    assert process.returncode == 75, stderr[-3000:]
    assert stderr.splitlines()[-1].startswith("streamsynth: stopped by SIGTERM after step")
    runs.finish(argv)
    assert runs.outcome(tmp_path / "run") == runs.outcome(finished.workdir)


@pytest.mark.slow
def test_two_runs_without_a_kill_agree(finished, tmp_path):
    runs.finish(runs.arguments(finished.cache, tmp_path / "run"))
    assert runs.outcome(tmp_path / "run") == runs.outcome(finished.workdir)


@pytest.mark.slow
@pytest.mark.parametrize("seed", [0, 1])
def test_killed_five_times(finished, tmp_path, seed):
    rng = random.Random(seed)
    argv = runs.arguments(finished.cache, tmp_path / "run")
    for step in sorted(rng.sample(range(1, 12), 5)):
        kill_after_checkpoint(argv, tmp_path / "run", step, delay=rng.uniform(0, 0.3))
    runs.finish(argv)
    assert runs.outcome(tmp_path / "run") == runs.outcome(finished.workdir)


@pytest.mark.slow
def test_killed_while_a_batch_is_written_for_the_next_step(finished, tmp_path):
    """With a lag and length buckets: after a kill, and after SIGTERM, whose checkpoint has the batch too."""

    def argv(name: str) -> list[str]:
        more = ("--config.rollout.lag=1", "--config.rollout.buckets=40,45")
        return runs.arguments(finished.cache, tmp_path / name, *more)

    def pending(step: int) -> bool:
        return "pending" in Checkpoints(tmp_path / "run" / "checkpoints").shapes(step)

    runs.finish(argv("whole"))
    kill_after_checkpoint(argv("run"), tmp_path / "run", MID_TURN)
    [*_, last] = complete(tmp_path / "run")
    assert last > MID_TURN or pending(last)
    process = runs.start(argv("run"))
    while max(complete(tmp_path / "run")) < MID_SECOND_TURN - 2:  # its first step, which only measures
        assert process.poll() is None, process.stderr.read()[-3000:]
        time.sleep(0.001)
    process.send_signal(signal.SIGTERM)
    process.communicate()
    assert process.returncode == 75
    [*_, last] = complete(tmp_path / "run")
    assert pending(last) == (last in (MID_SECOND_TURN - 1, MID_SECOND_TURN))
    runs.finish(argv("run"))
    assert not pending(max(complete(tmp_path / "run")))
    assert runs.outcome(tmp_path / "run") == runs.outcome(tmp_path / "whole")


def test_killed_between_the_config_and_the_policy(finished, tmp_path):
    """The first files of a run: whatever of them is missing is made again by the same command."""
    from streamsynth import api

    workdir = tmp_path / "run"
    workdir.mkdir()
    (workdir / "config.json").write_bytes((finished.workdir / "config.json").read_bytes())
    (workdir / "policy").mkdir()
    (workdir / "policy" / "tokenizer.model").write_bytes(b"")

    class Stop(Exception):
        pass

    with pytest.MonkeyPatch.context() as patch:

        def stop(*args):
            raise Stop

        patch.setattr(api.train_lib, "train", stop)
        with pytest.raises(Stop):
            api.train(runs.config(finished.cache), workdir)
    for name in ("policy.json", "params.safetensors", "tokenizer.model"):
        assert (workdir / "policy" / name).read_bytes() == (finished.workdir / "policy" / name).read_bytes()
