"""Chat formats: what a tokenizer's own template puts around a user's words and around the answer.

The template is rendered once, with stand-ins for what is said, and cut there. What users and policies say is
encoded by itself afterwards, so that no text can end its turn or begin another one.
"""

from __future__ import annotations

import dataclasses
import json
from typing import Any

import jinja2
import jinja2.ext
from jinja2.sandbox import ImmutableSandboxedEnvironment

from streamsynth.errors import UserError
from streamsynth.policy.tokenizer import Tokenizer, control_pattern

# Words that no template has, and that templates which trim, split or test what is said leave alone.
_ASKED, _ANSWERED = "Zxqaskedqxz", "Zxqansweredqxz"


@dataclasses.dataclass(frozen=True)
class Chat:
    """One turn of a user and the begin of the assistant's, cut at its outermost control tokens.

    Attributes:
      head: ids up to the last control token before the user's words.
      before: text between that token and the words.
      after: text between the words and the next control token.
      tail: ids from that token to the last one.
      opening: text between that one and the assistant's first word.
      end: the id that ends the assistant's turn.

    Where `tail` is empty, the words and the answer lie in one text without a control token between them.
    """

    head: tuple[int, ...]
    before: str
    after: str
    tail: tuple[int, ...]
    opening: str
    end: int

    def prompt(self, tokenizer: Tokenizer, asked: str, answer: str = "") -> list[int]:
        """Ids of a conversation in which the user said `asked`, and the assistant begins with `answer`."""
        said, opened = self.before + asked + self.after, self.opening + answer
        if not self.tail:
            return [*self.head, *tokenizer.encode(said + opened)]
        return [
            *self.head,
            *tokenizer.encode(said),
            *self.tail,
            *(tokenizer.encode(opened) if opened else []),
        ]


def read_chat(tokenizer: Tokenizer) -> Chat:
    """The chat format of a tokenizer that has a template.

    Raises:
      UserError: the template is no Jinja, fails, or leaves out what is said.
    """
    render = _compile(tokenizer)
    user = {"role": "user", "content": _ASKED}
    prompt = render([user], add_generation_prompt=True)
    turns = render([user, {"role": "assistant", "content": _ANSWERED}], add_generation_prompt=False)
    if prompt.count(_ASKED) != 1 or turns.count(_ANSWERED) != 1:
        raise UserError(
            f"the chat template in {tokenizer.chat_source} does not say once what each side says: "
            'mend it, or set policy.format = "plain".'
        )
    before, after = prompt.split(_ASKED)
    answered_before, answered_after = turns.split(_ANSWERED)
    # A blank that the template puts before an assistant's first word, but not into an open turn.
    gap = answered_before.removeprefix(prompt)
    after += gap if gap.isspace() else ""

    pattern = control_pattern(tokenizer.control)
    borders = [match.span() for match in pattern.finditer(before)]
    head_end = borders[-1][1] if borders else 0
    borders = [match.span() for match in pattern.finditer(after)]
    tail_start, tail_end = (borders[0][0], borders[-1][1]) if borders else (len(after), len(after))
    closing = pattern.search(answered_after)
    return Chat(
        head=tuple(tokenizer.encode_template(before[:head_end])),
        before=before[head_end:],
        after=after[:tail_start],
        tail=tuple(tokenizer.encode_template(after[tail_start:tail_end])),
        opening=after[tail_end:],
        end=tokenizer.control[closing[0]] if closing else tokenizer.eos,
    )


def _compile(tokenizer: Tokenizer):
    """A function of messages and add_generation_prompt.

    The environment has what templates rely on. It has no clock: templates that ask for the date fall back to
    the one they were written with, and prompts stay the same from day to day. The sandbox keeps templates
    from everything but messages and bounds each of their ranges; loops within loops may still take long.
    """
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, jinja2.ext.loopcontrols]
    )
    environment.filters["tojson"] = _to_json
    environment.globals["raise_exception"] = _raise

    def render(messages: list[dict[str, str]], add_generation_prompt: bool) -> str:
        try:
            return environment.from_string(tokenizer.chat_template).render(
                **tokenizer.special,
                messages=messages,
                tools=None,
                documents=None,
                add_generation_prompt=add_generation_prompt,
                # Templates that let the model think first otherwise: what is wanted is the answer alone.
                enable_thinking=False,
            )
        # A template is a program: it may also add a number to a word, divide by zero or call itself for ever.
        except Exception as error:
            raise UserError(
                f"the chat template in {tokenizer.chat_source} cannot be rendered "
                f'({" ".join(str(error).split())}): mend it, or set policy.format = "plain".'
            ) from error

    return render


class _Generation(jinja2.ext.Extension):
    """`{% generation %}` marks what an assistant said, for training on it elsewhere; it changes no text."""

    tags = {"generation"}

    def parse(self, parser: jinja2.parser.Parser) -> list[jinja2.nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def _to_json(value: Any, ensure_ascii: bool = False, indent=None, separators=None, sort_keys=False) -> str:
    """Jinja's own filter would write HTML's entities."""
    return json.dumps(
        value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )


def _raise(message: str) -> None:
    raise jinja2.exceptions.TemplateError(message)
