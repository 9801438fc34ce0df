"""How good is the cheap form of student utility, and what do both cost?

    python benchmarks/utility.py

Batches of 128 texts of every stream world: half of them sentences of the label asked for, a quarter
sentences of another label, a quarter words of all the world's sentences in any order. The student is
validated on the 8 examples a label of the task. Measured are the rank correlation with the exact
metagradient, how often a right text is worth more than a wrong one (the area under the ROC curve), seconds,
and temporary memory as XLA plans it. Writes benchmarks/results/utility.json.
"""

import argparse
import json
import os
import pathlib
import subprocess
import time

import jax
import numpy as np

from streamsynth.feedback.features import ngram_features
from streamsynth.feedback.judge import auc
from streamsynth.feedback.utility import UTILITIES, UtilityConfig
from streamsynth.keys import numpy_rng
from streamsynth.tasks import worlds

ROOT = pathlib.Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results" / "utility.json"
SAMPLES = 128
LABELS, VALIDATION = 8, 64  # padded, so that all worlds share one program
CONFIG = UtilityConfig()
SIZES = {"N = 128, K = 8": (128, 8), "N = 2048, K = 64": (2048, 64)}
REPEATS = 40


def batch(name: str, seed: int) -> tuple[tuple[np.ndarray, ...], np.ndarray]:
    """Arguments of a utility, and what each sample is: 0 right, 1 of another label, 2 words in any order."""
    task = worlds.load_task(name, seed=seed)
    rng = numpy_rng(seed, "utility benchmark", worlds.STREAM_WORLDS.index(name))
    chosen = [task.train[i] for i in rng.permutation(len(task.train))[:SAMPLES]]
    texts = [example.text for example in chosen]
    label = np.array([task.labels.index(example.label) for example in chosen])
    kind = rng.permutation(np.repeat([0, 0, 1, 2], SAMPLES // 4))
    shift = rng.integers(1, len(task.labels), SAMPLES)
    label = np.where(kind == 1, (label + shift) % len(task.labels), label)
    vocabulary = [word for example in task.train for word in example.text.split()]
    for i in np.flatnonzero(kind == 2):
        texts[i] = " ".join(rng.choice(vocabulary, len(texts[i].split())))

    val_features = ngram_features([example.text for example in task.examples])
    val_label = np.array([task.labels.index(example.label) for example in task.examples])
    rest = VALIDATION - len(val_label)
    arguments = (
        ngram_features(texts),
        label,
        np.ones(SAMPLES, np.float32),
        np.pad(val_features, ((0, rest), (0, 0))),
        np.pad(val_label, (0, rest), constant_values=-1),
    )
    return arguments, kind


def rank_correlation(x: np.ndarray, y: np.ndarray) -> float:
    """Spearman's, of values without ties."""
    ranks = [np.argsort(np.argsort(values)) for values in (x, y)]
    return float(np.corrcoef(*ranks)[0, 1])


def compare(seeds: int) -> list[dict]:
    """Each world and seed: every form against the exact one, and against what the samples are."""
    cells = []
    for name in worlds.STREAM_WORLDS:
        for seed in range(seeds):
            arguments, kind = batch(name, seed)
            found = {
                form: np.asarray(function(*arguments, LABELS, CONFIG)) for form, function in UTILITIES.items()
            }
            for form, values in found.items():
                cells.append(
                    {
                        "world": name,
                        "seed": seed,
                        "form": form,
                        "rank_correlation": rank_correlation(values, found["exact"]),
                        "auc_mislabelled": auc(values[kind == 0], values[kind == 1]),
                        "auc_junk": auc(values[kind == 0], values[kind == 2]),
                    }
                )
    return cells


def cost(samples: int, labels: int) -> dict[str, dict[str, float]]:
    """Seconds (the least of all repeats, the forms in turn: other jobs only add) and bytes of one batch."""
    rng = np.random.default_rng(0)
    features = rng.normal(size=(samples, 128)).astype(np.float32)
    features /= np.linalg.norm(features, axis=1, keepdims=True)
    label = np.arange(samples) % labels
    count = labels * 8
    arguments = jax.device_put(
        (features, label, np.ones(samples, np.float32), features[:count], np.arange(count) % labels)
    )
    programs = {
        form: function.lower(*arguments, labels, CONFIG).compile() for form, function in UTILITIES.items()
    }
    seconds = {form: [] for form in UTILITIES}
    for _ in range(REPEATS):
        for form, program in programs.items():
            start = time.perf_counter()
            program(*arguments).block_until_ready()
            seconds[form].append(time.perf_counter() - start)
    return {
        form: {
            "seconds": min(seconds[form]),
            "exact_over_this": min(seconds["exact"]) / min(seconds[form]),
            "temporary_bytes": programs[form].memory_analysis().temp_size_in_bytes,
            "argument_bytes": programs[form].memory_analysis().argument_size_in_bytes,
        }
        for form in UTILITIES
    }


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--out", type=pathlib.Path, default=RESULTS)
    arguments = parser.parse_args()
    cells = compare(arguments.seeds)
    costs = {size: cost(*shape) for size, shape in SIZES.items()}
    for form in UTILITIES:
        own = [cell for cell in cells if cell["form"] == form]
        figures = {
            key: np.median([cell[key] for cell in own])
            for key in ("rank_correlation", "auc_mislabelled", "auc_junk")
        }
        print(form, ", ".join(f"{key} {value:.2f}" for key, value in figures.items()))
        for size, measured in costs.items():
            print(f"  {size}: " + ", ".join(f"{key} {value:.4g}" for key, value in measured[form].items()))
    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout.strip()
    report = {
        "command": "python benchmarks/utility.py" + f" --seeds={arguments.seeds}" * (arguments.seeds != 5),
        "commit": commit,
        "device": f"{jax.devices()[0].device_kind}, {os.cpu_count()} cores",
        "config": vars(CONFIG),
        "repeats": REPEATS,
        "cells": cells,
        "costs": costs,
    }
    arguments.out.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
