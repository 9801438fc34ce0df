"""Log-probabilities and entropies from hidden states, a chunk of positions at a time, with their gradient.

The gradient is written out, for three reasons: nothing but the arguments is kept for it, what the chunks
add to the gradient of the head is summed in float32 whatever the head's dtype, and on a mesh that sum crosses
devices once, not once a chunk.

On a mesh a device has the samples of its place along `data` and `fsdp` and the tokens of its place along
`tensor`; the head [V, width], which lies split along both of its axes, is gathered along its width for the
time of the call. What crosses devices is this head, a few numbers a position along `tensor`, and in the
backward pass the gradients of the hidden states along `tensor` and of the head.
"""

from __future__ import annotations

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from streamsynth.policy.transformer import TransformerConfig, project
from streamsynth.pytrees import Array
from streamsynth.runtime import mesh as mesh_lib

_HEAD = PartitionSpec("tensor", "fsdp")
_ROWS = PartitionSpec(mesh_lib.BATCH_AXES)
_WHOLE = PartitionSpec()


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def statistics(
    config: TransformerConfig, chunk: int, head: Array, hidden: Array, tokens: Array, temperature: Array
) -> tuple[Array, Array]:
    """Log-probabilities of tokens, and entropies where they stand: [N, T] float32 each.

    Args:
      config: of the network.
      chunk: positions whose logits exist at one time on a device.
      head: [V, width], in any dtype.
      hidden: [N, T, width], from which each token is foretold.
      tokens: [N, T] int32.
      temperature: [] float32; it gets no gradient.
    """
    mesh = mesh_lib.current()
    if mesh is None:
        return _forward(config, chunk, False, head, hidden, tokens, temperature)
    rows, (hidden, tokens) = hidden.shape[0], (mesh_lib.padded(x, mesh) for x in (hidden, tokens))
    run = jax.shard_map(
        functools.partial(_forward, config, chunk, True),
        in_specs=(_HEAD, _ROWS, _ROWS, _WHOLE),
        out_specs=(_ROWS, _ROWS),
        check_vma=False,
    )
    logprobs, entropy = run(head, hidden, tokens, temperature)
    return logprobs[:rows], entropy[:rows]


def _statistics_forward(config, chunk, head, hidden, tokens, temperature):
    found = statistics(config, chunk, head, hidden, tokens, temperature)
    return found, (head, hidden, tokens, temperature)


def _statistics_backward(config: TransformerConfig, chunk: int, saved: Any, gradient: Any) -> tuple:
    head, hidden, tokens, temperature = saved
    mesh = mesh_lib.current()
    if mesh is None:
        of_head, of_hidden = _backward(config, chunk, False, head, hidden, tokens, temperature, *gradient)
        return of_head, of_hidden, None, None
    rows = hidden.shape[0]
    hidden, tokens, *gradient = (mesh_lib.padded(x, mesh) for x in (hidden, tokens, *gradient))
    run = jax.shard_map(
        functools.partial(_backward, config, chunk, True),
        in_specs=(_HEAD, _ROWS, _ROWS, _WHOLE, _ROWS, _ROWS),
        out_specs=(_HEAD, _ROWS),
        check_vma=False,
    )
    of_head, of_hidden = run(head, hidden, tokens, temperature, *gradient)
    return of_head, of_hidden[:rows], None, None


statistics.defvjp(_statistics_forward, _statistics_backward)


def _forward(
    config: TransformerConfig,
    chunk: int,
    split: bool,
    head: Array,
    hidden: Array,
    tokens: Array,
    temperature: Array,
) -> tuple[Array, Array]:
    """On each device, where `split`: of its samples, with its part of the head."""
    head = _gathered(head.astype(hidden.dtype), split)

    def of_chunk(arguments: tuple[Array, Array]) -> tuple[Array, Array]:
        hidden, tokens = arguments
        logits = _logits(config, temperature, hidden, head)
        logprobs, _, entropy = _normalised(logits, split)
        place, here = _places(tokens, logits.shape[-1], split)
        own = jnp.take_along_axis(logprobs, place[:, None], axis=-1)[:, 0]
        return _summed(jnp.where(here, own, 0.0), split), entropy

    found = jax.lax.map(of_chunk, tuple(_chunked(chunk, x) for x in (hidden, tokens)))
    return tuple(x.reshape(-1)[: tokens.size].reshape(tokens.shape) for x in found)


