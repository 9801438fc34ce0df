"""Writes the README's tables from the files under benchmarks/results/.

python benchmarks/readme.py
"""

import json
import pathlib

import numpy as np

ROOT = pathlib.Path(__file__).resolve().parent.parent


def learning() -> str:
    """Quality and diversity per task, the means over seeds, and how many cells meet every bound."""
    found = json.loads((ROOT / "benchmarks" / "results" / "learning.json").read_text())
    learned, supervised = found["runs"]["learned"], found["runs"]["supervised"]
    tasks = [cell["task"] for cell in next(iter(learned.values()))["cells"]]

    def mean(runs: dict, task: str, *path: str) -> float:
        cells = [cell for run in runs.values() for cell in run["cells"] if cell["task"] == task]
        values = []
        for cell in cells:
            for key in path:
                cell = cell[key]
            values.append(cell)
        return float(np.mean(values))

    lines = [
        "| task | valid: base | after the turn | after tuning to the examples | Vendi, of the base's "
        "| distinct-2, of the base's | student: examples | base rows | base, best of 4 | data set | real |",
        "|---|---:|---:|---:|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for task in tasks:
        figures = [
            mean(learned, task, "valid_before"),
            mean(learned, task, "valid_after"),
            mean(supervised, task, "valid_after"),
            mean(learned, task, "vendi_ratio"),
            mean(learned, task, "distinct_2_ratio"),
            *(
                mean(learned, task, "anchors", name)
                for name in ("examples", "base", "base_best_of_n", "synthetic", "real")
            ),
        ]
        lines.append(f"| {task} | " + " | ".join(f"{figure:.2f}" for figure in figures) + " |")
    cells = [cell for run in learned.values() for cell in run["cells"]]
    better = [
        cell["valid_after"] >= cell["valid_before"] + 0.10
        and cell["vendi_ratio"] >= 0.9
        and cell["distinct_2_ratio"] >= 0.9
        for cell in cells
    ]
    wins = [cell["anchors"]["synthetic"] > cell["anchors"]["examples"] for cell in cells]
    seconds = [sum(run["seconds"].values()) for run in learned.values()]
    lines += [
        "",
        f"Means over {len(learned)} seed(s) (`{found['command']}`). Of {len(cells)} turns, {sum(better)} "
        "raised validity by at least 0.10 with Vendi score and distinct-2 at 0.9 of the base's or more; in "
        f"{sum(wins)} the data set beat the examples alone. A run took {np.mean(seconds):.0f} seconds.",
    ]
    return "\n".join(lines)


TABLES = {"learning": learning}


def main() -> None:
    path = ROOT / "README.md"
    text = path.read_text()
    for name, table in TABLES.items():
        begin, end = f"<!-- {name} -->\n", f"<!-- end of {name} -->"
        before, rest = text.split(begin)
        text = before + begin + table() + "\n" + end + rest.split(end, 1)[1]
    path.write_text(text)


if __name__ == "__main__":
    main()
