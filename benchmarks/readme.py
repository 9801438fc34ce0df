"""Writes the README's tables from the files under benchmarks/results/.

python benchmarks/readme.py
"""

import json
import pathlib
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

ROOT = pathlib.Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"


def results(name: str) -> dict[str, Any]:
    """What a benchmark measured."""
    return json.loads((RESULTS / f"{name}.json").read_text())


def learning() -> str:
    """Quality and diversity per task, the means over seeds, and how many cells meet every bound."""
    found = results("learning")
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
        "| task | valid: base | learner | examples | Vendi, of the base's: learner | examples "
        "| distinct-2, of the base's: learner | examples |",
        "|---|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for task in tasks:
        figures = [mean(learned, task, "valid_before")]
        for measure in ("valid_after", "vendi_ratio", "distinct_2_ratio"):
            figures += [mean(runs, task, measure) for runs in (learned, supervised)]
        lines.append(f"| {task} | " + " | ".join(f"{figure:.2f}" for figure in figures) + " |")
    names = ("examples", "base", "base_best_of_n", "synthetic", "synthetic_all", "real")
    lines += [
        "",
        "| task | student: examples | base rows | base, best of 4 | data set, as many rows | whole data set "
        "| all real data |",
        "|---|---:|---:|---:|---:|---:|---:|",
    ]
    for task in tasks:
        figures = [mean(learned, task, "anchors", name) for name in names]
        lines.append(f"| {task} | " + " | ".join(f"{figure:.2f}" for figure in figures) + " |")

    pairs = [
        (cell, other)
        for seed, run in learned.items()
        for cell, other in zip(run["cells"], supervised[seed]["cells"], strict=True)
    ]
    cells = [cell for cell, _ in pairs]
    better = [
        cell["valid_after"] >= cell["valid_before"] + 0.10
        and cell["vendi_ratio"] >= 0.9
        and cell["distinct_2_ratio"] >= 0.9
        for cell in cells
    ]
    above = [cell["valid_after"] > other["valid_after"] for cell, other in pairs]
    gap = np.mean([cell["valid_after"] - other["valid_after"] for cell, other in pairs])

    def wins(anchor: str) -> int:
        return sum(cell["anchors"]["synthetic"] > cell["anchors"][anchor] for cell in cells)

    lines += [
        "",
        f"Means over {len(learned)} seed(s) (`{found['command']}`). Of {len(cells)} turns, {sum(better)} "
        "raised validity by at least 0.10 with Vendi score and distinct-2 at 0.9 of the base's or more. In "
        f"{sum(above)} validity ended above that of tuning to the examples (by {gap:+.3f} on average). "
        f"As many rows of the data set beat the examples alone in {wins('examples')}, base rows in "
        f"{wins('base')} and the base's best of 4 in {wins('base_best_of_n')}.",
    ]
    return "\n".join(lines)


