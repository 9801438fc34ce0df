"""The strict form of an answer in words: every field as `Name: value`, in order.

A prompt ends with the first field's name and colon, so that an answer begins with that field's value:

    ... Premise:| A man sleeps on a bench.
    Hypothesis: A person is resting.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Sequence

from streamsynth.stream.prompts import Answer
from streamsynth.tasks.task import FIELD_SEPARATOR, join_fields

# What can be wrong with an answer, in the order in which it is looked for.
REJECTIONS = (
    "empty",  # nothing but blanks
    "unreadable",  # control characters, or bytes that are no text
    "field_separator",  # the string that keeps the fields of a text apart is no part of any
    "repeated_field",  # a field's name a second time: often the begin of another answer
    "missing_field",
    "wrong_order",
    "empty_field",
    "several_lines",  # one field goes on in another line: often a remark below the answer
)


def field_names(fields: Sequence[str]) -> tuple[str, ...]:
    """How prompts and answers call the fields: `text` is "Text"."""
    spaced = (" ".join(field.replace("_", " ").split()) for field in fields)
    return tuple(name[:1].upper() + name[1:] for name in spaced)


def values(text: str) -> tuple[str, ...]:
    """The fields of a text, each on one line."""
    return tuple(" ".join(part.split()) for part in text.split(FIELD_SEPARATOR))


def write(names: Sequence[str], text: str, separator: str) -> str:
    """A text in the form of an answer, with all names, the first too; `separator` stands between fields.

    A text of another number of fields, which no answer gives, is written as far as there are names.
    """
    return separator.join(f"{name}: {value}" for name, value in zip(names, values(text), strict=False))


def parse(names: Sequence[str], text: str) -> Answer:
    """What was answered after the first of `names` and its colon; any text gives fields or a rejection."""
    if not text.strip():
        return Answer(text, "empty")
    if any(map(_unreadable, text)):
        return Answer(text, "unreadable")
    if FIELD_SEPARATOR in text:
        return Answer(text, "field_separator")
    # Names count at the begin of a word; within a sentence they are too rare to let two answers pass as one.
    known = "|".join(map(re.escape, sorted(names, key=len, reverse=True)))
    first, *rest = re.split(rf"(?<!\S)({known}):", text)
    found, parts = rest[::2], [part.strip() for part in (first, *rest[1::2])]
    if len({names[0], *found}) <= len(found):
        return Answer(text, "repeated_field")
    if set(found) != set(names[1:]):
        return Answer(text, "missing_field")
    if found != list(names[1:]):
        return Answer(text, "wrong_order")
    if not all(parts):
        return Answer(text, "empty_field")
    if any("\n" in part for part in parts):
        return Answer(text, "several_lines")
    return Answer(join_fields(tuple(" ".join(part.split()) for part in parts)))


def _unreadable(character: str) -> bool:
    # U+FFFD is what decoders write for bytes that are no UTF-8.
    return character == "\ufffd" or (
        unicodedata.category(character) in ("Cc", "Cs") and not character.isspace()
    )
