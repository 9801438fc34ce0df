"""What does it gain that a batch is written while the one before is judged?

    python benchmarks/overlap.py

Steps by reward of the quickstart's tiny policy, --prompts x 16 samples each, with `rollout.lag` 0 and 1: with
its own judges alone, and with a scorer in a process of its own that answers after --seconds, as a judge over
a network would. The two lags take turns, --steps at a time, so that what else the machine does meets both.
Writes benchmarks/results/overlap.json.

A step with lag 1 saves at most the time of a rollout, which is measured too (prompts rendered, tokens written
and fetched), and only as far as the host has to wait for something else than this device. On a CPU the
device's work and the host's take the same cores from each other.
"""

import argparse
import json
import os
import pathlib
import statistics
import subprocess
import tempfile
import time
from collections.abc import Sequence

import jax
import numpy as np

from streamsynth import api, assemble, turn, weights
from streamsynth.learner.collect import arrive
from streamsynth.runtime import mesh as mesh_lib
from streamsynth.step import dispatched
from streamsynth.stream.kept import Kept
from streamsynth.tasks import worlds

ROOT = pathlib.Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results" / "overlap.json"
TASK = "market_1"
LAGS = (0, 1)
SECONDS = "OVERLAP_SECONDS"  # environment variable that tells the scorer's process how long to take


def slow(texts: Sequence[str], labels: Sequence[str]) -> list[float]:
    """The world's verifier, after a while."""
    time.sleep(float(os.environ[SECONDS]))
    valid = worlds.load_task(TASK, train_per_label=1, test_per_label=1).verifier
    return [0.5 + 0.5 * valid(text, label) for text, label in zip(texts, labels, strict=True)]


class Stream:
    """A turn without an end, from where its first step would leave it."""

    def __init__(self, cache: str, prompts: int, lag: int, scorer: bool):
        keys = {
            "stream.tasks": f"worlds:{TASK}",
            "learner.steps": "1000000",
            "rollout.prompts": str(prompts),
            "rollout.samples": "16",
            "rollout.lag": str(lag),
            "replay.capacity": str(64 * prompts),
            "scheduler.probe_every": "0",
            "cache_dir": cache,
        }
        if scorer:
            keys |= {"feedback.scorers": "slow=overlap:slow", "feedback.judges.slow": "1"}
            keys["scorers.batch_size"] = str(16 * prompts)  # a batch is one request
        config = api.load(f"{ROOT / 'configs' / 'quickstart.py'}:tiny", keys)
        assemble.check(config)
        tasks = assemble.load_tasks(config)
        self.setting = assemble.assemble(config, tasks, weights.base_policy(config, tasks))
        self.state = assemble.first_state(self.setting).replace(turn_step=np.int32(1), step=np.int32(1))
        self.asked = tasks[0]
        self.kept = Kept(tasks[0], config.dataset.near_duplicate, config.rollout.best_kept)

    def seconds(self, steps: int) -> list[float]:
        found = []
        with mesh_lib.use(self.setting.mesh):
            for _ in range(steps):
                begin = time.monotonic()
                self.state, *_ = turn.learn(self.setting, self.state, self.kept)
                found.append(time.monotonic() - begin)
        return found

    def rollout_seconds(self, batches: int) -> list[float]:
        found = []
        with mesh_lib.use(self.setting.mesh):
            for batch in range(batches):
                begin = time.monotonic()
                arrive(dispatched(self.setting, self.state, self.asked, self.kept, "alone", batch))
                found.append(time.monotonic() - begin)
        return found


def measure(prompts: int, steps: int, rounds: int, scorer: bool) -> dict[str, float]:
    """Medians of the seconds that a step takes with either lag, their ratio, and those of a rollout."""
    with tempfile.TemporaryDirectory() as cache:
        streams = [Stream(cache, prompts, lag, scorer) for lag in LAGS]
        for stream in streams:
            stream.seconds(3)  # compiles
        found, alone = [[], []], []
        for _ in range(rounds):
            for lag in LAGS:
                found[lag] += streams[lag].seconds(steps)
            alone += streams[0].rollout_seconds(steps)
    medians = [statistics.median(times) for times in found]
    return {
        "lag 0": medians[0],
        "lag 1": medians[1],
        "ratio": medians[1] / medians[0],
        "rollout": statistics.median(alone),
    }


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--prompts", type=int, default=64)
    parser.add_argument("--seconds", type=float, default=0.5)
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--out", type=pathlib.Path, default=RESULTS)
    arguments = parser.parse_args()
    os.environ[SECONDS] = str(arguments.seconds)
    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout.strip()
    sizes = (arguments.prompts, arguments.steps, arguments.rounds)
    report = {
        "command": "python benchmarks/overlap.py"
        + "".join(
            f" --{name}={getattr(arguments, name)}"
            for name in ("prompts", "seconds", "steps", "rounds")
            if getattr(arguments, name) != parser.get_default(name)
        ),
        "commit": commit,
        "device": f"{jax.devices()[0].device_kind}, {os.cpu_count()} cores",
        "steps": arguments.steps * arguments.rounds,
        "cases": {
            "own judges alone": measure(*sizes, scorer=False),
            f"and a scorer that takes {arguments.seconds:g} s": measure(*sizes, scorer=True),
        },
    }
    arguments.out.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
