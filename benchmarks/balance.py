"""Is quality kept without losing diversity? Our learner, quality alone, and best of n, on the tuning worlds.

    python benchmarks/balance.py --runs=runs/balance --seeds=1,2,3,4,5

Runs the quickstart and two baselines on its tuning stream for every seed and writes
benchmarks/results/balance.json: validity and diversity of unselected texts before and after each task's own
turn, and the accuracy of students on as many rows of each. Finished runs are not run again.
"""

import argparse
import json
import pathlib
import subprocess
import sys
import time

from streamsynth import api, assemble
from streamsynth.evaluation import diversity

ROOT = pathlib.Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results" / "balance.json"
METRICS = ("vendi", "distinct_2")
VARIANTS = {
    "learned": "configs/quickstart.py",
    "quality_only": "configs/baselines/quality_only.py",
    "best_of_n": "configs/baselines/best_of_n.py",
}


def run(variant: str, seed: int, workdir: pathlib.Path) -> None:
    """Trains one run, or finds it done."""
    if (workdir / "report" / "results.json").exists():
        return
    config = f"--config={VARIANTS[variant]}:seed={seed},stream=tuning"
    command = [sys.executable, "-m", "streamsynth.main", "train", config, f"--workdir={workdir}"]
    subprocess.run(command, cwd=ROOT, check=True)


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


def real_texts(seed: int) -> dict[str, dict[str, float]]:
    """By task, the diversity of as many real texts: what independent draws of the language reach."""
    config = api.load(str(ROOT / f"configs/quickstart.py:seed={seed},stream=tuning"))
    count = config.evaluation.diversity_texts
    found = {}
    for task in assemble.load_tasks(config):
        measured = diversity.measure([example.text for example in task.train], count, seed)
        found[task.name] = {metric: measured[metric] for metric in METRICS}
    return found


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--runs", type=pathlib.Path, required=True)
    parser.add_argument("--seeds", default="1,2,3,4,5")
    arguments = parser.parse_args()
    seeds = [int(seed) for seed in arguments.seeds.split(",")]
    found: dict[str, dict] = {variant: {} for variant in VARIANTS}
    for seed in seeds:
        for variant in VARIANTS:
            workdir = (arguments.runs / f"{variant}-{seed}").resolve()
            start = time.monotonic()
            run(variant, seed, workdir)
            commit = json.loads((workdir / "report" / "results.json").read_text())["commit"]
            found[variant][str(seed)] = {"cells": cells(workdir), "commit": commit}
            print(f"{variant} seed {seed}: {time.monotonic() - start:.0f} s", flush=True)
    content = {
        "command": f"python benchmarks/balance.py --seeds={arguments.seeds}",
        "configs": VARIANTS,
        "runs": found,
        "real": {str(seed): real_texts(seed) for seed in seeds},
    }
    RESULTS.write_text(json.dumps(content, indent=1) + "\n")


if __name__ == "__main__":
    main()
