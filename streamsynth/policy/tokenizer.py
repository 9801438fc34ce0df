"""Text to tokens and back: SentencePiece with the markers that prompts are built from."""

from __future__ import annotations

import io
from collections.abc import Iterable, Sequence

import sentencepiece

from streamsynth.errors import UserError
from streamsynth.tasks.task import FIELD_SEPARATOR

# Markers are control pieces: no text, however it is written, can encode to one of them.
MARKERS = ("<label>", "<example>", "<contrast>", "<write>", FIELD_SEPARATOR)


class MarkerTokenizer:
    """A SentencePiece model whose texts may have fields."""

    def __init__(self, model: bytes):
        self.model = model
        self._processor = sentencepiece.SentencePieceProcessor(model_proto=model)
        self.vocab_size = self._processor.vocab_size()
        self.bos, self.eos, self.pad = (
            self._processor.bos_id(),
            self._processor.eos_id(),
            self._processor.pad_id(),
        )
        self._field = self.marker(FIELD_SEPARATOR)

    def files(self) -> dict[str, bytes]:
        """What a folder with this tokenizer must hold, by name."""
        return {"tokenizer.model": self.model}

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

    def decode(self, ids: Sequence[int]) -> str:
        """The text of ids up to the first end-of-text; markers other than the field separator vanish."""
        parts: list[list[int]] = [[]]
        for index in map(int, ids):
            if index == self.eos:
                break
            if index == self._field:
                parts.append([])
            else:
                parts[-1].append(index)
        return f" {FIELD_SEPARATOR} ".join(self._processor.decode(part) for part in parts)


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
