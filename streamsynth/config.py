"""Configs: a Python file with `get_config`, an argument, overrides; and the resolved config as JSON.

A config file is a short Python file:

    from streamsynth import config as config_lib
    from streamsynth import defaults

    def get_config(arg: str = ""):
        arg = config_lib.parse_arg(arg, tiny=False, seed=0)
        config = defaults.default_config()
        config.seed = arg.seed
        return config

and is named with its argument and overrides as `--config=FILE:tiny,seed=3 --config.learner.alpha=0.1`.

A resolved config holds plain values only (None, bool, int, float, str, tuples and dicts of those) and is
locked. So it survives JSON unchanged, two of them can be compared, and a hash of one can name a cache.
"""

from __future__ import annotations

import ast
import difflib
import hashlib
import importlib.util
import inspect
import json
import re
import traceback
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

from ml_collections import ConfigDict

from streamsynth.errors import UserError

# Groups whose keys are names of judges with their weights: any may be added, and left out.
OPEN_GROUPS = ("feedback.judges", "feedback.secondary")


def parse_arg(arg: str | None, **defaults: bool | float | str) -> ConfigDict:
    """Reads a config's argument, such as `"tiny,seed=3"`, into the types of `defaults`.

    A bare word means true: `parse_arg("tiny", tiny=False, seed=0)` gives tiny=True, seed=0.

    Raises UserError for a name that is not among `defaults`, one given twice, a bare word that is no
    boolean, and a value of another type.
    """
    values = ConfigDict(defaults)
    given = set()
    for item in filter(None, (item.strip() for item in (arg or "").split(","))):
        name, equals, text = (part.strip() for part in item.partition("="))
        if name not in defaults:
            known = ", ".join(defaults) if defaults else "none at all"
            raise UserError(f"The config's argument {name!r} is not known; it takes: {known}.")
        if name in given:
            raise UserError(f"The config's argument {name!r} is given twice; leave one out.")
        given.add(name)
        default = defaults[name]
        if not equals and not isinstance(default, bool):
            raise UserError(f"The config's argument {name!r} needs a value, such as {name}={default}.")
        values[name] = _parse(text, type(default), f"The config's argument {name!r}") if equals else True
    return values.lock()


def load(flag: str, overrides: Mapping[str, str] | None = None) -> ConfigDict:
    """Resolves a config.

    Args:
      flag: `FILE` or `FILE:ARG`; FILE defines `get_config(arg)`, or `get_config()` where it takes none.
      overrides: new values as text by dotted key, `{"learner.alpha": "0.1"}`. They are read as the type
        that the key has. Tuples are given as `a,b,c` or as a Python literal; a key that may be None takes
        `none`.

    Returns:
      A locked ConfigDict of plain values.

    Raises:
      UserError: for anything wrong with the file, the argument, or an override.
    """
    file, _, arg = flag.partition(":")
    module = _import_file(file)
    if not callable(getattr(module, "get_config", None)):
        raise UserError(f"{file} has no function get_config; a config file defines get_config(arg).")
    takes_arg = bool(inspect.signature(module.get_config).parameters)
    if arg and not takes_arg:
        raise UserError(f"{file} takes no argument, but {arg!r} stands behind its name; leave it out.")
    try:
        config = module.get_config(arg) if takes_arg else module.get_config()
    except UserError as error:
        raise UserError(f"{file}: {error}") from error
    except Exception as error:
        raise _file_error(file, error) from error
    if not isinstance(config, ConfigDict):
        raise UserError(f"{file}: get_config must return a ConfigDict, not {type(config).__name__}.")
    for key, text in (overrides or {}).items():
        _override(config, key, text, file)
    return _resolved(config.to_dict())


def base(file: str, name: str, arg: str = "") -> ConfigDict:
    """The config of another file, for one that changes a few keys of it.

    Args:
      file: of the config that asks: its `__file__`.
      name: of the other file, as seen from the folder of the first.
      arg: the argument, for the other file to read.
    """
    return _import_file(str(Path(file).parent / name)).get_config(arg)


def to_json(config: ConfigDict) -> str:
    """The config as JSON text: sorted keys, so that equal configs give equal text."""
    return json.dumps(config.to_dict(), indent=2, sort_keys=True) + "\n"


def from_json(text: str, name: str = "config.json") -> ConfigDict:
    """The resolved config that `to_json` wrote; `name` is the file's name in the error."""
    try:
        values = json.loads(text)
    except ValueError as error:
        raise UserError(f"{name} is not JSON ({error}); `train` writes it, do not edit it.") from error
    if not isinstance(values, dict):
        raise UserError(f"{name} holds no JSON object; `train` writes it, do not edit it.")
    return _resolved(values)


def content_hash(config: ConfigDict) -> str:
    """16 hex digits that follow from the config's keys and values; give it a part to name that part."""
    return hashlib.sha256(to_json(config).encode()).hexdigest()[:16]


def differences(old: ConfigDict, new: ConfigDict) -> dict[str, tuple[str, str]]:
    """The dotted keys whose values differ, with both values as Python literals ("absent" where missing)."""
    before, after = flatten(old), flatten(new)
    return {
        key: tuple(repr(side[key]) if key in side else "absent" for side in (before, after))
        for key in sorted(before.keys() | after.keys())
        if key not in before or key not in after or before[key] != after[key]
    }


def flatten(config: ConfigDict) -> dict[str, Any]:
    """Every value by its dotted key; an empty group stands as an empty dict."""
    flat = {}
    for key, value in config.items():
        if isinstance(value, ConfigDict) and len(value):
            flat.update({f"{key}.{inner}": item for inner, item in flatten(value).items()})
        else:
            flat[key] = value.to_dict() if isinstance(value, ConfigDict) else value
    return flat


