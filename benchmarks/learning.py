"""Does the quickstart learn? Quality and diversity before and after each task's own turn.

    python benchmarks/learning.py --runs=runs/learning --seeds=1,2,3

Runs configs/quickstart.py for every seed, as it is and with the supervised phase on the examples alone, and
writes benchmarks/results/learning.json. Finished runs are not run again.
"""

import argparse
import json
import pathlib
import shutil
import subprocess
import sys
import time

ROOT = pathlib.Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results" / "learning.json"
METRICS = ("vendi", "distinct_2")
VARIANTS = {
    "learned": {},
    # As many updates a turn as the learner makes, all of them maximum likelihood on the label budget.
    "supervised": {
        "learner.steps": 0,
        "supervised.batches": 0,
        "supervised.rows": 0,
        "supervised.rounds": 1,
        "supervised.steps": 48,
    },
}


def run(variant: str, seed: int, workdir: pathlib.Path) -> None:
    """Trains one run, or finds it done."""
    if (workdir / "report" / "results.json").exists():
        return
    overrides = [f"--config.{key}={value}" for key, value in VARIANTS[variant].items()]
    command = [sys.executable, "-m", "streamsynth.main", "train", f"--workdir={workdir}"]
    config = f"--config=configs/quickstart.py:seed={seed}"
    subprocess.run([*command, config, *overrides], cwd=ROOT, check=True)


def cells(workdir: pathlib.Path) -> list[dict]:
    """For each task of a run: validity and diversity before anything and after its own turn."""
    records = [json.loads(line) for line in (workdir / "evaluations.jsonl").read_text().splitlines()]
    results = json.loads((workdir / "report" / "results.json").read_text())
    by_cell = {(r["turn"], r["task"]): r for r in records}
    rows = []
    for turn, task in enumerate(results["tasks"], start=1):
        before, after = by_cell[0, task], by_cell[turn, task]
        row = {
            "task": task,
            "valid_before": before["valid"],
            "valid_after": after["valid"],
            "student_before": before["accuracy"],
            "student_after": after["accuracy"],
            "arrival": by_cell[turn - 1, task]["valid"],
        }
        for metric in METRICS:
            row[f"{metric}_before"] = before["diversity"][metric]
            row[f"{metric}_ratio"] = after["diversity"][metric] / before["diversity"][metric]
        rows.append(row)
    summary = json.loads((workdir / "summary.json").read_text())
    for row in rows:
        row["anchors"] = summary["anchors"][row["task"]]
    return rows


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--runs", type=pathlib.Path, required=True)
    parser.add_argument("--seeds", default="1,2,3")
    arguments = parser.parse_args()
    seeds = [int(seed) for seed in arguments.seeds.split(",")]
    found = {variant: {} for variant in VARIANTS}
    for seed in seeds:
        for variant in VARIANTS:
            workdir = (arguments.runs / f"{variant}-{seed}").resolve()
            start = time.monotonic()
            run(variant, seed, workdir)
            results = json.loads((workdir / "report" / "results.json").read_text())
            found[variant][str(seed)] = {
                "cells": cells(workdir),
                "commit": results["commit"],
                "seconds": results["seconds"],
            }
            print(f"{variant} seed {seed}: {time.monotonic() - start:.0f} s", flush=True)
    RESULTS.parent.mkdir(exist_ok=True)
    shutil.copy(
        arguments.runs / f"learned-{seeds[0]}" / "report" / "diversity.svg", RESULTS.with_suffix(".svg")
    )
    command = f"python benchmarks/learning.py --seeds={arguments.seeds}"
    RESULTS.write_text(
        json.dumps({"command": command, "config": "configs/quickstart.py", "runs": found}, indent=1) + "\n"
    )


if __name__ == "__main__":
    main()
