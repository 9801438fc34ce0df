"""A classifier from a few examples a label: the nearest mean, with a temperature found on them.

Prototypical networks (Snell, Swersky and Zemel 2017, arXiv 1703.05175, eq. 2) on vectors that are given:
labels are Gaussians of one common, round covariance around their means, so that

    p(k | x) proportional to exp(-|x - mean_k|^2 / (2 temperature)).

The temperature is the one under which the examples are likeliest, each under means that leave it out. With
four to eight examples a label it did better on sentence vectors than ridge or logistic regression.
"""

from __future__ import annotations

import dataclasses

import numpy as np

# Where no label has two examples nothing can be left out: about what is found with four of unit length.
DEFAULT_TEMPERATURE = 0.1
_TEMPERATURES = np.geomspace(1e-3, 10.0, 41)


@dataclasses.dataclass(frozen=True)
class Prototypes:
    """means: [K, D] float64, of the labels.   temperature: the common variance along every direction."""

    means: np.ndarray
    temperature: float

    def posterior(self, vectors: np.ndarray) -> np.ndarray:
        """p(label | vector), [N, K] float32, from vectors [N, D] and equal priors."""
        scores = _scores(np.asarray(vectors, np.float64), self.means)
        return np.exp(_log_softmax(scores / self.temperature)).astype(np.float32)


def fit(vectors: np.ndarray, label: np.ndarray, num_labels: int) -> Prototypes:
    """Prototypes of labelled vectors.

    Args:
      vectors: [M, D].
      label: [M] int, in [0, K); every label occurs.
      num_labels: K.
    """
    vectors, rows = np.asarray(vectors, np.float64), np.arange(len(label))
    count = np.bincount(label, minlength=num_labels).astype(np.float64)
    means = (np.eye(num_labels)[label].T @ vectors) / count[:, None]
    rest = count[label] > 1  # examples that leave their label a mean
    if not rest.any():
        return Prototypes(means, DEFAULT_TEMPERATURE)
    scores = _scores(vectors, means)
    own = means[label] + (means[label] - vectors) / np.maximum(count[label] - 1, 1)[:, None]
    scores[rows, label] = np.sum(vectors * own, axis=1) - 0.5 * np.sum(own * own, axis=1)
    likelihood = [_log_softmax(scores / t)[rows, label][rest].mean() for t in _TEMPERATURES]
    return Prototypes(means, float(_TEMPERATURES[int(np.argmax(likelihood))]))


def _scores(vectors: np.ndarray, means: np.ndarray) -> np.ndarray:
    """-|x - mean|^2 / 2 without the part that all labels share, [N, K]."""
    return vectors @ means.T - 0.5 * np.sum(means * means, axis=1)


def _log_softmax(scores: np.ndarray) -> np.ndarray:
    scores = scores - scores.max(axis=1, keepdims=True)
    return scores - np.log(np.exp(scores).sum(axis=1, keepdims=True))
