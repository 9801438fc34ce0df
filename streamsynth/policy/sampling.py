"""Drawing tokens from logits."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp

from streamsynth.pytrees import Array


def inverse_cdf(logits: Array, uniform: Array) -> tuple[Array, Array]:
    """Draws from softmax(logits) by inverting its distribution function in two levels.

    One uniform number a row chooses a block of about sqrt(V) tokens by the blocks' masses, then a
    token within it: two short cumulative sums instead of V exponential draws (Gumbel), which on a CPU
    would cost more than the rest of a small policy's decoding step.

    Args:
      logits: [N, V] float32, temperature already applied.
      uniform: [N] float32 in [0, 1).

    Returns:
      tokens [N] int32 and their log-probabilities [N] float32. A token of probability 0 is never drawn.
    """
    n, v = logits.shape
    block = math.isqrt(v - 1) + 1
    blocks = -(-v // block)
    top = jnp.max(logits, axis=-1, keepdims=True)
    mass = jnp.exp(logits - top)
    padded = jnp.pad(mass, ((0, 0), (0, blocks * block - v))).reshape(n, blocks, block)
    by_block = padded.sum(-1)
    total = by_block.sum(-1)
    chosen, rest = _invert(by_block, uniform * total)
    within, _ = _invert(jnp.take_along_axis(padded, chosen[:, None, None], axis=1)[:, 0], rest)
    tokens = chosen * block + within
    logit = jnp.take_along_axis(logits, tokens[:, None], axis=-1)[:, 0]
    return tokens, logit - top[:, 0] - jnp.log(total)


def _invert(mass: Array, target: Array) -> tuple[Array, Array]:
    """The entry of `mass` [N, M] in which the running sum passes `target` [N], and how far into it."""
    cumulative = jnp.cumsum(mass, axis=-1)
    index = jnp.sum(cumulative <= target[:, None], axis=-1)
    # Rounding may carry the target past the last entry that has mass.
    last = mass.shape[-1] - 1 - jnp.argmax(mass[:, ::-1] > 0, axis=-1)
    index = jnp.minimum(index, last).astype(jnp.int32)
    before = jnp.take_along_axis(cumulative - mass, index[:, None], axis=-1)[:, 0]
    return index, jnp.maximum(target - before, 0.0)


def uniforms(keys: jax.Array, length: int) -> Array:
    """[N, T] float32: the uniform numbers of each sample, from its own key."""
    return jax.vmap(lambda key: jax.random.uniform(key, (length,)))(keys)
