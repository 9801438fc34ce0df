"""The parts of a task's data: which texts are train, validation and test, and which are the examples.

Two texts are the same text here if `normalise` makes them equal. No text is in two parts.
"""

from __future__ import annotations

import functools
import hashlib
import re
import unicodedata
import zlib
from collections import Counter, defaultdict
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path

import numpy as np

from streamsynth.errors import UserError
from streamsynth.tasks.records import PROVENANCE_COLUMNS
from streamsynth.tasks.task import Example, Task

# Shares of a label's texts that are cut from train where the source has no such part.
CUT_SHARES = {"test": 0.2, "validation": 0.1}


class _LettersMarksDigits(dict):
    """For `str.translate`: keeps letters, their marks and digits, and makes anything else a space."""

    def __missing__(self, code: int) -> int:
        keep = unicodedata.category(chr(code))[0] in "LMN"
        return self.setdefault(code, code if keep else ord(" "))


_TABLE = _LettersMarksDigits()


@functools.lru_cache(maxsize=1 << 16)
def normalise(text: str) -> str:
    """A text without case, punctuation and the kind of its white space, for telling whether two are the same.

    A text that consists of signs alone, such as an emoji, keeps them.

    >>> normalise("  Isn't it \\n GOOD? ")
    'isn t it good'
    """
    # The second normalisation makes the result a fixed point: folding can undo the first.
    folded = unicodedata.normalize("NFKC", unicodedata.normalize("NFKC", text).casefold())
    return " ".join(folded.translate(_TABLE).split()) or " ".join(folded.split())


def build_task(
    *,
    name: str,
    description: str,
    labels: Sequence[str],
    fields: tuple[str, ...],
    kind: str = "classification",
    parts: Mapping[str, Sequence[Example]],
    test: str,
    commonest: int | None,
    examples_per_label: int,
    seed: int,
    skipped_rows: int,
) -> Task:
    """Makes a Task of what a source has read.

    Args:
      labels: all labels, in the order of their indices.
      kind: "classification" or "qa". Of a question and its answer the question decides what is the same text.
      parts: the examples of "train", and of "validation" and "test" where the source has them. A part that is
        missing is cut from train; the cut depends on the texts alone, so that all seeds share one test set.
      test: the part that becomes `Task.test`, "test" or "validation".
      commonest: how many labels to keep, the most frequent ones of train; None keeps all.
      seed: draws the examples.

    Raises:
      UserError: a text column with a reserved name, fewer than two labels, no test row, or a label with too
        few examples.
    """
    reserved = {"label", *PROVENANCE_COLUMNS}.intersection(fields)
    if reserved:
        raise UserError(
            f"the task {name} has a text column {min(reserved)!r}, which means something else in a data set "
            "that is written: choose or name another column"
        )
    parts = dict(parts)
    if commonest is not None:
        labels = commonest_labels(name, parts["train"], labels, commonest)
        parts = {part: [row for row in rows if row.label in labels] for part, rows in parts.items()}
    if len(labels) < 2 and kind == "classification":
        raise UserError(f"the task {name} has {len(labels)} label(s): classification needs two or more")
    train = without_texts_of(parts["train"], [*parts.get("test", ()), *parts.get("validation", ())], kind)
    for part, share in CUT_SHARES.items():
        if part not in parts:
            train, parts[part] = cut(train, share, kind)
    if not parts[test]:
        raise UserError(f"the {test} part of the task {name} has no usable row: add rows to it")
    return Task(
        name=name,
        description=description,
        labels=tuple(labels),
        examples=draw_examples(name, train, labels, examples_per_label, seed, kind),
        train=tuple(train),
        test=tuple(parts[test]),
        fields=fields,
        kind=kind,
        skipped_rows=skipped_rows,
    )


def commonest_labels(name: str, rows: Sequence[Example], labels: Sequence[str], count: int) -> list[str]:
    """The `count` most frequent labels, in the order of `labels`, which also decides between equal counts."""
    if count > len(labels):
        raise UserError(f"the option commonest={count} is more than the {len(labels)} labels of {name}")
    frequency = Counter(row.label for row in rows)
    chosen = sorted(labels, key=lambda label: -frequency[label])[:count]
    return [label for label in labels if label in chosen]


def same_text(row: Example, kind: str) -> str:
    """Equal for two rows if they are the same text: for a question and its answer, the same question."""
    return normalise(row.fields[0] if kind == "qa" else row.text)


