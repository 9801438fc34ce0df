"""safetensors files: memory-mapped in, streamed out.

They are read with the format's own library, which maps a file and copies what a slice asks for. They are
written here, tensor by tensor, because the library takes only what is in memory all at once. The format is
8 bytes of header length (little-endian), a JSON header {name: {dtype, shape, data_offsets}}, and the
tensors' bytes, which the offsets count from (huggingface/safetensors, README, "Format").
"""

from __future__ import annotations

import json
import math
import os
import pathlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np
from safetensors import SafetensorError, safe_open

from streamsynth.errors import UserError
from streamsynth.policy.huggingface.fields import read_json
from streamsynth.runtime.files import sync_folder

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"

# The dtypes that parameters are made of.
CODES = {np.dtype(np.float32): "F32", np.dtype(np.float16): "F16", np.dtype(jnp.bfloat16): "BF16"}


class Tensor:
    """One tensor of a mapped file.

    path: of the file.   name: of the tensor.   code: the format's name of its dtype, such as "BF16".
    """

    def __init__(self, path: pathlib.Path, name: str, view: Any):
        self.path, self.name, self._view = path, name, view
        self.code, self.shape = str(view.get_dtype()), tuple(view.get_shape())

    def __getitem__(self, index: tuple[slice, ...]) -> np.ndarray:
        """A copy of a part; only that part is read."""
        return self._view[index]

    def blocks(self, size: int = 1 << 24) -> Iterator[np.ndarray]:
        """The whole tensor in its own order, in copies of about `size` bytes.

        Raises:
          UserError: NumPy has no such dtype.
        """
        try:
            if not self.shape:
                # Older releases of the library cannot slice a scalar.
                with safe_open(self.path, "np") as file:
                    yield file.get_tensor(self.name)
                return
            row = 4 * math.prod(self.shape[1:])
            for part in row_blocks(0, self.shape[0], row, size):
                yield self._view[part]
        except AttributeError as error:
            raise UserError(
                f"{self.path}: tensor {self.name} has dtype {self.code}, which is not supported: name a "
                f"folder with weights in {', '.join(CODES.values())}."
            ) from error


def row_blocks(start: int, stop: int, row: int, size: int = 1 << 24) -> Iterator[slice]:
    """`start` to `stop` in slices of about `size` bytes, where one step is `row` bytes."""
    step = max(1, size // max(1, row))
    for begin in range(start, stop, step):
        yield slice(begin, min(begin + step, stop))


def read_file(path: pathlib.Path) -> dict[str, Tensor]:
    """The tensors of one file, memory-mapped.

    Raises:
      UserError: it is missing or damaged.
    """
    try:
        with safe_open(path, "np") as file:
            return {name: Tensor(path, name, file.get_slice(name)) for name in file.keys()}  # noqa: SIM118
    except (OSError, SafetensorError) as error:
        raise UserError(
            f"{path} is no readable safetensors file ({error}): fetch the folder's weights again."
        ) from error


def read_folder(directory: str | os.PathLike[str]) -> dict[str, Tensor]:
    """All tensors of a folder by name, from one file or from the shards that its index lists.

    Raises:
      UserError: there are no weights, a shard is missing or damaged, or the index names a tensor that its
        shard does not have.
    """
    folder = pathlib.Path(directory)
    if (folder / WEIGHTS).exists():
        return read_file(folder / WEIGHTS)
    if not (folder / INDEX).exists():
        raise UserError(
            f"{folder} has neither {WEIGHTS} nor {INDEX}: name a folder with safetensors weights."
        )
    places = read_json(folder / INDEX, "an index of shards").get("weight_map")
    if not isinstance(places, dict) or not all(isinstance(shard, str) for shard in places.values()):
        raise UserError(f"{folder / INDEX} has no weight_map: fetch the folder's weights again.")
    tensors = {}
    for shard in sorted(set(places.values())):
        tensors |= read_file(folder / shard)
    for name, shard in places.items():
        if name not in tensors:
            raise UserError(
                f"{folder / shard} lacks tensor {name}, which {INDEX} places there: fetch it again."
            )
    return tensors


def write_file(
    path: pathlib.Path,
    layout: Mapping[str, tuple[np.dtype, Sequence[int]]],
    arrays: Iterable[tuple[str, np.ndarray]],
) -> None:
    """Writes a file whole or not at all, one tensor in memory at a time.

    Args:
      path: the file.
      layout: dtype and shape of every tensor, in the order of `arrays`.
      arrays: (name, array) of every tensor.
    """
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}  # transformers asks for the format
    offset = 0
    for name, (dtype, shape) in layout.items():
        size = math.prod(shape) * dtype.itemsize
        header[name] = {"dtype": CODES[dtype], "shape": list(shape), "data_offsets": [offset, offset + size]}
        offset += size
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        with open(temporary, "wb") as file:
            file.write(len(text).to_bytes(8, "little") + text)
            for (name, (dtype, shape)), (given, array) in zip(layout.items(), arrays, strict=True):
                if (name, dtype, tuple(shape)) != (given, array.dtype, array.shape):
                    raise ValueError(f"{given} {array.dtype}{array.shape} came where {name} was due")
                file.write(np.ascontiguousarray(array).reshape(-1).view(np.uint8).data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    sync_folder(path.parent)
