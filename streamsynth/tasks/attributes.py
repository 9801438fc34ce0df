"""Attributes: in which ways the texts of a task differ beside their label, such as length or tone.

A combination of values, one of each attribute, is a *cell*. Prompts ask for cells in equal shares, so that a
data set covers them all. `task.json` names attributes:

    "attributes": {
      "length": {"short": {"max_words": 12}, "long": {"min_words": 13}},
      "topic": {"fees": {"any_of": ["fee", "charge"]}, "cards": {"any_of": ["card"]}},
      "tone": ["polite", "angry"]
    }

A value with a test is checked exactly; whether one without is met, the reference policy is asked.
"""

from __future__ import annotations

import dataclasses
import itertools
import statistics
from collections.abc import Sequence
from typing import Any

from streamsynth.errors import UserError

# More cells than that would never be covered.
MOST_CELLS = 256
_PUNCTUATION = ".,;:!?\"'()"
_TESTS = ("min_words", "max_words", "any_of")


@dataclasses.dataclass(frozen=True)
class Value:
    """One value of an attribute.

    Attributes:
      name: in plain words.
      min_words, max_words: a text of this value has so many words; 0 sets no limit.
      any_of: it has one of these words or phrases, whatever their case; empty asks for none.
    """

    name: str
    min_words: int = 0
    max_words: int = 0
    any_of: tuple[str, ...] = ()

    @property
    def tested(self) -> bool:
        """Whether a text can be checked."""
        return bool(self.min_words or self.max_words or self.any_of)

    def holds(self, text: str) -> bool:
        """Whether a text, its fields in one string, has this value; true of every text without a test."""
        words = text.replace("<field>", " ").lower().split()
        if len(words) < self.min_words or (self.max_words and len(words) > self.max_words):
            return False
        spoken = " ".join(word.strip(_PUNCTUATION) for word in words)
        return not self.any_of or any(
            f" {' '.join(one.lower().split())} " in f" {spoken} " for one in self.any_of
        )


@dataclasses.dataclass(frozen=True)
class Attribute:
    """A way in which texts differ, and its values; `proposed` by the policy, or named by the task."""

    name: str
    values: tuple[Value, ...]
    proposed: bool = False


Cell = tuple[Value, ...]


def cells(attributes: Sequence[Attribute]) -> tuple[Cell, ...]:
    """Every combination of values; of no attributes the one empty cell."""
    return tuple(itertools.product(*(attribute.values for attribute in attributes)))


def phrases(attributes: Sequence[Attribute], cell: Cell) -> tuple[str, ...]:
    """A cell as prompts say it: "length: short" and so on."""
    return tuple(f"{one.name}: {value.name}" for one, value in zip(attributes, cell, strict=True))


def asked_for(attributes: Sequence[Attribute], cell: Cell) -> dict[str, str]:
    """The names of a cell's values by those of their attributes."""
    return {one.name: value.name for one, value in zip(attributes, cell, strict=True)}


def by_length(texts: Sequence[str]) -> Attribute:
    """Two lengths, told apart by the median number of words of the given texts, at least one."""
    border = int(statistics.median(len(text.split()) for text in texts))
    return Attribute("length", (Value("short", max_words=border), Value("long", min_words=border + 1)))


def read(content: Any, place: str) -> tuple[Attribute, ...]:
    """The attributes that a task.json names.

    Args:
      content: what stands under "attributes".
      place: the file, for messages.

    Raises:
      UserError: it has another form than this module shows, or more than `MOST_CELLS` cells.
    """
    if not isinstance(content, dict):
        raise UserError(f'the key "attributes" of {place} must be an object: give each attribute its values')
    found = []
    for name, values in content.items():
        given = values if isinstance(values, dict) else {}
        names = list(values) if isinstance(values, (list, dict)) else []
        if len(names) < 2 or not all(isinstance(one, str) and one.strip() for one in (name, *names)):
            raise UserError(f"the attribute {name!r} of {place} must have two or more named values")
        if len(set(names)) < len(names):
            raise UserError(f"the attribute {name!r} of {place} has a value twice: keep one")
        found.append(Attribute(name, tuple(_value(one, given.get(one), name, place) for one in names)))
    count = len(cells(found))
    if count > MOST_CELLS:
        raise UserError(
            f"the attributes of {place} make {count} combinations, of which {MOST_CELLS} can be covered: "
            "name fewer values"
        )
    return tuple(found)


def _value(name: str, tests: Any, attribute: str, place: str) -> Value:
    tests = {} if tests is None else tests
    where = f"the value {name!r} of the attribute {attribute!r} in {place}"
    if not isinstance(tests, dict) or not set(tests) <= set(_TESTS):
        raise UserError(f"{where} must be an object with some of {', '.join(_TESTS)}, or null")
    limits = {key: tests[key] for key in ("min_words", "max_words") if key in tests}
    if not all(type(limit) is int and limit >= 1 for limit in limits.values()):
        raise UserError(f"{where}: min_words and max_words must be whole numbers, 1 or more")
    if limits.get("max_words", limits.get("min_words", 0)) < limits.get("min_words", 0):
        raise UserError(f"{where}: max_words is below min_words, and no text can have both")
    any_of = tests.get("any_of", [])
    if not (isinstance(any_of, list) and all(isinstance(one, str) and one.strip() for one in any_of)):
        raise UserError(f"{where}: any_of must be a list of words")
    return Value(name, **limits, any_of=tuple(any_of))
