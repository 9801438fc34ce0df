"""Advantages: what each sample did better than could be expected, from several parts of the reward.

Quality depends on the sample alone and is compared with the rest of its group. Parts that depend on the
whole set (diversity, utility) come with a baseline of their own, because centring them within the group is
biased and dividing them by the group's own deviation changes the direction. Every part is then divided by
its *lagged* running deviation, one number from earlier batches, and weighed:

    A_i = (q_i - mean of the group's other q) / sigma_q
          + w_u * (u_i - b_u) / sigma_u + alpha * (credit_i - b_i) / sigma_c

A group whose qualities are all equal has no quality advantage and keeps the other parts. Other objectives
centre and scale otherwise: see `learner.choices`.
"""

from __future__ import annotations

from collections.abc import Mapping

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np

from streamsynth.errors import UserError
from streamsynth.pytrees import Array

# Added to a group's deviation, as in TRL's grpo_trainer: a group that hardly varies is not blown up.
GROUP_EPSILON = 1e-4
# Rewards of a group that lie closer together than this are all equal.
SAME_REWARD = 1e-6


@flax.struct.dataclass
class Spread:
    """How large each part usually is.

    mean_square: for each part, [] float32, a running mean of the part's mean square; 0 until the part has
      been nonzero for the first time.
    level: for each part that a whole batch shares, [] float32, a running mean of it; 0 until then likewise.
    """

    mean_square: dict[str, Array]
    level: dict[str, Array] = flax.struct.field(default_factory=dict)


@flax.struct.dataclass
class Advantages:
    """The sum, and every part of it before and after its weight.

    total: [N].
    raw: each part as it came, [N].
    normalized: each part over its sigma, [N]; 0 while the sigma is not known.
    weighted: each part as it stands in the sum, [N].
    sigma: each part's divisor, []; [N] where it is the group's.
    """

    total: Array
    raw: dict[str, Array]
    normalized: dict[str, Array]
    weighted: dict[str, Array]
    sigma: dict[str, Array]


def leave_one_out(quality: Array, counted: Array | None = None) -> jax.Array:
    """q_i minus the mean of the other qualities in its group, [B, G] to [B, G] (RLOO: Kool et al. 2019).

    For one prompt, [1, 0, 0] gives [1, -1/2, -1/2].

    Args:
      quality: [B, G], finite.
      counted: [B, G] bool, the samples that take part, all by default. The others get 0 and are no part of
        a mean, and so does one that has no other to be compared with.

    Raises:
      UserError: groups have fewer than two samples.
    """
    group = quality.shape[-1]
    if group < 2:
        raise UserError(
            f"a group of {group} sample has nothing to compare with: set the samples per prompt to 2 or more"
        )
    # Summed differences rather than a difference of sums: exactly 0, not rounding noise, where all are equal.
    difference = quality[..., :, None] - quality[..., None, :]
    if counted is None:
        return jnp.sum(difference, axis=-1) / (group - 1)
    both = counted[..., :, None] & counted[..., None, :]
    others = jnp.sum(counted, axis=-1, keepdims=True) - 1
    return jnp.sum(jnp.where(both, difference, 0.0), axis=-1) / jnp.maximum(others, 1)


def centred(part: Array, samples: int, centre: str, counted: Array) -> jax.Array:
    """A part of the reward, [N], less the mean of the "others" of its group of G, or of the whole "group".

    Samples that are not `counted`, [N] bool, get 0 and are no part of a mean.
    """
    groups, counted = part.reshape(-1, samples), counted.reshape(-1, samples)
    if centre == "others":
        return leave_one_out(groups, counted).reshape(-1)
    count = jnp.maximum(counted.sum(-1, keepdims=True), 1)
    mean = jnp.sum(jnp.where(counted, groups, 0.0), -1, keepdims=True) / count
    return jnp.where(counted, groups - mean, 0.0).reshape(-1)


def dead(reward: Array, samples: int) -> jax.Array:
    """[N] bool: samples of groups whose rewards, [N], are all equal."""
    groups = reward.reshape(-1, samples)
    return jnp.repeat(groups.max(-1) - groups.min(-1) <= SAME_REWARD, samples)


