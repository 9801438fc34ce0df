"""What an update minimises: a clipped policy gradient on fresh rollouts, a weighted one on replayed ones."""

from __future__ import annotations

import dataclasses
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import optax

from streamsynth.learner.choices import OBJECTIVES, Choices, resolve
from streamsynth.policy.logprobs import group_logprobs
from streamsynth.policy.transformer import Transformer
from streamsynth.pytrees import Array, Prompts
from streamsynth.stream.replay import drift_mask, effective_sample_size, sequence_log_ratio, sequence_weight


@dataclasses.dataclass(frozen=True)
class ObjectiveConfig:
    """Constants of the objective.

    choices: what makes the objective, its token-level trust region among them.
    kl_weight: of KL(policy || reference).   entropy_weight: of the mean token entropy.
    replay_weight: of the replayed samples.  replay_cap: C, where sequence weights are truncated.
    drift_limit: nats beyond which a replayed sample with a negative advantage is dropped.
    cloning_weight: of behaviour cloning on replayed samples of quality 1 or nearly so.
    chunk: positions whose logits exist at one time.
    """

    choices: Choices = OBJECTIVES["streamsynth"]
    kl_weight: float = 0.05
    entropy_weight: float = 0.0
    replay_weight: float = 1.0
    replay_cap: float = 2.0
    drift_limit: float = 2.0
    cloning_weight: float = 0.0
    chunk: int = 1024


def objective_config(group: Any) -> ObjectiveConfig:
    """From the config group `objective`. Raises UserError for an unknown name."""
    fields = {field.name for field in dataclasses.fields(ObjectiveConfig)} - {"choices"}
    return ObjectiveConfig(choices=resolve(group), **{name: group[name] for name in fields})


@flax.struct.dataclass
class Fresh:
    """A rollout to learn from: N = B * G samples of B prompts.

    tokens, mask: [N, T].   behaviour, reference: [N, T] float32 log-probabilities of the tokens when
    they were sampled, and under the reference policy.   advantage: [N] float32.
    """

    prompts: Prompts
    tokens: Array
    mask: Array
    behaviour: Array
    reference: Array
    advantage: Array


@flax.struct.dataclass
class Replayed:
    """M samples of past tasks, each with a prompt of its own.

    tokens, mask: [M, T].   behaviour: [M, T] float32.   advantage: [M] float32.
    elite: [M] bool, good enough to be imitated.   valid: [M] bool, false for filler rows.
    """

    prompts: Prompts
    tokens: Array
    mask: Array
    behaviour: Array
    advantage: Array
    elite: Array
    valid: Array


def fresh_loss(
    model: Transformer, variables: Any, batch: Fresh, temperature: Array, c: ObjectiveConfig
) -> tuple[Array, dict[str, Array]]:
    """The clipped surrogate (PPO, arXiv 1707.06347, eq. 7, per token) plus KL to the reference.

    Our normaliser is the constant N * T, so that a long text counts for each of its tokens what a short
    one does (Dr. GRPO, arXiv 2503.20783); others are in `learner.choices`. The KL that is logged is k3,
    unbiased and positive; what is differentiated is k2, whose gradient on-policy is that of KL(policy ||
    reference), while k3's is not (Schulman, "Approximating KL divergence", 2020).
    """
    statistics = group_logprobs(
        model, variables, batch.prompts, batch.tokens, batch.mask, temperature, c.chunk
    )
    mask = batch.mask.astype(jnp.float32)
    count = jnp.maximum(mask.sum(), 1.0)
    normaliser, low, high = c.choices.normaliser, c.choices.clip_low, c.choices.clip_high
    ratio = jnp.exp(jnp.where(batch.mask, statistics.logprobs - batch.behaviour, 0.0))
    advantage = batch.advantage[:, None]
    clipped = jnp.clip(ratio, 1.0 - low, 1.0 + high)
    surrogate = jnp.minimum(ratio * advantage, clipped * advantage)
    policy = -token_mean(surrogate, mask, normaliser)
    gap = jnp.where(batch.mask, statistics.logprobs - batch.reference, 0.0)
    k2 = 0.5 * token_mean(gap**2, mask, normaliser)
    entropy = token_mean(statistics.entropy, mask, normaliser)
    # Before an update learner and sampler are one policy: what differs is their arithmetic.
    sampler = jnp.where(batch.mask, jnp.abs(statistics.logprobs - batch.behaviour), 0.0)
    loss = policy + c.kl_weight * k2 - c.entropy_weight * entropy
    return loss, {
        "loss/policy": policy,
        "loss/kl": c.kl_weight * k2,
        "kl": ((jnp.exp(-gap) - 1.0 + gap) * mask).sum() / count,
        "entropy": statistics.entropy.sum() / count,
        "logprob/gap": sampler.sum() / count,
        "clip_share": ((surrogate < ratio * advantage) * mask).sum() / count,
    }


