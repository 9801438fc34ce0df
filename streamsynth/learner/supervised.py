"""Maximum likelihood: how a small policy is pretrained, and how a policy is tuned to examples."""

from __future__ import annotations

import functools
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import optax

from streamsynth.learner.optimizer import step
from streamsynth.policy.logprobs import read_group, token_statistics
from streamsynth.policy.microbatches import gradients
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
    return _terms(model, variables, _weighed(batch), temperature, prompt_weight, chunk)


def _weighed(batch: SupervisedBatch) -> tuple[SupervisedBatch, Array, Array]:
    """A batch with what each token counts in the means over targets [N, T] and prompts [B, P - 1]."""
    own, prompts = batch.mask, batch.prompts.mask[:, 1:]
    return batch, *(mask / jnp.maximum(mask.sum(), 1) for mask in (own, prompts))


def _terms(
    model: Transformer,
    variables: Any,
    weighed: tuple[SupervisedBatch, Array, Array],
    temperature: Array | float,
    prompt_weight: float,
    chunk: int,
) -> tuple[Array, dict[str, Array]]:
    batch, own, of_prompts = weighed
    hidden = read_group(model, variables, batch.prompts, batch.tokens)

    def nll(states, tokens, mask, weight):
        logprobs = token_statistics(model, variables, states, tokens, mask, temperature, chunk).logprobs
        return -(logprobs * weight).sum()

    completion = nll(hidden.before, batch.tokens, batch.mask, own)
    if not prompt_weight:  # their logits are most of the work
        return completion, {"nll/completion": completion}
    prompts = batch.prompts
    prompt = nll(hidden.prompt[:, :-1], prompts.tokens[:, 1:], prompts.mask[:, 1:], of_prompts)
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
    static_argnames=("model", "optimizer", "prompt_weight", "chunk", "microbatches"),
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
    microbatches: int = 1,
) -> tuple[Any, Any, dict[str, Array]]:
    """One update by maximum likelihood; `params` and `opt_state` are donated, `frozen` stays."""
    grads, metrics = gradients(
        lambda p, part: _terms(model, {**frozen, **p}, part, temperature, prompt_weight, chunk),
        model.config,
        params,
        _weighed(batch),
        batch.prompts.tokens.shape[0],
        microbatches,
    )
    return *step(model, optimizer, grads, params, opt_state), metrics
