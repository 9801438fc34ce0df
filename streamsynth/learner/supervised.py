"""Maximum likelihood: how a small policy is pretrained, and how a policy is tuned to examples."""

from __future__ import annotations

import functools
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import optax

from streamsynth.policy.logprobs import read_group, token_statistics
from streamsynth.policy.transformer import Transformer
from streamsynth.pytrees import Array, Prompts


@flax.struct.dataclass
class SupervisedBatch:
    """B prompts with G target texts each: tokens and mask [N, T]."""

    prompts: Prompts
    tokens: Array
    mask: Array


def supervised_loss(
    model: Transformer,
    variables: Any,
    batch: SupervisedBatch,
    temperature: Array | float,
    prompt_weight: float,
    chunk: int,
) -> tuple[Array, dict[str, Array]]:
    """Mean negative log-likelihood of the targets' tokens, plus `prompt_weight` times the prompts'.

    A prompt that lists examples is itself a few-shot exercise: each example is to be foretold from
    those before it. Learning from it costs nothing, its hidden states are computed anyway.

    The likelihood is that of the policy as it samples at `temperature`: one that fits a set at temperature 1
    and then samples at a lower one writes less diverse texts than the set's.
    """
    hidden = read_group(model, variables, batch.prompts, batch.tokens)

    def nll(states, tokens, mask):
        logprobs = token_statistics(model, variables, states, tokens, mask, temperature, chunk).logprobs
        return -logprobs.sum() / jnp.maximum(mask.sum(), 1)

    completion = nll(hidden.before, batch.tokens, batch.mask)
    if not prompt_weight:  # their logits are most of the work
        return completion, {"nll/completion": completion}
    prompt = nll(hidden.prompt[:, :-1], batch.prompts.tokens[:, 1:], batch.prompts.mask[:, 1:])
    return completion + prompt_weight * prompt, {"nll/completion": completion, "nll/prompt": prompt}


@functools.partial(jax.jit, static_argnames=("model", "chunk"))
def held_out_nll(
    model: Transformer,
    variables: Any,
    batch: SupervisedBatch,
    temperature: Array | float,
    *,
    chunk: int = 1024,
) -> Array:
    """Mean negative log-likelihood of the targets' tokens, [] float32, of texts that are not tuned to."""
    return supervised_loss(model, variables, batch, temperature, 0.0, chunk)[0]


@functools.partial(
    jax.jit,
    static_argnames=("model", "optimizer", "prompt_weight", "chunk"),
    donate_argnames=("params", "opt_state"),
)
def supervised_step(
    model: Transformer,
    optimizer: optax.GradientTransformation,
    params: Any,
    frozen: Any,
    opt_state: Any,
    batch: SupervisedBatch,
    temperature: Array | float = 1.0,
    *,
    prompt_weight: float = 0.0,
    chunk: int = 1024,
) -> tuple[Any, Any, dict[str, Array]]:
    """One update by maximum likelihood; `params` and `opt_state` are donated, `frozen` stays."""
    grads, metrics = jax.grad(
        lambda p: supervised_loss(model, {**frozen, **p}, batch, temperature, prompt_weight, chunk),
        has_aux=True,
    )(params)
    updates, opt_state = optimizer.update(grads, opt_state, params)
    return optax.apply_updates(params, updates), opt_state, metrics
