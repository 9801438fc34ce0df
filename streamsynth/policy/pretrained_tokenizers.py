"""Tokenizers that come with weights: SentencePiece models and `tokenizer.json` of the library `tokenizers`.

Texts come from users and from policies, so none of them may steer a prompt: a text that spells a turn's
border is that spelling, piece by piece. Templates are trusted, and there the same string is its token.
"""

from __future__ import annotations

import abc
import dataclasses
import itertools
from collections.abc import Mapping, Sequence

import sentencepiece
import tokenizers

from streamsynth.errors import UserError
from streamsynth.policy.tokenizer import control_pattern, encode_with_control


@dataclasses.dataclass(frozen=True)
class Settings:
    """What the files beside a vocabulary say.

    Attributes:
      source: the folder, for messages.
      special: by name, such as "bos_token", the strings of special tokens.
      bos, stops: ids that the network's files name; the first of `stops` ends a text where no string says so.
      add_bos: whether texts begin with `bos`, or None where it is not said.
      added: ids of strings beyond the vocabulary.
      chat_template, chat_source: Jinja source, and its file.
      files: by name, everything that was read or belongs to it.
    """

    source: str
    special: Mapping[str, str] = dataclasses.field(default_factory=dict)
    bos: int | None = None
    stops: tuple[int, ...] = ()
    add_bos: bool | None = None
    added: Mapping[str, int] = dataclasses.field(default_factory=dict)
    chat_template: str | None = None
    chat_source: str = ""
    files: Mapping[str, bytes] = dataclasses.field(default_factory=dict)


class PretrainedTokenizer(abc.ABC):
    """What both kinds share; see `tokenizer.Tokenizer` for the attributes.

    Args:
      settings: of the folder.
      ids: of all strings that are special, added or look like markup; see `control`.
      hidden: ids without a text.
      vocab_size: one more than the largest id.
      bos, eos, pad: what the vocabulary itself says, where `settings` say nothing.
    """

    def __init__(
        self,
        settings: Settings,
        ids: Mapping[str, int],
        hidden: frozenset[int],
        vocab_size: int,
        bos: int | None,
        eos: int | None,
        pad: int | None,
    ):
        special = {name: ids[piece] for name, piece in settings.special.items() if piece in ids}
        eos = special.get("eos_token", eos)
        if eos is None and not settings.stops:
            raise UserError(
                f"{settings.source} names no token that ends a text: give tokenizer_config.json an eos_token."
            )
        self.vocab_size = vocab_size
        self.eos = settings.stops[0] if eos is None else eos
        self.bos = special.get("bos_token", settings.bos if bos is None else bos)
        self.pad = special.get("pad_token", self.eos if pad is None else pad)
        self.stops = tuple(dict.fromkeys((self.eos, *settings.stops)))
        self.special = settings.special
        self.chat_template, self.chat_source = settings.chat_template, settings.chat_source
        # Unknown characters may become the unknown token. And what cannot be cut in two cannot be defused.
        unknown = settings.special.get("unk_token", "<unk>")
        self.control = {piece: i for piece, i in ids.items() if len(piece) > 1 and piece != unknown}
        self._control_ids = frozenset(self.control.values())
        self._pattern = control_pattern(self.control)
        self._hidden = hidden
        self._files = dict(settings.files)
        self.add_bos = self.bos is not None and (
            self._begins_with_bos() if settings.add_bos is None else settings.add_bos
        )

    @abc.abstractmethod
    def _pieces(self, text: str) -> list[int]:
        """Ids of a text, as the vocabulary has them."""

    @abc.abstractmethod
    def _text(self, ids: list[int]) -> str:
        """The text of ids that all have one."""

    @abc.abstractmethod
    def _begins_with_bos(self) -> bool:
        """Whether texts begin with `bos` where no file says it."""

    def encode(self, text: str) -> list[int]:
        """Token ids of a text, without `bos` or `eos`; whatever it says, no id of `control` is among them."""
        text = text.encode("utf-8", "replace").decode()  # half a surrogate pair is no character
        ids = self._pieces(text)
        if self._control_ids.isdisjoint(ids):
            return ids
        # A vocabulary may hold a control string among its pieces, where a text comes upon it. Cut behind the
        # first character, no piece spans it. What is left then came about by normalisation, and goes.
        cuts = [0, *(match.start() + 1 for match in self._pattern.finditer(text)), len(text)]
        parts = [text[start:end] for start, end in itertools.pairwise(cuts)]
        return [i for part in parts for i in self._pieces(part) if i not in self._control_ids]

    def encode_template(self, text: str) -> list[int]:
        """Token ids of a text that is trusted: the strings of `control` become their ids."""
        return encode_with_control(text, self.control, self.encode)

    def decode(self, ids: Sequence[int]) -> str:
        """The text of ids up to the first of `stops`; ids without a text, unknown ones too, vanish."""
        spoken = itertools.takewhile(lambda i: i not in self.stops, map(int, ids))
        return self._text([i for i in spoken if 0 <= i < self.vocab_size and i not in self._hidden])

    def files(self) -> dict[str, bytes]:
        """By name, the files of a folder from which this tokenizer can be read again."""
        return dict(self._files)


