"""One update: advantages from scores and credit, then a step of the optimizer. Jitted and donated."""

from __future__ import annotations

import functools
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import optax

from streamsynth.feedback import diversity
from streamsynth.feedback.diversity import Archive
from streamsynth.feedback.reward import ATTRIBUTE
from streamsynth.learner import advantages, rivals
from streamsynth.learner.advantages import Advantages, Spread
from streamsynth.learner.balance import Balance, dual_ascent
from streamsynth.learner.choices import OBJECTIVES, Choices
from streamsynth.learner.objective import Fresh, ObjectiveConfig, Replayed, gradients
from streamsynth.learner.optimizer import step
from streamsynth.learner.rivals import REWARDS, Paid, RivalConfig
from streamsynth.policy.transformer import Transformer
from streamsynth.pytrees import Array, Scores

# Of all rewards; one that is not to be taken apart is "reward". Secondary parts have names of their own.
PARTS = ("quality", "utility", "diversity", "reward")
# No part is divided by less than this, in its own unit; secondary parts have that of quality.
FLOORS = {"quality": 0.05, "utility": 1e-5, "diversity": 0.01, "reward": 0.05}


@flax.struct.dataclass
class Assessment:
    """What a batch of samples is worth to the learner.

    advantage: [N].   earned: [N], what strategies are compared by.
    counted: [N] bool, whether a sample is learned from.
    weight: [N], r(q).   credit: [N].   metrics: scalars, every part by name.
    spread, balance: the running statistics after the batch.
    """

    advantage: Array
    earned: Array
    counted: Array
    weight: Array
    credit: Array
    metrics: dict[str, Array]
    spread: Spread
    balance: Balance


@functools.partial(
    jax.jit,
    static_argnames=(
        "samples",
        "floor",
        "power",
        "eta",
        "alpha_max",
        "weighted",
        "neutral",
        "remembered",
        "reward",
        "choices",
        "constants",
        "secondary",
    ),
)
def assess(
    archive: Archive,
    scores: Scores,
    label: Array,
    spread: Spread,
    balance: Balance,
    *,
    samples: int,
    floor: float,
    power: float,
    eta: float,
    alpha_max: float,
    weighted: bool,
    neutral: bool,
    remembered: float,
    reward: str = "credit",
    choices: Choices = OBJECTIVES["streamsynth"],
    constants: RivalConfig = RivalConfig(),  # noqa: B008, frozen
    elsewhere: Array | None = None,
    secondary: tuple[tuple[str, float], ...] = (),
    utility: Array | None = None,
) -> Assessment:
    """Advantages of fresh samples: what the reward pays them, compared and scaled as the objective says.

    Diversity, its credit and alpha are measured alike, whatever is paid.

    Args:
      archive: of the task, from before this batch.
      scores: of the N samples.
      label: [N] int32.
      spread, balance: from before this batch.
      samples: G.
      floor, power: of r(q).
      eta, alpha_max: of the dual ascent.
      weighted: whether the statistic that alpha follows weighs samples by r(q), or takes all that passed
        the gates alike.
      neutral: whether diversity is paid by `neutral_credit`, or by credit less its baseline.
      remembered: in [0, 1], how much the archive counts; with 0 a sample is new if it is new in its batch.
      reward: a name in `rivals.REWARDS`.
      choices: of the objective.
      constants: of the rivals.
      elsewhere: [D, D], what other tasks' archives count for (`diversity.beside`); nothing by default.
      secondary: weights, against that of quality, of the secondary parts and of the utility.
      utility: [N], `feedback.utility` of each sample; 0 where it was not accepted.
    """
    # A sample that was not scored is of no label: it is no part of any log-volume or statistic.
    label = jnp.where(scores.scored, label, -1)
    archive = diversity.decay(archive, remembered)
    if elsewhere is not None:
        archive = diversity.beside(archive, elsewhere)
    weight = diversity.reward_weight(scores.quality, floor, power)
    e = diversity.weighted(scores.features, weight)
    credit, novelty = _novelty(archive, e, label, neutral)
    value = diversity.value(archive, e, label).sum()
    counted = weight if weighted else scores.gate
    d, valid = diversity.statistic(scores.features, counted, label, archive.matrix.shape[0])
    batch = rivals.Batch(
        quality=scores.quality,
        scored=scores.scored,
        gate=scores.gate,
        features=scores.features,
        value=value,
        novelty=novelty,
        share=balance.alpha / (1.0 + balance.alpha),
        attribute=scores.secondary.get(ATTRIBUTE),
        utility=utility,
        secondary=scores.secondary,
        weights=secondary,
        samples=samples,
    )
    paid = REWARDS[reward](batch, constants)
    known = {name: scores.scored & jnp.isfinite(part) for name, part in paid.parts.items()}
    paid = paid.replace(parts={name: jnp.where(known[name], part, 0.0) for name, part in paid.parts.items()})
    parts = {name: _compared(paid, name, spread, samples, choices, known[name]) for name in paid.parts}
    floors = {name: FLOORS.get(name, FLOORS["quality"]) for name in parts}
    combined = advantages.combine(parts, paid.weights, spread, floors, scale=choices.scale, samples=samples)
    dead = advantages.dead(sum(paid.weights[name] * part for name, part in paid.parts.items()), samples)
    metrics = {
        "diversity/statistic": d,
        "diversity/target": balance.target,
        "diversity/credit": credit.mean(),
        "diversity/value": value,
        "alpha": balance.alpha,
        "advantage/dead_groups": dead.mean(),
        **_part_metrics(combined, paid),
    }
    spread = advantages.update_level(spread, {name: paid.parts[name] for name in paid.shared}, known)
    return Assessment(
        advantage=jnp.where(scores.scored, combined.total, 0.0),
        earned=_earned(combined, paid, scores.quality),
        counted=~dead if choices.drop_dead else jnp.ones_like(dead),
        weight=weight,
        credit=credit,
        metrics=metrics,
        spread=advantages.update_spread(spread, parts, counted=known),
        balance=dual_ascent(balance, d, valid, eta=eta, alpha_max=alpha_max),
    )


