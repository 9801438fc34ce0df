"""Attention over two segments: a prompt kept once for its group, and each sample's own tokens.

The cache is head-major, [*, heads, length, width]: a decoding step then reads each head's keys as one
contiguous matrix, which on a CPU more than halves its time.
"""

from __future__ import annotations

import flax.struct
import jax
import jax.numpy as jnp

from streamsynth.pytrees import Array

# Large and finite: a row with nothing to attend to (padding) gives a uniform mixture instead of NaN.
MASKED = -1e30


@flax.struct.dataclass
class Segment:
    """Keys and values of one layer, [*, Hkv, S, d] each (a leading L where layers are scanned)."""

    keys: Array
    values: Array


def rotate(x: Array, positions: Array, theta: float) -> Array:
    """Rotary position embedding, halves layout (RoFormer, arXiv 2104.09864, eq. 34).

    Args:
      x: [N, H, Q, d].
      positions: [N, Q] int32.
      theta: base of the wavelengths.
    """
    half = x.shape[-1] // 2
    frequency = theta ** (-jnp.arange(half, dtype=jnp.float32) / half)
    angle = positions[:, None, :, None].astype(jnp.float32) * frequency
    cos, sin = jnp.cos(angle).astype(x.dtype), jnp.sin(angle).astype(x.dtype)
    first, second = x[..., :half], x[..., half:]
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)


def two_segment_attention(
    query: Array, own: Segment, own_mask: Array, shared: Segment | None, shared_mask: Array | None
) -> Array:
    """Grouped-query attention (arXiv 2305.13245) of N samples to their own and their prompt's keys.

    The prompt's keys are never repeated: the G queries of a group are laid side by side against them.

    Args:
      query: [N, H, Q, d].
      own: keys and values [N, Hkv, S, d].
      own_mask: [Q, S] bool, which own keys each query sees.
      shared: keys and values [B, Hkv, P, d] of the prompts, or None; sample n sees prompt n // G.
      shared_mask: [B, P] bool.

    Returns:
      [N, H, Q, d], in the dtype of `query`; the softmax is float32.
    """
    n, heads, q, d = query.shape
    kv_heads = own.keys.shape[1]
    grouped = (query * d**-0.5).reshape(n, kv_heads, heads // kv_heads, q, d)
    own_scores = jnp.einsum("nhrqd,nhsd->nhrqs", grouped, own.keys).astype(jnp.float32)
    own_scores = jnp.where(own_mask, own_scores, MASKED)
    if shared is None:
        weights = jax.nn.softmax(own_scores, axis=-1).astype(query.dtype)
        return jnp.einsum("nhrqs,nhsd->nhrqd", weights, own.values).reshape(query.shape)

    b, _, p, _ = shared.keys.shape
    by_prompt = grouped.reshape(b, n // b, *grouped.shape[1:])
    shared_scores = jnp.einsum("bghrqd,bhpd->bghrqp", by_prompt, shared.keys).astype(jnp.float32)
    shared_scores = jnp.where(shared_mask[:, None, None, None, None, :], shared_scores, MASKED)
    scores = jnp.concatenate([shared_scores.reshape(*own_scores.shape[:-1], p), own_scores], axis=-1)
    weights = jax.nn.softmax(scores, axis=-1).astype(query.dtype)
    shared_weights = weights[..., :p].reshape(shared_scores.shape)
    mixed = jnp.einsum("bghrqp,bhpd->bghrqd", shared_weights, shared.values).reshape(grouped.shape)
    mixed += jnp.einsum("nhrqs,nhsd->nhrqd", weights[..., p:], own.values)
    return mixed.reshape(query.shape)
