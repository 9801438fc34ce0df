"""As many rows of each label."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence

from streamsynth.dataset.rows import Row

# Which rows of a label are taken: all its rows, and how many of them are wanted.
Select = Callable[[Sequence[Row], int], Sequence[Row]]


def best_first(rows: Sequence[Row]) -> list[Row]:
    """Rows by falling quality; rows of equal quality keep their order."""
    return sorted(rows, key=lambda row: -row.quality)


def best(rows: Sequence[Row], count: int) -> list[Row]:
    """The `count` rows of highest quality."""
    return best_first(rows)[:count]


def balanced(rows: Sequence[Row], per_label: int | None = None, choose: Select = best) -> list[Row]:
    """The same number of rows of every label that occurs, by default the best ones.

    Args:
      rows: any rows. A label that none of them has cannot be balanced and is not asked for.
      per_label: at most so many rows a label; None takes as many as the scarcest label has.
      choose: which rows of a label.

    Returns:
      Rows by rounds: the first of each label, then the second of each, and so on. So each beginning of the
      result is balanced too, and as good as it can be.
    """
    of_label: dict[str, list[Row]] = defaultdict(list)
    for row in best_first(rows):
        of_label[row.label].append(row)
    count = min(map(len, of_label.values()), default=0)
    if per_label is not None:
        count = min(count, per_label)
    chosen = [choose(of_label[label], count) for label in sorted(of_label)]
    return [of_one[i] for i in range(count) for of_one in chosen]
