"""Sampling completions: each prompt is read once, its G samples grow beside each other."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp

from streamsynth.policy.attention import NOWHERE
from streamsynth.policy.placement import gather_variables
from streamsynth.policy.sampling import inverse_cdf, uniforms
from streamsynth.policy.transformer import Transformer, empty_cache
from streamsynth.pytrees import Array, Prompts, Rollouts
from streamsynth.runtime.mesh import constrain


def prefill(model: Transformer, variables: Any, prompts: Prompts) -> tuple[Array, Array, Array, Any]:
    """Reads the prompts once.

    Returns:
      hidden: [B, P, width].
      last: [B, width], the state of each prompt's last real token.
      lengths: [B] int32.
      segments: the prompts' keys and values of every layer.
    """
    lengths = prompts.mask.sum(-1).astype(jnp.int32)
    positions = jnp.where(prompts.mask, jnp.arange(prompts.tokens.shape[1]), NOWHERE)
    hidden, segments = model.apply(variables, prompts.tokens, positions)
    last = jnp.take_along_axis(hidden, lengths[:, None, None] - 1, axis=1)[:, 0]
    return hidden, last, lengths, segments


@functools.partial(jax.jit, static_argnames=("model", "samples", "length", "stops"))
def rollout(
    model: Transformer,
    variables: Any,
    prompts: Prompts,
    keys: jax.Array,
    temperature: Array,
    *,
    samples: int,
    length: int,
    stops: tuple[int, ...],
) -> Rollouts:
    """Samples G completions of every prompt.

    Args:
      model, variables: the policy: {"params": tree}, and "lora" beside it for one with an adapter.
      prompts: B prompts.
      keys: [N] random keys, one a sample (`keys.sample_keys`).
      temperature: float32 scalar > 0.
      samples: G.
      length: T; a completion that has not ended by then is cut (`finished` is false).
      stops: the tokens that end a completion; its padding is the first of them.
    """
    n, prompts = keys.shape[0], constrain(prompts, "prompts")

    def gathered(variables):
        return gather_variables(model.config, variables) if model.config.gather_to_sample else variables

    if model.config.gather_to_sample:
        # Here and in the loop, or XLA would find another placement for it and gather at every token.
        variables = jax.lax.optimization_barrier(gathered(variables))
    _, last, lengths, shared = prefill(model, variables, prompts)
    offsets = jnp.repeat(lengths, samples)
    draws = uniforms(keys, length)

    def logits_of(variables, hidden):
        logits = model.apply(variables, hidden, method="logits").astype(jnp.float32) / temperature
        return constrain(logits, "logits")

    def ends(tokens):
        return jnp.isin(tokens, jnp.array(stops, jnp.int32))

    first_token, first_logprob = inverse_cdf(
        jnp.repeat(logits_of(variables, last), samples, axis=0), draws[:, 0]
    )
    tokens = jnp.full((n, length), stops[0], jnp.int32).at[:, 0].set(first_token)
    logprobs = jnp.zeros((n, length), jnp.float32).at[:, 0].set(first_logprob)
    cache = empty_cache(model.config, n, length)

    def running(carry):
        t, _, _, done, _ = carry
        return (t < length) & ~jnp.all(done)

    def step(carry):
        t, tokens, logprobs, done, cache = carry
        own = gathered(variables)
        token = jax.lax.dynamic_slice_in_dim(tokens, t - 1, 1, axis=1)
        hidden, cache = model.apply(own, token, (offsets + t - 1)[:, None], shared, cache, t - 1)
        uniform = jax.lax.dynamic_index_in_dim(draws, t, axis=1, keepdims=False)
        drawn, logprob = inverse_cdf(logits_of(own, hidden[:, 0]), uniform)
        drawn, logprob = jnp.where(done, stops[0], drawn), jnp.where(done, 0.0, logprob)
        tokens = jax.lax.dynamic_update_slice_in_dim(tokens, drawn[:, None], t, axis=1)
        logprobs = jax.lax.dynamic_update_slice_in_dim(logprobs, logprob[:, None], t, axis=1)
        return t + 1, tokens, logprobs, done | ends(drawn), cache

    carry = (jnp.int32(1), tokens, logprobs, ends(first_token), cache)
    _, tokens, logprobs, finished, _ = jax.lax.while_loop(running, step, carry)
    ended = ends(tokens)
    ended_before = jnp.cumsum(ended, axis=1) - ended
    return constrain(Rollouts(prompts, tokens, ended_before == 0, logprobs, finished), "rollouts")
