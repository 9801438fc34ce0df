"""What is asked for: a task and its labelled examples."""

from __future__ import annotations

import dataclasses
import functools
import zlib
from collections.abc import Callable

from streamsynth.tasks.attributes import Attribute, Cell, cells

# Between the fields of a two-field text (premise and hypothesis) wherever it travels as one string.
# It is one piece of the policy's vocabulary.
FIELD_SEPARATOR = "<field>"
# The one label of a question-answer task.
QUESTION = "question"


@dataclasses.dataclass(frozen=True)
class Example:
    """One labelled text. `fields` holds one string, or two as in sentence pairs."""

    id: str
    fields: tuple[str, ...]
    label: str

    @property
    def text(self) -> str:
        """The fields as the policy reads and writes them: one string."""
        return join_fields(self.fields)


@dataclasses.dataclass(frozen=True)
class Brief:
    """What a prompt says of a task: its description, the names of its fields, its kind."""

    description: str
    fields: tuple[str, ...]
    kind: str


@dataclasses.dataclass(frozen=True)
class Task:
    """A data set that is wanted.

    Attributes:
      name: unique within a stream; also the name of its folder in the workdir.
      description: one sentence.
      labels: label names, in the order of their indices (K labels).
      examples: the label budget: k per label. All that learning may see of the task's labels.
      train: all real training data; only the anchor "real" is trained on it.
      test: the real test set; only the final measure sees it.
      fields: names of the fields, `("text",)` or for instance `("premise", "hypothesis")`.
      kind: "classification"; or "qa", whose fields are a question and its answer, and whose one label,
        `QUESTION`, stands for all of them (K = 1).
      attributes: in which ways its texts differ beside their label; empty where nothing is said of it.
      verifier: test of a text against a label where one exists (embedded worlds, or the user's own), else
        None.
      skipped_rows: malformed rows that were left out under `on_bad_row="skip"`.
    """

    name: str
    description: str
    labels: tuple[str, ...]
    examples: tuple[Example, ...]
    train: tuple[Example, ...]
    test: tuple[Example, ...]
    fields: tuple[str, ...] = ("text",)
    kind: str = "classification"
    attributes: tuple[Attribute, ...] = ()
    verifier: Callable[[str, str], bool] | None = None
    skipped_rows: int = 0

    @functools.cached_property
    def cells(self) -> tuple[Cell, ...]:
        """The combinations of the attributes' values: C of them, one empty one without attributes."""
        return cells(self.attributes)

    @property
    def brief(self) -> Brief:
        return Brief(self.description, self.fields, self.kind)

    @property
    def checksum(self) -> int:
        """CRC-32 of all that it says and of its texts; the verifier is left out."""
        found = zlib.crc32(repr((self.name, self.brief, self.labels, self.attributes)).encode())
        for example in (*self.examples, *self.train, *self.test):
            found = zlib.crc32(f"{example.id}\n{example.text}\n{example.label}".encode(), found)
        return found

    def identity(self, text: str) -> str:
        """What decides whether a text is another's copy: of a question and its answer the question."""
        return text.partition(FIELD_SEPARATOR)[0].strip() if self.kind == "qa" else text

    def examples_of(self, label: str) -> tuple[Example, ...]:
        """The examples of one label, in their fixed order."""
        return tuple(example for example in self.examples if example.label == label)


def join_fields(fields: tuple[str, ...]) -> str:
    return f" {FIELD_SEPARATOR} ".join(fields)


def split_fields(text: str, count: int) -> tuple[str, ...] | None:
    """The `count` non-empty fields of a text as the policy wrote it, or None if it has another form."""
    parts = tuple(part.strip() for part in text.split(FIELD_SEPARATOR))
    return parts if len(parts) == count and all(parts) else None
