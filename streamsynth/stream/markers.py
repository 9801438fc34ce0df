"""Prompts of small policies of our own: marker pieces that no text can contain.

A prompt reads, marker by marker:

    <s> <strategy> <label> name <attribute> length: short ... <contrast> text ... <example> text ... <write>

and the completion is a text of that label, ended by </s>. What a strategy starts from, the example to vary or
the two to combine, stands last, next to <write>; all others are there to show what the label is like.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from streamsynth.errors import UserError
from streamsynth.policy.tokenizer import MarkerTokenizer, strategy_marker
from streamsynth.stream.patterns import STRATEGIES
from streamsynth.stream.prompts import Answer, PromptFormat, label_text
from streamsynth.tasks.task import Brief, split_fields


@dataclasses.dataclass(frozen=True)
class MarkerFormat(PromptFormat):
    """Prompts of markers. They do not say what a task is about: the policy was trained on their form."""

    tokenizer: MarkerTokenizer

    def __post_init__(self):
        # Four markers and one token of the label; one token and the end.
        for name, least in (("prompt_length", 5), ("completion_length", 2)):
            if getattr(self, name) < least:
                raise UserError(f"rollout.{name} = {getattr(self, name)} is too short: give {least} or more.")

    @property
    def stops(self) -> tuple[int, ...]:
        return (self.tokenizer.eos,)

    def prompt(
        self,
        brief: Brief,
        strategy: int,
        label: str,
        own: Sequence[str],
        others: Sequence[str],
        wanted: Sequence[str] = (),
    ) -> tuple[list[int], list[bool]]:
        """As in `PromptFormat.prompt`; a label or attributes too long for the prompt are cut."""
        t = self.tokenizer
        head = [t.bos, t.marker(strategy_marker(STRATEGIES[strategy])), t.marker("<label>")]
        room = self.prompt_length - len(head) - 1
        asked = [token for phrase in wanted for token in (t.marker("<attribute>"), *t.encode(phrase))]
        name = [*t.encode(label_text(label)), *asked][:room]
        room -= len(name)
        kept: dict[str, list[list[int]]] = {"<example>": [], "<contrast>": []}
        fits = []
        for marker, texts in (("<example>", own), ("<contrast>", others)):
            for text in texts:
                ids = [t.marker(marker), *t.encode(text)]
                fits.append(len(ids) <= room)
                if fits[-1]:
                    kept[marker].append(ids)
                    room -= len(ids)
        shown = [
            token for marker in ("<contrast>", "<example>") for ids in kept[marker][::-1] for token in ids
        ]
        return [*head, *name, *shown, t.marker("<write>")], fits

    def answer(self, brief: Brief, text: str) -> list[int]:
        return [*self.tokenizer.encode(text), self.tokenizer.eos]

    def read(self, brief: Brief, ids: Sequence[int]) -> Answer:
        text = self.tokenizer.decode(ids)
        return Answer(text, "" if split_fields(text, len(brief.fields)) else "fields")

    def neutral(self) -> list[int]:
        return [self.tokenizer.bos, self.tokenizer.marker("<write>")]
