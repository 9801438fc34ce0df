"""Attributes that the policy proposes for tasks that name none: asked for in words, read strictly.

One completion names one way in which texts differ, "tone: polite, angry". A batch of them is a vote, and the
ways named most often are taken.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from absl import logging

from streamsynth.keys import numpy_rng, purpose_key, sample_keys
from streamsynth.policy.rollout import rollout
from streamsynth.policy.transformer import Transformer
from streamsynth.runtime import arrays
from streamsynth.stream.answers import field_names
from streamsynth.stream.prompts import label_text
from streamsynth.stream.wording import WordedFormat
from streamsynth.tasks.attributes import MOST_CELLS, Attribute, Value, cells
from streamsynth.tasks.task import Task

# How many examples a prompt shows; each prompt shows others.
_EXAMPLES = 4
_VALUES = (2, 5)
_MOST_WORDS = 3
_MOST_CHARACTERS = 40
# In no name or value: prompts could not set it apart from what stands around it.
_RESERVED = frozenset(':;,.!?"*#<>[]{}()|\\/=_`~\ufffd')


def parse(text: str, task: Task) -> Attribute | None:
    """The attribute that a completion names, in lower case; None unless it has exactly the form asked for.

    That is one line, "name: value, value", with a full stop or not. Names and values have one to three words
    without punctuation but hyphens and apostrophes. There are two to five values, all different. None is the
    name or a label of the task, and the name is neither a label nor a field.
    """
    lines = text.strip().splitlines()
    if len(lines) != 1:
        return None
    name, _, listed = lines[0].lower().removesuffix(".").partition(":")
    *parts, last = listed.split(",")
    phrases = [_phrase(part) for part in (name, *parts, last.strip().removeprefix("and "))]
    if None in phrases or len(set(phrases)) < len(phrases):
        return None
    labels = (
        set() if task.kind == "qa" else {" ".join(label_text(one).lower().split()) for one in task.labels}
    )
    fields = {one.lower() for one in field_names(task.fields)}
    name, *values = phrases
    if labels & set(phrases) or name in fields | {"label", "labels"}:
        return None
    if not _VALUES[0] <= len(values) <= _VALUES[1]:
        return None
    return Attribute(name, tuple(map(Value, values)), proposed=True)


def _phrase(text: str) -> str | None:
    """A name or a value with single blanks, or None if it can be neither."""
    words = text.split()
    phrase = " ".join(words)
    fits = 1 <= len(words) <= _MOST_WORDS and len(phrase) <= _MOST_CHARACTERS
    readable = phrase.isprintable() and not set(phrase) & _RESERVED
    return phrase if fits and readable and all(any(map(str.isalnum, word)) for word in words) else None


def choose(proposals: Sequence[Attribute], count: int) -> tuple[Attribute, ...]:
    """At most `count` of the proposals, of different names, with at most `MOST_CELLS` cells together.

    The names proposed most often come first, each with the values that it was most often proposed with; what
    is equal stays in its order. One whose cells would be too many is passed over.
    """
    by_name: dict[str, dict[frozenset[Value], list[Attribute]]] = {}
    for one in proposals:
        by_name.setdefault(one.name, {}).setdefault(frozenset(one.values), []).append(one)
    chosen: list[Attribute] = []
    for versions in sorted(by_name.values(), key=lambda of_name: -sum(map(len, of_name.values()))):
        best = max(versions.values(), key=len)[0]
        if len(chosen) < count and len(cells([*chosen, best])) <= MOST_CELLS:
            chosen.append(best)
    return tuple(chosen)


def propose(
    model: Transformer,
    variables: Any,
    form: WordedFormat,
    task: Task,
    count: int,
    *,
    seed: int,
    prompts: int,
    samples: int,
    temperature: float,
    place: Callable[[Any], Any] = lambda tree: tree,
) -> tuple[Attribute, ...]:
    """Asks a policy for attributes of a task; takes at most `count` and warns where it takes fewer.

    Args:
      model, variables, form: the policy and its prompt format.
      task: that has none.
      count: how many are wanted.
      seed: of the random numbers, which follow from it and the task's name.
      prompts, samples: B and G, the shape of the one batch that is written.
      temperature: of sampling.
      place: puts a batch on the mesh.
    """
    purpose = f"attributes/{task.name}"
    rng = numpy_rng(seed, purpose)
    shown = [rng.permutation(len(task.examples))[:_EXAMPLES] for _ in range(prompts)]
    rows = [
        form.attribute_prompt(task.brief, task.labels, [task.examples[i].text for i in some])
        for some in shown
    ]
    none = np.zeros(prompts, np.int32)  # such prompts have neither a label nor a strategy
    rollouts = rollout(
        model,
        variables,
        place(form.pad_prompts(rows, none, none)),
        place(sample_keys(purpose_key(seed, purpose), prompts, samples)),
        np.float32(temperature),
        samples=samples,
        length=form.completion_length,
        stops=form.stops,
    )
    tokens, mask, finished = arrays.fetch((rollouts.tokens, rollouts.mask, rollouts.finished))
    # Of a completion that was cut the last value may be half a word.
    texts = [form.spoken(tokens[n][mask[n]].tolist()) for n in np.flatnonzero(finished)]
    found = [parsed for parsed in (parse(text, task) for text in texts) if parsed is not None]
    chosen = choose(found, count)
    if len(chosen) < count:
        logging.warning(
            "%s goes on with %d of the %d attributes that stream.proposed_attributes asks for: %d of the "
            "policy's %d completions named one in the right form",
            task.name, len(chosen), count, len(found), len(tokens),
        )  # fmt: skip
    return chosen


def with_proposed(tasks: Sequence[Task], proposed: Mapping[str, tuple[Attribute, ...]]) -> tuple[Task, ...]:
    """The tasks with what was proposed for them, by name; the others as they are."""
    return tuple(
        dataclasses.replace(task, attributes=proposed.get(task.name, task.attributes)) for task in tasks
    )
