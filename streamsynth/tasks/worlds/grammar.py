"""Domains, frames, labels and worlds: how sentences are made, and how they are recognised exactly."""

from __future__ import annotations

import dataclasses
import functools
import math

import numpy as np


@dataclasses.dataclass(frozen=True)
class Domain:
    """What can be said about one subject.

    Attributes:
      name: one word.
      topic: plain words for a world's description.
      roles: role -> names of the categories that may fill it. The categories of a role share no word.
        The first two roles are the *bearing* ones: they occur in every core and decide the label.
      openers, cores, tails: the three parts of a frame; `{role}` marks a slot.
    """

    name: str
    topic: str
    roles: dict[str, tuple[str, ...]]
    openers: tuple[str, ...]
    cores: tuple[str, ...]
    tails: tuple[str, ...]

    @property
    def bearing(self) -> tuple[str, str]:
        """The two roles whose combination of categories is the label."""
        first, second, *_ = self.roles
        return first, second


@dataclasses.dataclass(frozen=True)
class Frame:
    """A sentence with slots: opener, core and tail, each with `{role}` where a word is to be filled in."""

    opener: str
    core: str
    tail: str

    @functools.cached_property
    def tokens(self) -> tuple[str, ...]:
        """The words of the frame in order; a slot is one token, braces included."""
        return tuple(f"{self.opener} {self.core} {self.tail}".split())

    @functools.cached_property
    def roles(self) -> tuple[str, ...]:
        """The roles of the slots, from left to right."""
        return tuple(token[1:-1] for token in self.tokens if is_slot(token))


@dataclasses.dataclass(frozen=True)
class Label:
    """A language: frames, filled with the words of one category, or of several, per role.

    Attributes:
      name: unique within the world; the names of the two categories that bear it.
      categories: role -> names of the categories that may fill it: a single one for each bearing role, all
        of the domain's for any other.
      words: role -> the words that may fill it (the first words of each of its categories).
      frames: the combinations of the world's openers, this label's cores and the world's tails, without
        those that would have a role in both core and tail. Other labels may share some of them.
    """

    name: str
    categories: dict[str, tuple[str, ...]]
    words: dict[str, tuple[str, ...]]
    frames: tuple[Frame, ...]

    @functools.cached_property
    def _accepted(self) -> tuple[tuple[frozenset[str], ...], ...]:
        """For every frame, the words that are accepted at each position."""
        return tuple(
            tuple(
                frozenset(self.words[token[1:-1]]) if is_slot(token) else frozenset((token,))
                for token in frame.tokens
            )
            for frame in self.frames
        )

    def sample(self, rng: np.random.Generator) -> str:
        """One sentence: a frame drawn uniformly, each slot filled uniformly and independently."""
        frame = self.frames[rng.integers(len(self.frames))]
        filled = []
        for token in frame.tokens:
            if is_slot(token):
                words = self.words[token[1:-1]]
                token = words[rng.integers(len(words))]
            filled.append(token)
        return " ".join(filled)

    def accepts(self, text: str) -> bool:
        """Whether the text is in the language, word for word. Only runs of blanks do not matter."""
        tokens = text.split()
        return any(
            len(positions) == len(tokens)
            and all(token in accepted for token, accepted in zip(tokens, positions, strict=True))
            for positions in self._accepted
        )

    def language_size(self) -> int:
        """How many sentences the label has: over its frames, the products of the slots' numbers of words."""
        return sum(math.prod(len(self.words[role]) for role in frame.roles) for frame in self.frames)


@dataclasses.dataclass(frozen=True)
class World:
    """A classification task in a made-up but plain piece of English, with an exact verifier.

    The labels are cells of a grid: which category fills the first bearing role, and which the second.
    They share openers, tails, most cores, and the words of all roles that are not bearing. A bearing category
    is mostly shared with another label, so that combinations tell labels apart.
    """

    name: str
    description: str
    domain: str
    labels: tuple[Label, ...]

    @functools.cached_property
    def _by_name(self) -> dict[str, Label]:
        return {label.name: label for label in self.labels}

    @property
    def label_names(self) -> tuple[str, ...]:
        return tuple(label.name for label in self.labels)

    def sample(self, rng: np.random.Generator, label_index: int) -> str:
        """One sentence of a label."""
        return self.labels[label_index].sample(rng)

    def verify(self, text: str, label_name: str) -> bool:
        """Whether the text is a sentence of the label. KeyError for a label of another world."""
        return self._by_name[label_name].accepts(text)

    def language_size(self, label_index: int) -> int:
        """The number of sentences of a label."""
        return self.labels[label_index].language_size()


def is_slot(token: str) -> bool:
    return token.startswith("{")
