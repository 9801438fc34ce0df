"""What the policy is asked: a task's label, a strategy and some examples, as tokens.

How that is put into words, or markers, and how an answer is read, is the business of a `PromptFormat`.
"""

from __future__ import annotations

import abc
import dataclasses
from collections.abc import Callable, Collection, Sequence
from typing import Any

import numpy as np

from streamsynth.pytrees import Prompts
from streamsynth.stream.patterns import STRATEGIES
from streamsynth.tasks.attributes import phrases
from streamsynth.tasks.task import Brief, Example, Task

# How many examples of the label, and how many of other labels, each strategy shows.
SHOWN = {
    "label_only": (0, 0),
    "imitate": (6, 0),
    "vary_one": (6, 0),
    "combine_two": (6, 0),
    "contrast": (4, 2),
    "imitate_best": (6, 0),
    "reshape": (6, 0),
}
assert tuple(SHOWN) == tuple(STRATEGIES)
# How many of them, the ones next to where the text is written, it starts from.
SOURCES = {"vary_one": 1, "combine_two": 2, "reshape": 1}
# It shows the best kept texts of what is asked for, and examples where there are too few of them.
ELITE = "imitate_best"


# From indices of a label and a cell to the best texts that were kept of them.
Best = Callable[[int, int], Sequence[Example]]


@dataclasses.dataclass(frozen=True)
class Answer:
    """What a policy wrote, read by its format.

    text: the fields as one string (`tasks.task.join_fields`); what was decoded, where it did not parse.
    rejection: why it did not parse, "" where it did.
    """

    text: str
    rejection: str = ""


@dataclasses.dataclass(frozen=True)
class PromptFormat(abc.ABC):
    """How a policy is asked and how its answers are read; the lengths P and T that all is padded to.

    Texts travel with their fields in one string (`tasks.task.join_fields`).

    buckets: rising lengths below P, to the first of which a batch may be cut that all its prompts fit.
    """

    tokenizer: Any
    prompt_length: int
    completion_length: int
    buckets: tuple[int, ...] = ()

    @property
    @abc.abstractmethod
    def stops(self) -> tuple[int, ...]:
        """The tokens that end a completion."""

    @abc.abstractmethod
    def prompt(
        self,
        brief: Brief,
        strategy: int,
        label: str,
        own: Sequence[str],
        others: Sequence[str],
        wanted: Sequence[str] = (),
    ) -> tuple[list[int], list[bool]]:
        """One prompt.

        A text that does not fit is left out whole. The label's own come before the others, and the first of
        them, which stands next to where the text is written, before the later ones.

        Args:
          brief: of the task.
          strategy: index into `STRATEGIES`.
          label: that is asked for.
          own: example texts of the label; the first are the sources of a strategy that has them.
          others: example texts of other labels.
          wanted: values of attributes that are asked for, such as "length: short".

        Returns:
          At most `prompt_length` token ids, and for each text of `own` and then of `others` whether it is in.
        """

    @abc.abstractmethod
    def answer(self, brief: Brief, text: str) -> list[int]:
        """Token ids of the completion that gives a text, with its end, however long."""

    @abc.abstractmethod
    def read(self, brief: Brief, ids: Sequence[int]) -> Answer:
        """What token ids say; any ids give a text or a named rejection."""

    @abc.abstractmethod
    def neutral(self) -> list[int]:
        """The shortest prompt: a text read after it is read for itself alone."""

    def completion(self, brief: Brief, text: str) -> list[int] | None:
        """Token ids of the completion that gives a text, or None if it does not fit."""
        ids = self.answer(brief, text)
        return ids if len(ids) <= self.completion_length else None

    def pad_prompts(
        self, prompts: Sequence[Sequence[int]], label: np.ndarray, strategy: np.ndarray
    ) -> Prompts:
        """B prompts as arrays."""
        tokens, mask = _pad(prompts, self.prompt_length, self.tokenizer.pad)
        return Prompts(tokens, mask, np.asarray(label, np.int32), np.asarray(strategy, np.int32))

    def shortened(self, prompts: Prompts, longest: int) -> Prompts:
        """The same prompts, the longest of `longest` tokens, padded to the first length that holds them."""
        length = min(size for size in (*self.buckets, self.prompt_length) if size >= longest)
        return prompts.replace(tokens=prompts.tokens[:, :length], mask=prompts.mask[:, :length])

    def pad_completions(self, completions: Sequence[Sequence[int]]) -> tuple[np.ndarray, np.ndarray]:
        """Tokens [N, T] int32 and mask [N, T] bool of completions, which are cut if they are longer."""
        cut = [row[: self.completion_length] for row in completions]
        return _pad(cut, self.completion_length, self.stops[0])


def label_text(label: str) -> str:
    """A label's name as prompts write it: `card_arrival` reads "card arrival"."""
    return label.replace("_", " ")


@dataclasses.dataclass(frozen=True)
class Rendered:
    """B prompts, the ids of the examples that each one shows, and how many did not fit into it, [B] int.

    Prompts that were not rendered are blank, show nothing and dropped nothing.
    """

    prompts: Prompts
    shown: tuple[tuple[str, ...], ...]
    dropped: np.ndarray


def render(
    form: PromptFormat,
    task: Task,
    label: np.ndarray,
    strategy: np.ndarray,
    rng: np.random.Generator,
    cell: np.ndarray | None = None,
    best: Best = lambda label, cell: (),
    only: Collection[int] | None = None,
) -> Rendered:
    """Prompts for the given labels [B] and strategies [B]; the examples shown are drawn afresh for each.

    What prompt b draws follows from `rng` and b alone, whichever other prompts are rendered.

    Args:
      form, task: how is asked, and for what.
      label, strategy: [B] int.
      rng: a fresh one, of which each prompt has its own.
      cell: [B] int, indices into `task.cells`; None asks for no attributes.
      best: the best kept texts of a label and cell, for the strategy that shows them.
      only: the indices of the prompts that are rendered; all by default.
    """
    examples = [task.examples_of(name) for name in task.labels]
    rows, shown, dropped = [], [], np.zeros(len(label), np.int32)
    cell = np.zeros(len(label), np.int32) if cell is None else cell
    own_rngs = rng.spawn(len(label))
    for b, (k, s, c, rng) in enumerate(zip(label, strategy, cell, own_rngs, strict=True)):
        if only is not None and b not in only:
            rows.append([])
            shown.append(())
            continue
        own_count, other_count = SHOWN[STRATEGIES[s]]
        pool = [examples[k][i] for i in rng.permutation(len(examples[k]))]
        if STRATEGIES[s] == ELITE:
            kept = best(int(k), int(c))
            pool = [*(kept[i] for i in rng.permutation(len(kept))), *pool]
        own = pool[:own_count]
        others = [example for j, those in enumerate(examples) if j != k for example in those]
        others = [others[i] for i in rng.permutation(len(others))[:other_count]]
        texts = ([example.text for example in those] for those in (own, others))
        wanted = phrases(task.attributes, task.cells[c]) if task.attributes else ()
        ids, fits = form.prompt(task.brief, int(s), task.labels[k], *texts, wanted)
        rows.append(ids)
        shown.append(tuple(example.id for example, fit in zip((*own, *others), fits, strict=True) if fit))
        dropped[b] = fits.count(False)
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