def _backward(
    config: TransformerConfig,
    chunk: int,
    split: bool,
    head: Array,
    hidden: Array,
    tokens: Array,
    temperature: Array,
    of_logprob: Array,
    of_entropy: Array,
) -> tuple[Array, Array]:
    """The gradients of the head and the hidden states.

    With p the distribution over tokens v and H its entropy, in the logits
    d log p_y = 1[v = y] - p_v and d H = -p_v (log p_v + H).
    """
    whole = _gathered(head.astype(hidden.dtype), split)

    def of_chunk(total: Array, arguments: tuple[Array, ...]) -> tuple[Array, Array]:
        hidden, tokens, of_logprob, of_entropy = arguments
        logits, pullback = jax.vjp(functools.partial(_logits, config, temperature), hidden, whole)
        logprobs, p, entropy = _normalised(logits, split)
        place, here = _places(tokens, logits.shape[-1], split)
        gradient = -p * (of_logprob[:, None] + of_entropy[:, None] * (logprobs + entropy[:, None]))
        # As a scatter it would not be one with the rest.
        chosen = (jnp.arange(p.shape[-1]) == place[:, None]) & here[:, None]
        gradient += jnp.where(chosen, of_logprob[:, None], 0.0)
        of_hidden, of_head = pullback(gradient)
        return total + of_head.astype(jnp.float32), _summed(of_hidden, split)

    total, of_hidden = jax.lax.scan(
        of_chunk,
        jnp.zeros(whole.shape, jnp.float32),
        tuple(_chunked(chunk, x) for x in (hidden, tokens, of_logprob, of_entropy)),
    )
    if split:
        total = jax.lax.psum_scatter(total, "fsdp", scatter_dimension=1, tiled=True)
        total = mesh_lib.summed(total, "data")
        # Where microbatches are added up, XLA would move the sum out of their loop, for which each device had
        # to hold the whole width; of a head that is not tied libtpu 0.0.42 then fails to compile.
        total = jax.lax.optimization_barrier(total)
    of_hidden = of_hidden.reshape(-1, hidden.shape[-1])[: tokens.size].reshape(hidden.shape)
    return total.astype(head.dtype), of_hidden


def _logits(config: TransformerConfig, temperature: Array, hidden: Array, head: Array) -> Array:
    return project(config, hidden, head).astype(jnp.float32) / temperature


def chunk_size(positions: int, chunk: int) -> int:
    """Positions in each of as few chunks as there may be of at most `chunk`, all alike."""
    return math.ceil(positions / math.ceil(positions / chunk))


def _chunked(chunk: int, x: Array) -> Array:
    """[n, T, ...] as [chunks, size, ...], with zeros behind the last."""
    flat = x.reshape(x.shape[0] * x.shape[1], *x.shape[2:])
    size = chunk_size(len(flat), chunk)
    extra = -len(flat) % size
    flat = jnp.pad(flat, [(0, extra), *[(0, 0)] * (flat.ndim - 1)])
    return flat.reshape(-1, size, *flat.shape[1:])


def _normalised(logits: Array, split: bool) -> tuple[Array, Array, Array]:
    """log p and p, [size, V] each, and the entropy, [size], of logits whose V may be split over devices."""
    top = jnp.max(logits, axis=-1, keepdims=True)
    if split and jax.lax.axis_size("tensor") > 1:
        top = jax.lax.pmax(top, "tensor")
    shifted = logits - top
    logprobs = shifted - jnp.log(_summed(jnp.exp(shifted).sum(-1, keepdims=True), split))
    p = jnp.exp(logprobs)
    return logprobs, p, -_summed((p * logprobs).sum(-1), split)


def _places(tokens: Array, size: int, split: bool) -> tuple[Array, Array]:
    """Where tokens stand among the `size` ones of this device, and which of them do."""
    if not split:
        return tokens, jnp.ones(tokens.shape, bool)
    place = tokens - jax.lax.axis_index("tensor") * size
    here = (place >= 0) & (place < size)
    return jnp.where(here, place, 0), here


def _gathered(head: Array, split: bool) -> Array:
    return jax.lax.all_gather(head, "fsdp", axis=1, tiled=True) if split else head


def _summed(x: Array, split: bool) -> Array:
    return mesh_lib.summed(x, "tensor") if split else x
