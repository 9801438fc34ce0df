"""A run that is killed and started again leaves what it would have left, bit for bit."""

from __future__ import annotations

import random
import signal
import time
from pathlib import Path

import pytest
import runs

# The steps of the smallest run: 0 evaluates, 1 measures, 2-4 learn, 5 ends turn 1, 6 evaluates, 7 measures,
# 8-10 learn, 11 ends turn 2, 12 evaluates. Every second one, and each that is no step of a turn, is saved.
MID_TURN, MID_SECOND_TURN = 4, 10


def kill_after_checkpoint(argv: list[str], workdir: Path, step: int, delay: float = 0.0) -> None:
    """Starts the command and kills it once checkpoint `step` or a later one is there."""
    process = runs.start(argv)
    while not any(
        path.name.isdecimal() and int(path.name) >= step for path in (workdir / "checkpoints").glob("*")
    ):
        assert process.poll() is None, process.stderr.read()[-3000:]
        time.sleep(0.005)
    time.sleep(delay)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert process.returncode == -signal.SIGKILL
    assert not (workdir / "summary.json").exists()


def test_killed_in_the_middle_of_a_turn(finished, tmp_path):
    argv = runs.arguments(finished.cache, tmp_path / "run")
    kill_after_checkpoint(argv, tmp_path / "run", MID_TURN)
    runs.finish(argv)
    assert runs.outcome(tmp_path / "run") == runs.outcome(finished.workdir)


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
def test_killed_while_the_second_task_is_learned(finished, tmp_path):
    argv = runs.arguments(finished.cache, tmp_path / "run")
    kill_after_checkpoint(argv, tmp_path / "run", MID_SECOND_TURN)
    runs.finish(argv)
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
