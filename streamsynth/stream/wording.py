"""What formats in words share: answers in their strict form, and which examples a prompt has room for."""

from __future__ import annotations

import abc
import dataclasses
import functools
import itertools
from collections.abc import Sequence
from typing import ClassVar

from streamsynth.errors import UserError
from streamsynth.policy.tokenizer import Tokenizer
from streamsynth.stream import answers
from streamsynth.stream.patterns import STRATEGIES
from streamsynth.stream.prompts import SOURCES, Answer, PromptFormat, label_text
from streamsynth.tasks.task import Brief, join_fields

# What a prompt for an attribute ends with; its name and values follow.
SURVEY_START = "They also differ in"


@dataclasses.dataclass(frozen=True)
class Order:
    """What one prompt asks for, and the examples it shows in this order.

    names: of the fields, as the answer has them.   label: in plain words; unused where kind is "qa".
    others: texts of other labels.   own: texts of the label.   sources: more of them, to start from.
    wanted: values of attributes, such as "length: short".
    """

    description: str
    kind: str
    names: tuple[str, ...]
    label: str
    strategy: str
    others: tuple[str, ...]
    own: tuple[str, ...]
    sources: tuple[str, ...]
    wanted: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True)
class Survey:
    """What a prompt shows of a task whose attributes are asked for.

    names: of the fields.   labels: in plain words; none where kind is "qa".   texts: examples of any label.
    """

    description: str
    names: tuple[str, ...]
    labels: tuple[str, ...]
    texts: tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class WordedFormat(PromptFormat):
    """A format whose prompts are words that a pretrained policy understands.

    separator: stands between two fields of a text.   ending: of an answer, before the token that ends it.
    """

    separator: ClassVar[str]
    ending: ClassVar[str]
    tokenizer: Tokenizer

    def __post_init__(self):
        if self.completion_length < 2:
            raise UserError(
                f"rollout.completion_length = {self.completion_length} is too short: give 2 or more."
            )

    @functools.cached_property
    def _wordless(self) -> frozenset[int]:
        return frozenset(self.tokenizer.control.values())

    @property
    @abc.abstractmethod
    def end(self) -> int:
        """The token that a policy learns to write behind an answer, unless its ending is one of `stops`."""

    @abc.abstractmethod
    def render(self, order: Order) -> list[int]:
        """All token ids of a prompt, which ends with the name of the first field and its colon."""

    @abc.abstractmethod
    def render_survey(self, survey: Survey) -> list[int]:
        """All token ids of a prompt for an attribute, which ends with `SURVEY_START`."""

    @abc.abstractmethod
    def spoken(self, ids: Sequence[int]) -> str:
        """The text of a completion up to its end."""

    def prompt(
        self,
        brief: Brief,
        strategy: int,
        label: str,
        own: Sequence[str],
        others: Sequence[str],
        wanted: Sequence[str] = (),
    ) -> tuple[list[int], list[bool]]:
        """As in `PromptFormat.prompt`; questions have no label, and none are shown as those of another.

        Raises:
          UserError: the prompt does not fit even without any example.
        """
        texts = (*own, *others)
        kept = list(range(len(own) if brief.kind == "qa" else len(texts)))

        def render() -> list[int]:
            mine, theirs = ([texts[i] for i in kept if (i < len(own)) == is_own] for is_own in (True, False))
            return self.render(_order(brief, STRATEGIES[strategy], label, mine, theirs, wanted))

        ids = render()
        if len(ids) > self.prompt_length:
            # How long a text is alone says nearly what it adds, and is remembered: most are shown often.
            candidates, kept = kept, []
            room = self.prompt_length - len(render())
            for i in candidates:
                cost = _length(self.tokenizer, self.block(answers.field_names(brief.fields), texts[i]))
                if cost <= room:
                    kept.append(i)
                    room -= cost
            ids = render()
        while len(ids) > self.prompt_length:
            if not kept:
                raise UserError(
                    f"rollout.prompt_length = {self.prompt_length} is too short for a prompt without any "
                    f"example, which takes {len(ids)} tokens: give {len(ids)} or more, and more to show some."
                )
            kept.pop()
            ids = render()
        return ids, [i in kept for i in range(len(texts))]

    def attribute_prompt(self, brief: Brief, labels: Sequence[str], texts: Sequence[str]) -> list[int]:
        """A prompt for one way in which a task's texts differ beside their label.

        The completion (`spoken`) is wanted as one line, "name: value, value, value". What does not fit is
        left out whole: the last texts, then the last labels.

        Args:
          brief: of the task.
          labels: of the task; those of questions are not named.
          texts: examples.

        Raises:
          UserError: the prompt does not fit even without any of them.
        """
        named = () if brief.kind == "qa" else tuple(" ".join(label_text(label).split()) for label in labels)
        shown = [(named, tuple(texts[:count])) for count in range(len(texts), -1, -1)]
        shown += [(named[:count], ()) for count in range(len(named) - 1, -1, -1)]
        for some_labels, some_texts in shown:
            ids = self.render_survey(
                Survey(
                    sentence(brief.description), answers.field_names(brief.fields), some_labels, some_texts
                )
            )
            if len(ids) <= self.prompt_length:
                return ids
        raise UserError(
            f"rollout.prompt_length = {self.prompt_length} is too short for a prompt that asks for "
            f"attributes (stream.proposed_attributes), which takes {len(ids)} tokens without any label or "
            f"example: give {len(ids)} or more."
        )

    def block(self, names: Sequence[str], text: str) -> str:
        """A text as prompts show it: in the form of the answer."""
        return answers.write(names, text, self.separator)

    def answer(self, brief: Brief, text: str) -> list[int]:
        names = answers.field_names(brief.fields)
        start = f"{names[0]}:"
        spoken = self.tokenizer.encode(start)
        whole = self.tokenizer.encode(self.block(names, text) + self.ending)
        if whole[: len(spoken)] != spoken:
            # The border between prompt and answer is none between tokens.
            whole = spoken + self.tokenizer.encode(self.block(names, text).removeprefix(start) + self.ending)
        whole = whole[len(spoken) :]
        return whole if whole and whole[-1] in self.stops else [*whole, self.end]

    def completion(self, brief: Brief, text: str) -> list[int] | None:
        """As in `PromptFormat.completion`; None also for a text that would be read as something else."""
        names = answers.field_names(brief.fields)
        block = self.block(names, text)
        clean = join_fields(answers.values(text))
        if answers.parse(names, block.removeprefix(f"{names[0]}:")) != Answer(clean):
            return None
        return super().completion(brief, text)

    def read(self, brief: Brief, ids: Sequence[int]) -> Answer:
        ids = [int(i) for i in ids]
        parsed = answers.parse(answers.field_names(brief.fields), self.spoken(ids))
        said = itertools.takewhile(lambda i: i not in self.stops, ids)
        if any(i in self._wordless or i >= self.tokenizer.vocab_size for i in said):
            # They vanish from the text, but not from what the policy is judged and learns by.
            return Answer(parsed.text, "unreadable")
        return parsed

    def neutral(self) -> list[int]:
        return [self.tokenizer.eos if self.tokenizer.bos is None else self.tokenizer.bos]


