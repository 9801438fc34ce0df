"""The frozen pytrees that travel, and the letters of their dimensions.

Dimensions, one letter each everywhere:

    B prompts           G samples a prompt     N = B * G samples (sample n belongs to prompt n // G)
    P prompt length     T completion length    V vocabulary
    D feature width     K labels               L layers

Prompts are padded on the right; position p of a prompt is real where `prompt_mask[b, p]`.
"""

from __future__ import annotations

import flax.struct
import jax
import numpy as np

Array = jax.Array | np.ndarray


@flax.struct.dataclass
class Prompts:
    """A batch of rendered prompts.

    tokens: [B, P] int32.   mask: [B, P] bool.
    label: [B] int32, index of the label asked for.
    strategy: [B] int32, index of the synthesis strategy.
    """

    tokens: Array
    mask: Array
    label: Array
    strategy: Array


@flax.struct.dataclass
class Rollouts:
    """Completions and how they came about.

    prompts: the B prompts.
    tokens: [N, T] int32, padded after the end-of-text token.
    mask: [N, T] bool, true up to and including the end-of-text token.
    logprobs: [N, T] float32, log-probability of each token under the very distribution it was
      sampled from (temperature included); 0 where `mask` is false.
    finished: [N] bool, whether the end-of-text token came within T tokens.
    """

    prompts: Prompts
    tokens: Array
    mask: Array
    logprobs: Array
    finished: Array


@flax.struct.dataclass
class Scores:
    """What samples are worth.

    gate: [N] float32 in {0, 1}.
    quality: [N] float32 in [0, 1], 0 where the gate is 0; depends on the sample alone.
    features: [N, D] float32 unit vectors; depend on the sample alone.
    parts: every part of the quality by name, [N] float32 each, before its weight; NaN where there is none.
    scored: [N] bool, false where a judge failed on the sample: it then has quality 0, and nothing is learned
      from it, neither by the policy nor by any running statistic.
    secondary: parts that count among accepted samples alone, by name, [N] float32 each; NaN elsewhere.
    """

    gate: Array
    quality: Array
    features: Array
    parts: dict[str, Array]
    scored: Array
    secondary: dict[str, Array] = flax.struct.field(default_factory=dict)