def without_texts_of(
    rows: Sequence[Example], others: Sequence[Example], kind: str = "classification"
) -> list[Example]:
    """The rows whose text is not among the others' texts."""
    taken = {same_text(row, kind) for row in others}
    return [row for row in rows if same_text(row, kind) not in taken]


def cut(
    rows: Sequence[Example], share: float, kind: str = "classification"
) -> tuple[list[Example], list[Example]]:
    """Cuts the share of each label's texts off `rows` and returns (the rest, what was cut).

    The texts with the smallest hashes are cut: no seed, and the order of the rows does not matter. Of a label
    with at least two texts, at least one is cut. Rows with the same text fall on the same side.
    """
    texts: dict[str, set[str]] = defaultdict(set)
    for row in rows:
        texts[row.label].add(same_text(row, kind))
    chosen: set[str] = set()
    for of_label in texts.values():
        count = max(round(share * len(of_label)), min(1, len(of_label) - 1))
        chosen.update(sorted(of_label, key=_digest)[:count])
    rest = [row for row in rows if same_text(row, kind) not in chosen]
    return rest, [row for row in rows if same_text(row, kind) in chosen]


def draw_examples(
    name: str,
    rows: Sequence[Example],
    labels: Sequence[str],
    per_label: int,
    seed: int,
    kind: str = "classification",
) -> tuple[Example, ...]:
    """Draws `per_label` rows a label, with distinct texts that no row of another label has.

    The draw for fewer examples is the beginning of the draw for more, and labels do not influence each other.
    """
    labels_of: dict[str, set[str]] = defaultdict(set)
    first: dict[tuple[str, str], Example] = {}
    for row in rows:
        text = same_text(row, kind)
        labels_of[text].add(row.label)
        first.setdefault((row.label, text), row)
    candidates: dict[str, list[Example]] = {label: [] for label in labels}
    for (label, text), row in first.items():
        if len(labels_of[text]) == 1:
            candidates[label].append(row)
    drawn: list[Example] = []
    for label, usable in candidates.items():
        if len(usable) < per_label:
            if kind == "qa":
                raise UserError(
                    f"the task {name} has {len(usable)} usable training question(s), but "
                    f"examples_per_label={per_label}: add rows or lower examples_per_label"
                )
            raise UserError(
                f"the label {label!r} of the task {name} has {len(usable)} usable training text(s), but "
                f"examples_per_label={per_label}: add rows, lower examples_per_label, or leave rare labels "
                "out with the option commonest=NUMBER"
            )
        order = _label_rng(seed, label).permutation(len(usable))
        drawn.extend(usable[i] for i in order[:per_label])
    return tuple(drawn)


def limit(
    rows: Sequence[Example], count: int, seed: int, always: Collection[Example] = ()
) -> tuple[Example, ...]:
    """At most `count` rows, drawn with the labels' shares kept, in their old order.

    The rows in `always` come first. The draw for a smaller count is part of the draw for a larger one.
    """
    if len(rows) <= count:
        return tuple(rows)
    indices: dict[str, list[int]] = defaultdict(list)
    for i, row in enumerate(rows):
        indices[row.label].append(i)
    # A label's i-th of n rows, in random order, stands at (i + 1/2) / n: every beginning has fair shares.
    position = np.empty(len(rows))
    fixed = {row.id for row in always}
    for label, own in indices.items():
        in_line = sorted(_label_rng(seed, label).permutation(own), key=lambda i: rows[i].id not in fixed)
        position[in_line] = (np.arange(len(own)) + 0.5) / len(own)
    position[[i for i, row in enumerate(rows) if row.id in fixed]] = 0
    chosen = np.sort(np.argsort(position, kind="stable")[:count])
    return tuple(rows[i] for i in chosen)


def check_name(name: str, origin: str) -> str:
    """Returns the name if it can be a folder's name in the workdir; `origin` says where it comes from."""
    if not re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9_.-]*", name):
        raise UserError(
            f"the task name {name!r} from {origin} must consist of letters, digits, '_', '-' and '.' and not "
            "begin with '-' or '.': choose another with the option name=NAME"
        )
    return name


def name_of_folder(folder: Path) -> str:
    """A task name made of a folder's own name, which may be empty where that has no usable character."""
    return re.sub(r"[^A-Za-z0-9_.-]+", "-", folder.resolve().name).strip("-.")


def _digest(text: str) -> bytes:
    return hashlib.blake2b(text.encode(), digest_size=16).digest()


def _label_rng(seed: int, label: str) -> np.random.Generator:
    return np.random.default_rng([seed, zlib.crc32(label.encode())])
