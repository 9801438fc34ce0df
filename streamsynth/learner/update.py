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
from streamsynth.learner import advantages
from streamsynth.learner.advantages import Spread
from streamsynth.learner.balance import Balance, dual_ascent
from streamsynth.learner.objective import Fresh, ObjectiveConfig, Replayed, gradients
from streamsynth.policy.transformer import Transformer
from streamsynth.pytrees import Array, Scores

PARTS = ("quality", "diversity")
# No part is divided by less than this, in its own unit; secondary parts have that of quality.
FLOORS = {"quality": 0.05, "diversity": 0.01}


@flax.struct.dataclass
class Assessment:
    """What a batch of samples is worth to the learner.

    advantage: [N].   weight: [N], r(q).   credit: [N].   metrics: scalars, every part by name.
    spread, balance: the running statistics after the batch.
    """

    advantage: Array
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
    secondary: tuple[tuple[str, float], ...] = (),
) -> Assessment:
    """Advantages of fresh samples: quality against its group, diversity credit against its baseline.

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
      secondary: weights, against that of quality, of the secondary parts.
    """
    # A sample that was not scored is of no label: it is no part of any log-volume or statistic.
    label = jnp.where(scores.scored, label, -1)
    archive = diversity.decay(archive, remembered)
    weight = diversity.reward_weight(scores.quality, floor, power)
    e = diversity.weighted(scores.features, weight)
    if neutral:
        credit, novelty = diversity.neutral_credit(archive, e, label)
    else:
        credit, baseline = diversity.credit(archive, e, label)
        novelty = credit - baseline
    num_labels = archive.matrix.shape[0]
    counted = weight if weighted else scores.gate
    d, valid = diversity.statistic(scores.features, counted, label, num_labels)

    def against_group(part: Array, counted: Array) -> Array:
        values = jnp.where(counted, part, 0.0).reshape(-1, samples)
        return advantages.leave_one_out(values, counted.reshape(-1, samples)).reshape(-1)

    known = {"quality": scores.scored, "diversity": scores.scored}
    parts = {"quality": against_group(scores.quality, scores.scored), "diversity": novelty}
    # A mean, not a sum: what binds must hold quality back, or the policy outruns it.
    share = balance.alpha / (1.0 + balance.alpha)
    weights = {"quality": 1.0 - share, "diversity": share}
    for name, of_quality in secondary:
        known[name] = jnp.isfinite(scores.secondary[name])
        parts[name] = against_group(scores.secondary[name], known[name])
        weights[name] = of_quality * (1.0 - share)
    floors = {name: FLOORS.get(name, FLOORS["quality"]) for name in parts}
    combined = advantages.combine(parts, weights, spread, floors)
    metrics = {
        "diversity/statistic": d,
        "diversity/target": balance.target,
        "diversity/credit": credit.mean(),
        "diversity/value": diversity.value(archive, e, label).sum(),
        "alpha": balance.alpha,
    }
    for name in parts:
        metrics[f"advantage/{name}"] = jnp.abs(combined.normalized[name]).mean()
        metrics[f"advantage/{name}_weighted"] = jnp.abs(combined.weighted[name]).mean()
        metrics[f"sigma/{name}"] = combined.sigma[name]
    return Assessment(
        advantage=jnp.where(scores.scored, combined.total, 0.0),
        weight=weight,
        credit=credit,
        metrics=metrics,
        spread=advantages.update_spread(spread, parts, counted=known),
        balance=dual_ascent(balance, d, valid, eta=eta, alpha_max=alpha_max),
    )


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
    updates, opt_state = optimizer.update(grads, opt_state, params)
    metrics["gradient/norm"] = optax.tree.norm(grads)
    metrics["update/skipped"] = opt_state.total_notfinite
    return optax.apply_updates(params, updates), opt_state, metrics