class SentencePieceTokenizer(PretrainedTokenizer):
    """A `tokenizer.model`."""

    def __init__(self, model: bytes, settings: Settings):
        self._processor = p = sentencepiece.SentencePieceProcessor(model_proto=model)
        size = p.vocab_size()
        pieces = {p.id_to_piece(i): i for i in range(size)}
        ids = {piece: i for piece, i in pieces.items() if p.is_control(i) or _is_markup(piece, p.is_byte(i))}
        ids |= {piece: pieces[piece] for piece in settings.special.values() if piece in pieces}
        ids |= settings.added
        hidden = {i for i in ids.values() if i >= size or p.is_control(i)} | {p.unk_id()}
        hidden |= {ids[piece] for piece in settings.special.values() if piece in ids}
        bos, eos, pad = (i if i >= 0 else None for i in (p.bos_id(), p.eos_id(), p.pad_id()))
        super().__init__(settings, ids, frozenset(hidden), max(size - 1, *ids.values()) + 1, bos, eos, pad)
        self._size = size

    def _pieces(self, text: str) -> list[int]:
        return self._processor.encode(text)

    def _text(self, ids: list[int]) -> str:
        return self._processor.decode([i for i in ids if i < self._size])

    def _begins_with_bos(self) -> bool:
        return True  # as Llama, the family that comes with nothing but such a file


class HuggingFaceTokenizer(PretrainedTokenizer):
    """A `tokenizer.json`."""

    def __init__(self, model: bytes, settings: Settings):
        self._tokenizer = t = tokenizers.Tokenizer.from_buffer(model)
        # The file may say what rows it was trained with: those of a policy are not cut or filled here.
        t.no_truncation()
        t.no_padding()
        t.encode_special_tokens = (
            True  # "special" ones are plain text in `encode`; other added ones still match
        )
        added = t.get_added_tokens_decoder()
        # Runs of blanks and newlines are added by some vocabularies as ordinary pieces.
        ids = {
            token.content: i for i, token in added.items() if token.special or token.content.strip(" \n\t▁")
        }
        vocabulary = t.get_vocab(with_added_tokens=True)
        ids |= {piece: vocabulary[piece] for piece in settings.special.values() if piece in vocabulary}
        hidden = {i for i, token in added.items() if token.special}
        hidden |= {ids[piece] for piece in settings.special.values() if piece in ids}
        self._known = frozenset(vocabulary.values())
        super().__init__(settings, ids, frozenset(hidden), max(self._known) + 1, None, None, None)

    def _pieces(self, text: str) -> list[int]:
        return self._tokenizer.encode(text, add_special_tokens=False).ids

    def _text(self, ids: list[int]) -> str:
        return self._tokenizer.decode([i for i in ids if i in self._known], skip_special_tokens=False)

    def _begins_with_bos(self) -> bool:
        return self._tokenizer.encode("", add_special_tokens=True).ids[:1] == [self.bos]


def _is_markup(piece: str, is_byte: bool) -> bool:
    """Whether a piece, such as `<start_of_turn>`, may be one that templates are made of."""
    return not is_byte and len(piece) > 2 and (piece[0] + piece[-1]) in ("<>", "[]")
