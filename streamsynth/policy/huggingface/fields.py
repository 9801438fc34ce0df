"""The JSON files of a Hugging Face folder, field by field."""

from __future__ import annotations

import json
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
