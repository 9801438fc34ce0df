"""Attention over two segments: a prompt kept once for its group, and each sample's own tokens.

The cache is head-major, [*, heads, length, width]: a decoding step then reads each head's keys as one
contiguous matrix, which on a CPU more than halves its time. Every key carries its position, so that one rule
says who sees whom, whether a cache is a plain one, a ring that holds a window, or the end of a prompt.
"""

from __future__ import annotations

import dataclasses

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np

from streamsynth.errors import UserError
from streamsynth.pytrees import Array

# Large and finite: a row with nothing to attend to (padding) gives a uniform mixture instead of NaN.
MASKED = -1e30
# Of a place that holds no token.
NOWHERE = -1


@flax.struct.dataclass
class Segment:
    """Keys and values of one layer, [*, Hkv, S, d] each, and positions [*, S] int32, -1 where there is none.

    Where layers are scanned, all three have a leading axis of periods.
    """

    keys: Array
    values: Array
    positions: Array


@dataclasses.dataclass(frozen=True)
class RopeScaling:
    """How rotary wavelengths are stretched for texts longer than the model was first trained on.

    kind: "linear" divides every frequency by `factor` (arXiv 2306.15595); "llama3" only those that turn less
      than `low_frequency_factor` times within `original_length`, with a smooth passage up to those that turn
      `high_frequency_factor` times, which stay (Llama 3.1's published code).
    """

    kind: str
    factor: float
    low_frequency_factor: float = 1.0
    high_frequency_factor: float = 4.0
    original_length: int = 8192

    def __post_init__(self):
        if self.kind not in ("linear", "llama3"):
            raise UserError(f"rope scaling {self.kind!r} is not known: use linear or llama3.")


def rope_frequencies(width: int, theta: float, scaling: RopeScaling | None = None) -> np.ndarray:
    """[d / 2] float32: radians a position of each rotated pair (RoFormer, arXiv 2104.09864, eq. 15).

    Args:
      width: d.
      theta: base of the wavelengths.
      scaling: None leaves them as they are.
    """
    half = width // 2
    frequency = float(theta) ** (-np.arange(half, dtype=np.float64) / half)
    if scaling is None:
        return frequency.astype(np.float32)
    if scaling.kind == "linear":
        return (frequency / scaling.factor).astype(np.float32)
    turns = scaling.original_length * frequency / (2.0 * np.pi)
    low, high = scaling.low_frequency_factor, scaling.high_frequency_factor
    kept = np.clip((turns - low) / (high - low), 0.0, 1.0)
    return (frequency * (kept + (1.0 - kept) / scaling.factor)).astype(np.float32)


def rotate(x: Array, positions: Array, frequency: Array) -> Array:
    """Rotary position embedding, halves layout (RoFormer, arXiv 2104.09864, eq. 34).

    Args:
      x: [N, H, Q, d].
      positions: [N, Q] int32.
      frequency: [d / 2] float32.
    """
    half = x.shape[-1] // 2
    angle = positions[:, None, :, None].astype(jnp.float32) * frequency
    cos, sin = jnp.cos(angle).astype(x.dtype), jnp.sin(angle).astype(x.dtype)
    first, second = x[..., :half], x[..., half:]
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)


def visible(query: Array, key: Array, window: int) -> Array:
    """[*, Q, S] bool: which keys at positions [*, S] each query at [*, Q] sees; window 0: all before."""
    query, key = query[..., :, None], key[..., None, :]
    seen = (key >= 0) & (key <= query)
    return seen & (key > query - window) if window else seen


def two_segment_attention(
    query: Array,
    positions: Array,
    own: Segment,
    shared: Segment | None,
    *,
    scale: float,
    window: int = 0,
    softcap: float | None = None,
) -> Array:
    """Grouped-query attention (arXiv 2305.13245) of N samples to their own and their prompt's keys.

    The prompt's keys are never repeated: the G queries of a group are laid side by side against them.

    Args:
      query: [N, H, Q, d].
      positions: [N, Q] int32, of the queries.
      own: keys and values [N, Hkv, S, d].
      shared: keys and values [B, Hkv, P, d] of the prompts, or None; sample n sees prompt n // G.
      scale: that scores are multiplied by.
      window: how many keys back a query sees, its own included; 0: all.
      softcap: c of c * tanh(score / c) (Gemma 2, arXiv 2408.00118, section 2), or None.

    Returns:
      [N, H, Q, d], in the dtype of `query`; the softmax is float32.
    """
    n, heads, q, d = query.shape
    kv_heads = own.keys.shape[1]
    grouped = (query * scale).reshape(n, kv_heads, heads // kv_heads, q, d)

    def capped(scores: Array) -> Array:
        scores = scores.astype(jnp.float32)
        return scores if softcap is None else softcap * jnp.tanh(scores / softcap)

    own_scores = capped(jnp.einsum("nhrqd,nhsd->nhrqs", grouped, own.keys))
    own_mask = visible(positions, own.positions, window)
    own_scores = jnp.where(own_mask[:, None, None], own_scores, MASKED)
    if shared is None:
        weights = jax.nn.softmax(own_scores, axis=-1).astype(query.dtype)
        return jnp.einsum("nhrqs,nhsd->nhrqd", weights, own.values).reshape(query.shape)

    b, _, p, _ = shared.keys.shape
    by_prompt = grouped.reshape(b, n // b, *grouped.shape[1:])
    shared_scores = capped(jnp.einsum("bghrqd,bhpd->bghrqp", by_prompt, shared.keys))
    shared_mask = visible(positions.reshape(b, n // b, q), shared.positions[:, None], window)
    shared_scores = jnp.where(shared_mask[:, :, None, None], shared_scores, MASKED)
    scores = jnp.concatenate([shared_scores.reshape(*own_scores.shape[:-1], p), own_scores], axis=-1)
    weights = jax.nn.softmax(scores, axis=-1).astype(query.dtype)
    shared_weights = weights[..., :p].reshape(shared_scores.shape)
    mixed = jnp.einsum("bghrqp,bhpd->bghrqd", shared_weights, shared.values).reshape(grouped.shape)
    mixed += jnp.einsum("nhrqs,nhsd->nhrqd", weights[..., p:], own.values)
    return mixed.reshape(query.shape)


def write(cache: Segment, new: Segment, index: Array) -> Segment:
    """The cache with one new key a sample, in place `index` of its ring (int32 scalar, counted on)."""
    place = index % cache.keys.shape[-2]
    return Segment(
        jax.lax.dynamic_update_slice_in_dim(cache.keys, new.keys, place, axis=2),
        jax.lax.dynamic_update_slice_in_dim(cache.values, new.values, place, axis=2),
        jax.lax.dynamic_update_slice_in_dim(cache.positions, new.positions, place, axis=1),
    )


def last_seen(segment: Segment, window: int) -> Segment:
    """Of texts [N, Hkv, S, d] padded on the right, the `window` - 1 keys that what follows can still see."""
    keep = max(window - 1, 1)
    if not window or segment.keys.shape[-2] <= keep:
        return segment
    length = segment.positions.max(axis=-1, keepdims=True) + 1
    place = jnp.maximum(length - keep, 0) + jnp.arange(keep)
    return Segment(
        jnp.take_along_axis(segment.keys, place[:, None, :, None], axis=2),
        jnp.take_along_axis(segment.values, place[:, None, :, None], axis=2),
        jnp.take_along_axis(segment.positions, place, axis=1),
    )
