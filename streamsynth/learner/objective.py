"""What an update minimises: a clipped policy gradient on fresh rollouts, a weighted one on replayed ones."""

from __future__ import annotations

import dataclasses
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import optax

from streamsynth.learner.choices import OBJECTIVES, Choices, resolve
from streamsynth.policy import microbatches
from streamsynth.policy.logprobs import group_logprobs
from streamsynth.policy.transformer import Transformer
from streamsynth.pytrees import Array, Prompts
from streamsynth.stream.replay import drift_mask, effective_size, sequence_log_ratio, sequence_weight


@dataclasses.dataclass(frozen=True)
class ObjectiveConfig:
    """Constants of the objective.

    choices: what makes the objective, its token-level trust region among them.
    kl_weight: of KL(policy || reference).   entropy_weight: of the mean token entropy.
    replay_weight: of the replayed samples.  replay_cap: C, where sequence weights are truncated.
    drift_limit: nats beyond which a replayed sample with a negative advantage is dropped.
    cloning_weight: of behaviour cloning on replayed samples of quality 1 or nearly so.
    chunk: positions whose logits exist at one time on a device.
    microbatches: parts in which a batch is differentiated, one after another.
    lagged: whether an older policy wrote the fresh batch; what its weights are is then logged.
    """

    choices: Choices = OBJECTIVES["streamsynth"]
    kl_weight: float = 0.05
    entropy_weight: float = 0.0
    replay_weight: float = 1.0
    replay_cap: float = 2.0
    drift_limit: float = 2.0
    cloning_weight: float = 0.0
    chunk: int = 1024
    microbatches: int = 1
    lagged: bool = False


