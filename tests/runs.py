"""What tests of whole runs share: the smallest run, the command that makes it, and what must not differ."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
from flax import traverse_util

from streamsynth import api, assemble
from streamsynth.assemble import Setting
from streamsynth.learner.state import RunState, extend
from streamsynth.policy.store import load_policy
from streamsynth.runtime.checkpoint import Checkpoints
from streamsynth.workdir import Workdir

ROOT = Path(__file__).resolve().parent.parent
QUICKSTART = ROOT / "configs" / "quickstart.py"
TASKS = ("market_1", "restaurant_1")
THIRD = "school_1"  # of a stream that goes on
STEPS = 3  # a turn, by reward
TUNING = 4  # updates with which a turn starts: two rounds of two
KEYS = {
    "stream.tasks": ",".join(f"worlds:{name}" for name in TASKS),
    "learner.steps": str(STEPS),
    "rollout.samples": "8",
    "evaluation.samples": "8",
    "checkpoint.every": "2",
}


def config(cache: Path, **overrides: str) -> Any:
    """The smallest run's config; `stream__tasks="worlds:bank_1"` overrides stream.tasks."""
    dotted = {key.replace("__", "."): value for key, value in overrides.items()}
    return api.load(f"{QUICKSTART}:tiny", {**KEYS, "cache_dir": str(cache), **dotted})


def third_turn(finished: Any, **overrides: str) -> tuple[Setting, RunState]:
    """A third task appended to the finished run, in its turn: two past tasks have full buffers.

    The turn's first step is left out; what it would measure is what the turn before had found.
    """
    specs = ",".join(f"worlds:{name}" for name in (*TASKS, THIRD))
    resolved = config(finished.cache, stream__tasks=specs, **overrides)
    tasks = assemble.load_tasks(resolved)
    setting = assemble.assemble(resolved, tasks, load_policy(finished.workdir / "policy"), None)
    before = dataclasses.replace(setting, tasks=tasks[: len(TASKS)])
    state = Workdir(finished.workdir).restore(assemble.first_state(before))
    state = extend(state, resolved, tuple(len(task.labels) for task in tasks))
    return setting, assemble.on_mesh(setting, state.replace(turn_step=np.int32(1)))


def arguments(cache: Path, workdir: Path, *more: str) -> list[str]:
    """The command line of the same run."""
    keys = {**KEYS, "cache_dir": str(cache)}
    return [
        "train",
        f"--config={QUICKSTART}:tiny",
        f"--workdir={workdir}",
        *(f"--config.{key}={value}" for key, value in keys.items()),
        *more,
    ]


def start(argv: list[str], *folders: Path) -> subprocess.Popen:
    """The command as a process of its own, with further folders to import from."""
    path = os.pathsep.join(map(str, (ROOT, *folders)))
    env = {**os.environ, "PYTHONPATH": path, "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"}
    return subprocess.Popen(
        [sys.executable, "-m", "streamsynth.main", *argv],
        env=env,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )


def finish(argv: list[str], *folders: Path) -> str:
    """Runs the command to its end; returns what it said."""
    process = start(argv, *folders)
    _, stderr = process.communicate()
    assert process.returncode == 0, stderr[-3000:]
    return stderr


def read_jsonl(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def state(workdir: Path) -> dict[str, np.ndarray]:
    """Every array of the last checkpoint by its path."""
    checkpoints = Checkpoints(workdir / "checkpoints")
    step = checkpoints.latest_step()
    tree = checkpoints.restore(step, checkpoints.shapes(step))
    return traverse_util.flatten_dict(tree, sep="/")


def outcome(workdir: Path) -> dict[str, Any]:
    """All that a run leaves and that must follow from its config: times and commit are left out."""
    results = json.loads((workdir / "report" / "results.json").read_text())
    del results["seconds"]
    commit = (results.pop("commit") or "").encode()
    files = ["config.json", "metrics.jsonl", "evaluations.jsonl", "report/report.md"]
    files += sorted(
        str(path.relative_to(workdir))
        for folder in ("kept", "datasets", "policy")
        for path in (workdir / folder).rglob("*")
        if path.is_file()
    )
    arrays = {name: (array.dtype, array.shape, array.tobytes()) for name, array in state(workdir).items()}
    return {
        "results": results,
        # The page in Markdown names the commit as well.
        "files": {name: (workdir / name).read_bytes().replace(commit, b"") for name in files},
        "state": arrays,
    }
