"""What does a checkpoint cost the loop, and what damage is noticed?

    python benchmarks/checkpoints.py

A state of --megabytes in 48 float32 arrays on one device. Measured are the seconds for which `save` holds
the loop up, written meanwhile or not, the seconds until it is complete, those that sealing it and comparing
the seal take, and those of reading it; then, on a small one, how many of --flips single bits turned over at
random in the files of the arrays Orbax notices when it reads them, and how many the seal shows. Writes
benchmarks/results/checkpoints.json.
"""

import argparse
import json
import logging
import os
import pathlib
import random
import subprocess
import tempfile
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from streamsynth.runtime import seal
from streamsynth.runtime.checkpoint import Checkpoints

ROOT = pathlib.Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results" / "checkpoints.json"
ARRAYS = 48


def seconds(act: Callable[[], Any]) -> float:
    begin = time.monotonic()
    act()
    return time.monotonic() - begin


def cost(megabytes: int, repeats: int) -> dict[str, float]:
    """Medians of the seconds."""
    rng = np.random.default_rng(0)
    count = megabytes * 1_000_000 // 4 // ARRAYS
    tree = {f"{i}": jnp.asarray(rng.normal(size=count).astype(np.float32)) for i in range(ARRAYS)}
    found: dict[str, list[float]] = {}

    def measure(name: str, act: Callable[[], Any]) -> None:
        found.setdefault(name, []).append(seconds(act))

    with tempfile.TemporaryDirectory() as folder:
        for repeat in range(repeats):
            for asynchronous in (True, False):
                where = pathlib.Path(folder, f"{repeat}-{asynchronous}")
                checkpoints = Checkpoints(where, asynchronous=asynchronous)
                checkpoints.save(0, {"x": np.zeros(1)}, {})  # Orbax starts its threads
                checkpoints.wait()
                name = "asynchronous" if asynchronous else "synchronous"
                measure(f"save, {name}", lambda c=checkpoints: c.save(1, tree, {}))
                measure(f"wait, {name}", checkpoints.wait)
                measure("seal", lambda w=where: seal.write(w / "1"))
                measure("check", lambda w=where: seal.check(w / "1"))
                template = checkpoints.shapes(1)
                measure("restore", lambda c=checkpoints, t=template: c.restore(1, t))
    return {name: float(np.median(values)) for name, values in found.items()}


def flips(count: int) -> dict[str, int]:
    """How many of the flips are noticed; `harmless` ones change nothing of what is read."""
    rng = random.Random(0)
    values = {f"{i}": np.random.default_rng(i).normal(size=(64, 64)).astype(np.float32) for i in range(10)}
    found = {"flips": count, "orbax": 0, "seal": 0, "harmless": 0}
    with tempfile.TemporaryDirectory() as folder:
        checkpoints = Checkpoints(folder)
        checkpoints.save(1, values, {})
        step = pathlib.Path(folder, "1")
        paths = [path for path in (step / "state").rglob("*") if path.is_file()]
        sizes = [path.stat().st_size for path in paths]
        for _ in range(count):
            [path] = rng.choices(paths, sizes)
            whole = path.read_bytes()
            damaged = bytearray(whole)
            damaged[rng.randrange(len(damaged))] ^= 1 << rng.randrange(8)
            path.write_bytes(damaged)
            try:
                seal.check(step)
            except seal.Damaged:
                found["seal"] += 1
            try:
                read = checkpoints.restore(1, checkpoints.shapes(1))
            except Exception:  # whatever it says
                found["orbax"] += 1
            else:
                found["harmless"] += all(np.array_equal(read[name], values[name]) for name in values)
            path.write_bytes(whole)
    return found


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--megabytes", type=int, default=400)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--flips", type=int, default=100)
    parser.add_argument("--out", type=pathlib.Path, default=RESULTS)
    arguments = parser.parse_args()
    logging.disable(logging.CRITICAL)  # Orbax's, of damaged files
    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout.strip()
    report = {
        "command": "python benchmarks/checkpoints.py"
        + "".join(
            f" --{name}={getattr(arguments, name)}"
            for name in ("megabytes", "repeats", "flips")
            if getattr(arguments, name) != parser.get_default(name)
        ),
        "commit": commit,
        "device": f"{jax.devices()[0].device_kind}, {os.cpu_count()} cores",
        "megabytes": arguments.megabytes,
        "repeats": arguments.repeats,
        "seconds": cost(arguments.megabytes, arguments.repeats),
        "flips": flips(arguments.flips),
    }
    arguments.out.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
