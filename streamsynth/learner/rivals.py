"""What a batch of samples is paid for: our own reward, and those it is measured against.

Every reward is a function of one scored batch, named in `REWARDS` and chosen by `learner.reward`. It says
what each sample is paid; how payments become advantages (centring, scaling) is the objective's affair, see
`learner.choices`. Groups are the G samples of a prompt: sample n belongs to group n // G.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp

from streamsynth.errors import UserError
from streamsynth.feedback.diversity import PRECISION
from streamsynth.learner.choices import Choices
from streamsynth.pytrees import Array

# Similarities that sum to less say nothing of how they are spread.
_LEAST_SUM = 1e-6


@flax.struct.dataclass
class Batch:
    """One scored batch, as rewards see it.

    quality: [N] in [0, 1], 0 where the gate is 0.   gate: [N] in {0, 1}.
    features: [N, D] unit vectors.
    attribute: [N] in [0, 1], how far a text has the attributes that were asked for, NaN where it was not
      accepted; None where none were asked for.
    utility: [N], what a sample does for a student (`feedback.utility`), 0 where it was not accepted; or None.
    secondary: parts that count among accepted samples alone, by name, [N] each; NaN elsewhere.
    weights: of secondary parts and of "utility", against that of quality; those without count for nothing.
    scored: [N] bool, false where a judge failed: such a sample has quality 0 and is learned from by nobody.
    value: [], the log-volume that the batch adds to the archive (`feedback.diversity.value`).
    novelty: [N], each sample's credit for it less what could be expected of it.
    share: [] in [0, 1], of diversity in the reward, the dual ascent's.
    samples: G.
    """

    quality: Array
    gate: Array
    features: Array
    value: Array
    novelty: Array
    share: Array
    scored: Array
    attribute: Array | None = None
    utility: Array | None = None
    secondary: Mapping[str, Array] = flax.struct.field(default_factory=dict)
    weights: tuple[tuple[str, float], ...] = flax.struct.field(pytree_node=False, default=())
    samples: int = flax.struct.field(pytree_node=False, default=2)


@flax.struct.dataclass
class Paid:
    """What the samples of a batch are paid.

    parts: by name, [N]; NaN where a sample has no value and none is to be compared with it.
    weights: by name, what each part counts.
    ready: names of parts that bring their own comparison, which knows nothing of the sample; the objective
      compares the others within the group.
    shared: names of parts that all samples have alike; they are compared with earlier batches.
    shown: by name, [N], what the parts were made from, before and after its weight.
    """

    parts: dict[str, Array]
    weights: dict[str, Array | float]
    ready: tuple[str, ...] = flax.struct.field(pytree_node=False, default=())
    shared: tuple[str, ...] = flax.struct.field(pytree_node=False, default=())
    shown: dict[str, Array] = flax.struct.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class RivalConfig:
    """Constants of the rivals.

    same: the cosine of two feature vectors from which their texts count as the same (DARLING).
    least_distinct: what the quality of a text is multiplied by at least (DARLING).
    dqo_alpha: weight of the log-volume (DQO).
    release_label, release_attribute, release_quality, release_diversity: weights of the public release.
    release_slope: c, by which its distinctness is stretched before it is clipped.
    """

    same: float = 0.7
    least_distinct: float = 0.1
    dqo_alpha: float = 1.0
    release_label: float = 0.1
    release_attribute: float = 0.1
    release_quality: float = 0.5
    release_diversity: float = 0.3
    release_slope: float = 3.0


def credit(batch: Batch, c: RivalConfig) -> Paid:
    """Ours: quality, secondary parts, and each sample's own credit for the diversity of the whole batch.

    The weights are a mean's, not a sum's: what binds must hold quality back, or the policy outruns it. The
    utility depends on the whole set and is compared with its running mean over earlier batches.
    """
    parts = {"quality": batch.quality, "diversity": batch.novelty}
    weights = {"quality": 1.0 - batch.share, "diversity": batch.share}
    for name, weight in batch.weights:
        parts[name] = batch.utility if name == "utility" else batch.secondary[name]
        weights[name] = weight * (1.0 - batch.share)
    shared = ("utility",) if "utility" in parts else ()
    return Paid(parts=parts, weights=weights, ready=("diversity",), shared=shared)


def quality(batch: Batch, c: RivalConfig) -> Paid:
    """Quality alone."""
    return Paid(parts={"quality": batch.quality}, weights={"quality": 1.0})


def shared(batch: Batch, c: RivalConfig) -> Paid:
    """Every sample is paid what the set is worth: its mean quality and its log-volume, as ours are weighed.

    The set is the whole batch, whose value is the one that `credit` shares out. It is compared with its
    running mean over earlier batches, which is unbiased too; what it lacks is any knowledge of who did it.
    (Set-level policy gradients, for instance arXiv 2604.17654, draw many sets a prompt and compare those.)
    """
    alike = jnp.ones_like(batch.quality)
    return Paid(
        parts={
            "quality": jnp.mean(batch.quality, where=batch.scored) * alike,
            "diversity": batch.value * alike,
        },
        weights={"quality": 1.0 - batch.share, "diversity": batch.share},
        shared=("quality", "diversity"),
    )


def darling(batch: Batch, c: RivalConfig) -> Paid:
    """DARLING (arXiv 2509.02534): quality times the share of the group's other samples that are different.

        d_i = max(0.1, (G - |cluster of i|) / (G - 1))

    A learned classifier tells there which texts are the same. Here those are whose features have a cosine of
    `same` or more, and, since that is no equivalence, all that a chain of such pairs connects.
    """
    groups = _grouped(batch.features, batch.samples)
    connected = _similarity(groups) >= c.same
    connected |= jnp.eye(batch.samples, dtype=bool)  # also a text without a word, whose features are zero
    for _ in range((batch.samples - 1).bit_length()):  # chains of 2, 4, 8, ... pairs
        steps = connected.astype(jnp.float32)
        connected = jnp.matmul(steps, steps) > 0.5
    cluster = connected.sum(-1).reshape(-1)
    distinct = jnp.maximum(c.least_distinct, (batch.samples - cluster) / (batch.samples - 1))
    return _one(batch.quality * distinct, {"quality": batch.quality, "distinct": distinct})


def dqo(batch: Batch, c: RivalConfig) -> Paid:
    """DQO (arXiv 2509.04784): quality, and what a sample adds to the log-volume of its group.

        r_i = q_i + alpha * (logdet(L + I) - logdet(L without i + I)),   L_ij = phi_i . phi_j

    By the inverse's cofactors the difference is -log of the i-th diagonal element of (L + I)^-1. Neither
    quality nor an archive weighs the features.
    """
    identity = jnp.eye(batch.samples, dtype=batch.features.dtype)

    def inverse_diagonal(kernel: Array) -> Array:
        root = jax.scipy.linalg.solve_triangular(jnp.linalg.cholesky(kernel + identity), identity, lower=True)
        return jnp.sum(root * root, axis=0)

    # One group after the other: see `feedback.diversity._cholesky`.
    kernels = _similarity(_grouped(batch.features, batch.samples))
    added = -jnp.log(jax.lax.map(inverse_diagonal, kernels)).reshape(-1)
    paid = c.dqo_alpha * added
    return _one(
        batch.quality + paid, {"quality": batch.quality, "log_volume": added, "log_volume_weighted": paid}
    )


def mmr(batch: Batch, c: RivalConfig) -> Paid:
    """MMR-GRPO (arXiv 2601.09085): samples are chosen greedily for quality and unlikeness to those chosen.

    The best sample of a group is chosen first and keeps its reward; after that, always the one with the most

        r_i = lambda * q_i - (1 - lambda) * max over the chosen j of max(0, phi_i . phi_j),

    which becomes its reward. lambda = sigmoid(standard deviation of the group's q) follows from the group.
    """

    def reweigh(q: Array, similarity: Array) -> Array:
        weight = jax.nn.sigmoid(jnp.std(q))

        def choose(_: int, carry: tuple) -> tuple:
            reward, chosen, nearest, latest = carry
            nearest = jnp.maximum(nearest, similarity[latest])
            score = weight * q - (1.0 - weight) * nearest
            following = jnp.argmax(jnp.where(chosen, -jnp.inf, score))
            return (
                reward.at[following].set(score[following]),
                chosen.at[following].set(True),
                nearest,
                following,
            )

        first = jnp.argmax(q)
        start = (jnp.zeros_like(q).at[first].set(q[first]), jnp.arange(q.size) == first, jnp.zeros_like(q))
        return jax.lax.fori_loop(1, q.size, choose, (*start, first))[0]

    similarity = _similarity(_grouped(batch.features, batch.samples))
    reward = jax.vmap(reweigh)(batch.quality.reshape(-1, batch.samples), similarity).reshape(-1)
    return _one(reward, {"quality": batch.quality, "penalty": batch.quality - reward})


def release(batch: Batch, c: RivalConfig) -> Paid:
    """The reward of the public release of StreamSynth: four parts, weighed and added up.

    Distinctness is that of the batch: with cosines s_ij and sums over its other samples j,

        rho_i = sum_j s_ij^2 / sum_j s_ij,   d_i = clip(c * (1 - rho_i), 0, 1).

    The release reads the label off what a text declares of itself, in its format; here the gate stands for
    that. It pays for being distinct, whatever the text is worth, and so does this. Without attributes their
    part is 0.
    """
    similarity = _similarity(batch.features)
    others = jnp.where(jnp.eye(batch.quality.size, dtype=bool), 0.0, similarity)
    total, squares = others.sum(-1), (others**2).sum(-1)
    density = jnp.where(jnp.abs(total) < _LEAST_SUM, 0.0, squares / jnp.where(total == 0.0, 1.0, total))
    parts = {
        "label": (c.release_label, batch.gate),
        "attribute": (
            c.release_attribute,
            jnp.zeros_like(batch.quality) if batch.attribute is None else jnp.nan_to_num(batch.attribute),
        ),
        "quality": (c.release_quality, batch.quality),
        "distinct": (c.release_diversity, jnp.clip(c.release_slope * (1.0 - density), 0.0, 1.0)),
    }
    shown = {name: part for name, (_, part) in parts.items()}
    shown |= {f"{name}_weighted": weight * part for name, (weight, part) in parts.items()}
    return _one(sum(weight * part for weight, part in parts.values()), shown)


REWARDS: Mapping[str, Callable[[Batch, RivalConfig], Paid]] = {
    "credit": credit,
    "quality": quality,
    "shared": shared,
    "darling": darling,
    "dqo": dqo,
    "mmr": mmr,
    "release": release,
}
# Paid by what the whole batch does. Comparing or scaling them within the group would bias the gradient.
SET_LEVEL = ("credit", "shared")
# Of these a stored sample can be paid anew: see `learner.replaying`.
REPLAYABLE = ("credit", "quality")


def check(config: Any, choices: Choices) -> None:
    """Raises UserError for a reward that is not known, or one that the rest of the config does not fit."""
    name = config.learner.reward
    if name not in REWARDS:
        raise UserError(f"learner.reward = {name!r} is not known: choose one of {', '.join(REWARDS)}.")
    if name in SET_LEVEL and choices.group_relative:
        raise UserError(
            f"objective.name = {config.objective.name!r} centres or scales rewards within the group, which "
            f"biases the gradient of learner.reward = {name!r}: choose streamsynth or rloo."
        )
    if name not in REPLAYABLE and config.replay.share:
        raise UserError(
            f"replay.share = {config.replay.share} replays samples, and learner.reward = {name!r} is not "
            "defined for a sample outside its group: set replay.share to 0."
        )


def _one(reward: Array, shown: dict[str, Array]) -> Paid:
    """A reward that is not to be taken apart."""
    return Paid(parts={"reward": reward}, weights={"reward": 1.0}, shown=shown)


def _grouped(features: Array, samples: int) -> Array:
    """[B, G, D] from [N, D]."""
    return features.reshape(-1, samples, features.shape[-1])


def _similarity(features: Array) -> jax.Array:
    """Cosines of unit vectors, [..., M, D] to [..., M, M]."""
    return jnp.matmul(features, jnp.swapaxes(features, -1, -2), precision=PRECISION)
