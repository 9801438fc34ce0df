"""Judges: what a text is worth as a text of its label. A judge reads the text, and is measured first.

How far a judge can be trusted is measured on held-back examples: its area under the ROC curve at telling
texts of a label from texts of the other labels scales its weight, and a judge at chance gets none.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from streamsynth.policy.logprobs import group_logprobs
from streamsynth.policy.microbatches import filled, mapped
from streamsynth.policy.transformer import Transformer
from streamsynth.pytrees import Array, Prompts
from streamsynth.tasks.task import Task

# What a judge reads at one time: a data set of texts, times the labels, would not fit in memory.
TEXTS_AT_A_TIME = 256


def verifier(task: Task, texts: Sequence[str], label: np.ndarray) -> np.ndarray:
    """[N] float32 in {0, 1}: whether each text is in the language of the label asked for, exactly."""
    names = task.labels
    return np.array([task.verifier(t, names[k]) for t, k in zip(texts, label, strict=True)], np.float32)


@functools.partial(jax.jit, static_argnames=("model", "chunk", "at_a_time"))
def label_loglikelihood(
    model: Transformer,
    variables: Any,
    prompts: Prompts,
    tokens: Array,
    mask: Array,
    *,
    chunk: int = 1024,
    at_a_time: int = TEXTS_AT_A_TIME,
) -> Array:
    """log p_ref(text | prompt of the label), [N, K] float32, summed over each text's tokens.

    Args:
      model, variables: the frozen reference policy.
      prompts: K prompts, one a label, in the order of the labels.
      tokens, mask: [N, T] texts with their ends.
      chunk: positions whose logits exist at one time on a device.
      at_a_time: texts that are read at one time.
    """
    count = parts(len(tokens), at_a_time)
    texts = filled((tokens, mask), count)

    # One label at a time: its prompt is read once, and the texts are its group. All labels at once would
    # take K times the memory, and their number is seldom a multiple of the devices.
    def of_label(prompt: Prompts) -> Array:
        alone = jax.tree.map(lambda leaf: leaf[None], prompt)

        def of_texts(part: tuple[Array, Array]) -> Array:
            return group_logprobs(model, variables, alone, *part, 1.0, chunk).logprobs.sum(-1)

        return mapped(of_texts, texts, len(texts[0]), count)[: len(tokens)]

    return jax.lax.map(of_label, prompts).T


def parts(count: int, at_a_time: int = TEXTS_AT_A_TIME) -> int:
    """How many parts, one after another, so many texts are read in."""
    return math.ceil(count / at_a_time)


def posterior(loglikelihood: Array, label: Array) -> Array:
    """p(label | text) [N] of the label asked for, from [N, K] log-likelihoods and equal priors (Bayes)."""
    return jnp.take_along_axis(jax.nn.softmax(loglikelihood, axis=-1), label[:, None], axis=-1)[:, 0]


def fluency(loglikelihood: Array, label: Array, length: Array, centre: Array, scale: Array) -> Array:
    """[N] in (0, 1): how the text's mean token log-probability compares with that of real examples.

    Args:
      loglikelihood: [N, K].   label: [N].   length: [N], tokens with the end.
      centre, scale: mean and standard deviation of the same measure over held-back examples. A text two
        deviations below a real one has a fluency of one half.
    """
    own = jnp.take_along_axis(loglikelihood, label[:, None], axis=-1)[:, 0] / jnp.maximum(length, 1)
    return jax.nn.sigmoid((own - centre) / scale + 2.0)


@jax.jit
def verdict(loglikelihood: Array, label: Array, mask: Array, centre: Array, scale: Array) -> Array:
    """[N] in (0, 1): posterior times fluency, of texts with the mask [N, T]; arguments as of both."""
    fluent = fluency(loglikelihood, label, mask.sum(-1), centre, scale)
    return posterior(loglikelihood, label) * fluent


def auc(positive: np.ndarray, negative: np.ndarray) -> float:
    """P(a positive's score > a negative's), ties counting half (Mann-Whitney); 0.5 if one is empty."""
    if not len(positive) or not len(negative):
        return 0.5
    ordered = np.sort(negative)
    below, not_above = (np.searchsorted(ordered, positive, side) for side in ("left", "right"))
    return float(np.mean(below + not_above) / (2 * len(ordered)))


def trust(area: float) -> float:
    """The weight of a judge in [0, 1]: 2 AUC - 1 (Gini), and 0 at chance or below."""
    return max(0.0, 2.0 * area - 1.0)
