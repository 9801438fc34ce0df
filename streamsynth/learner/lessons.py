"""What maximum likelihood learns from: prompts in every strategy, and texts they could have called for."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence

import numpy as np

from streamsynth.learner.supervised import SupervisedBatch
from streamsynth.stream.patterns import STRATEGIES
from streamsynth.stream.prompts import SHOWN, SOURCES, PromptFormat
from streamsynth.tasks.attributes import Attribute, Value
from streamsynth.tasks.task import Brief, Example, Task

Draw = Callable[[np.random.Generator, int], list[str]]

# How often a lesson is given in each strategy. Those that show examples teach most, since each example in a
# prompt is foretold from those before it.
_CHANCE = {
    "label_only": 0.04,
    "imitate": 0.22,
    "vary_one": 0.22,
    "combine_two": 0.22,
    "contrast": 0.2,
    "imitate_best": 0.04,
    "reshape": 0.06,
}
# How often a lesson whose texts have attributes asks for them.
_ATTRIBUTES_CHANCE = 0.08
# Of this many candidates, the one most like its sources becomes the target of a strategy that has them; and
# of "reshape" the one whose length differs most.
_CANDIDATES = 4


def mix() -> dict[str, float]:
    """How often a lesson is of each strategy, and asks for attributes: for caches of what was taught."""
    return {**_CHANCE, "attributes": _ATTRIBUTES_CHANCE}


@dataclasses.dataclass(frozen=True)
class Lesson:
    """A label of a task with a source of its texts, and of texts of the labels beside it.

    A source gives at most as many different texts as it is asked for, and fewer where it has no more.
    """

    brief: Brief
    label: str
    own: Draw
    others: Draw
    attributes: tuple[Attribute, ...] = ()


def task_lesson(
    brief: Brief, label: str, examples: Sequence, attributes: tuple[Attribute, ...] = ()
) -> Lesson:
    """A lesson of one label of a task, from labelled texts."""
    own = [e.text for e in examples if e.label == label]
    others = [e.text for e in examples if e.label != label]
    return Lesson(brief, label, _without_replacement(own), _without_replacement(others), attributes)


def lesson_batch(
    form: PromptFormat, lessons: Sequence[Lesson], rng: np.random.Generator, samples: int
) -> SupervisedBatch:
    """One prompt a lesson, in a random strategy, with `samples` target texts that it does not show.

    A target that is too long for the completion is left out: its row stays empty, as are all rows of a
    lesson that has no text.
    """
    prompts, completions = [], []
    strategies = rng.choice(len(STRATEGIES), size=len(lessons), p=[_CHANCE[name] for name in STRATEGIES])
    for lesson, strategy in zip(lessons, strategies, strict=True):
        name = STRATEGIES[strategy]
        own_count, other_count = SHOWN[name]
        wanted = samples * (_CANDIDATES if name in SOURCES else 1)
        texts = lesson.own(rng, own_count + wanted)
        # Where texts are few, targets come first: a prompt may show fewer examples than its strategy says.
        own_count = min(own_count, max(len(texts) - 1, 0))
        pool = texts[own_count:]
        shown = [text for text in texts[:own_count] if text not in pool]
        if name in SOURCES:
            choose = _most_reshaped if name == "reshape" else _most_alike
            pool = choose(shown[: SOURCES[name]], pool, samples)
        wanted = ()
        if lesson.attributes and pool and rng.random() < _ATTRIBUTES_CHANCE:
            values = _values_of(lesson.attributes, pool[0])
            pool = [text for text in pool if all(value.holds(text) for _, value in values)]
            wanted = [f"{one.name}: {value.name}" for one, value in values]
        others = lesson.others(rng, other_count)
        ids, _ = form.prompt(lesson.brief, int(strategy), lesson.label, shown, others, wanted)
        prompts.append(ids)
        targets = [pool[i % len(pool)] for i in range(samples)] if pool else [""] * samples
        completions += [(form.completion(lesson.brief, text) if text else None) or [] for text in targets]
    tokens, mask = form.pad_completions(completions)
    return SupervisedBatch(form.pad_prompts(prompts, np.zeros(len(prompts)), strategies), tokens, mask)


def examination(
    form: PromptFormat, task: Task, tuned: Sequence[Example], held: Sequence[Example]
) -> SupervisedBatch:
    """What held-out examples measure a policy by: for each label one prompt that shows others, and them.

    Args:
      form: of the prompts.
      task: whose examples they are.
      tuned: examples that prompts may show.
      held: as many of each label; those too long for a completion count nothing.
    """
    imitate = STRATEGIES.index("imitate")
    prompts, completions = [], []
    for label in task.labels:
        shown = [e.text for e in tuned if e.label == label][: SHOWN["imitate"][0]]
        prompts.append(form.prompt(task.brief, imitate, label, shown, ())[0])
        completions += [form.completion(task.brief, e.text) or [] for e in held if e.label == label]
    tokens, mask = form.pad_completions(completions)
    count = len(prompts)
    strategy = np.full(count, imitate)
    return SupervisedBatch(form.pad_prompts(prompts, np.arange(count), strategy), tokens, mask)


def _most_alike(sources: Sequence[str], pool: Sequence[str], count: int) -> list[str]:
    """The best of every `count`-th candidate: like the sources, and still a random choice."""
    words = [set(text.split()) for text in sources]

    def likeness(text: str) -> float:
        own = set(text.split())
        return sum(len(other & own) / len(other | own) for other in words)

    return _best_of_runs(pool, count, likeness)


def _most_reshaped(sources: Sequence[str], pool: Sequence[str], count: int) -> list[str]:
    """Of every `count`-th candidate the one whose length differs most from the source's."""
    lengths = [len(text.split()) for text in sources]
    return _best_of_runs(pool, count, lambda text: sum(abs(len(text.split()) - n) for n in lengths))


def _best_of_runs(pool: Sequence[str], count: int, score: Callable[[str], float]) -> list[str]:
    runs = [pool[i::count] for i in range(min(count, len(pool)))]
    return [max(run, key=score) for run in runs]


def _values_of(attributes: Sequence[Attribute], text: str) -> list[tuple[Attribute, Value]]:
    """The tested values that a text has, with their attributes."""
    found = []
    for attribute in attributes:
        found += [(attribute, value) for value in attribute.values if value.tested and value.holds(text)][:1]
    return found


def _without_replacement(texts: Sequence[str]) -> Draw:
    return lambda rng, n: [texts[i] for i in rng.permutation(len(texts))[:n]]
