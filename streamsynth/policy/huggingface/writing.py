"""A policy as a Hugging Face folder that transformers loads."""

from __future__ import annotations

import math
import os
import pathlib
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import traverse_util
from jax.experimental import multihost_utils

from streamsynth.errors import UserError
from streamsynth.policy.huggingface.description import config_fields
from streamsynth.policy.huggingface.fields import CONFIG_FILE, GENERATION_FILE, write_json
from streamsynth.policy.huggingface.names import sources
from streamsynth.policy.huggingface.tensors import INDEX, WEIGHTS, write_file
from streamsynth.policy.transformer import TransformerConfig
from streamsynth.runtime.files import atomic_write


class Entry(NamedTuple):
    """A tensor to be written.

    name: in the file.   leaf: the parameter it lies in.   row: of the leading axis, or None.
    transposed: the file has [out, in].
    """

    name: str
    leaf: Any
    row: int | None
    transposed: bool


def save_model(
    directory: str | os.PathLike[str],
    config: TransformerConfig,
    params: Any,
    *,
    files: Mapping[str, bytes],
    bos: int | None,
    eos: tuple[int, ...],
    pad: int | None,
    context: int = 4096,
    max_shard_bytes: int = 4 << 30,
) -> None:
    """Writes a model as a Hugging Face folder; config.json comes last and says that it is whole.

    One tensor is fetched at a time. Where there are several processes, all must call this, and the first
    one writes.

    Args:
      directory: the folder, made if missing.
      config: the network.
      params: its parameters, on any devices, in one dtype.
      files: tokenizer files by name, carried along as they are.
      bos, eos, pad: ids that begin a text, end it (any of them), and pad it.
      context: the longest text the model is for, in tokens (`max_position_embeddings`).
      max_shard_bytes: weights above it go to several files.

    Raises:
      UserError: the folder holds a model already, or the network is none that config.json can describe.
    """
    folder = pathlib.Path(directory)
    leaves = traverse_util.flatten_dict(params)
    ids = {
        "bos_token_id": bos,
        "eos_token_id": eos[0] if len(eos) == 1 else list(eos) or None,
        "pad_token_id": pad,
    }
    dtype = str(leaves["embedding",].dtype)
    fields = {**config_fields(config, dtype=dtype, context=context), **ids}
    first = jax.process_index() == 0
    if first:
        if (folder / CONFIG_FILE).exists():
            raise UserError(
                f"{folder} already holds a model: remove the folder or name another to export to."
            )
        folder.mkdir(parents=True, exist_ok=True)
        for left in folder.glob("model*.safetensors*"):  # of an export that was cut off
            left.unlink()
    shards = _shards(_entries(config, leaves), max_shard_bytes)
    placed = {}
    for number, entries in enumerate(shards, 1):
        name = WEIGHTS if len(shards) == 1 else f"model-{number:05}-of-{len(shards):05}.safetensors"
        placed |= {entry.name: name for entry in entries}
        arrays = ((entry.name, fetch(entry)) for entry in entries)
        if first:
            layout = {entry.name: (np.dtype(entry.leaf.dtype), file_shape(entry)) for entry in entries}
            write_file(folder / name, layout, arrays)
        else:
            for _ in arrays:  # its part in gathering them
                pass
    if not first:
        return
    if len(shards) > 1:
        total = sum(_size(entry) for entries in shards for entry in entries)
        write_json(folder / INDEX, {"metadata": {"total_size": total}, "weight_map": placed})
    for name, content in files.items():
        atomic_write(folder / name, content)
    write_json(folder / GENERATION_FILE, {name: value for name, value in ids.items() if value is not None})
    write_json(folder / CONFIG_FILE, fields)


def file_shape(entry: Entry) -> tuple[int, ...]:
    """The shape of a tensor in the file."""
    shape = entry.leaf.shape if entry.row is None else entry.leaf.shape[1:]
    return shape[::-1] if entry.transposed else shape


def fetch(entry: Entry) -> np.ndarray:
    """A tensor on the host. Where there are several processes, all must call this."""
    # A copy on the device, which indexing makes too: JAX would keep what it fetched with the parameter.
    part = jnp.copy(entry.leaf) if entry.row is None else entry.leaf[entry.row]
    if isinstance(part, jax.Array) and not part.is_fully_addressable:
        part = multihost_utils.process_allgather(part, tiled=True)
    array = np.asarray(part)
    return array.T if entry.transposed else array


def _entries(config: TransformerConfig, leaves: Mapping[tuple[str, ...], Any]) -> list[Entry]:
    """Every tensor of the folder, in the order of the parameters."""
    wanted = sources(config)
    if {path: source.param_shape for path, source in wanted.items()} != {
        p: v.shape for p, v in leaves.items()
    }:
        raise ValueError("the parameters are those of another network than config says")
    return [
        Entry(name, leaves[path], row if source.stacked else None, source.transposed)
        for path, source in wanted.items()
        for row, name in enumerate(source.names)
    ]


def _size(entry: Entry) -> int:
    return math.prod(file_shape(entry)) * np.dtype(entry.leaf.dtype).itemsize


def _shards(entries: list[Entry], most: int) -> list[list[Entry]]:
    """The tensors, one file after the other, each of at most `most` bytes unless one tensor is larger."""
    shards: list[list[Entry]] = [[]]
    room = most
    for entry in entries:
        if shards[-1] and _size(entry) > room:
            shards.append([])
            room = most
        shards[-1].append(entry)
        room -= _size(entry)
    return shards