def token_mean(values: Array, mask: Array, normaliser: str) -> Array:
    """The sum of [N, T] values where `mask`, in {0, 1}, is 1, over a normaliser that `Choices` names."""
    if normaliser == "sequence":
        length = mask.sum(-1)
        own = (values * mask).sum(-1) / jnp.maximum(length, 1.0)
        return own.sum() / jnp.maximum((length > 0).sum(), 1)
    norm = {"constant": mask.size, "tokens": jnp.maximum(mask.sum(), 1.0)}[normaliser]
    return (values * mask).sum() / norm


def replayed_loss(
    model: Transformer, variables: Any, batch: Replayed, temperature: Array, c: ObjectiveConfig
) -> tuple[Array, dict[str, Array]]:
    """sg(min(C, pi / mu)) * A * log pi over whole sequences, and behaviour cloning where it has a weight."""
    statistics = group_logprobs(
        model, variables, batch.prompts, batch.tokens, batch.mask, temperature, c.chunk
    )
    mask = batch.mask & batch.valid[:, None]
    weight = sequence_weight(statistics.logprobs, batch.behaviour, mask, c.replay_cap)
    log_ratio = sequence_log_ratio(statistics.logprobs, batch.behaviour, mask)
    kept = batch.valid & drift_mask(log_ratio, batch.advantage, c.drift_limit)
    sequence = (statistics.logprobs * mask).sum(-1)
    policy = -(jnp.where(kept, weight * batch.advantage, 0.0) * sequence).sum() / mask.size
    cloning = -(jnp.where(batch.valid & batch.elite, sequence, 0.0)).sum() / mask.size
    loss = c.replay_weight * policy + c.cloning_weight * cloning
    return loss, {
        "replay/loss": c.replay_weight * policy,
        "replay/cloning": c.cloning_weight * cloning,
        "replay/effective_samples": effective_sample_size(weight, kept),
        "replay/samples": batch.valid.sum(),
        "replay/dropped": (batch.valid & ~kept).sum(),
    }


def gradients(
    model: Transformer,
    params: Any,
    frozen: Any,
    fresh: Fresh,
    replayed: Replayed | None,
    temperature: Array,
    c: ObjectiveConfig,
) -> tuple[Any, dict[str, Array]]:
    """The gradient of the whole objective in `params`, and what is to be logged of it.

    `params` are the collections of the network's variables that are trained, `frozen` the others (see
    `learner.state`).
    Fresh and replayed parts are differentiated apart, which costs nothing and gives replay's share of
    the gradient norm.
    """
    grads, metrics = jax.grad(
        lambda p: fresh_loss(model, {**frozen, **p}, fresh, temperature, c), has_aux=True
    )(params)
    fresh_norm = optax.tree.norm(grads)
    metrics["gradient/fresh"] = fresh_norm
    if replayed is None:
        return grads, metrics
    more, extra = jax.grad(
        lambda p: replayed_loss(model, {**frozen, **p}, replayed, temperature, c), has_aux=True
    )(params)
    replay_norm = optax.tree.norm(more)
    share = replay_norm / jnp.maximum(fresh_norm + replay_norm, 1e-12)
    return jax.tree.map(jnp.add, grads, more), {**metrics, **extra, "replay/gradient_share": share}
