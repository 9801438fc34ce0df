"""The form of what processes tell each other: a JSON header, and the bytes of the arrays in it."""

from __future__ import annotations

import json
import struct
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

_FRAME = struct.Struct("!IQ")  # bytes of the header, and of the arrays behind it
_ARRAY = "__array__"


def encode(header: Mapping[str, Any], value: Any = None) -> bytes:
    """One message.

    Raises:
      TypeError: something in `value` is neither of JSON nor a number or an array of numbers.
    """
    arrays: list[np.ndarray] = []
    told = json.dumps({"header": header, "value": _out(value, arrays)}).encode()
    blobs = b"".join(np.ascontiguousarray(array).tobytes() for array in arrays)
    return _FRAME.pack(len(told), len(blobs)) + told + blobs


def frames(buffer: bytearray) -> Iterator[tuple[dict[str, Any], Any]]:
    """Takes the whole messages out of a buffer: their headers and values."""
    while len(buffer) >= _FRAME.size:
        header_size, blob_size = _FRAME.unpack_from(buffer)
        size = _FRAME.size + header_size + blob_size
        if len(buffer) < size:
            return
        told = json.loads(buffer[_FRAME.size : _FRAME.size + header_size])
        blobs = bytes(buffer[_FRAME.size + header_size : size])
        del buffer[:size]
        yield told["header"], _in(told["value"], blobs)


def _out(value: Any, arrays: list[np.ndarray]) -> Any:
    if isinstance(value, np.generic):
        return value.item()
    if isinstance(value, np.ndarray):
        if value.dtype.kind not in "biuf":
            raise TypeError(f"an array of {value.dtype} does not go over the line")
        start = sum(array.nbytes for array in arrays)
        arrays.append(value)
        return {_ARRAY: [value.dtype.str, list(value.shape), start]}
    if isinstance(value, Mapping):
        return {str(key): _out(item, arrays) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_out(item, arrays) for item in value]
    return value


def _in(value: Any, blobs: bytes) -> Any:
    if isinstance(value, dict):
        if value.keys() == {_ARRAY}:
            dtype, shape, start = value[_ARRAY]
            count = int(np.prod(shape))
            return np.frombuffer(blobs, dtype, count, start).reshape(shape).copy()
        return {key: _in(item, blobs) for key, item in value.items()}
    if isinstance(value, list):
        return [_in(item, blobs) for item in value]
    return value
