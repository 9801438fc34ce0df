"""What is kept of one task: which texts were there before, and the best of each cell. On the host."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable

from streamsynth.dataset.near_duplicates import NearDuplicates
from streamsynth.dataset.rows import Row
from streamsynth.tasks.task import Example, Task


@dataclasses.dataclass(frozen=True)
class _Elite:
    """A kept row, with the place it would have as an example."""

    rank: tuple[float, float, int]
    example: Example


class Kept:
    """The kept texts of a task, by its rows alone: a resumed run reads them again and has the same.

    The best of a cell (a label and a combination of attributes) are those of highest quality; of equal ones
    those that added more to what their batch had, then the earlier ones. They are what was validated: no row
    is kept that the judges did not accept.
    """

    def __init__(self, task: Task, threshold: float, best: int, rows: Iterable[Row] = ()):
        """
        Args:
          task: whose texts they are.
          threshold: similarity from which two texts are near-duplicates.
          best: how many are remembered of each cell.
          rows: kept so far, in their order.
        """
        self._task, self._best, self._count = task, best, 0
        self._texts = NearDuplicates(threshold)
        self._cells: dict[tuple[int, int], list[_Elite]] = {}
        for row in rows:
            self._texts.add(task.identity(row.text))
            self.remember(row)

    def seen(self, identity: str) -> bool:
        """Whether a text (its `Task.identity`) is a near-duplicate of a kept one."""
        return self._texts.seen(identity)

    def add(self, identity: str) -> None:
        """From now on the text is one that was kept."""
        self._texts.add(identity)

    def remember(self, row: Row) -> None:
        """Lets a kept row compete for a place among the best of its cell."""
        task = self._task
        values = tuple(row.attributes.get(one.name) for one in task.attributes)
        names = [tuple(value.name for value in cell) for cell in task.cells]
        cell = names.index(values) if values in names else 0
        example = Example(f"{task.name}/kept/{self._count}", row.fields, row.label)
        rank = (-row.quality, -row.scores.get("diversity", 0.0), self._count)
        place = (task.labels.index(row.label), cell)
        elites = [*self._cells.get(place, ()), _Elite(rank, example)]
        self._cells[place] = sorted(elites, key=lambda elite: elite.rank)[: self._best]
        self._count += 1

    def best(self, label: int, cell: int) -> tuple[Example, ...]:
        """The best texts of a label (its index) and cell, best first; their ids are TASK/kept/NUMBER."""
        return tuple(elite.example for elite in self._cells.get((label, cell), ()))

    def counts(self) -> dict[str, int]:
        """How many are remembered, by label, all cells together."""
        counts = dict.fromkeys(self._task.labels, 0)
        for (label, _), elites in self._cells.items():
            counts[self._task.labels[label]] += len(elites)
        return counts
