"""How well a policy writes for a task: one cell of the transfer matrix, and the anchors around it."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from streamsynth.evaluation import diversity, questions, student
from streamsynth.feedback import gates as gates_lib
from streamsynth.keys import purpose_key
from streamsynth.learner.collect import gated, write
from streamsynth.policy.transformer import Transformer
from streamsynth.stream.patterns import STRATEGIES
from streamsynth.stream.prompts import PromptFormat
from streamsynth.tasks.task import Task


@dataclasses.dataclass(frozen=True)
class Drawn:
    """Unselected texts of a policy for a task, and what the gates say of them."""

    texts: tuple[str, ...]
    label: np.ndarray
    gates: gates_lib.Gates


def draw(
    model: Transformer,
    variables: Any,
    form: PromptFormat,
    task: Task,
    config: Any,
    *,
    seed: int,
    place: Callable[[Any], Any],
    batches: int | None = None,
) -> Drawn:
    """Texts for a task from fixed prompts and keys, the same for every policy that is compared.

    The strategies of `evaluation.strategies` come in equal shares, so that what is compared is the policy and
    not its choice of strategy.
    """
    e = config.evaluation
    known = np.array([STRATEGIES.index(name) for name in e.strategies], np.int32)
    strategies = np.resize(known, e.prompts)
    texts, label, passed = [], [], []
    for batch in range(batches or e.batches):
        written = write(
            model,
            variables,
            form,
            task,
            strategies,
            seed=seed,
            purpose=f"evaluate/{task.name}",
            steps=(batch,),
            samples=e.samples,
            temperature=e.temperature,
            place=place,
        )
        texts += written.texts
        label.append(written.label)
        passed.append(gated(task, written, lambda text: False, config.feedback))
    by_name = {name: np.concatenate([gates.by_name[name] for gates in passed]) for name in passed[0].by_name}
    gates = gates_lib.Gates(by_name, np.concatenate([gates.passed for gates in passed]))
    return Drawn(tuple(texts), np.concatenate(label), gates)


def cell(task: Task, drawn: Drawn, config: Any, *, seed: int) -> dict[str, Any]:
    """One evaluation: a student on a fixed number of gated rows, validity, copies, diversity, samples.

    No student learns from questions and answers: there, accuracy and macro-F1 are None, and the score is the
    validity.

    Returns:
      The record of evaluations.jsonl but for its turn: see `report`. "score" names the key of its score.
    """
    e = config.evaluation
    if has_student(task):
        rows = first_of_each(drawn.label, drawn.gates.passed, len(task.labels), e.rows_per_label)
        texts = [drawn.texts[i] for i in rows]
        scored = {
            "score": "accuracy",
            **fit_student(task, texts, drawn.label[rows], config, seed=seed),
            "rows": len(rows),
        }
    else:
        scored = {"score": "validity", "accuracy": None, "macro_f1": None, "rows": 0}
        scored["questions"] = questions.measure(task, drawn.texts, config.dataset.near_duplicate)
    valid = verify(task, drawn.texts, drawn.label)
    samples = [
        {
            "text": drawn.texts[i],
            "label": task.labels[drawn.label[i]],
            "valid": None if valid is None else bool(valid[i]),
        }
        for i in range(0, len(drawn.texts), max(1, len(drawn.texts) // 20))
    ]
    return {
        "task": task.name,
        **scored,
        "validity": float((drawn.gates.passed if valid is None else drawn.gates.passed & valid).mean()),
        "gate_pass": float(drawn.gates.passed.mean()),
        "copy_rate": 1.0 - float(drawn.gates.by_name["not_copied"].mean()),
        "valid": None if valid is None else float(valid.mean()),
        "diversity": diversity.measure(drawn.texts, e.diversity_texts, seed, reference(task)),
        "samples": samples[:20],
    }


def reference(task: Task) -> list[str]:
    """The real texts that coverage and NovelSum compare with: all training texts but the label budget.

    These are for the reader: nothing learns from them. The examples are left out because a policy
    has seen them, and could cover them by copying; the test set stays for the student.
    """
    shown = {example.text for example in task.examples}
    return [example.text for example in task.train if example.text not in shown]


def has_student(task: Task) -> bool:
    """Whether a student can be trained on the task's rows: it learns to tell labels apart."""
    return task.kind != "qa"


def verify(task: Task, texts: Sequence[str], label: np.ndarray) -> np.ndarray | None:
    """[N] bool: what the task's verifier says, or None without one."""
    if task.verifier is None:
        return None
    return np.array([task.verifier(t, task.labels[k]) for t, k in zip(texts, label, strict=True)], bool)


def first_of_each(label: np.ndarray, passed: np.ndarray, num_labels: int, per_label: int) -> np.ndarray:
    """Indices of the first `per_label` samples of each label that passed, fewer where there are fewer."""
    chosen = [np.flatnonzero((label == k) & passed)[:per_label] for k in range(num_labels)]
    return np.concatenate(chosen)


def fit_student(
    task: Task, texts: Sequence[str], label: np.ndarray, config: Any, *, seed: int
) -> dict[str, float]:
    """Accuracy and macro-F1, on the real test set, of a student trained on the given texts.

    Always as many gradient steps, whatever the number of texts. Without any text: chance.
    """
    if not len(texts):
        return {"accuracy": 1.0 / len(task.labels), "macro_f1": 0.0}
    truth = [task.labels.index(example.label) for example in task.test]
    return student.score(
        list(texts),
        list(map(int, label)),
        [example.text for example in task.test],
        truth,
        len(task.labels),
        purpose_key(seed, f"student/{task.name}"),
        student.StudentConfig(**config.evaluation.student.to_dict()),
    )


def anchors(task: Task, config: Any, *, seed: int) -> dict[str, float]:
    """The student on the examples alone, and on all real training data, with as many steps."""

    def on(examples):
        label = np.array([task.labels.index(example.label) for example in examples])
        return fit_student(task, [e.text for e in examples], label, config, seed=seed)["accuracy"]

    return {"examples": on(task.examples), "real": on(task.train)}
