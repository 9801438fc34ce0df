"""The tokenizer of a folder of weights, with what the files beside it say of special tokens and chats."""

from __future__ import annotations

import json
import os
import pathlib
from typing import Any

from streamsynth.errors import UserError
from streamsynth.policy.pretrained_tokenizers import HuggingFaceTokenizer, SentencePieceTokenizer, Settings
from streamsynth.policy.tokenizer import MarkerTokenizer, Tokenizer
from streamsynth.runtime.files import as_path

# What belongs to a tokenizer in such a folder, and goes along when the policy is written out again.
FILES = (
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "vocab.json",
    "merges.txt",
)


def load_tokenizer(directory: str | os.PathLike[str]) -> Tokenizer:
    """Reads `tokenizer.json`, or `tokenizer.model` where there is none.

    Raises:
      UserError: there is neither, or a file is damaged.
    """
    directory = as_path(directory)
    settings = read_settings(directory)
    if "tokenizer.json" in settings.files:
        name, make = "tokenizer.json", HuggingFaceTokenizer
    elif "tokenizer.model" in settings.files:
        name, make = "tokenizer.model", _sentencepiece
    else:
        raise UserError(
            f"{directory} has no tokenizer.json and no tokenizer.model: copy the one its weights came with."
        )
    try:
        return make(settings.files[name], settings)
    except UserError:
        raise
    except Exception as error:  # `tokenizers` raises Exception itself, SentencePiece RuntimeError
        reason = " ".join(str(error).split())
        raise UserError(f"{directory / name} is damaged ({reason}): copy it anew.") from error


def _sentencepiece(model: bytes, settings: Settings) -> Tokenizer:
    """A model trained by `train_tokenizer` has all markers; any other lacks them."""
    try:
        return MarkerTokenizer(model)
    except UserError:
        return SentencePieceTokenizer(model, settings)


def read_settings(directory: pathlib.Path) -> Settings:
    """What the JSON files and the template of a folder say.

    Raises:
      UserError: a file is damaged.
    """
    files = {name: (directory / name).read_bytes() for name in FILES if (directory / name).is_file()}
    network = _read_json(directory / "config.json")
    generation = _read_json(directory / "generation_config.json")
    config = _read_json(directory / "tokenizer_config.json")
    special = _special(_read_json(directory / "special_tokens_map.json")) | _special(config)
    template, template_file = _chat_template(directory, files, config)
    add_bos = config.get("add_bos_token")
    added = _read_json(directory / "added_tokens.json")
    return Settings(
        source=str(directory),
        special=special,
        # A tokenizer_config.json that is silent on it means that there is none, whatever the network says.
        bos=None if config else next(iter(_ids(directory, network, "bos_token_id")), None),
        stops=tuple(
            dict.fromkeys(
                _ids(directory, generation, "eos_token_id") + _ids(directory, network, "eos_token_id")
            )
        ),
        add_bos=add_bos if isinstance(add_bos, bool) else None,
        added={piece: i for piece, i in added.items() if isinstance(i, int)},
        chat_template=template,
        chat_source=template_file,
        files=files,
    )


def _read_json(path: pathlib.Path) -> dict[str, Any]:
    """The object in a file; an absent file says nothing."""
    if not path.is_file():
        return {}
    try:
        value = json.loads(path.read_bytes())
        if not isinstance(value, dict):
            raise ValueError("it holds no object")
        return value
    except ValueError as error:
        raise UserError(f"{path} is damaged ({error}): copy it anew.") from error


def _special(config: dict[str, Any]) -> dict[str, str]:
    """Names like "eos_token" with their strings, which some files wrap up with what they do to blanks."""
    entries = {name: value for name, value in config.items() if name.endswith("_token")}
    texts = {n: v.get("content") if isinstance(v, dict) else v for n, v in entries.items()}
    return {name: text for name, text in texts.items() if isinstance(text, str) and text}


def _ids(directory: pathlib.Path, config: dict[str, Any], key: str) -> list[int]:
    """One id, several or none; a network that also sees images keeps them under `text_config`."""
    value = config.get(key)
    if value is None:
        value = config.get("text_config", {}).get(key)
    values = value if isinstance(value, list) else [] if value is None else [value]
    if not all(isinstance(i, int) and not isinstance(i, bool) for i in values):
        raise UserError(f"{directory}: {key} = {json.dumps(value)} must be a token id or a list of them.")
    return values


def _chat_template(
    directory: pathlib.Path, files: dict[str, bytes], config: dict[str, Any]
) -> tuple[str | None, str]:
    """Jinja source and its file; of several named ones the default."""
    name = "chat_template.jinja"
    if name in files:
        try:
            return files[name].decode("utf-8"), str(directory / name)
        except UnicodeDecodeError as error:
            raise UserError(f"{directory / name} is damaged ({error}): copy it anew.") from error
    template = config.get("chat_template")
    if isinstance(template, list):
        template = {t.get("name"): t.get("template") for t in template if isinstance(t, dict)}.get("default")
    if not isinstance(template, str):
        return None, ""
    return template, str(directory / "tokenizer_config.json")
