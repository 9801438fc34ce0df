"""What the policy is asked: a task's label, a strategy and some examples, as tokens.

A prompt reads, marker by marker:

    <s> <strategy> <label> name <contrast> text ... <example> text ... <write>

and the completion is a text of that label, ended by </s>. What a strategy starts from, the example to vary or
the two to combine, stands last, next to <write>; all others are there to show what the label is like.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np

from streamsynth.errors import UserError
from streamsynth.policy.tokenizer import Tokenizer, strategy_marker
from streamsynth.pytrees import Prompts
from streamsynth.stream.patterns import STRATEGIES
from streamsynth.tasks.task import Task

# How many examples of the label, and how many of other labels, each strategy shows.
SHOWN = {
    "label_only": (0, 0),
    "imitate": (6, 0),
    "vary_one": (6, 0),
    "combine_two": (6, 0),
    "contrast": (4, 2),
}
assert tuple(SHOWN) == tuple(STRATEGIES)
# How many of them, the ones next to <write>, the text is to resemble.
SOURCES = {"vary_one": 1, "combine_two": 2}


@dataclasses.dataclass(frozen=True)
class PromptFormat:
    """The markers' ids and the lengths that every prompt and completion is padded to."""

    tokenizer: Tokenizer
    prompt_length: int
    completion_length: int

    def __post_init__(self):
        # Four markers and one token of the label; one token and the end.
        for name, least in (("prompt_length", 5), ("completion_length", 2)):
            if getattr(self, name) < least:
                raise UserError(f"rollout.{name} = {getattr(self, name)} is too short: give {least} or more.")

    def prompt(
        self,
        strategy: int,
        label: Sequence[int],
        own: Sequence[Sequence[int]],
        others: Sequence[Sequence[int]],
    ) -> tuple[list[int], list[bool]]:
        """Token ids of one prompt, and for each text of `own` and then of `others` whether it is in it.

        A text that does not fit is left out whole. The label's own come before the others, and the first of
        them, which stands next to <write>, before the later ones; a label too long for the prompt is cut.
        """
        t = self.tokenizer
        head = [t.bos, t.marker(strategy_marker(STRATEGIES[strategy])), t.marker("<label>")]
        room = self.prompt_length - len(head) - 1
        label = list(label)[:room]
        room -= len(label)
        kept: dict[str, list[list[int]]] = {"<example>": [], "<contrast>": []}
        fits = []
        for marker, texts in (("<example>", own), ("<contrast>", others)):
            for ids in texts:
                fits.append(len(ids) + 1 <= room)
                if fits[-1]:
                    kept[marker].append([t.marker(marker), *ids])
                    room -= len(ids) + 1
        shown = [
            token for marker in ("<contrast>", "<example>") for ids in kept[marker][::-1] for token in ids
        ]
        return [*head, *label, *shown, t.marker("<write>")], fits

    def pad_prompts(
        self, prompts: Sequence[Sequence[int]], label: np.ndarray, strategy: np.ndarray
    ) -> Prompts:
        """B prompts as arrays."""
        tokens, mask = _pad(prompts, self.prompt_length, self.tokenizer.pad)
        return Prompts(tokens, mask, np.asarray(label, np.int32), np.asarray(strategy, np.int32))

    def completion(self, text: str) -> list[int] | None:
        """Token ids of a text with its end, or None if it does not fit."""
        ids = [*self.tokenizer.encode(text), self.tokenizer.eos]
        return ids if len(ids) <= self.completion_length else None

    def pad_completions(self, completions: Sequence[Sequence[int]]) -> tuple[np.ndarray, np.ndarray]:
        """Tokens [N, T] int32 and mask [N, T] bool."""
        return _pad(completions, self.completion_length, self.tokenizer.eos)


@dataclasses.dataclass(frozen=True)
class TaskTokens:
    """A task's label names [K] and examples [K][k], tokenised once."""

    names: tuple[tuple[int, ...], ...]
    examples: tuple[tuple[tuple[int, ...], ...], ...]
    ids: tuple[tuple[str, ...], ...]


def label_text(label: str) -> str:
    """A label's name as prompts write it: `card_arrival` reads "card arrival"."""
    return label.replace("_", " ")


def tokenise(task: Task, tokenizer: Tokenizer) -> TaskTokens:
    """The task as prompts need it."""
    by_label = [task.examples_of(label) for label in task.labels]
    return TaskTokens(
        names=tuple(tuple(tokenizer.encode(label_text(label))) for label in task.labels),
        examples=tuple(tuple(tuple(tokenizer.encode(e.text)) for e in examples) for examples in by_label),
        ids=tuple(tuple(e.id for e in examples) for examples in by_label),
    )


@dataclasses.dataclass(frozen=True)
class Rendered:
    """B prompts, the ids of the examples each one shows, and how many examples did not fit in all."""

    prompts: Prompts
    shown: tuple[tuple[str, ...], ...]
    dropped: int


def render(
    form: PromptFormat, task: TaskTokens, label: np.ndarray, strategy: np.ndarray, rng: np.random.Generator
) -> Rendered:
    """Prompts for the given labels [B] and strategies [B]; the examples shown are drawn afresh for each."""
    rows, shown, dropped = [], [], 0
    for k, s in zip(label, strategy, strict=True):
        own_count, other_count = SHOWN[STRATEGIES[s]]
        own = [(k, i) for i in rng.permutation(len(task.examples[k]))[:own_count]]
        others = [(j, i) for j, texts in enumerate(task.examples) if j != k for i in range(len(texts))]
        others = [others[i] for i in rng.permutation(len(others))[:other_count]]
        ids, fits = form.prompt(
            s, task.names[k], *([task.examples[j][i] for j, i in places] for places in (own, others))
        )
        rows.append(ids)
        kept = [place for place, fit in zip((*own, *others), fits, strict=True) if fit]
        shown.append(tuple(task.ids[j][i] for j, i in kept))
        dropped += len(fits) - len(kept)
    return Rendered(form.pad_prompts(rows, label, strategy), tuple(shown), dropped)


def balanced_labels(count: int, labels: int, rng: np.random.Generator) -> np.ndarray:
    """[count] int32 label indices in random order, each label as often as any other (to within one)."""
    order = np.concatenate([rng.permutation(labels) for _ in range(-(-count // labels))])
    return rng.permutation(order[:count]).astype(np.int32)


def _pad(rows: Sequence[Sequence[int]], length: int, value: int) -> tuple[np.ndarray, np.ndarray]:
    tokens = np.full((len(rows), length), value, np.int32)
    mask = np.zeros((len(rows), length), bool)
    for i, row in enumerate(rows):
        tokens[i, : len(row)] = row
        mask[i, : len(row)] = True
    return tokens, mask
