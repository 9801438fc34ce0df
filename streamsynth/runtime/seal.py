"""The seal of a finished folder: the size and CRC-32 of every file, so that damage is seen before it is read.

Neither the container (OCDBT) nor the chunks (zarr) that Orbax writes carry a checksum over their data. The
seal is one JSON file, {path: [bytes, CRC-32]}. A bucket checks what it stores by itself, and reading all of
it back would take as long as writing it: there the CRC-32 is null, and the sizes alone are compared.
"""

from __future__ import annotations

import concurrent.futures
import json
import zlib
from typing import Any

from streamsynth.runtime import files

NAME = "seal.json"
_THREADS = 8  # zlib lets go of the interpreter while it sums
_BLOCK = 1 << 20

# What Orbax writes into the folder once more after it was sealed. Nothing that is restored is in it.
_LATER = ("_CHECKPOINT_METADATA", NAME)


class Damaged(Exception):
    """Says what is wrong with which file."""


def write(folder: Any) -> None:
    """Seals a folder that holds all its files."""
    names = [name for name in files.names_within(folder) if name not in _LATER]
    with concurrent.futures.ThreadPoolExecutor(_THREADS) as pool:
        found = dict(zip(names, pool.map(lambda name: _measure(folder / name), names), strict=True))
    files.atomic_write(folder / NAME, json.dumps(found, indent=0) + "\n")


def check(folder: Any) -> None:
    """Raises Damaged where a file is not as it was when the folder was sealed."""
    sealed = read_json(folder, NAME)

    def check_file(name: str) -> None:
        try:
            if files.size(folder / name) != sealed[name][0]:
                raise Damaged(f"{name} has {files.size(folder / name)} bytes instead of {sealed[name][0]}")
            if _measure(folder / name) != sealed[name]:
                raise Damaged(f"{name} has other bytes than were written")
        except FileNotFoundError:
            raise Damaged(f"{name} is missing") from None

    with concurrent.futures.ThreadPoolExecutor(_THREADS) as pool:
        list(pool.map(check_file, sealed))


def read_json(folder: Any, name: str) -> dict[str, Any]:
    """The JSON object in a file of the folder. Raises Damaged where there is none."""
    try:
        value = json.loads((folder / name).read_bytes())
    except FileNotFoundError:
        raise Damaged(f"{name} is missing") from None
    except ValueError:
        value = None
    if not isinstance(value, dict):
        raise Damaged(f"{name} is no JSON object")
    return value


def _measure(path: Any) -> list[int | None]:
    """Size in bytes and CRC-32 of a file."""
    if not files.is_local(path):
        return [files.size(path), None]
    size = crc = 0
    with open(path, "rb") as file:
        while block := file.read(_BLOCK):
            size, crc = size + len(block), zlib.crc32(block, crc)
    return [size, crc]
