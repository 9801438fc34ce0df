"""What is planted and has to be found: a better strategy, and a judge that can be hacked.

    python benchmarks/planted.py

Runs the experiments of tests/test_planted_strategy.py and tests/test_hackable_judge.py, twenty seeds each,
and writes benchmarks/results/planted.json.
"""

import json
import pathlib
import subprocess
import sys

import numpy as np

ROOT = pathlib.Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "tests"))

import test_hackable_judge as hackable  # noqa: E402
import test_planted_strategy as strategy  # noqa: E402

from streamsynth.stream import patterns  # noqa: E402

RESULTS = ROOT / "benchmarks" / "results" / "planted.json"


def main() -> None:
    strategies = {}
    for choice in patterns.CHOICES:
        steps, final = strategy.searches(choice)
        strategies[choice] = {"steps": steps, "probability_after_first": [float(p) for p in final]}
    rates = hackable.rates_of_arms()
    content = {
        "command": "python benchmarks/planted.py",
        "commit": subprocess.check_output(["git", "rev-parse", "HEAD"], cwd=ROOT, text=True).strip(),
        "seeds": len(strategy.SEEDS),
        "gap": strategy.GAP,
        "strategies": strategies,
        "hack_rate_before": hackable.START,
        "utility_weight": hackable.UTILITY_WEIGHT,
        "hack_rate": {arm: np.round(rate[:, -1].astype(float), 4).tolist() for arm, rate in rates.items()},
    }
    RESULTS.write_text(json.dumps(content, indent=1) + "\n")


if __name__ == "__main__":
    main()
