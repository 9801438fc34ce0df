"""Text to tokens and back: what every tokenizer can do, and the one that small policies have."""

from __future__ import annotations

import io
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Protocol

import sentencepiece

from streamsynth.errors import UserError
from streamsynth.tasks.task import FIELD_SEPARATOR

# Markers are control pieces: no text, however it is written, can encode to one of them.
MARKERS = ("<label>", "<attribute>", "<example>", "<contrast>", "<write>", FIELD_SEPARATOR)


class Tokenizer(Protocol):
    """Text to tokens and back.

    Attributes:
      vocab_size: one more than the largest id; the embedding may have more rows.
      bos: starts a text, or None where the vocabulary has no such token.
      eos: ends a text.
      pad: fills rows; the end of text where the vocabulary has no token of its own for it.
      stops: every id that ends what a policy writes, `eos` among them.
      add_bos: whether texts and prompts begin with `bos`.
      control: strings that are one token each in a template, and in a text never: turn borders and such.
      special: by name, such as "bos_token", what templates know of them.
      chat_template: Jinja source of the form that turns of a conversation take, or None.
      chat_source: the file it comes from, or "".
    """

    vocab_size: int
    bos: int | None
    eos: int
    pad: int
    stops: tuple[int, ...]
    add_bos: bool
    control: Mapping[str, int]
    special: Mapping[str, str]
    chat_template: str | None
    chat_source: str

    def encode(self, text: str) -> list[int]:
        """Token ids of a text, without `bos` or `eos`; whatever it says, no id of `control` is among them."""

    def encode_template(self, text: str) -> list[int]:
        """Token ids of a text that is trusted: the strings of `control` become their ids."""

    def decode(self, ids: Sequence[int]) -> str:
        """The text of ids up to the first of `stops`; ids without a text, unknown ones too, vanish."""

    def files(self) -> dict[str, bytes]:
        """By name, the files of a folder from which this tokenizer can be read again."""


def control_pattern(control: Mapping[str, int]) -> re.Pattern[str]:
    """Finds the strings of `control`, of two that start at one place the longer."""
    if not control:
        return re.compile(r"(?!)")
    return re.compile("|".join(map(re.escape, sorted(control, key=len, reverse=True))))


def encode_with_control(
    text: str, control: Mapping[str, int], encode: Callable[[str], list[int]]
) -> list[int]:
    """Ids of a trusted text: the strings of `control` as their ids, what lies between them by `encode`."""
    ids, start = [], 0
    for match in control_pattern(control).finditer(text):
        ids += [*(encode(text[start : match.start()]) if match.start() > start else []), control[match[0]]]
        start = match.end()
    return ids + (encode(text[start:]) if start < len(text) else [])


class MarkerTokenizer:
    """A SentencePiece model trained here, with a control piece for every part of a prompt."""

    add_bos = True
    special: Mapping[str, str] = {}
    chat_template = None
    chat_source = ""

    def __init__(self, model: bytes):
        self.model = model
        self._processor = sentencepiece.SentencePieceProcessor(model_proto=model)
        self.vocab_size = self._processor.vocab_size()
        self.bos, self.eos, self.pad = (
            self._processor.bos_id(),
            self._processor.eos_id(),
            self._processor.pad_id(),
        )
        self.stops = (self.eos,)
        pieces = {self._processor.id_to_piece(i): i for i in range(self.vocab_size)}
        # The border of two fields is a part of texts.
        self.control = {
            piece: i
            for piece, i in pieces.items()
            if self._processor.is_control(i) and piece != FIELD_SEPARATOR
        }
        self._field = self.marker(FIELD_SEPARATOR)

    def marker(self, piece: str) -> int:
        """The id of a marker; UserError if the vocabulary lacks it."""
        index = self._processor.piece_to_id(piece)
        if index == self._processor.unk_id():
            raise UserError(
                f"the tokenizer has no marker piece {piece!r}: train it with streamsynth's markers."
            )
        return index

    def encode(self, text: str) -> list[int]:
        """Token ids of a text; a field separator in it becomes its marker."""
        ids: list[int] = []
        for i, part in enumerate(text.split(FIELD_SEPARATOR)):
            ids += ([self._field] if i else []) + self._processor.encode(part.strip())
        return ids

    def encode_template(self, text: str) -> list[int]:
        """The same, with every marker's string as its marker."""
        return encode_with_control(text, self.control, self.encode)

    def decode(self, ids: Sequence[int]) -> str:
        """The text of ids up to the first end-of-text; markers other than the field separator vanish."""
        parts: list[list[int]] = [[]]
        for index in map(int, ids):
            if index == self.eos:
                break
            if index == self._field:
                parts.append([])
            elif 0 <= index < self.vocab_size:
                parts[-1].append(index)
        return f" {FIELD_SEPARATOR} ".join(self._processor.decode(part) for part in parts)

    def files(self) -> dict[str, bytes]:
        """The SentencePiece model says everything."""
        return {"tokenizer.model": self.model}


def train_tokenizer(corpus: Iterable[str], vocab_size: int, strategies: Sequence[str]) -> MarkerTokenizer:
    """A byte-pair model (arXiv 1508.07909) of at most `vocab_size` pieces, deterministic in its corpus.

    Bytes stand in for characters the corpus lacks, so every text can be encoded. Not a unigram model: on a
    small vocabulary of even frequencies that one splits a third of the words for good, and texts grow by
    two thirds.
    """
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(corpus),
        model_writer=model,
        model_type="bpe",
        vocab_size=vocab_size,
        hard_vocab_limit=False,
        byte_fallback=True,
        character_coverage=1.0,
        control_symbols=[*MARKERS, *map(strategy_marker, strategies)],
        pad_id=0,
        bos_id=1,
        eos_id=2,
        unk_id=3,
        num_threads=1,
        minloglevel=2,
    )
    return MarkerTokenizer(model.getvalue())


def strategy_marker(name: str) -> str:
    """The marker that asks for a synthesis strategy."""
    return f"<strategy:{name}>"
