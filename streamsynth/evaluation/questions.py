"""What can be said of written questions and answers without a student: form, spread, and what they repeat."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np

from streamsynth.dataset.near_duplicates import NearDuplicates
from streamsynth.tasks.question_answer import fields_of, normalise_number
from streamsynth.tasks.splits import normalise
from streamsynth.tasks.task import Task

STATISTICS = ("numeric", "commonest_answer", "question_words", "answer_words")


def measure(task: Task, texts: Sequence[str], threshold: float) -> dict[str, Any]:
    """Figures of unselected texts beside those of the real test set. Nothing may learn from them.

    Args:
      task: of kind "qa".
      texts: as the policy wrote them; those that are no question with an answer are left out.
      threshold: of word-bigram Jaccard similarity, from which two questions are near-duplicates.

    Returns:
      "parsed": how many texts are a question with an answer.
      "written", "real": `statistics` of those and of the test set.
      "test_exact", "test_near": share of the written questions that are a test question, and that are a
        near-duplicate of one (exact ones included). None without a written question.
    """
    written = [fields for fields in (fields_of(task, text) for text in texts) if fields is not None]
    asked = [question for question, _ in written]
    real = [example.fields for example in task.test]
    exact = {normalise(question) for question, _ in real}
    near = NearDuplicates(threshold, (question for question, _ in real))
    return {
        "parsed": len(written),
        "written": statistics(written),
        "real": statistics(real),
        "test_exact": _share([normalise(question) in exact for question in asked]),
        "test_near": _share([near.seen(question) for question in asked]),
    }


def statistics(rows: Sequence[tuple[str, ...]]) -> dict[str, float | None]:
    """Figures of questions and answers that hardly depend on how many there are; None without any.

    Args:
      rows: questions with their answers.

    Returns:
      "numeric": share of answers that are numbers.   "commonest_answer": share of the most frequent answer,
      which tells a writer that always answers alike.   "question_words", "answer_words": medians.
    """
    if not rows:
        return dict.fromkeys(STATISTICS)
    answers = Counter(normalise_number(answer) or normalise(answer) for _, answer in rows)
    return {
        "numeric": _share([normalise_number(answer) is not None for _, answer in rows]),
        "commonest_answer": max(answers.values()) / len(rows),
        "question_words": float(np.median([len(question.split()) for question, _ in rows])),
        "answer_words": float(np.median([len(answer.split()) for _, answer in rows])),
    }


def _share(found: Sequence[bool]) -> float | None:
    return float(np.mean(found)) if found else None
