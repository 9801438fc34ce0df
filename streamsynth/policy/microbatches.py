"""A batch in parts, one after another, whose gradients add up to the whole batch's."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from streamsynth.policy.placement import constrain_variables
from streamsynth.policy.transformer import TransformerConfig
from streamsynth.pytrees import Array
from streamsynth.runtime.mesh import constrain, current, shards


def split(batch: Any, rows: int, count: int) -> Any:
    """A batch of B prompts in microbatches: each array [B, ...] or [N, ...] as [count, a share of it, ...].

    A prompt stays with its G samples. Microbatch i has the prompts i, i + count, i + 2 * count and so on:
    each device then finds its share of every microbatch among the rows that it has.

    Args:
      batch: a tree of arrays whose first axis is B long, or a multiple of it.
      rows: B, a multiple of `count`.
      count: how many microbatches.
    """

    def cut(leaf: Array) -> Array:
        group, rest = leaf.shape[0] // rows, leaf.shape[1:]
        parts = leaf.reshape(rows // count, count, group, *rest).swapaxes(0, 1)
        return parts.reshape(count, rows // count * group, *rest)

    return constrain(jax.tree.map(cut, batch), "microbatches")


def filled(batch: Any, count: int) -> Any:
    """A batch of rows with prompts of their own, filled up with zeros until it can be split.

    On a mesh each microbatch then fills it.
    """
    mesh = current()
    extra = -jax.tree.leaves(batch)[0].shape[0] % (count * (shards(mesh) if mesh else 1))
    return jax.tree.map(lambda leaf: jnp.pad(leaf, [(0, extra), *[(0, 0)] * (leaf.ndim - 1)]), batch)


def join(parts: Any, rows: int) -> Any:
    """Inverse of `split`."""

    def put(leaf: Array) -> Array:
        count, size, *rest = leaf.shape
        group = size * count // rows
        whole = leaf.reshape(count, rows // count, group, *rest).swapaxes(0, 1)
        return whole.reshape(size * count, *rest)

    return constrain(jax.tree.map(put, parts), "rollouts")


def mapped(function: Callable[[Any], Any], batch: Any, rows: int, count: int) -> Any:
    """`function` of a batch of B = `rows` prompts, a microbatch at a time; it gives arrays [B or N, ...]."""
    if count == 1:
        return function(constrain(batch, "rollouts"))
    return join(jax.lax.map(function, split(batch, rows, count)), rows)


def gradients(
    terms: Callable[[Any, Any], tuple[Array, dict[str, Array]]],
    config: TransformerConfig,
    params: Any,
    batch: Any,
    rows: int,
    count: int,
) -> tuple[Any, dict[str, Array]]:
    """The gradient of a loss that is a sum over samples, in `params`, and the figures that are such sums too.

    Args:
      terms: (params, batch) to the loss and figures by name; of a part of the batch it gives that part's
        share of both.
      config: of the network; gradients lie as its variables do.
      params: collections of its variables.
      batch, rows, count: as in `split`.

    Returns:
      The gradient, of several microbatches summed in float32, and the figures.
    """
    own = jax.grad(terms, has_aux=True)
    if count == 1:
        grads, figures = own(params, constrain(batch, "rollouts"))
        return constrain_variables(config, grads), figures

    def add(total: Any, part: Any) -> tuple[Any, dict[str, Array]]:
        grads, figures = own(params, part)
        grads = constrain_variables(config, grads)
        return jax.tree.map(lambda a, b: a + b.astype(jnp.float32), total, grads), figures

    nothing = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, jnp.float32), params)
    total, figures = jax.lax.scan(add, constrain_variables(config, nothing), split(batch, rows, count))
    return total, jax.tree.map(lambda part: part.sum(0), figures)
