"""Prompts for base models, which go on with what they read: a list of labelled texts, the last one open.

    A sentence of a support chat, told apart by topic.

    Label: card arrival
    Text: my card is still not here

    Label: card arrival
    Text:

The answer is the rest of that line.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence

from streamsynth.policy.tokenizer import Tokenizer
from streamsynth.stream.wording import SURVEY_START, Order, Survey, WordedFormat, effective

# What stands between the sources of a strategy and the open text.
_NOTES = {
    "vary_one": "The last one once more, said in other words:",
    "combine_two": "Parts of the last two, joined into a new one:",
    "reshape": "What the last one is about, in another form and of another length:",
}
# What comes before a task whose attributes are asked for. A model may repeat these, so they suit most tasks.
_SURVEYS = f"""\
Collections of texts: the labels of each, some texts, and another way in which its texts differ.

Questions that visitors ask a library.
Labels: opening hours; loans; fees
Text: may I keep this book for another week
{SURVEY_START} tone: polite, matter-of-fact, annoyed

Short reports of the weather.
Labels: sun; rain; snow
Text: Heavy rain until noon, then some sun over the hills.
{SURVEY_START} detail: vague, specific"""


@dataclasses.dataclass(frozen=True)
class PlainFormat(WordedFormat):
    """A prompt without turns: completions end with the line."""

    separator = " "
    ending = "\n"

    @functools.cached_property
    def stops(self) -> tuple[int, ...]:
        return tuple(dict.fromkeys((*self.tokenizer.stops, *newlines(self.tokenizer))))

    @property
    def end(self) -> int:
        return self.tokenizer.eos

    def render(self, order: Order) -> list[int]:
        def head(label: str) -> str:
            return "" if order.kind == "qa" else f"Label: {label}\n"

        blocks = [head(f"not {order.label}") + self.block(order.names, text) for text in order.others]
        blocks += [head(order.label) + self.block(order.names, text) for text in (*order.own, *order.sources)]
        blocks += [_NOTES[effective(order)]] if order.sources else []
        blocks += [f"The next one has {'; '.join(order.wanted)}."] if order.wanted else []
        blocks += [f"{head(order.label)}{order.names[0]}:"]
        return self._ids("\n\n".join([*([order.description] if order.description else []), *blocks]))

    def render_survey(self, survey: Survey) -> list[int]:
        lines = [survey.description] if survey.description else []
        lines += [f"Labels: {'; '.join(survey.labels)}"] if survey.labels else []
        lines += [self.block(survey.names, text) for text in survey.texts]
        return self._ids("\n\n".join([_SURVEYS, "\n".join([*lines, SURVEY_START])]))

    def spoken(self, ids: Sequence[int]) -> str:
        # A token that holds the newline may hold the end of the sentence as well.
        return self.tokenizer.decode(ids).split("\n")[0]

    def _ids(self, text: str) -> list[int]:
        ids = self.tokenizer.encode(text)
        return [self.tokenizer.bos, *ids] if self.tokenizer.add_bos else ids


@functools.lru_cache(maxsize=4)
def newlines(tokenizer: Tokenizer) -> tuple[int, ...]:
    """The ids whose text has a newline, byte pieces included; none where the vocabulary has no such text."""
    return tuple(i for i in range(tokenizer.vocab_size) if "\n" in tokenizer.decode([i]))
