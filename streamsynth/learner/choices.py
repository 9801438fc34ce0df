"""Objectives by name: how rewards become advantages, and how the tokens' losses are averaged.

The literature's objectives differ in few choices, each of which is one field here. None of them resamples,
and all take one update a batch, so that the clipping only acts where the learner's probabilities differ from
the sampler's.
"""

from __future__ import annotations

import dataclasses
from typing import Any

from streamsynth.errors import UserError


@dataclasses.dataclass(frozen=True)
class Choices:
    """What makes an objective.

    centre: what a sample's reward is compared with: the mean of the "others" of its group, or of the whole
      "group", itself among them.
    scale: what the difference is divided by: the "lagged" running deviation of each part of the reward, the
      deviation of the rewards in the "group", or nothing ("none").
    normaliser: of the sum over the tokens of N samples: "constant", N * T; "tokens", as many as there are;
      "sequence", each sample's own mean first.
    drop_dead: whether groups whose rewards are all equal are left out of the loss and of its normaliser.
    clip_low, clip_high: the trust region of a token's ratio, [1 - low, 1 + high].
    """

    centre: str
    scale: str
    normaliser: str
    drop_dead: bool = False
    clip_low: float = 0.2
    clip_high: float = 0.2

    @property
    def group_relative(self) -> bool:
        """Whether a sample has a say in what it is compared with, or divided by."""
        return self.centre == "group" or self.scale == "group"


OBJECTIVES = {
    # Ours: leave-one-out means (Kool et al. 2019) and deviations that no sample of the batch can move.
    "streamsynth": Choices("others", "lagged", "constant", clip_high=0.28),
    # arXiv 2402.14740, eq. 8. On the first update of a batch the sum over a sample's tokens has the gradient
    # of its sequence, and a constant normaliser leaves that sum a sum.
    "rloo": Choices("others", "none", "constant"),
    # arXiv 2402.03300, eq. 3: (r - mean) / std in the group, and a mean over each sample's own tokens.
    "grpo": Choices("group", "group", "sequence"),
    # arXiv 2503.20783: without the deviation, which favours groups of one mind, and with a constant in place
    # of the lengths, which favour short good texts and long bad ones.
    "dr_grpo": Choices("group", "none", "constant"),
    # arXiv 2503.14476: a higher upper clip, a mean over all tokens, and dynamic sampling, of which only the
    # filter is here: dead groups are masked out and no others are drawn in their place.
    "dapo": Choices("group", "group", "tokens", drop_dead=True, clip_high=0.28),
}


def resolve(group: Any) -> Choices:
    """The choices of the config group `objective`; a clip of 0 takes the objective's own.

    Raises:
      UserError: there is no objective of that name.
    """
    if group.name not in OBJECTIVES:
        raise UserError(
            f"objective.name = {group.name!r} is not known: choose one of {', '.join(OBJECTIVES)}."
        )
    own = OBJECTIVES[group.name]
    return dataclasses.replace(
        own, clip_low=group.clip_low or own.clip_low, clip_high=group.clip_high or own.clip_high
    )