def _import_file(file: str) -> ModuleType:
    path = Path(file)
    if not path.is_file():
        raise UserError(
            f"The config file {file} does not exist; --config names a Python file with get_config."
        )
    if path.suffix != ".py":
        raise UserError(f"The config file {file} is no Python file; --config names one that ends in .py.")
    spec = importlib.util.spec_from_file_location(f"streamsynth_config_{path.stem}", path)
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except UserError as error:
        raise UserError(f"{file}: {error}") from error
    except Exception as error:
        raise _file_error(file, error) from error
    return module


def _file_error(file: str, error: Exception) -> UserError:
    """One sentence that names the line of the config file from which `error` came."""
    if isinstance(error, SyntaxError):
        return UserError(f"{file}, line {error.lineno} is not valid Python: {error.msg}.")
    frames = traceback.extract_tb(error.__traceback__)
    lines = [frame.lineno for frame in frames if Path(frame.filename).absolute() == Path(file).absolute()]
    where = f"{file}, line {lines[-1]}" if lines else file
    # ml_collections prints the whole group where a key is unknown; keep what names the mend.
    text = re.sub(r'Other fields present: ".*"(?:\\n|\n)', "", str(error), flags=re.DOTALL)
    if text[:1] in ("'", '"') and text[:1] == text[-1:]:
        text = text[1:-1]  # a KeyError quotes its message
    return UserError(f"{where}: {type(error).__name__}: {' '.join(text.split())}")


def _override(config: ConfigDict, key: str, text: str, file: str) -> None:
    *groups, name = key.split(".")
    group = config
    for part in groups:
        group = group.get(part) if isinstance(group, ConfigDict) else None
    if isinstance(group, ConfigDict) and name not in group and ".".join(groups) in OPEN_GROUPS:
        with group.unlocked():
            group[name] = _parse(text, float, f"--config.{key}")
        return
    if not isinstance(group, ConfigDict) or name not in group:
        raise UserError(f"--config.{key}: {file} has no such key; {_nearest(config, key)}.")
    if isinstance(group[name], ConfigDict):
        keys = ", ".join(f"--config.{key}.{inner}" for inner in group[name])
        raise UserError(f"--config.{key} is a group of keys and takes no value; its keys are: {keys}.")
    what = f"--config.{key}"
    declared = group.get_type(name)
    if text.lower() == "none" and (group[name] is None or declared is type(None)):
        value = None
    elif issubclass(declared, (list, tuple)):
        value = _parse_sequence(text, tuple(group[name] or ()), what)
    elif declared is type(None):
        value = _literal(text)
    else:
        value = _parse(text, declared, what)
    with group.ignore_type():  # a None gets its first value, and a list may become a tuple
        group[name] = value


def _nearest(config: ConfigDict, key: str) -> str:
    """Names the keys that were most likely meant."""
    known = list(flatten(config))
    last = key.rpartition(".")[2]
    near = [other for other in known if other.rpartition(".")[2] == last]
    near += [other for other in difflib.get_close_matches(key, known, n=3, cutoff=0.5) if other not in near]
    if near:
        return f"the nearest are: {', '.join(near[:3])}"
    return f"its groups and keys are: {', '.join(config)}"


def _parse(text: str, wanted: type, what: str) -> bool | int | float | str:
    """Reads `text` as a `wanted`; UserError starting with `what` where it is none."""
    if wanted is str:
        return text
    if wanted is bool:
        if text.lower() in ("true", "false"):
            return text.lower() == "true"
        raise UserError(f"{what} is true or false, not {text!r}.")
    if wanted not in (int, float):
        raise UserError(f"{what} holds a {wanted.__name__} and can be set in the config file alone.")
    try:
        return wanted(text)
    except ValueError:
        kind = "a whole number" if wanted is int else "a number"
        raise UserError(f"{what} is {kind}, not {text!r}.") from None


def _parse_sequence(text: str, old: tuple, what: str) -> tuple:
    """Reads `a,b,c`, `(1, 2)` or nothing; elements take the one type that the old ones have."""
    if text.strip().startswith(("(", "[")):
        try:
            value = ast.literal_eval(text)
        except (ValueError, SyntaxError):
            raise UserError(f"{what} is a tuple, and {text!r} is no Python literal.") from None
        items = [str(item) for item in (value if isinstance(value, (list, tuple)) else (value,))]
    else:
        items = [item.strip() for item in text.split(",") if item.strip()]
    kinds = {type(item) for item in old}
    return tuple(_parse(item, *kinds, what) if len(kinds) == 1 else _literal(item) for item in items)


def _literal(text: str) -> Any:
    """A Python literal where `text` is one, else the text itself."""
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return text


def _resolved(values: Mapping[str, Any]) -> ConfigDict:
    return ConfigDict(_plain(values, "")).lock()


def _plain(value: Any, key: str) -> Any:
    """The value with lists as tuples; UserError for one that JSON would not give back."""
    if value is None or type(value) in (bool, int, float, str):
        return value
    if isinstance(value, (Mapping, ConfigDict)):
        return {name: _plain(item, f"{key}.{name}" if key else name) for name, item in value.items()}
    if isinstance(value, (list, tuple)):
        return tuple(_plain(item, key) for item in value)
    raise UserError(
        f"The config key {key} holds a {type(value).__name__}; configs hold plain numbers, texts, booleans, "
        "None, and tuples or groups of them."
    )
