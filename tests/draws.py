"""When two machines may draw different tokens: where the random number all but lies on an edge."""

from __future__ import annotations

import numpy as np

EDGE = 1e-5  # of the distribution function, that rounding may move


def unexplained(
    expected: np.ndarray, found: np.ndarray, mask: np.ndarray, logits: np.ndarray, uniforms: np.ndarray
) -> list[tuple[int, int]]:
    """Where samples first differ though rounding cannot be why.

    What comes after a sample's first difference is another text and says nothing.

    Args:
      expected, found: [N, T] tokens, drawn by inverting the distribution function.
      mask: [N, T] bool, the tokens of `expected` up to the end.
      logits: [N, T, V], that the tokens of `expected` were drawn from, temperature applied.
      uniforms: [N, T], the numbers they were drawn with.

    Returns:
      (sample, place) of each.
    """
    wrong = []
    for n in np.flatnonzero((expected != found).any(axis=1)):
        t = int(np.argmax(expected[n] != found[n]))
        logit = np.asarray(logits[n, t], np.float64)
        mass = np.exp(logit - logit.max())
        edges = np.cumsum(mass) / mass.sum()
        if not mask[n, t] or np.abs(edges - uniforms[n, t]).min() > EDGE:
            wrong.append((int(n), t))
    return wrong