def _novelty(archive: Archive, e: Array, label: Array, neutral: bool) -> tuple[Array, Array]:
    """Each sample's credit for the value of the batch, and what of it was not to be expected: [N] each."""
    if neutral:
        return diversity.neutral_credit(archive, e, label)
    credit, baseline = diversity.credit(archive, e, label)
    return credit, credit - baseline


def _compared(paid: Paid, name: str, spread: Spread, samples: int, choices: Choices, known: Array) -> Array:
    """A part of what is paid, [N], less what it is compared with; 0 for samples that have no value for it."""
    part = paid.parts[name]
    if name in paid.ready:
        return part
    if name in paid.shared:
        return jnp.where(known, advantages.from_level(spread, name, part), 0.0)
    return advantages.centred(part, samples, choices.centre, known)


def _earned(combined: Advantages, paid: Paid, quality: Array) -> Array:
    """[N], what each sample earned, in the unit of quality: that itself, uncompared, and the other parts.

    It is what strategies are compared by, so that a group's own mean must not be taken out of it.
    """
    if "quality" not in combined.weighted:
        return quality
    others = sum(part for name, part in combined.weighted.items() if name != "quality")
    return paid.weights["quality"] * quality + combined.sigma["quality"] * others


def _part_metrics(combined: Advantages, paid: Paid) -> dict[str, Array]:
    """Every part before and after its weight, what divided it, and what it was made from."""
    metrics = {f"paid/{name}": part.mean() for name, part in paid.shown.items()}
    for name, part in combined.normalized.items():
        metrics[f"advantage/{name}"] = jnp.abs(part).mean()
        metrics[f"advantage/{name}_weighted"] = jnp.abs(combined.weighted[name]).mean()
        metrics[f"sigma/{name}"] = combined.sigma[name].mean()
    return metrics


@functools.partial(
    jax.jit, static_argnames=("model", "optimizer", "objective"), donate_argnames=("params", "opt_state")
)
def update(
    model: Transformer,
    optimizer: optax.GradientTransformation,
    objective: ObjectiveConfig,
    params: Any,
    frozen: Any,
    opt_state: Any,
    fresh: Fresh,
    replayed: Replayed | None,
    temperature: Array,
) -> tuple[Any, Any, dict[str, Array]]:
    """One step of the optimizer, skipped if not finite; `params` and `opt_state` are donated."""
    grads, metrics = gradients(model, params, frozen, fresh, replayed, temperature, objective)
    params, opt_state = step(model, optimizer, grads, params, opt_state)
    metrics["gradient/norm"] = optax.tree.norm(grads)
    metrics["update/skipped"] = opt_state.total_notfinite
    return params, opt_state, metrics
