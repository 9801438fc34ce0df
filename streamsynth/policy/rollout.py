"""Sampling completions: each prompt is read once, its G samples grow beside each other."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp

from streamsynth.policy.sampling import inverse_cdf, uniforms
from streamsynth.policy.transformer import Transformer, empty_cache
from streamsynth.pytrees import Array, Prompts, Rollouts


def prefill(model: Transformer, params: Any, prompts: Prompts) -> tuple[Array, Array, Array, Any]:
    """Reads the prompts once.

    Returns:
      hidden: [B, P, width].
      last: [B, width], the state of each prompt's last real token.
      lengths: [B] int32.
      segments: the prompts' keys and values of every layer.
    """
    lengths = prompts.mask.sum(-1).astype(jnp.int32)
    positions = jnp.broadcast_to(jnp.arange(prompts.tokens.shape[1]), prompts.tokens.shape)
    hidden, segments = model.apply({"params": params}, prompts.tokens, positions)
    last = jnp.take_along_axis(hidden, lengths[:, None, None] - 1, axis=1)[:, 0]
    return hidden, last, lengths, segments


@functools.partial(jax.jit, static_argnames=("model", "samples", "length", "eos"))
def rollout(
    model: Transformer,
    params: Any,
    prompts: Prompts,
    keys: jax.Array,
    temperature: Array,
    *,
    samples: int,
    length: int,
    eos: int,
) -> Rollouts:
    """Samples G completions of every prompt.

    Args:
      model, params: the policy.
      prompts: B prompts.
      keys: [N] random keys, one a sample (`keys.sample_keys`).
      temperature: float32 scalar > 0.
      samples: G.
      length: T; a completion that has not ended by then is cut (`finished` is false).
      eos: the end-of-text token.
    """
    n = keys.shape[0]
    _, last, lengths, shared = prefill(model, params, prompts)
    offsets = jnp.repeat(lengths, samples)
    draws = uniforms(keys, length)

    def logits_of(hidden):
        return model.apply({"params": params}, hidden, method="logits") / temperature

    first_token, first_logprob = inverse_cdf(jnp.repeat(logits_of(last), samples, axis=0), draws[:, 0])
    tokens = jnp.full((n, length), eos, jnp.int32).at[:, 0].set(first_token)
    logprobs = jnp.zeros((n, length), jnp.float32).at[:, 0].set(first_logprob)
    cache = empty_cache(model.config, n, length, last.dtype)

    def running(carry):
        t, _, _, done, _ = carry
        return (t < length) & ~jnp.all(done)

    def step(carry):
        t, tokens, logprobs, done, cache = carry
        token = jax.lax.dynamic_slice_in_dim(tokens, t - 1, 1, axis=1)
        hidden, cache = model.apply(
            {"params": params}, token, (offsets + t - 1)[:, None], shared, prompts.mask, cache, t - 1
        )
        uniform = jax.lax.dynamic_index_in_dim(draws, t, axis=1, keepdims=False)
        drawn, logprob = inverse_cdf(logits_of(hidden[:, 0]), uniform)
        drawn, logprob = jnp.where(done, eos, drawn), jnp.where(done, 0.0, logprob)
        tokens = jax.lax.dynamic_update_slice_in_dim(tokens, drawn[:, None], t, axis=1)
        logprobs = jax.lax.dynamic_update_slice_in_dim(logprobs, logprob[:, None], t, axis=1)
        return t + 1, tokens, logprobs, done | (drawn == eos), cache

    carry = (jnp.int32(1), tokens, logprobs, first_token == eos, cache)
    _, tokens, logprobs, finished, _ = jax.lax.while_loop(running, step, carry)
    ended_before = jnp.cumsum(tokens == eos, axis=1) - (tokens == eos)
    return Rollouts(prompts, tokens, ended_before == 0, logprobs, finished)
