"""Which of many kept rows become the data set."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from streamsynth.dataset.balance import Select, best
from streamsynth.dataset.rows import Row
from streamsynth.feedback.diversity import spread_out
from streamsynth.feedback.features import ngram_features


def selection(config: Any) -> Select:
    """What `dataset.select` names, with the features and the ridge of the config's diversity."""
    if config.dataset.select == "best":
        return best
    width, ridge, seed = config.feedback.width, config.feedback.ridge, config.seed

    def most_spread_out(rows: Sequence[Row], count: int) -> list[Row]:
        """The greedy choice of log-volume among vectors sqrt(quality) * n-gram features."""
        features = ngram_features([row.text for row in rows], width, seed)
        quality = np.clip([row.quality for row in rows], 0.0, 1.0)
        none = np.zeros((0, width))
        order = spread_out(np.sqrt(quality)[:, None] * features, count, ridge, none)
        return [rows[i] for i in order]

    return most_spread_out
