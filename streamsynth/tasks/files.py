"""Tasks from a user's folder: {train,validation,test}.{jsonl,jsonl.gz,csv} and perhaps task.json.

Only train is required. The text stands in the column "text", or in one or two columns that task.json names as
"fields", or in the only one or two columns beside "label". task.json may hold "name", "kind", "description",
"labels", "fields" and "attributes" (see `attributes`); its other keys are left alone.

Of the kind "qa" (or "math", which means the same here) are questions in the column "question" and their
answers in "answer"; without a column "label" such a set needs no task.json. Other columns are left alone.
"""

from __future__ import annotations

import csv
import dataclasses
import gzip
import json
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from streamsynth.errors import UserError
from streamsynth.tasks import attributes as attributes_lib
from streamsynth.tasks import question_answer, splits, verifiers
from streamsynth.tasks.attributes import Attribute
from streamsynth.tasks.records import PROVENANCE_COLUMNS, BadRecord, BadRows, examples_from
from streamsynth.tasks.task import QUESTION, Example, Task

PARTS = ("train", "validation", "test")
SUFFIXES = (".jsonl", ".jsonl.gz", ".csv")
# What task.json may call a kind, and which it is.
KINDS = {"classification": "classification", "qa": "qa", "math": "qa"}

Records = Iterator[tuple[int, dict[str, Any] | BadRecord]]


@dataclasses.dataclass(frozen=True)
class _Card:
    """What task.json says; None where it says nothing."""

    name: str | None = None
    kind: str | None = None
    description: str | None = None
    labels: tuple[str, ...] | None = None
    fields: tuple[str, ...] | None = None
    attributes: tuple[Attribute, ...] = ()


def load_task(
    directory: str,
    *,
    name: str | None = None,
    commonest: int | None = None,
    test: str = "test",
    examples_per_label: int = 8,
    seed: int = 0,
    on_bad_row: str = "error",
    verifier: str | None = None,
) -> Task:
    """Loads a folder as a task.

    Args:
      directory: the folder.
      name: name of the task; by default that of task.json, or else the folder's.
      commonest: keeps so many labels, the most frequent ones.
      test: the part to measure on, "test" or "validation".
      examples_per_label: k, the label budget per label.
      seed: draws the examples; the parts do not depend on it.
      on_bad_row: "error" or "skip".
      verifier: "package.module:function", see `verifiers`.

    Raises:
      UserError: names folder, file and line and says how to mend it. A file that cannot be read to its end is
        an error under "skip", too.
    """
    folder = Path(directory).expanduser()
    paths = _find_parts(folder)
    if test not in ("test", "validation"):
        raise UserError(f"the option test={test} of {folder} must be test or validation")
    card = _read_card(folder)
    kind = card.kind or _find_kind(paths["train"])
    if kind == "qa":
        fields = card.fields or question_answer.FIELDS
        if fields != question_answer.FIELDS:
            raise UserError(
                f"the 'fields' of {folder / 'task.json'} must be question and answer, or left out"
            )
    else:
        fields = card.fields or _find_fields(paths["train"])
    if kind == "qa" and commonest is not None:
        raise UserError(f"{folder} holds questions and answers, which have no labels: leave out commonest")
    bad_rows = BadRows(on_bad_row)

    def read(part: str, labels: tuple[str, ...] | None) -> list[Example]:
        records = _records(paths[part])
        return list(
            examples_from(
                _of_one_label(records) if kind == "qa" else records,
                part=part,
                place=f"{paths[part]}, line",
                fields=fields,
                labels=labels,
                bad_rows=bad_rows,
            )
        )

    known_labels = (QUESTION,) if kind == "qa" else card.labels
    train = read("train", known_labels)
    if not train:
        wanted = "a question and an answer" if kind == "qa" else "a text and a label"
        raise UserError(f"{paths['train']} has no usable row: add rows with {wanted}")
    labels = known_labels or tuple(sorted({row.label for row in train}))
    others = {part: read(part, labels) for part in paths if part != "train"}
    name = name or card.name or splits.name_of_folder(folder)
    some_labels = ", ".join(labels[:8]) + ", ..." * (len(labels) > 8)
    without_description = "Questions and answers." if kind == "qa" else f"Texts of the kinds {some_labels}."
    task = splits.build_task(
        name=splits.check_name(name, f"the spec or {folder}"),
        description=card.description or without_description,
        labels=labels,
        fields=fields,
        kind=kind,
        parts={"train": train, **others},
        test=test,
        commonest=commonest,
        examples_per_label=examples_per_label,
        seed=seed,
        skipped_rows=bad_rows.count,
    )
    task = dataclasses.replace(task, attributes=card.attributes)
    if kind == "qa":
        task = question_answer.with_normalised_answers(task)
    return task if verifier is None else verifiers.with_verifier(task, verifier)


def _find_parts(folder: Path) -> dict[str, Path]:
    if not folder.is_dir():
        raise UserError(f"there is no folder {folder}: give the path of one with a train.jsonl or train.csv")
    paths = {}
    for part in PARTS:
        found = [folder / (part + suffix) for suffix in SUFFIXES if (folder / (part + suffix)).is_file()]
        if len(found) > 1:
            raise UserError(f"{folder} has {' and '.join(path.name for path in found)}: keep one of them")
        if found:
            paths[part] = found[0]
    if "train" not in paths:
        raise UserError(f"the folder {folder} has none of train.jsonl, train.jsonl.gz and train.csv: add one")
    return paths