def effective(order: Order) -> str:
    """The strategy that what is shown allows: with too few sources or examples it is another one."""
    if order.strategy in SOURCES and len(order.sources) < SOURCES[order.strategy]:
        return "vary_one" if order.sources else "label_only"
    if order.strategy in ("imitate", "imitate_best", "contrast") and not order.own:
        return "label_only"
    return order.strategy


def sentence(text: str) -> str:
    """On one line, with a full stop where it ends with nothing of that kind."""
    text = " ".join(text.split())
    return text if text.endswith((".", "!", "?", ":")) or not text else f"{text}."


def _order(
    brief: Brief, strategy: str, label: str, own: list[str], others: list[str], wanted: Sequence[str]
) -> Order:
    """What stands next to the answer comes first in `own` and `others`, and last in the order."""
    # Where not all of its sources fit, a strategy makes do with the ones that do.
    count = SOURCES.get(strategy, 0)
    return Order(
        description=sentence(brief.description),
        kind=brief.kind,
        names=answers.field_names(brief.fields),
        label=" ".join(label_text(label).split()),
        strategy=strategy,
        others=tuple(others[::-1]),
        own=tuple(own[count:][::-1]),
        sources=tuple(own[:count][::-1]),
        wanted=tuple(" ".join(phrase.split()) for phrase in wanted),
    )


@functools.lru_cache(maxsize=1 << 14)
def _length(tokenizer: Tokenizer, text: str) -> int:
    return len(tokenizer.encode(text))
