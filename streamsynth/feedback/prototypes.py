"""A classifier from a few examples a label: the nearest mean, with a temperature found on them.

Prototypical networks (Snell, Swersky and Zemel 2017, arXiv 1703.05175, eq. 2) on vectors that are given:
labels are Gaussians of one common, round covariance around their means, so that

    p(k | x) proportional to exp((x . mean_k - |mean_k|^2 / 2) / temperature).

The mean of n examples is longer than the label's own by the examples' noise: E|mean|^2 exceeds it by v / n,
where v is their total variance. That part is taken out, or labels with fewer examples would lose. The
temperature is the one under which the examples are likeliest, each with itself left out of its label's mean.

On sentence vectors of four and eight examples a label this ranked texts better, or as well, and was better
calibrated than ridge and logistic regression.
"""

from __future__ import annotations

import dataclasses

import numpy as np

# Where no label has two examples nothing can be left out: about what is found with four of unit length.
DEFAULT_TEMPERATURE = 0.05
_TEMPERATURES = np.geomspace(1e-3, 10.0, 41)


@dataclasses.dataclass(frozen=True)
class Prototypes:
    """means: [K, D] float64, of the labels.   half_square: [K], |mean|^2 / 2 without the examples' noise.

    temperature: the variance of a label along every direction, as far as it matters here.
    """

    means: np.ndarray
    half_square: np.ndarray
    temperature: float

    def posterior(self, vectors: np.ndarray) -> np.ndarray:
        """p(label | vector), [N, K] float32, from vectors [N, D] and equal priors."""
        scores = np.asarray(vectors, np.float64) @ self.means.T - self.half_square
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
    noise = np.sum((vectors - means[label]) ** 2) / max(len(label) - num_labels, 1)
    half_square = _half_square(means, count, noise)
    rest = count[label] > 1  # examples that leave their label a mean
    if not rest.any():
        return Prototypes(means, half_square, DEFAULT_TEMPERATURE)
    left = np.maximum(count[label] - 1, 1)
    own = means[label] + (means[label] - vectors) / left[:, None]
    scores = vectors @ means.T - half_square
    scores[rows, label] = np.sum(vectors * own, axis=1) - _half_square(own, left, noise)
    likelihood = [_log_softmax(scores / t)[rows, label][rest].mean() for t in _TEMPERATURES]
    return Prototypes(means, half_square, float(_TEMPERATURES[int(np.argmax(likelihood))]))


def _half_square(means: np.ndarray, count: np.ndarray, noise: float) -> np.ndarray:
    return 0.5 * (np.sum(means * means, axis=1) - noise / count)


def _log_softmax(scores: np.ndarray) -> np.ndarray:
    scores = scores - scores.max(axis=1, keepdims=True)
    return scores - np.log(np.exp(scores).sum(axis=1, keepdims=True))