def _read_card(folder: Path) -> _Card:
    path = folder / "task.json"
    if not path.is_file():
        return _Card()
    try:
        content = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is not JSON ({error}): mend or remove it") from error
    if not isinstance(content, dict):
        raise UserError(f"{path} must hold one JSON object")
    for key in ("name", "kind", "description"):
        if key in content and not (isinstance(content[key], str) and content[key].strip()):
            raise UserError(f"the key {key!r} of {path} must be a text")
    kind = content.get("kind")
    if kind is not None and kind not in KINDS:
        raise UserError(f"the kind {kind!r} of {path} cannot be loaded: there are {', '.join(KINDS)}")
    lists: dict[str, tuple[str, ...] | None] = {}
    for key in ("labels", "fields"):
        value = content.get(key) or None
        if value is not None:
            if not (isinstance(value, list) and all(isinstance(x, str) and x.strip() for x in value)):
                raise UserError(f"the key {key!r} of {path} must be a list of texts")
            value = tuple(" ".join(item.split()) for item in value)
            if len(set(value)) < len(value):
                raise UserError(f"the key {key!r} of {path} names something twice")
        lists[key] = value
    if lists["fields"] is not None and len(lists["fields"]) > 2:
        raise UserError(f"the key 'fields' of {path} must name one or two columns, the text of a row")
    known = {key: content[key] for key in ("name", "description") if key in content}
    attributes = attributes_lib.read(content.get("attributes") or {}, str(path))
    return _Card(**known, kind=kind and KINDS[kind], attributes=attributes, **lists)


def _find_kind(path: Path) -> str:
    columns = _columns(path)
    return (
        "qa" if "label" not in columns and set(question_answer.FIELDS) <= set(columns) else "classification"
    )


def _columns(path: Path) -> tuple[str, ...]:
    """Those of the first record that has more than a label."""
    readable = (tuple(record) for _, record in _records(path) if isinstance(record, dict))
    columns = next((columns for columns in readable if set(columns) - {"label"}), None)
    if columns is None:
        raise UserError(f"{path} has no usable row: add rows with a text and a label")
    return columns


def _find_fields(path: Path) -> tuple[str, ...]:
    """The text columns of labelled texts."""
    columns = _columns(path)
    if "text" in columns:
        return ("text",)
    fields = tuple(column for column in columns if column != "label" and column not in PROVENANCE_COLUMNS)
    if len(fields) not in (1, 2):
        raise UserError(
            f"{path} has the columns {', '.join(columns)}: name the text column 'text', or list one or two "
            'columns as "fields" in task.json'
        )
    return fields


def _of_one_label(records: Records) -> Records:
    for number, record in records:
        yield number, record if isinstance(record, BadRecord) else {**record, "label": QUESTION}


def _records(path: Path) -> Records:
    return _csv_records(path) if path.suffix == ".csv" else _jsonl_records(path)


def _jsonl_records(path: Path) -> Records:
    for number, line in _lines(path):
        if not line.strip():
            continue
        try:
            record = json.loads(line.decode("utf-8-sig" if number == 1 else "utf-8"))
        except UnicodeDecodeError:
            yield number, BadRecord("it is not UTF-8")
        except (ValueError, RecursionError):
            yield number, BadRecord("it is not JSON")
        else:
            yield number, record if isinstance(record, dict) else BadRecord("it is no JSON object")


def _csv_records(path: Path) -> Records:
    def text_lines() -> Iterator[str]:
        for number, line in _lines(path):
            try:
                yield line.decode("utf-8-sig" if number == 1 else "utf-8")
            except UnicodeDecodeError as error:
                raise UserError(f"{path}, line {number}, is not UTF-8: save the file as UTF-8") from error

    reader = csv.reader(text_lines(), strict=True)
    try:
        header = [column.strip() for column in next(reader, [])]
        if "label" not in header and not set(question_answer.FIELDS) <= set(header):
            raise UserError(
                f"{path}, line 1, has no column 'label' but {', '.join(map(repr, header)) or 'none'}: begin "
                "the file with a header such as text,label or question,answer"
            )
        if len(set(header)) < len(header):
            raise UserError(f"{path}, line 1, names a column twice: rename one")
        last_line = reader.line_num
        for cells in reader:
            number, last_line = last_line + 1, reader.line_num  # a quoted cell may run over several lines
            if not cells:
                continue
            if len(cells) != len(header):
                yield number, BadRecord(f"it has {len(cells)} cell(s) where the header has {len(header)}")
            else:
                yield number, dict(zip(header, cells, strict=True))
    except csv.Error as error:
        # What follows a wrong quote cannot be told apart from text any more.
        place = f"{path}, line {reader.line_num}"
        raise UserError(f"{place}, is not CSV ({error}): mend the quotes there") from error


def _lines(path: Path) -> Iterator[tuple[int, bytes]]:
    """Numbered lines of a plain or gzipped file, from 1 and with their ends."""
    try:
        with gzip.open(path, "rb") if path.suffix == ".gz" else open(path, "rb") as file:
            yield from enumerate(file, start=1)
    except EOFError as error:
        raise UserError(f"{path} is a truncated gzip file: copy or download it again") from error
    except (gzip.BadGzipFile, zlib.error) as error:
        raise UserError(f"{path} is not a sound gzip file ({error}): copy or download it again") from error
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror or error}") from error