def initial_spread(names: tuple[str, ...] = ("quality", "utility", "diversity")) -> Spread:
    """Nothing known of any part."""
    unknown = {name: np.float32(0) for name in names}
    return Spread(mean_square=unknown, level=unknown)


def from_level(spread: Spread, name: str, part: Array) -> jax.Array:
    """A part that the whole batch shares, [N], less its running mean over earlier batches; 0 in the first."""
    level = spread.level[name]
    return jnp.where(level != 0.0, part - level, 0.0)


def update_level(
    spread: Spread, parts: Mapping[str, Array], counted: Mapping[str, Array], decay: float = 0.95
) -> Spread:
    """The spread with the running means of shared parts, [N] each, over their `counted` samples, [N] bool."""
    level = dict(spread.level)
    for name, part in parts.items():
        old, new = level[name], jnp.mean(part, where=counted[name])  # NaN without any
        moved = jnp.where(old != 0.0, decay * old + (1.0 - decay) * new, new)
        level[name] = jnp.where(jnp.isfinite(new), moved, old)
    return spread.replace(level=level)


def update_spread(
    spread: Spread,
    parts: Mapping[str, Array],
    decay: float = 0.95,
    counted: Mapping[str, Array] | None = None,
) -> Spread:
    """The spread after a batch; call it after `combine`, so that no sample moves the sigma it is divided by.

    A part's first batch that is not all zeros is taken as it is; after that, decay * old + (1 - decay) *
    new. A part that is absent, or not finite, keeps its value.

    Args:
      spread: before the batch.
      parts: centred parts by name, [N] each; names must be in `spread`.
      decay: in [0, 1).
      counted: by name, [N] bool, the samples that a part has a value for; all by default. A part without any
        keeps its value.
    """
    mean_square = dict(spread.mean_square)
    for name, part in parts.items():
        mine = None if counted is None else counted[name]
        old, new = mean_square[name], jnp.mean(jnp.square(part), where=mine)  # NaN without any
        moved = jnp.where(old > 0.0, decay * old + (1.0 - decay) * new, new)
        mean_square[name] = jnp.where(jnp.isfinite(new), moved, old)
    return spread.replace(mean_square=mean_square)


def combine(
    parts: Mapping[str, Array],
    weights: Mapping[str, Array | float],
    spread: Spread,
    floors: Mapping[str, float],
    *,
    scale: str = "lagged",
    samples: int = 2,
) -> Advantages:
    """The weighed sum of normalised parts.

    A part whose lagged sigma is not known yet counts for nothing: its first batch only tells how large it is.

    Args:
      parts: centred parts by name, [N] each: `leave_one_out` quality, credit minus baseline, and so on.
      weights: the weight of each part, a number or a traced scalar such as alpha.
      spread: from before this batch.
      floors: the least sigma of each part, in the part's own unit, above 0; it keeps noise from being blown
        up once a part has almost stopped to vary.
      scale: what divides: each part's "lagged" sigma; the deviation of the sum in the "group", one for all
        parts; or "none".
      samples: G, for the group's.
    """
    if scale == "lagged":
        known = {name: spread.mean_square[name] > 0.0 for name in parts}
        sigma = {name: jnp.maximum(jnp.sqrt(spread.mean_square[name]), floors[name]) for name in parts}
    else:
        known = dict.fromkeys(parts, True)
        sigma = dict.fromkeys(parts, jnp.float32(1.0))
    if scale == "group":
        total = sum(weights[name] * part for name, part in parts.items())
        deviation = jnp.std(total.reshape(-1, samples), axis=-1, ddof=1) + GROUP_EPSILON
        sigma = dict.fromkeys(parts, jnp.repeat(deviation, samples))
    normalized = {name: jnp.where(known[name], part / sigma[name], 0.0) for name, part in parts.items()}
    weighted = {name: weights[name] * part for name, part in normalized.items()}
    return Advantages(
        total=sum(weighted.values()), raw=dict(parts), normalized=normalized, weighted=weighted, sigma=sigma
    )
