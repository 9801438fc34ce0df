"""Is quality kept without losing diversity? Our learner, quality alone, and best of n, on the tuning worlds.

    python benchmarks/balance.py --runs=runs/balance --seeds=1,2,3,4,5

Runs the quickstart and two baselines on its tuning stream for every seed and writes
benchmarks/results/balance.json: validity and diversity of unselected texts before and after each task's own
turn, and the accuracy of students on as many rows of each. Finished runs are not run again.
"""

import argparse
import dataclasses
import json
import pathlib
import subprocess
import sys
import time

import numpy as np

from streamsynth import api, assemble
from streamsynth.dataset.rows import read_rows
from streamsynth.evaluation import diversity
from streamsynth.tasks import worlds

ROOT = pathlib.Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results" / "balance.json"
METRICS = ("vendi", "distinct_2")
VARIANTS = {
    "learned": "configs/quickstart.py",
    "quality_only": "configs/baselines/quality_only.py",
    "best_of_n": "configs/baselines/best_of_n.py",
}
# Other settings that were tried, with the config and how many of the seeds: less weight for diversity and
# faster learning, and quality alone at that rate; the first settings; faster learning alone; and three times
# the steps by reward, mostly paid for diversity.
_LIGHTER = {
    "optimizer.learning_rate": 6e-4,
    "balance.factor": 1.0,
    "balance.alpha": 1.0,
    "balance.alpha_max": 1.0,
}
TRIED = {
    "lighter": (VARIANTS["learned"], 3, _LIGHTER),
    "quality_only_faster": (VARIANTS["quality_only"], 3, {"optimizer.learning_rate": 6e-4}),
    "narrower": (
        VARIANTS["learned"],
        1,
        {
            "balance.factor": 0.95,
            "feedback.width": 128,
            "supervised.batches": 6,
            "supervised.rows": 96,
        },
    ),
    "faster": (VARIANTS["learned"], 1, {"optimizer.learning_rate": 1.2e-3}),
    "pushed": (
        VARIANTS["learned"],
        1,
        {
            "optimizer.learning_rate": 1.2e-3,
            "learner.steps": 24,
            "balance.factor": 1.3,
            "balance.alpha_max": 32.0,
        },
    ),
}


def run(variant: str, seed: int, workdir: pathlib.Path) -> None:
    """Trains one run, or finds it done."""
    if (workdir / "report" / "results.json").exists():
        return
    file, _, keys = TRIED[variant] if variant in TRIED else (VARIANTS[variant], 0, {})
    config = f"--config={file}:seed={seed},stream=tuning"
    command = [sys.executable, "-m", "streamsynth.main", "train", config, f"--workdir={workdir}"]
    overrides = [f"--config.{key}={value}" for key, value in keys.items()]
    subprocess.run([*command, *overrides], cwd=ROOT, check=True)


def cells(workdir: pathlib.Path) -> list[dict]:
    """Each task's figures before anything and after its own turn, and its students."""
    records = [json.loads(line) for line in (workdir / "evaluations.jsonl").read_text().splitlines()]
    results = json.loads((workdir / "report" / "results.json").read_text())
    by_cell = {(record["turn"], record["task"]): record for record in records}
    rows = []
    for turn, task in enumerate(results["tasks"], start=1):
        before, after = by_cell[0, task], by_cell[turn, task]
        row = {"task": task, "valid_before": before["valid"], "valid_after": after["valid"]}
        for metric in METRICS:
            row[f"{metric}_before"] = before["diversity"][metric]
            row[f"{metric}_ratio"] = after["diversity"][metric] / before["diversity"][metric]
        rows.append({**row, "student": results["student"][task]})
    return rows


def valid_texts(seed: int, best_of_n: pathlib.Path) -> dict[str, dict[str, dict[str, float | None]]]:
    """By task, the diversity of as many valid texts: what a policy's texts can reach without mistakes.

    "accepted" are those that the base policy wrote and the verifier accepted, as the run `best_of_n` kept
    them; "real" are drawn independently from the language; "open" have only the frames of each label with
    more open places than half of them, which repeat fewer words.
    """
    config = api.load(str(ROOT / f"configs/quickstart.py:seed={seed},stream=tuning"))
    count, found = config.evaluation.diversity_texts, {}
    for task in assemble.load_tasks(config):
        rng = np.random.default_rng(seed)
        world = worlds.stream_world(task.name, worlds.Difficulty(**config.worlds.to_dict()))
        opened = [label.sample(rng) for label in map(_open_frames, world.labels) for _ in range(count)]
        texts = {
            "accepted": [row.fields[0] for row in read_rows(best_of_n / "kept" / f"{task.name}.jsonl")],
            "real": [example.text for example in task.train],
            "open": opened,
        }
        found[task.name] = {
            name: {metric: diversity.measure(own, count, seed)[metric] for metric in METRICS}
            for name, own in texts.items()
        }
    return found


def _open_frames(label: worlds.Label) -> worlds.Label:
    """The label with the half of its frames that has the largest share of open places."""
    shares = [len(frame.roles) / len(frame.tokens) for frame in label.frames]
    order = np.argsort(shares)[::-1][: max(4, len(shares) // 2)]
    return dataclasses.replace(label, frames=tuple(label.frames[i] for i in order))


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--runs", type=pathlib.Path, required=True)
    parser.add_argument("--seeds", default="1,2,3,4,5")
    arguments = parser.parse_args()
    seeds = [int(seed) for seed in arguments.seeds.split(",")]
    found: dict[str, dict] = {variant: {} for variant in (*VARIANTS, *TRIED)}
    for index, seed in enumerate(seeds):
        for variant in (*VARIANTS, *(name for name, (_, count, _) in TRIED.items() if index < count)):
            workdir = (arguments.runs / f"{variant}-{seed}").resolve()
            start = time.monotonic()
            run(variant, seed, workdir)
            commit = json.loads((workdir / "report" / "results.json").read_text())["commit"]
            found[variant][str(seed)] = {"cells": cells(workdir), "commit": commit}
            print(f"{variant} seed {seed}: {time.monotonic() - start:.0f} s", flush=True)
    content = {
        "command": f"python benchmarks/balance.py --seeds={arguments.seeds}",
        "configs": {**VARIANTS, **{name: {file: keys} for name, (file, _, keys) in TRIED.items()}},
        "runs": found,
        "valid": {str(seed): valid_texts(seed, arguments.runs / f"best_of_n-{seed}") for seed in seeds},
    }
    RESULTS.write_text(json.dumps(content, indent=1) + "\n")


if __name__ == "__main__":
    main()
