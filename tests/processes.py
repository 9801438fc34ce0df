"""What tests of several processes share: two of them over loopback, each with two simulated devices."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
QUICKSTART = ROOT / "configs" / "quickstart.py"
DEVICES = 2  # of each process
# The smallest run that four devices divide.
KEYS = {
    "stream.tasks": "worlds:market_1",
    "pretrain.steps": "100",
    "learner.steps": "3",
    "rollout.prompts": "4",
    "supervised.rounds": "1",
    "feedback.secondary.utility": "0",
    "evaluation.prompts": "4",
    "evaluation.samples": "4",
    "evaluation.batches": "1",
    "evaluation.best_of": "1",
    "checkpoint.every": "2",
}
# With fewer programs to compile: no judge, so that what passes the gates is kept, and no tuning.
FEWER_PROGRAMS = {
    "feedback__judges__posterior": "0",
    "feedback__secondary__attribute": "0",
    "phases__tuning": "False",
    "evaluation__student__steps": "5",
}


def train(cache: Path, workdir: Path, **overrides: str) -> list[str]:
    """The command line of that run; `learner__steps="4"` overrides learner.steps."""
    dotted = {key.replace("__", "."): value for key, value in overrides.items()}
    keys = {**KEYS, "cache_dir": str(cache), **dotted}
    return [
        *("-m", "streamsynth.main", "train", f"--config={QUICKSTART}:tiny", f"--workdir={workdir}"),
        *(f"--config.{key}={value}" for key, value in keys.items()),
    ]


def free_port() -> int:
    with socket.create_server(("localhost", 0)) as server:
        return server.getsockname()[1]


def start(
    argv: Sequence[str], logs: Path, count: int = 2, flags: bool = True, **env: str
) -> list[subprocess.Popen]:
    """The processes of a run.

    Args:
      argv: of Python; in each word PORT stands for a free port, and PROCESS for the process's index.
      logs: a folder for what each of them prints, INDEX.log.
      count: how many; one by itself has all the devices that they would have together.
      flags: whether the command is told who it is by flags at its end.
      env: more of the environment.
    """
    port = free_port()
    environment = {
        **os.environ,
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": f"--xla_force_host_platform_device_count={2 * DEVICES // count}",
        "PYTHONPATH": os.pathsep.join(map(str, (ROOT, ROOT / "tests"))),
        # The first process alone would profit from what others compiled, and wait for the rest at the next
        # collective; gloo gives up after half a minute.
        "JAX_ENABLE_COMPILATION_CACHE": "0",
        **env,
    }
    logs.mkdir(parents=True, exist_ok=True)
    found: list[subprocess.Popen] = []
    for index in range(count):
        who = [f"--coordinator=localhost:{port}", f"--processes={count}", f"--process_id={index}"]
        with open(logs / f"{index}.log", "ab") as log:
            found.append(
                subprocess.Popen(
                    [
                        sys.executable,
                        *(word.replace("PORT", str(port)).replace("PROCESS", str(index)) for word in argv),
                        *(who if flags and count > 1 else ()),
                    ],
                    env=environment,
                    stdout=log,
                    stderr=log,
                )
            )
    return found


def finish(processes: Sequence[subprocess.Popen], seconds: float = 600.0) -> list[int]:
    """Waits for all to end; their exit codes. Kills what is left after so many seconds."""
    try:
        return [process.wait(timeout=seconds) for process in processes]
    finally:
        for process in processes:
            if process.poll() is None:
                process.kill()
                process.wait()
