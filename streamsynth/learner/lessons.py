"""What maximum likelihood learns from: prompts in every strategy, and texts they could have called for."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence

import numpy as np

from streamsynth.learner.supervised import SupervisedBatch
from streamsynth.stream.patterns import STRATEGIES
from streamsynth.stream.prompts import SHOWN, PromptFormat
from streamsynth.tasks.task import Task

Draw = Callable[[np.random.Generator, int], list[str]]

# Of this many candidates, the one most like the examples shown becomes the target of a strategy that
# asks for likeness.
_LIKENESS_CANDIDATES = 4
_LIKENESS = ("vary_one", "combine_two")


@dataclasses.dataclass(frozen=True)
class Lesson:
    """A label with a source of its texts, and of texts of the labels beside it.

    A source gives at most as many different texts as it is asked for, and fewer where it has no more.
    """

    label: str
    own: Draw
    others: Draw


def example_lessons(task: Task) -> list[Lesson]:
    """One lesson a label, from the task's examples alone."""
    return [task_lesson(label, task.examples) for label in task.labels]


def task_lesson(label: str, examples: Sequence) -> Lesson:
    """A lesson of one label, from labelled texts."""
    own = [e.text for e in examples if e.label == label]
    others = [e.text for e in examples if e.label != label]
    return Lesson(label, _without_replacement(own), _without_replacement(others))


def lesson_batch(
    form: PromptFormat, lessons: Sequence[Lesson], rng: np.random.Generator, samples: int
) -> SupervisedBatch:
    """One prompt a lesson, in a random strategy, with `samples` target texts that it does not show.

    A target that is too long for the completion is left out: its row stays empty.
    """
    encode = form.tokenizer.encode
    prompts, completions = [], []
    strategies = rng.integers(len(STRATEGIES), size=len(lessons))
    for lesson, strategy in zip(lessons, strategies, strict=True):
        name = STRATEGIES[strategy]
        own_count, other_count = SHOWN[name]
        wanted = samples * (_LIKENESS_CANDIDATES if name in _LIKENESS else 1)
        texts = lesson.own(rng, own_count + wanted)
        # Where texts are few, targets come first: a prompt may show fewer examples than its strategy says.
        own_count = min(own_count, max(len(texts) - 1, 0))
        shown = texts[:own_count]
        pool = [text for text in texts[own_count:] if text not in shown] or texts[-1:]
        if name in _LIKENESS:
            pool = _most_alike(shown, pool, samples)
        ids, _ = form.prompt(
            int(strategy),
            encode(lesson.label.replace("_", " ")),
            [encode(text) for text in shown],
            [encode(text) for text in lesson.others(rng, other_count)],
        )
        prompts.append(ids)
        completions += [form.completion(pool[i % len(pool)]) or [] for i in range(samples)]
    tokens, mask = form.pad_completions(completions)
    return SupervisedBatch(form.pad_prompts(prompts, np.zeros(len(prompts)), strategies), tokens, mask)


def _most_alike(shown: Sequence[str], pool: Sequence[str], count: int) -> list[str]:
    """The best of every `count`-th candidate: like the examples, and still a random choice."""
    words = [set(text.split()) for text in shown]

    def likeness(i: int) -> float:
        own = set(pool[i].split())
        return sum(len(other & own) / len(other | own) for other in words)

    runs = [range(i, len(pool), count) for i in range(min(count, len(pool)))]
    return [pool[max(run, key=likeness)] for run in runs]


def _without_replacement(texts: Sequence[str]) -> Draw:
    return lambda rng, n: [texts[i] for i in rng.permutation(len(texts))[:n]]
