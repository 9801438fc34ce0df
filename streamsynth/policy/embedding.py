"""Tokens to rows of the embedding table, with a gradient that low precision does not lose."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from streamsynth.pytrees import Array


@jax.custom_vjp
def embed(table: Array, tokens: Array) -> Array:
    """Rows of `table` [V, width] for tokens [N, Q]: [N, Q, width].

    The gradient is summed in float32 whatever the dtype of the table: a frequent token's is a sum over
    thousands of places, of which bfloat16 would lose most.
    """
    return jnp.take(table, tokens, axis=0)


def _embed_forward(table: Array, tokens: Array) -> tuple[Array, tuple[Array, Array]]:
    return embed(table, tokens), (table, tokens)


def _embed_backward(saved: tuple[Array, Array], gradient: Array) -> tuple[Array, None]:
    table, tokens = saved
    total = jnp.zeros(table.shape, jnp.float32).at[tokens].add(gradient.astype(jnp.float32))
    return total.astype(table.dtype), None


embed.defvjp(_embed_forward, _embed_backward)
