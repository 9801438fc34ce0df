"""The weights of a Hugging Face folder, straight to where the parameters lie."""

from __future__ import annotations

import hashlib
import os
import pathlib
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import traverse_util
from jax.experimental import multihost_utils

from streamsynth.errors import UserError
from streamsynth.policy.huggingface.fields import CONFIG_FILE
from streamsynth.policy.huggingface.names import HEAD, Source, plain_name, sources
from streamsynth.policy.huggingface.tensors import CODES, Tensor, read_folder, row_blocks
from streamsynth.policy.transformer import TransformerConfig


def load_params(directory: str | os.PathLike[str], config: TransformerConfig, shardings: Any) -> Any:
    """The parameters of a folder's model, each placed as its sharding says.

    The files are mapped and every process reads the slices of its own shards alone, parameter by parameter;
    above the parameters it needs the memory of one parameter's shards.

    Args:
      directory: a folder with `model.safetensors`, or with shards and their index.
      config: the network, as `read_config` reads it; `param_dtype` is what the weights are cast to.
      shardings: tree of `jax.sharding.Sharding` in the structure of the parameters.

    Raises:
      UserError: a file is missing or damaged, a tensor is missing, unknown, of a wrong shape or of a dtype
        that is no plain float.
    """
    places = traverse_util.flatten_dict(shardings)
    wanted = sources(config)
    if places.keys() != wanted.keys():
        raise ValueError(f"shardings of other parameters: {sorted(places.keys() ^ wanted.keys())}")
    tensors = {plain_name(name): tensor for name, tensor in read_folder(directory).items()}
    tensors.pop(None, None)
    _check(pathlib.Path(directory), config, wanted, tensors)
    params = {}
    for path, source in wanted.items():
        parts = [tensors[name] for name in source.names]
        params[path] = _parameter(source, parts, jnp.dtype(config.param_dtype), places[path])
        # Before the next one is read: what is on its way to a device is kept on the host until it is there.
        jax.block_until_ready(params[path])
    return traverse_util.unflatten_dict(params)


def content_hash(directory: str | os.PathLike[str]) -> str:
    """16 hex digits that name a folder's model by config.json and the bytes of all its tensors.

    How the tensors are spread over files does not matter. Where there are several processes, the first one
    alone reads the weights and tells the others.

    Raises:
      UserError: a file is missing or damaged.
    """
    digest = np.zeros(8, np.uint8)
    if jax.process_index() == 0:
        digest = np.frombuffer(_digest(pathlib.Path(directory)), np.uint8)
    if jax.process_count() > 1:
        digest = np.asarray(multihost_utils.broadcast_one_to_all(digest))
    return digest.tobytes().hex()


def _digest(folder: pathlib.Path) -> bytes:
    try:
        described = (folder / CONFIG_FILE).read_bytes()
    except OSError as error:
        raise UserError(
            f"{folder / CONFIG_FILE} cannot be read ({error}): name a folder with one."
        ) from error
    tensors = read_folder(folder)

    def one(name: str) -> bytes:
        tensor = tensors[name]
        digest = hashlib.sha256(f"{name} {tensor.code} {tensor.shape}".encode())
        for block in tensor.blocks():
            digest.update(np.ascontiguousarray(block).reshape(-1).view(np.uint8).data)
        return digest.digest()

    whole = hashlib.sha256(described)
    # Hashing lets other threads run, and is slower than a disk.
    with ThreadPoolExecutor(max_workers=4) as pool:
        for part in pool.map(one, sorted(tensors)):
            whole.update(part)
    return whole.digest()[:8]


def _check(
    folder: pathlib.Path,
    config: TransformerConfig,
    wanted: dict[tuple[str, ...], Source],
    tensors: dict[str, Tensor],
) -> None:
    """Raises UserError unless the tensors are those wanted, before anything is read."""
    named = set()
    for source in wanted.values():
        named.update(source.names)
        for name in source.names:
            tensor = tensors.get(name)
            if tensor is None:
                raise UserError(
                    f"{folder} lacks tensor {name}, which its config.json asks for: fetch the weights that "
                    "belong to it."
                )
            if tensor.shape != source.shape:
                raise UserError(
                    f"{tensor.path}: tensor {tensor.name} has shape {list(tensor.shape)}, but config.json "
                    f"asks for {list(source.shape)}: fetch the two files that belong together."
                )
            if tensor.code not in CODES.values():
                raise UserError(
                    f"{tensor.path}: tensor {tensor.name} has dtype {tensor.code}, which is not supported: "
                    f"name a folder with weights in {', '.join(CODES.values())}."
                )
    # Old files keep the rotary frequencies, which follow from the config; a tied head is the embedding.
    extra = [name for name in tensors if name not in named and not name.endswith(".rotary_emb.inv_freq")]
    for name in sorted(extra):
        if not (name == HEAD and config.tied_embeddings):
            raise UserError(
                f"{tensors[name].path}: tensor {tensors[name].name} belongs to nothing in config.json's "
                "architecture: name a folder where the two belong together."
            )


def _parameter(
    source: Source, parts: list[Tensor], dtype: np.dtype, sharding: jax.sharding.Sharding
) -> jax.Array:
    shape = source.param_shape
    read: dict[tuple[tuple[int, int, int], ...], np.ndarray] = {}

    def shard(index: tuple[slice, ...]) -> np.ndarray:
        # Devices that hold the same slice share one reading of it.
        key = tuple(part.indices(size) for part, size in zip(index, shape, strict=True))
        if key not in read:
            read[key] = _shard(source, parts, dtype, [slice(*part) for part in key])
        return read[key]

    return jax.make_array_from_callback(shape, sharding, shard, dtype=dtype)


def _shard(source: Source, parts: list[Tensor], dtype: np.dtype, index: list[slice]) -> np.ndarray:
    """One slice of a parameter, cast and in the network's layout, read through a small buffer."""
    array = np.empty([part.stop - part.start for part in index], dtype)
    rows, own = (parts[index[0]], index[1:]) if source.stacked else (parts, index)
    targets = array if source.stacked else array[None]
    for target, tensor in zip(targets, rows, strict=True):
        # In the file's own order: a transposed copy of the whole jumps through the file.
        first, *rest = own[::-1] if source.transposed else own
        target = target.T if source.transposed else target
        row = 4 * int(np.prod(tensor.shape[1:], dtype=np.int64))
        for block in row_blocks(first.start, first.stop, row, 1 << 22):
            target[block.start - first.start : block.stop - first.start] = tensor[(block, *rest)]
    return array
