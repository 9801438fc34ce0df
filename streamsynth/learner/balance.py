"""The balance of quality and diversity: the weight alpha of diversity is found, not tuned.

Diversity is asked to stay at a target: maximise quality subject to d >= target. alpha is the multiplier of
that constraint and follows dual ascent,

    alpha <- clip(alpha + eta * (target - d), 0, alpha_max),

where d is `feedback.diversity.statistic` of the batch. It rises while the samples are less diverse than
wanted, and falls back to 0 when the constraint does not bind.
"""

from __future__ import annotations

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np

from streamsynth.errors import UserError
from streamsynth.pytrees import Array


@flax.struct.dataclass
class Balance:
    """The weight and what it is for.

    alpha: [] float32, the weight of diversity.   target: [] float32, the diversity wanted, in the unit of d.
    """

    alpha: Array
    target: Array


def initial(alpha: float, target: Array | float) -> Balance:
    """A balance that starts from a weight and a target."""
    return Balance(alpha=np.float32(alpha), target=np.float32(target))


def target_from(statistic: Array | float, valid: Array | bool, factor: float = 1.0) -> float:
    """The target: `factor` times the statistic of the examples, or of the base policy's samples. On the host.

    Raises:
      UserError: the statistic could not be measured.
    """
    if not bool(valid):
        raise UserError(
            "the diversity target cannot be measured because no label has two samples: "
            "give more examples per label or set the target to a number"
        )
    return factor * float(statistic)


def dual_ascent(balance: Balance, statistic: Array, valid: Array, *, eta: float, alpha_max: float) -> Balance:
    """One step of alpha; it stays where it is when the batch says nothing (not valid, or not finite).

    Args:
      balance: before the batch.
      statistic: [], d of the batch.
      valid: [] bool.
      eta: step size.
      alpha_max: keeps an unreachable target from drowning quality.
    """
    moved: jax.Array = jnp.clip(balance.alpha + eta * (balance.target - statistic), 0.0, alpha_max)
    return balance.replace(alpha=jnp.where(valid & jnp.isfinite(statistic), moved, balance.alpha))
