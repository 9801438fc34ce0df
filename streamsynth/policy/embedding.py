"""Tokens to rows of the embedding table, with a gradient that low precision does not lose.

On a mesh the table lies [V / tensor, width / fsdp] on a device and is never gathered. Every device looks up
the tokens of its whole `fsdp` group in its own slice of the width; what it found of others' tokens is
exchanged for what they found of its own. The gradient goes the same way back.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from streamsynth.pytrees import Array
from streamsynth.runtime import mesh as mesh_lib

_TABLE = PartitionSpec("tensor", "fsdp")
_ROWS = PartitionSpec(mesh_lib.BATCH_AXES)


@jax.custom_vjp
def embed(table: Array, tokens: Array) -> Array:
    """Rows of `table` [V, width] for tokens [N, Q]: [N, Q, width].

    The gradient is summed in float32 whatever the dtype of the table: a frequent token's is a sum over
    thousands of places, of which bfloat16 would lose most.
    """
    mesh = mesh_lib.current()
    if mesh is None:
        return jnp.take(table, tokens, axis=0)
    count, tokens = tokens.shape[0], mesh_lib.padded(tokens, mesh)
    rows = jax.shard_map(_look_up, in_specs=(_TABLE, _ROWS), out_specs=_ROWS, check_vma=False)(table, tokens)
    return rows[:count]


def _look_up(table: Array, tokens: Array) -> Array:
    """On each device: [V / tensor, width / fsdp] and [n, Q] to [n, Q, width]."""
    place, here = _places(tokens, table.shape[0])
    rows = jnp.where(here[..., None], jnp.take(table, place, axis=0, mode="clip"), 0)
    rows = mesh_lib.summed(rows, "tensor")
    return jax.lax.all_to_all(rows, "fsdp", split_axis=0, concat_axis=2, tiled=True)


def _places(tokens: Array, size: int) -> tuple[Array, Array]:
    """The tokens of the whole `fsdp` group as places in this device's `size` rows, and which lie there."""
    tokens = jax.lax.all_gather(tokens, "fsdp", axis=0, tiled=True)
    place = tokens - jax.lax.axis_index("tensor") * size
    return place, (place >= 0) & (place < size)


def _embed_forward(table: Array, tokens: Array) -> tuple[Array, tuple[Array, Array]]:
    return embed(table, tokens), (table, tokens)


def _embed_backward(saved: tuple[Array, Array], gradient: Array) -> tuple[Array, None]:
    table, tokens = saved
    mesh = mesh_lib.current()
    if mesh is None:
        total = jnp.zeros(table.shape, jnp.float32).at[tokens].add(gradient.astype(jnp.float32))
        return total.astype(table.dtype), None
    tokens, gradient = (mesh_lib.padded(x, mesh) for x in (tokens, gradient))
    add = jax.shard_map(_add_up, in_specs=(_TABLE, _ROWS, _ROWS), out_specs=_TABLE, check_vma=False)
    return add(table, tokens, gradient), None


def _add_up(table: Array, tokens: Array, gradient: Array) -> Array:
    """On each device: the gradient [n, Q, width] of its samples to that of its part of the table."""
    place, here = _places(tokens, table.shape[0])
    gradient = jax.lax.all_to_all(gradient, "fsdp", split_axis=2, concat_axis=0, tiled=True)
    place = jnp.where(here, place, table.shape[0])
    total = jnp.zeros(table.shape, jnp.float32).at[place].add(gradient.astype(jnp.float32), mode="drop")
    return mesh_lib.summed(total, "data").astype(table.dtype)


embed.defvjp(_embed_forward, _embed_backward)
