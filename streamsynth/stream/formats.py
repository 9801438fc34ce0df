"""The prompt format of a policy, by `policy.format`."""

from __future__ import annotations

from streamsynth.errors import UserError
from streamsynth.policy.tokenizer import MarkerTokenizer, Tokenizer
from streamsynth.stream.instructions import ChatFormat
from streamsynth.stream.markers import MarkerFormat
from streamsynth.stream.plain import PlainFormat
from streamsynth.stream.prompts import PromptFormat

FORMATS = {"markers": MarkerFormat, "plain": PlainFormat, "chat": ChatFormat}


def make_format(
    kind: str,
    tokenizer: Tokenizer,
    prompt_length: int,
    completion_length: int,
    buckets: tuple[int, ...] = (),
) -> PromptFormat:
    """The format of that kind; "auto" is the one that a tokenizer was made for. The rest: see `PromptFormat`.

    Raises:
      UserError: there is no such kind, or the tokenizer lacks what it needs.
    """
    has_markers, has_chat = isinstance(tokenizer, MarkerTokenizer), tokenizer.chat_template is not None
    if kind == "auto":
        kind = "markers" if has_markers else "chat" if has_chat else "plain"
    if kind not in FORMATS:
        raise UserError(f'policy.format = "{kind}" is none of auto, {", ".join(FORMATS)}: give one of these.')
    if kind == "markers" and not has_markers:
        raise UserError('policy.format = "markers" needs a policy trained here: give "plain" or "chat".')
    if kind == "chat" and not has_chat:
        raise UserError(
            'policy.format = "chat" needs a chat template, and the tokenizer has none: give "plain", or add '
            "a chat_template.jinja to the folder of its weights."
        )
    return FORMATS[kind](tokenizer, prompt_length, completion_length, buckets)