def real_text() -> str:
    """The anchors of the real-text stream, and how its rows fared at the gates and with the judge."""
    found = results("real_text")
    lines = [
        "| task | student: examples | base rows | base, best of 4 | data set, as many rows | all real data "
        "| gate pass: base | after its turn | copies: base | after its turn | AUC of the judge |",
        "|---|---:|---:|---:|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for task, of_task in found["tasks"].items():
        names = ("examples", "base", "base_best_of_n", "synthetic", "real")
        figures = [of_task["anchors"][name] for name in names]
        for share in ("gate_pass", "copy_rate"):
            figures += [of_task[f"{share}_before"], of_task[f"{share}_after"]]
        figures.append(of_task["judges"]["posterior"]["auc"])
        lines.append(f"| {task} | " + " | ".join(f"{figure:.2f}" for figure in figures) + " |")
    return "\n".join([*lines, "", f"One seed (`{found['command']}`)."])


def import_memory() -> str:
    """Anonymous memory of reading a checkpoint, by how it is placed."""
    found = results("import_memory")
    lines = [
        "| reading 200M parameters, MB of anonymous memory | own parameters | largest one | peak "
        "| peak above own | seconds |",
        "|---|---:|---:|---:|---:|---:|",
    ]
    for name, processes in found["cases"].items():
        worst = max(processes, key=lambda process: process["peak"] - process["own"])
        sizes = [worst["own"], worst["largest"], worst["peak"], worst["peak"] - worst["own"]]
        figures = " | ".join(f"{size / 2**20:.0f}" for size in sizes)
        lines.append(f"| {name} | {figures} | {worst['seconds']:.1f} |")
    return "\n".join([*lines, "", f"On CPU devices (`{found['command']}`)."])


def balance() -> str:
    """Our learner, quality alone and best of n on the tuning worlds, beside as many real texts."""
    found = results("balance")
    runs, valid = found["runs"], found["valid"]
    [first] = runs["narrower"]

    def mean(variant: str, figure: Callable[[dict], float], seeds: Sequence[str] = ()) -> float:
        chosen = [runs[variant][seed] for seed in seeds or runs[variant]]
        return float(np.mean([figure(cell) for run in chosen for cell in run["cells"]]))

    def ratio_of(texts: str, metric: str) -> float:
        return float(
            np.mean(
                [
                    valid[seed][cell["task"]][texts][metric] / cell[f"{metric}_before"]
                    for seed, run in runs["learned"].items()
                    for cell in run["cells"]
                ]
            )
        )

    lines = [
        "| unselected texts | valid | Vendi, of the base's | distinct-2, of the base's | student |",
        "|---|---:|---:|---:|---:|",
    ]
    rows = {
        "base policy": [
            mean("learned", lambda cell: cell["valid_before"]),
            1.0,
            1.0,
            mean("learned", lambda cell: cell["student"]["base"]),
        ]
    }
    few = tuple(runs["lighter"])
    of_few = f"seeds {few[0]} to {few[-1]}"
    named = {
        "learner": ("learned", ()),
        "quality alone": ("quality_only", ()),
        f"learner, {of_few}": ("learned", few),
        f"learner, alpha at most 1, 1.5 times the rate, {of_few}": ("lighter", ()),
        f"quality alone, 1.5 times the rate, {of_few}": ("quality_only_faster", ()),
        f"learner, seed {first} alone": ("learned", (first,)),
        f"learner, as first tried (seed {first})": ("narrower", ()),
        f"learner, three times the rate (seed {first})": ("faster", ()),
        f"learner, alpha up to 32, three times the rate, 24 steps (seed {first})": ("pushed", ()),
    }
    for name, (variant, own) in named.items():
        keys = ("valid_after", "vendi_ratio", "distinct_2_ratio")
        rows[name] = [mean(variant, lambda cell, key=key: cell[key], own) for key in keys]
        rows[name].append(mean(variant, lambda cell: cell["student"]["synthetic"], own))
    rows["best of n, no learning"] = [
        *(None,) * 3,
        mean("best_of_n", lambda cell: cell["student"]["synthetic"]),
    ]
    accepted = (ratio_of("accepted", metric) for metric in ("vendi", "distinct_2"))
    rows["the base policy's valid texts alone"] = [1.0, *accepted, None]
    rows["real texts"] = [1.0, ratio_of("real", "vendi"), ratio_of("real", "distinct_2")]
    rows["real texts"].append(mean("learned", lambda cell: cell["student"]["real"]))
    rows["real texts of the more open frames"] = [
        1.0,
        ratio_of("open", "vendi"),
        ratio_of("open", "distinct_2"),
        None,
    ]
    for name, figures in rows.items():
        cells = ["–" if figure is None else f"{figure:.3f}" for figure in figures]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    seeds = len(runs["learned"])
    cells = [cell for run in runs["learned"].values() for cell in run["cells"]]
    wins = {
        name: sum(cell["student"]["synthetic"] > cell["student"][name] for cell in cells)
        for name in ("base", "base_best_of_n")
    }
    over_best = sum(
        cell["student"]["synthetic"] > other["student"]["synthetic"]
        for seed, run in runs["learned"].items()
        for cell, other in zip(run["cells"], runs["best_of_n"][seed]["cells"], strict=True)
    )
    note = (
        f"Means over {seeds} seeds and {len(cells) // seeds} tuning worlds (`{found['command']}`). "
        "All students but that on real texts have as many rows. On the learner's they are "
        f"better than on base rows in {wins['base']} of {len(cells)} turns, than on the best of 4 in "
        f"{wins['base_best_of_n']}, and than on the data set of best of n in {over_best}."
    )
    return "\n".join([*lines, "", note])


def utility() -> str:
    """Both forms of student utility: what they tell apart, and what they cost."""
    found = results("utility")
    sizes = list(found["costs"])
    lines = [
        "| student utility | rank correlation with the exact | right above mislabelled | right above junk | "
        + " | ".join(f"{size}: ms | exact takes | temporary MB" for size in sizes)
        + " |",
        "|---|" + "---:|" * (3 + 3 * len(sizes)),
    ]
    for form in found["costs"][sizes[0]]:
        own = [cell for cell in found["cells"] if cell["form"] == form]
        figures = [
            f"{np.median([cell[key] for cell in own]):.2f}"
            for key in ("rank_correlation", "auc_mislabelled", "auc_junk")
        ]
        for size in sizes:
            cost = found["costs"][size][form]
            figures.append(f"{1e3 * cost['seconds']:.3g}")
            figures.append(f"{cost['exact_over_this']:.0f} x")
            figures.append(f"{cost['temporary_bytes'] / 1e6:.2g}")
        lines.append(f"| {form.replace('_', ' ')} | " + " | ".join(figures) + " |")
    batches = len(found["cells"]) // len(found["costs"][sizes[0]])
    note = (
        f"Medians over {batches} batches; the least time of {found['repeats']}; {found['device']} "
        f"(`{found['command']}`)."
    )
    return "\n".join([*lines, "", note])


def judges() -> str:
    """The judge of sentence vectors, fitted on four examples a label: how well it ranks real texts."""
    found = results("judges")
    lines = [
        "| set | labels | AUC on validation texts | from seed to seed | as a run measures it | accuracy "
        "| confidence | AUC by n-grams | texts a second |",
        "|---|---:|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for name, of_set in found["sets"].items():
        runs = of_set["judges"]["encoder"]
        areas = [run["auc"] for run in runs]
        figures = [f"{np.mean(areas):.2f}", f"{min(areas):.2f}-{max(areas):.2f}"]
        for figure in ("auc_held_back", "accuracy", "confidence"):
            figures.append(f"{np.mean([run[figure] for run in runs]):.2f}")
        figures.append(f"{np.mean([run['auc'] for run in of_set['judges']['ngrams']]):.2f}")
        figures.append(f"{of_set['texts_per_processor_second']:.0f}")
        lines.append(f"| {name} | {of_set['labels']} | " + " | ".join(figures) + " |")
    seeds = len(next(iter(found["sets"].values()))["judges"]["encoder"])
    return "\n".join([*lines, "", f"Means over {seeds} draws of the examples (`{found['command']}`)."])


def planted() -> str:
    """Median steps until a planted better strategy is asked for, and hack rates with a judge of length."""
    found = results("planted")
    lines = [
        "| steps until the better strategy has more than half of the prompts | first task | second, alike "
        "| alike, statistics shuffled | second, another one better |",
        "|---|---:|---:|---:|---:|",
    ]
    for choice, of_choice in found["strategies"].items():
        medians = (np.median(of_choice["steps"][kind]) for kind in ("first", "second", "shuffled", "another"))
        lines.append(f"| `{choice}` | " + " | ".join(f"{median:g}" for median in medians) + " |")
    lines += [
        "",
        "| reward by a judge that scores length | hack rate at the end | quartiles |",
        "|---|---:|---:|",
    ]
    for arm, rates in found["hack_rate"].items():
        low, middle, high = np.quantile(rates, [0.25, 0.5, 0.75])
        lines.append(f"| {arm} | {middle:.2f} | {low:.2f}-{high:.2f} |")
    note = (
        f"Medians over {found['seeds']} seeds (`{found['command']}`). The better strategy earns "
        f"{found['gap']:g} more. Hacks start at {found['hack_rate_before']:g}; the utility weighs "
        f"{found['utility_weight']:g}, and with shuffled values as much."
    )
    return "\n".join([*lines, "", note])


def compiled() -> str:
    """Configs on their slices and hosts: memory of a device, and seconds that a step cannot do without."""
    reports = [results(f"compile/{path.stem}") for path in sorted((RESULTS / "compile").glob("*.json"))]
    if not reports:
        return "No pod has been compiled to its end yet (`python benchmarks/compile.py`)."
    lines = [
        "| config | slice | programs compiled | trained | mesh: fsdp x tensor | kept, GiB a device "
        "| most in use, GiB | of | in "
        "| rollout: compute s | memory s | links s | gathering at every token: links s "
        "| update: compute s | memory s | links s |",
        "|---|---|---:|---:|---:|---:|---:|---:|---|" + "---:|" * 7,
    ]
    for found in reports:
        programs = {one["name"]: one for one in found["programs"]}
        most = max(found["programs"], key=lambda one: one["total"])
        name = pathlib.PurePath(found["config"].partition(":")[0]).stem
        each = found.get("rollout_gathering_at_every_token")
        floors = [
            f"{programs[program]['floor_seconds'][rate]:.2f}" if program in programs else "-"
            for program in ("rollout", "update")
            for rate in ("compute", "memory", "links")
        ]
        floors.insert(3, f"{each['floor_seconds']['links']:.2f}" if each else "-")
        cells = [
            name if found["fits"] else f"{name} (does not fit)",
            found["topology"],
            f"{len(programs)} of {len(found['declared'])}",
            f"{found['trained'] / 1e9:.2f}e9",
            f"{found['mesh']['fsdp']} x {found['mesh']['tensor']}",
            f"{sum(found['kept'].values()) / 2**30:.2f}",
            f"{most['total'] / 2**30:.2f}",
            f"{found['chip']['usable'] / 2**30:.2f}",
            most["name"],
            *floors,
        ]
        lines.append(f"| {' | '.join(cells)} |")
    found = {name: version for report in reports for name, version in report["versions"].items()}
    versions = ", ".join(f"{name} {version}" for name, version in found.items())
    note = (
        f"Compiled without any of them, not run (`python benchmarks/compile.py`; {versions}). Seconds are "
        "what each published rate of the chip alone allows at best, for one step; all tokens are sampled."
    )
    return "\n".join([*lines, "", note])


def checkpoints() -> str:
    """What a checkpoint costs the loop, and how much damage is noticed."""
    found = results("checkpoints")
    seconds, flips = found["seconds"], found["flips"]
    complete = seconds["save, asynchronous"] + seconds["wait, asynchronous"]
    rows = {
        "the loop is held up, `checkpoint.asynchronous = True`": seconds["save, asynchronous"],
        "and False": seconds["save, synchronous"],
        "complete after": complete,
        "of which sealing (read back and summed)": seconds["seal"],
        "comparing the seal before a restore": seconds["check"],
        "restoring": seconds["restore"],
    }
    lines = [f"| {found['megabytes']} MB of arrays | seconds |", "|---|---:|"]
    lines += [f"| {name} | {value:.2f} |" for name, value in rows.items()]
    note = (
        f"Of {flips['flips']} single bits turned over in the files of the arrays, {flips['harmless']} "
        f"changed nothing that is read, Orbax alone noticed {flips['orbax']}, and the seal shows "
        f"{flips['seal']}. Medians of {found['repeats']}; {found['device']} (`{found['command']}`)."
    )
    return "\n".join([*lines, "", note])


def overlap() -> str:
    """Seconds of a step with and without a batch that is written meanwhile."""
    found = results("overlap")
    lines = [
        "| seconds a step | `rollout.lag = 0` | `rollout.lag = 1` | ratio | a rollout alone |",
        "|---|---:|---:|---:|---:|",
    ]
    for name, row in found["cases"].items():
        figures = " | ".join(f"{row[key]:.2f}" for key in ("lag 0", "lag 1", "ratio", "rollout"))
        lines.append(f"| {name} | {figures} |")
    note = f"Medians of {found['steps']} steps; {found['device']} (`{found['command']}`)."
    return "\n".join([*lines, "", note])


TABLES = {
    "learning": learning,
    "real_text": real_text,
    "import_memory": import_memory,
    "balance": balance,
    "utility": utility,
    "judges": judges,
    "planted": planted,
    "compiled": compiled,
    "checkpoints": checkpoints,
    "overlap": overlap,
}


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
