"""Arrays between the hosts and the devices of one mesh, of which a process sees its own devices alone.

On one process these are `jax.device_put` and `jax.device_get`.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec, Sharding


def put(array: Any, sharding: Sharding) -> jax.Array:
    """An array placed as told.

    Args:
      array: the whole of it, on every process; where it is on the host, what a process's own devices do not
        hold may be anything there. Or one that lies on the mesh already.
      sharding: over devices of any processes.
    """
    if sharding.is_fully_addressable:
        return jax.device_put(array, sharding)
    if isinstance(array, jax.Array) and not array.is_fully_addressable:
        return array if array.sharding == sharding else _moved(sharding)(array)
    if isinstance(array, jax.Array) and jax.dtypes.issubdtype(array.dtype, jax.dtypes.prng_key):
        data = put(np.asarray(jax.random.key_data(array)), sharding)
        return jax.random.wrap_key_data(data, impl=jax.random.key_impl(array))
    array = np.asarray(array)
    return jax.make_array_from_callback(array.shape, sharding, lambda piece: array[piece])


def place(tree: Any, shardings: Any) -> Any:
    """A tree of arrays placed as told, by one sharding or a tree of them: see `put`."""
    if all(sharding.is_fully_addressable for sharding in jax.tree.leaves(shardings)):
        return jax.device_put(tree, shardings)
    if isinstance(shardings, Sharding):
        return jax.tree.map(lambda leaf: put(leaf, shardings), tree)
    return jax.tree.map(put, tree, shardings)


def fetch(tree: Any, here: bool = True) -> Any:
    """A tree with its arrays on the host, whole, on every process.

    What lies in pieces on devices of several processes is first gathered by the devices, one array after the
    other: a device need not have room for all of them. All processes call this together.

    Args:
      tree: of arrays.
      here: False where this process only helps the others; it is given None for each array then.
    """

    def whole(leaf: Any) -> Any:
        if isinstance(leaf, jax.Array) and not leaf.is_fully_addressable and not leaf.is_fully_replicated:
            leaf = jax.block_until_ready(_moved(NamedSharding(leaf.sharding.mesh, PartitionSpec()))(leaf))
            leaf = jax.device_get(leaf) if here else None
        return leaf if here else None

    return jax.device_get(jax.tree.map(whole, tree))


def held(size: int, sharding: Sharding) -> np.ndarray:
    """The indices, rising, along a first axis of `size`, of which devices of this process hold something."""
    pieces = sharding.addressable_devices_indices_map((size,)).values()
    return np.unique(np.concatenate([np.arange(size)[piece] for piece in pieces]))


@dataclasses.dataclass(frozen=True)
class Placement:
    """Puts trees on the mesh, all leaves alike."""

    sharding: Sharding

    def __call__(self, tree: Any) -> Any:
        return place(tree, self.sharding)

    def held(self, size: int) -> np.ndarray:
        """Of `size` rows those that this process must give: see `held`."""
        return held(size, self.sharding)


@functools.lru_cache(maxsize=64)
def _moved(sharding: Sharding) -> Any:
    return jax.jit(lambda array: array, out_shardings=sharding)
