"""Log-probabilities of given completions, with gradient, prompts read once."""

from __future__ import annotations

import functools
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp

from streamsynth.policy.rollout import prefill
from streamsynth.policy.transformer import Transformer
from streamsynth.pytrees import Array, Prompts


@flax.struct.dataclass
class TokenStatistics:
    """Per token, [N, T] float32 each, 0 outside the mask: its log-probability, the entropy there."""

    logprobs: Array
    entropy: Array


@flax.struct.dataclass
class GroupHidden:
    """Hidden states of one pass over prompts and their completions.

    prompt: [B, P, width], states that have read each prompt token.
    before: [N, T, width], the state from which completion token t is predicted.
    after: [N, T, width], the state that has read completion token t.
    """

    prompt: Array
    before: Array
    after: Array


def read_group(model: Transformer, variables: Any, prompts: Prompts, tokens: Array) -> GroupHidden:
    """Runs B prompts once and their N completions [N, T] over them (sample n has prompt n // G)."""
    n, t = tokens.shape
    prompt, last, lengths, shared = prefill(model, variables, prompts)
    group = n // last.shape[0]
    positions = jnp.repeat(lengths, group)[:, None] + jnp.arange(t)
    after, _ = model.apply(variables, tokens, positions, shared)
    before = jnp.concatenate([jnp.repeat(last, group, axis=0)[:, None], after[:, :-1]], axis=1)
    return GroupHidden(prompt, before, after)


def token_statistics(
    model: Transformer,
    variables: Any,
    hidden: Array,
    tokens: Array,
    mask: Array,
    temperature: Array,
    chunk: int,
) -> TokenStatistics:
    """Log-probabilities of `tokens` [N, T] predicted from `hidden` [N, T, width].

    Logits exist for `chunk` positions at a time, in float32, forward and backward: never [N, T, V].
    """
    n, t = tokens.shape
    size = min(chunk, n * t)
    chunks = -(-n * t // size)
    pad = chunks * size - n * t
    flat_hidden = jnp.pad(hidden.reshape(n * t, -1), ((0, pad), (0, 0))).reshape(chunks, size, -1)
    flat_tokens = jnp.pad(tokens.reshape(-1), (0, pad)).reshape(chunks, size)

    @jax.checkpoint
    def one_chunk(arguments):
        hidden, tokens = arguments
        logits = model.apply(variables, hidden, method="logits").astype(jnp.float32) / temperature
        logprobs = jax.nn.log_softmax(logits, axis=-1)
        entropy = -jnp.sum(jnp.exp(logprobs) * logprobs, axis=-1)
        return jnp.take_along_axis(logprobs, tokens[:, None], axis=-1)[:, 0], entropy

    logprobs, entropy = jax.lax.map(one_chunk, (flat_hidden, flat_tokens))
    logprobs = jnp.where(mask, logprobs.reshape(-1)[: n * t].reshape(n, t), 0.0)
    entropy = jnp.where(mask, entropy.reshape(-1)[: n * t].reshape(n, t), 0.0)
    return TokenStatistics(logprobs, entropy)


def group_logprobs(
    model: Transformer,
    variables: Any,
    prompts: Prompts,
    tokens: Array,
    mask: Array,
    temperature: Array | float = 1.0,
    chunk: int = 1024,
) -> TokenStatistics:
    """Log-probabilities of the N completions given their B prompts (G = N / B a prompt).

    Args:
      prompts: B prompts, each run once, with gradient.
      tokens, mask: [N, T].
      temperature: the sampler's.
      chunk: positions whose logits exist at one time.
    """
    hidden = read_group(model, variables, prompts, tokens)
    return token_statistics(model, variables, hidden.before, tokens, mask, temperature, chunk)


@functools.partial(jax.jit, static_argnames="model")
def mean_hidden(model: Transformer, variables: Any, prompts: Prompts, tokens: Array, mask: Array) -> Array:
    """Hidden states that have read the completions' tokens, averaged over each: [N, width] float32."""
    after = read_group(model, variables, prompts, tokens).after.astype(jnp.float32)
    real = mask[..., None].astype(jnp.float32)
    return (after * real).sum(1) / jnp.maximum(real.sum(1), 1.0)


@functools.partial(jax.jit, static_argnames=("model", "chunk"))
def sequence_logprobs(
    model: Transformer,
    variables: Any,
    prompts: Prompts,
    tokens: Array,
    mask: Array,
    temperature: Array,
    *,
    chunk: int = 1024,
) -> Array:
    """`group_logprobs(...).logprobs`, compiled: [N, T] float32, for the reference policy."""
    return group_logprobs(model, variables, prompts, tokens, mask, temperature, chunk).logprobs
