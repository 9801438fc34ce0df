"""Log-probabilities of given completions, with gradient, prompts read once."""

from __future__ import annotations

import functools
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp

from streamsynth.policy.chunks import statistics as _statistics
from streamsynth.policy.microbatches import mapped
from streamsynth.policy.rollout import prefill
from streamsynth.policy.transformer import Transformer, head_of
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

    Logits exist for `chunk` positions at a time on a device, in float32, forward and backward: never
    [N, T, V]. On a mesh every device goes through the positions of its own samples, with its own part of
    the vocabulary; hidden states and logits stay where they are.
    """
    config = model.config
    logprobs, entropy = _statistics(
        config, chunk, head_of(config, variables), hidden, tokens, jnp.asarray(temperature, jnp.float32)
    )
    return TokenStatistics(jnp.where(mask, logprobs, 0.0), jnp.where(mask, entropy, 0.0))


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
      chunk: positions whose logits exist at one time on a device.
    """
    hidden = read_group(model, variables, prompts, tokens)
    return token_statistics(model, variables, hidden.before, tokens, mask, temperature, chunk)


@functools.partial(jax.jit, static_argnames="model")
def mean_hidden(model: Transformer, variables: Any, prompts: Prompts, tokens: Array, mask: Array) -> Array:
    """Hidden states that have read the completions' tokens, averaged over each: [N, width] float32."""
    after = read_group(model, variables, prompts, tokens).after.astype(jnp.float32)
    real = mask[..., None].astype(jnp.float32)
    return (after * real).sum(1) / jnp.maximum(real.sum(1), 1.0)


@functools.partial(jax.jit, static_argnames=("model", "chunk", "microbatches"))
def sequence_logprobs(
    model: Transformer,
    variables: Any,
    prompts: Prompts,
    tokens: Array,
    mask: Array,
    temperature: Array,
    *,
    chunk: int = 1024,
    microbatches: int = 1,
) -> Array:
    """`group_logprobs(...).logprobs`, compiled: [N, T] float32, for the reference policy.

    The prompts, B of them, are read with their samples in as many parts as there are microbatches.
    """

    def of_part(part: tuple[Prompts, Array, Array]) -> Array:
        return group_logprobs(model, variables, *part, temperature, chunk).logprobs

    return mapped(of_part, (prompts, tokens, mask), prompts.tokens.shape[0], microbatches)