def objective_config(group: Any, microbatches: int = 1, lagged: bool = False) -> ObjectiveConfig:
    """From the config group `objective`. Raises UserError for an unknown name."""
    given = {"choices": resolve(group), "microbatches": microbatches, "lagged": lagged}
    names = {field.name for field in dataclasses.fields(ObjectiveConfig)} - given.keys()
    return ObjectiveConfig(**given, **{name: group[name] for name in names})


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

    The ratio is the policy's to the one that wrote the batch, pi / mu as `batch.behaviour` has it. Where that
    is the policy itself it is 1 at the update; where it is older (`rollout.lag`), it weighs each token by how
    likely it has become since, given what stands before it: the gradient is sum_t r_t * A * grad log pi_t.
    Over what stands before it the mean stays mu's, as in all of PPO: whole sequences would be weighed by the
    product of their ratios, whose variance grows with T.
    """
    loss, sums = _fresh_terms(model, variables, _weighed(batch, c), temperature, c)
    return loss, _fresh_figures(sums)


def _weighed(batch: Fresh, c: ObjectiveConfig) -> tuple[Fresh, Array, Array]:
    """A batch with what each token weighs, [N, T], in its losses and in its other figures.

    Both know the whole batch, so that a part of it has its share of every sum.
    """
    return batch, token_weights(batch.mask, c.choices.normaliser), token_weights(batch.mask, "tokens")


def _fresh_terms(
    model: Transformer,
    variables: Any,
    weighed: tuple[Fresh, Array, Array],
    temperature: Array,
    c: ObjectiveConfig,
) -> tuple[Array, dict[str, Array]]:
    batch, weight, share = weighed
    statistics = group_logprobs(
        model, variables, batch.prompts, batch.tokens, batch.mask, temperature, c.chunk
    )
    low, high = c.choices.clip_low, c.choices.clip_high
    ratio = jnp.exp(jnp.where(batch.mask, statistics.logprobs - batch.behaviour, 0.0))
    advantage = batch.advantage[:, None]
    clipped = jnp.clip(ratio, 1.0 - low, 1.0 + high)
    surrogate = jnp.minimum(ratio * advantage, clipped * advantage)
    policy = -(surrogate * weight).sum()
    gap = jnp.where(batch.mask, statistics.logprobs - batch.reference, 0.0)
    k2 = 0.5 * (gap**2 * weight).sum()
    entropy = (statistics.entropy * weight).sum()
    # Without a lag, learner and sampler are one policy before an update: what differs is their arithmetic.
    sampler = jnp.where(batch.mask, jnp.abs(statistics.logprobs - batch.behaviour), 0.0)
    loss = policy + c.kl_weight * k2 - c.entropy_weight * entropy
    figures = {
        "loss/policy": policy,
        "loss/kl": c.kl_weight * k2,
        "kl": ((jnp.exp(-gap) - 1.0 + gap) * share).sum(),
        "entropy": (statistics.entropy * share).sum(),
        "logprob/gap": (sampler * share).sum(),
        "clip_share": ((surrogate < ratio * advantage) * share).sum(),
    }
    if c.lagged:
        figures |= {"ratio/mean": (ratio * share).sum(), "ratio/squares": (ratio**2 * share).sum()}
    return loss, figures


def _fresh_figures(sums: dict[str, Array]) -> dict[str, Array]:
    """What is logged, from what parts of a batch add up to.

    `ratio/effective_share` in (0, 1] is the effective sample size of the tokens' ratios (Kish 1965), by the
    number of tokens.
    """
    if "ratio/mean" not in sums:
        return sums
    left = dict(sums)
    share = effective_size(left["ratio/mean"], left.pop("ratio/squares"))
    return {**left, "ratio/effective_share": share}


def token_weights(mask: Array, normaliser: str) -> Array:
    """[N, T] float32: what each token where `mask`, in {0, 1}, is 1 counts in a mean that `Choices` names."""
    mask = mask.astype(jnp.float32)
    if normaliser == "sequence":
        length = mask.sum(-1, keepdims=True)
        return mask / jnp.maximum(length, 1.0) / jnp.maximum((length > 0).sum(), 1)
    return mask / {"constant": mask.size, "tokens": jnp.maximum(mask.sum(), 1.0)}[normaliser]


def replayed_loss(
    model: Transformer, variables: Any, batch: Replayed, temperature: Array, c: ObjectiveConfig
) -> tuple[Array, dict[str, Array]]:
    """sg(min(C, pi / mu)) * A * log pi over whole sequences, and behaviour cloning where it has a weight."""
    loss, sums = _replayed_terms(model, variables, batch, temperature, c, batch.mask.size)
    return loss, _replayed_figures(sums)


def _replayed_terms(
    model: Transformer, variables: Any, batch: Replayed, temperature: Array, c: ObjectiveConfig, size: int
) -> tuple[Array, dict[str, Array]]:
    """The loss and figures of a batch, or of a part of it; `size` is M * T of the whole."""
    statistics = group_logprobs(
        model, variables, batch.prompts, batch.tokens, batch.mask, temperature, c.chunk
    )
    mask = batch.mask & batch.valid[:, None]
    weight = sequence_weight(statistics.logprobs, batch.behaviour, mask, c.replay_cap)
    log_ratio = sequence_log_ratio(statistics.logprobs, batch.behaviour, mask)
    kept = batch.valid & drift_mask(log_ratio, batch.advantage, c.drift_limit)
    sequence = (statistics.logprobs * mask).sum(-1)
    policy = -(jnp.where(kept, weight * batch.advantage, 0.0) * sequence).sum() / size
    cloning = -(jnp.where(batch.valid & batch.elite, sequence, 0.0)).sum() / size
    loss = c.replay_weight * policy + c.cloning_weight * cloning
    weight = jnp.where(kept, weight, 0.0)
    return loss, {
        "replay/loss": c.replay_weight * policy,
        "replay/cloning": c.cloning_weight * cloning,
        "replay/weights": weight.sum(),
        "replay/squares": (weight**2).sum(),
        "replay/samples": batch.valid.sum(),
        "replay/dropped": (batch.valid & ~kept).sum(),
    }


def _replayed_figures(sums: dict[str, Array]) -> dict[str, Array]:
    """What is logged, from what parts of a batch add up to."""
    left = dict(sums)
    size = effective_size(left.pop("replay/weights"), left.pop("replay/squares"))
    return {**left, "replay/effective_samples": size}


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
    `learner.state`). With several microbatches the prompts, B of them, must be a multiple of them; what is
    replayed is filled up to one.
    Fresh and replayed parts are differentiated apart, which costs nothing and gives replay's share of
    the gradient norm.
    """
    grads, metrics = microbatches.gradients(
        lambda p, part: _fresh_terms(model, {**frozen, **p}, part, temperature, c),
        model.config,
        params,
        _weighed(fresh, c),
        fresh.prompts.tokens.shape[0],
        c.microbatches,
    )
    fresh_norm = optax.tree.norm(grads)
    metrics = {**_fresh_figures(metrics), "gradient/fresh": fresh_norm}
    if replayed is None:
        return grads, metrics
    size, replayed = replayed.mask.size, microbatches.filled(replayed, c.microbatches)
    more, sums = microbatches.gradients(
        lambda p, part: _replayed_terms(model, {**frozen, **p}, part, temperature, c, size),
        model.config,
        params,
        replayed,
        replayed.valid.shape[0],
        c.microbatches,
    )
    replay_norm = optax.tree.norm(more)
    share = replay_norm / jnp.maximum(fresh_norm + replay_norm, 1e-12)
    metrics = {**metrics, **_replayed_figures(sums), "replay/gradient_share": share}
    return jax.tree.map(jnp.add, grads, more), metrics
