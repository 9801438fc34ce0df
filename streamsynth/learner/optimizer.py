"""The Optax chain, by config."""

from __future__ import annotations

from typing import Any

import jax
import optax

from streamsynth.errors import UserError

# Updates that are not finite are skipped for as long as they come; the count is in the metrics.
_NEVER_GIVE_UP = 2**31 - 1


def _constant(peak: float, steps: int, warmup: int) -> optax.Schedule:
    return optax.warmup_constant_schedule(0.0, peak, warmup)


def _cosine(peak: float, steps: int, warmup: int) -> optax.Schedule:
    return optax.warmup_cosine_decay_schedule(0.0, peak, warmup, max(steps, warmup + 1), 0.05 * peak)


def _linear(peak: float, steps: int, warmup: int) -> optax.Schedule:
    return optax.join_schedules(
        [
            optax.linear_schedule(0.0, peak, warmup),
            optax.linear_schedule(peak, 0.0, max(steps - warmup, 1)),
        ],
        [warmup],
    )


SCHEDULES = {"constant": _constant, "cosine": _cosine, "linear": _linear}

# Matrices decay, gains do not.
OPTIMIZERS = {
    "adamw": lambda lr, c: optax.adamw(lr, b1=c.b1, b2=c.b2, weight_decay=c.weight_decay, mask=_matrices),
    "adafactor": lambda lr, c: optax.adafactor(lr, weight_decay_rate=c.weight_decay or None),
    "sgd": lambda lr, c: optax.sgd(lr, momentum=c.b1),
    "muon": lambda lr, c: optax.contrib.muon(lr, weight_decay=c.weight_decay, adam_b1=c.b1, adam_b2=c.b2),
}


def _matrices(params: Any) -> Any:
    return jax.tree.map(lambda p: p.ndim > 1, params)


def make_optimizer(config: Any, steps: int) -> optax.GradientTransformation:
    """Clipping by global norm, then the optimizer under its schedule; non-finite updates are skipped.

    Args:
      config: keys `name`, `learning_rate`, `schedule`, `warmup`, `clip_norm`, `b1`, `b2`, `weight_decay`.
      steps: how many updates the schedule spans.

    Raises:
      UserError: for a name that is not in the tables.
    """
    for key, table in (("name", OPTIMIZERS), ("schedule", SCHEDULES)):
        if config[key] not in table:
            raise UserError(
                f"optimizer.{key} = {config[key]!r} is not known: choose one of {', '.join(table)}."
            )
    schedule = SCHEDULES[config.schedule](config.learning_rate, steps, config.warmup)
    chain = optax.chain(
        optax.clip_by_global_norm(config.clip_norm), OPTIMIZERS[config.name](schedule, config)
    )
    return optax.apply_if_finite(chain, max_consecutive_errors=_NEVER_GIVE_UP)
