"""Prompts for instruction-tuned models: what is wanted, put as a user would ask for it in a chat.

The assistant's turn is opened with the name of the first field, so that nothing but its value can follow.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence

from streamsynth.policy.chat import Chat, read_chat
from streamsynth.stream.wording import SURVEY_START, Order, Survey, WordedFormat, effective

# What is asked for, by strategy: {one} is the name of a text, {label} in what way it is labelled.
_ASKS = {
    "label_only": "Write one new {one}{label}. Make it specific and natural, as if taken from real data.",
    "imitate": "Write one new {one}{label}, in the style and of the length of the examples, but about "
    "something that none of them is about.",
    "vary_one": "Write one new {one}{label}: take the example to rewrite, and say it in other words, with "
    "other details.",
    "combine_two": "Write one new {one}{label}: take something from each of the two examples to combine, and "
    "make one natural {one} of it.",
    "contrast": "Write one new {one}{label}, in the style and of the length of the examples. Nobody should "
    "take it for one with another label.",
    "imitate_best": "Write one new {one}{label}. The examples are the best ones so far: write one as good as "
    "they are, about something that none of them is about.",
    "reshape": "Write one new {one}{label}: take the example to rewrite, and put what it is about into "
    "another form, clearly shorter or longer.",
}
# Where there are questions with their answers instead of labels.
_QUESTION_ASKS = {
    **_ASKS,
    "vary_one": "Write one new {one}: take the example to rewrite, change the situation and the facts in it, "
    "and work out the answer anew.",
    "combine_two": "Write one new {one} that needs what both of the examples to combine need.",
    "contrast": "Write one new {one} of the kind of the examples, but as unlike each of them as it can be.",
    "reshape": "Write one new {one}: take the example to rewrite, ask for something else of its situation, "
    "in clearly fewer or more words, and work out the answer anew.",
}
_SOURCES = {
    "vary_one": "Example to rewrite",
    "combine_two": "Example to combine",
    "reshape": "Example to rewrite",
}


@dataclasses.dataclass(frozen=True)
class ChatFormat(WordedFormat):
    """A prompt in the turns of the tokenizer's chat template."""

    separator = "\n"
    ending = ""
    chat: Chat = dataclasses.field(init=False)

    def __post_init__(self):
        super().__post_init__()
        object.__setattr__(self, "chat", read_chat(self.tokenizer))

    @property
    def end(self) -> int:
        return self.chat.end

    @functools.cached_property
    def stops(self) -> tuple[int, ...]:
        return tuple(dict.fromkeys((self.end, *self.tokenizer.stops)))

    def render(self, order: Order) -> list[int]:
        return self.chat.prompt(self.tokenizer, self.instruction(order), f"{order.names[0]}:")

    def render_survey(self, survey: Survey) -> list[int]:
        parts = [f"Here is a data set: {survey.description}" if survey.description else "Here is a data set."]
        if survey.labels:
            parts += [f"Its texts are told apart by these labels: {'; '.join(survey.labels)}."]
        if survey.texts:
            parts += ["Some of its texts:", *self._numbered("Example", survey.names, survey.texts)]
        beside = ", beside their label" if survey.labels else ""
        parts += [
            f"Name one way in which such texts differ{beside}, and two to five values of it, of one or two "
            "words each. Every text must have one of the values, and any of them must be possible whatever "
            "the text is about.",
            "Answer with exactly one line of this form, and nothing else:\n"
            f"{SURVEY_START} name: value, value, value",
        ]
        return self.chat.prompt(self.tokenizer, "\n\n".join(parts), SURVEY_START)

    def instruction(self, order: Order) -> str:
        """What the user says."""
        is_qa = order.kind == "qa"
        label = "" if is_qa else f' with the label "{order.label}"'
        strategy = effective(order)
        ask = (_QUESTION_ASKS if is_qa else _ASKS)[strategy].format(one=_one(order), label=label)
        what = f"this data set: {order.description}" if order.description else "a data set."
        parts = [f"You write examples for {what}"]
        if order.others:
            parts += ["Examples with other labels; yours must fit none of these labels:"]
            parts += self._numbered("Other example", order.names, order.others)
        if order.own:
            parts += [f"Examples{label}:"]
            parts += self._numbered("Example", order.names, order.own)
        if order.sources:
            parts += self._numbered(_SOURCES[strategy], order.names, order.sources)
        wanted = [f"It must have: {'; '.join(order.wanted)}."] if order.wanted else []
        parts += [ask, *wanted, _form(order.names)]
        return "\n\n".join(parts)

    def spoken(self, ids: Sequence[int]) -> str:
        stop = next((i for i, index in enumerate(ids) if index in self.stops), len(ids))
        return self.tokenizer.decode(ids[:stop])

    def _numbered(self, title: str, names: Sequence[str], texts: Sequence[str]) -> list[str]:
        titles = [title] if len(texts) == 1 else [f"{title} {i}" for i in range(1, len(texts) + 1)]
        return [f"{t}:\n{self.block(names, text)}" for t, text in zip(titles, texts, strict=True)]


def _one(order: Order) -> str:
    """What is written, as a noun: "text", "pair of premise and hypothesis"."""
    names = [name[:1].lower() + name[1:] for name in order.names]
    if len(names) == 1:
        return names[0]
    if order.kind == "qa":
        return f"{names[0]} with its correct {' and '.join(names[1:])}"
    return f"pair of {' and '.join(names)}"


def _form(names: Sequence[str]) -> str:
    lines = "one line" if len(names) == 1 else f"{len(names)} lines"
    form = "\n".join(f"{name}: ..." for name in names)
    return f"Answer with exactly {lines} of this form, and nothing else:\n{form}"
