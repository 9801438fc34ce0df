"""The JSON files of a Hugging Face folder, field by field."""

from __future__ import annotations

import dataclasses
import json
import os
import pathlib
from collections.abc import Mapping
from typing import Any

from streamsynth.errors import UserError
from streamsynth.runtime.files import atomic_write

CONFIG_FILE = "config.json"
GENERATION_FILE = "generation_config.json"


def read_json(path: pathlib.Path, what: str) -> dict[str, Any]:
    """A JSON object from a file; `what` says in an error what the file should be.

    Raises:
      UserError: it is missing or holds anything else.
    """
    try:
        fields = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{path} is not {what} ({error}): name a folder with one.") from error
    if not isinstance(fields, dict):
        raise UserError(f"{path} is not {what} (no JSON object): name a folder with one.")
    return fields


def write_json(path: pathlib.Path, fields: Mapping[str, Any]) -> None:
    """Writes a JSON object whole or not at all."""
    atomic_write(path, json.dumps(fields, indent=2, sort_keys=True) + "\n")


class Fields:
    """The fields of a config.json with their defaults; what is wrong with one is said with its name."""

    def __init__(self, path: pathlib.Path, fields: Mapping[str, Any]):
        self.path, self.values = path, fields

    def wrong(self, name: str, mend: str) -> UserError:
        value = json.dumps(self.values.get(name))
        return UserError(f"{self.path}: {name} = {value} is not supported: {mend}")

    def number(self, name: str, kind: type = int, *, fields: Mapping[str, Any] | None = None) -> Any:
        fields = self.values if fields is None else fields
        value = fields.get(name)
        if value is None:
            raise UserError(f"{self.path} has no field {name}: take the file that came with the weights.")
        numeric = isinstance(value, int | float) and not isinstance(value, bool)
        if not numeric or value <= 0 or kind(value) != value:
            words = "a positive whole number" if kind is int else "a positive number"
            raise UserError(f"{self.path}: {name} = {json.dumps(value)} must be {words}.")
        return kind(value)

    def get(self, name: str) -> Any:
        return self.values.get(name)


@dataclasses.dataclass(frozen=True)
class SpecialIds:
    """The ids that a folder names: begin of text, ends of text, padding. None or () where it names none."""

    bos: int | None = None
    eos: tuple[int, ...] = ()
    pad: int | None = None


def read_special_ids(directory: str | os.PathLike[str]) -> SpecialIds:
    """The special ids of a folder: those of generation_config.json, where it has one, come first.

    Instruction-tuned models end their turn with another id than their texts, and often only
    generation_config.json names both.

    Raises:
      UserError: a file is damaged or an id is no whole number.
    """
    folder = pathlib.Path(directory)
    sources = [folder / CONFIG_FILE]
    if (folder / GENERATION_FILE).exists():
        sources.insert(0, folder / GENERATION_FILE)
    named: dict[str, tuple[int, ...]] = {}
    for path in sources:
        fields = read_json(path, "a description of a model")
        nested = fields.get("text_config")
        fields = {**(nested if isinstance(nested, dict) else {}), **fields}
        for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
            value = fields.get(name)
            ids = value if isinstance(value, list) else [value] if value is not None else []
            if not all(isinstance(entry, int) and not isinstance(entry, bool) for entry in ids):
                raise UserError(f"{path}: {name} = {json.dumps(value)} must be a token id or a list of them.")
            if ids:
                named.setdefault(name, tuple(ids))
    first = {name: ids[0] for name, ids in named.items()}
    return SpecialIds(first.get("bos_token_id"), named.get("eos_token_id", ()), first.get("pad_token_id"))
