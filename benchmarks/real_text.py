"""The figures of a finished run of configs/real_text.py; none of its texts.

    streamsynth train --config=configs/real_text.py:data=DIR --workdir=runs/real_text
    python benchmarks/real_text.py --workdir=runs/real_text

Writes benchmarks/results/real_text.json.
"""

import argparse
import json
import pathlib

RESULTS = pathlib.Path(__file__).resolve().parent / "results" / "real_text.json"


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--workdir", type=pathlib.Path, required=True)
    workdir = parser.parse_args().workdir
    summary = json.loads((workdir / "summary.json").read_text())
    results = json.loads((workdir / "report" / "results.json").read_text())
    records = [json.loads(line) for line in (workdir / "evaluations.jsonl").read_text().splitlines()]
    by_cell = {(record["turn"], record["task"]): record for record in records}
    tasks = {}
    for turn, task in enumerate(summary["tasks"], start=1):
        before, after = by_cell[0, task], by_cell[turn, task]
        tasks[task] = {
            "anchors": summary["anchors"][task],
            "judges": summary["judges"][task],
            "rows": summary["datasets"][task]["rows"],
            **{f"{name}_before": before[name] for name in ("gate_pass", "copy_rate")},
            **{f"{name}_after": after[name] for name in ("gate_pass", "copy_rate")},
        }
    found = {
        "command": "streamsynth train --config=configs/real_text.py:data=DIR",
        "seed": results["config"]["seed"],
        "commit": results["commit"],
        "seconds": results["seconds"],
        "tasks": tasks,
    }
    RESULTS.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
