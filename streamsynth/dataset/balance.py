"""As many rows of each label."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence

from streamsynth.dataset.rows import Row


def best_first(rows: Sequence[Row]) -> list[Row]:
    """Rows by falling quality; rows of equal quality keep their order."""
    return sorted(rows, key=lambda row: -row.quality)


def balanced(rows: Sequence[Row], per_label: int | None = None) -> list[Row]:
    """The best rows, the same number of every label that occurs.

    Args:
      rows: any rows. A label that none of them has cannot be balanced and is not asked for.
      per_label: at most so many rows a label; None takes as many as the scarcest label has.

    Returns:
      Rows by rounds: the best of each label, then the second best of each, and so on. So each beginning of
      the result is balanced too, and as good as it can be.
    """
    of_label: dict[str, list[Row]] = defaultdict(list)
    for row in best_first(rows):
        of_label[row.label].append(row)
    count = min(map(len, of_label.values()), default=0)
    if per_label is not None:
        count = min(count, per_label)
    return [of_label[label][i] for i in range(count) for label in sorted(of_label)]
