"""Tasks from TensorFlow Datasets, read without TensorFlow: random access to ArrayRecord or Parquet files."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import tensorflow_datasets as tfds

from streamsynth.errors import UserError
from streamsynth.tasks import question_answer, splits
from streamsynth.tasks.records import BadRecord, BadRows, examples_from
from streamsynth.tasks.task import QUESTION, Example, Task


def load_task(
    dataset: str,
    *,
    text: str | None = None,
    label: str | None = None,
    question: str | None = None,
    answer: str | None = None,
    data_dir: str | None = None,
    name: str | None = None,
    commonest: int | None = None,
    test: str = "test",
    examples_per_label: int = 8,
    seed: int = 0,
    on_bad_row: str = "error",
) -> Task:
    """Loads a TFDS data set as a task.

    Args:
      dataset: NAME, NAME/CONFIG or NAME/CONFIG:VERSION as TFDS writes them, prepared on the first use if it
        can be; or the folder of one prepared version, which needs no code of the data set.
      text: the text feature, or two with a comma between them; by default "text", or else the only one or two
        text features beside the label, by alphabet.
      label: the label feature, a ClassLabel (its names become the labels) or a text; by default "label".
      question, answer: the text features of a question-answer task, in place of text and label.
      data_dir: where TFDS keeps its data sets.
      name: name of the task; by default that of the data set.
      commonest: keeps so many labels, the most frequent ones.
      test: the split to measure on. Where the data set has no split "test", one is cut from train.
      examples_per_label: k, the label budget per label.
      seed: draws the examples; the parts do not depend on it.
      on_bad_row: "error" or "skip". An unlabelled row (-1) is a bad row.

    Raises:
      UserError: names the data set, feature, split or row and says how to mend it.
    """
    sources, info = _open(dataset, data_dir)
    if "train" not in sources:
        raise UserError(f"the TFDS set {dataset} has no split train, only {', '.join(sorted(sources))}")
    if test == "train" or (test != "test" and test not in sources):
        raise UserError(
            f"the option test={test} must be another split of the TFDS set {dataset} than train; there are "
            f"{', '.join(sorted(sources))}"
        )
    features = dict(sorted(info.features.items()))  # TFDS reads them from its files in no fixed order
    if question or answer:
        if not (question and answer) or text or label or commonest:
            raise UserError(
                f"the TFDS set {dataset} is read as questions with the options question and answer together, "
                "and without text, label and commonest"
            )
        kind, names = "qa", (QUESTION,)
        columns = _question_features(dataset, features, question, answer)
    else:
        kind, label = "classification", label or "label"
        columns = {field: field for field in _text_features(dataset, features, text, label)}
        names = _label_names(dataset, features, label)
    fields = tuple(columns)
    bad_rows = BadRows(on_bad_row)

    def read(split: str, labels: tuple[str, ...] | None) -> list[Example]:
        records = _records(sources[split], columns, label, names)
        place = f"{dataset}, split {split}, row"
        return list(
            examples_from(records, part=split, place=place, fields=fields, labels=labels, bad_rows=bad_rows)
        )

    train = read("train", names)
    labels = names or tuple(sorted({row.label for row in train}))
    parts = {"train": train}
    # The other splits may be large or unlabelled: beside train only the one that is measured on is read.
    if test in sources:
        parts["test"] = read(test, labels)
    parts["validation"] = []
    task = splits.build_task(
        name=splits.check_name(name or info.name, "the spec"),
        description=_first_sentence(info.description) or f"Texts of the TFDS set {info.name}.",
        labels=labels,
        fields=fields,
        kind=kind,
        parts=parts,
        test="test",
        commonest=commonest,
        examples_per_label=examples_per_label,
        seed=seed,
        skipped_rows=bad_rows.count,
    )
    return question_answer.with_normalised_answers(task) if kind == "qa" else task


def _open(dataset: str, data_dir: str | None) -> tuple[dict[str, Sequence[Any]], tfds.core.DatasetInfo]:
    """All splits as random-access sources, and the description of the data set."""
    folder = Path(dataset).expanduser()
    try:
        if folder.is_dir():
            builder = tfds.builder_from_directory(folder)
            return builder.as_data_source(), builder.info
        sources = tfds.data_source(dataset, data_dir=data_dir)
        return sources, next(iter(sources.values())).dataset_info
    except tfds.core.DatasetNotFoundError as error:
        raise UserError(
            f"there is no TFDS set {dataset!r}: check name and version, or give the folder of a prepared set"
        ) from error
    except NotImplementedError as error:  # what TFDS raises for a file format without random access
        raise UserError(
            f"the TFDS set {dataset} is not prepared in a format with random access: prepare it with "
            'file_format="array_record", or choose another data_dir'
        ) from error
    except ImportError as error:
        raise UserError(
            f"preparing the TFDS set {dataset} needs a package that is not there ({error}): prepare it "
            'elsewhere with file_format="array_record" and give its place with the option data_dir'
        ) from error
    except (ValueError, AssertionError, OSError) as error:  # wrong config or version, no network, no data
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise UserError(f"cannot open the TFDS set {dataset}: {reason}") from error


def _text_features(
    dataset: str, features: Mapping[str, Any], text: str | None, label: str
) -> tuple[str, ...]:
    known = [
        key for key, feature in features.items() if isinstance(feature, tfds.features.Text) and key != label
    ]
    if text is not None:
        fields = tuple(text.split(","))
        if len(fields) > 2 or len(set(fields)) < len(fields) or not set(fields) <= set(known):
            raise UserError(
                f"the option text={text} must name one or two text features of the TFDS set {dataset}: "
                f"{', '.join(known) or 'it has none'}"
            )
        return fields
    fields = ("text",) if "text" in known else tuple(known)
    if len(fields) not in (1, 2):
        raise UserError(
            f"the TFDS set {dataset} has the text features {', '.join(known) or '(none)'}: choose one or two "
            "with the option text=NAME or text=NAME,NAME"
        )
    return fields


def _question_features(
    dataset: str, features: Mapping[str, Any], question: str, answer: str
) -> dict[str, str]:
    """The features that hold the fields of a question-answer task."""
    known = [key for key, feature in features.items() if isinstance(feature, tfds.features.Text)]
    for name, feature in zip(question_answer.FIELDS, (question, answer), strict=True):
        if feature not in known:
            raise UserError(
                f"the option {name}={feature} must name a text feature of the TFDS set {dataset}: "
                f"{', '.join(known) or 'it has none'}"
            )
    return dict(zip(question_answer.FIELDS, (question, answer), strict=True))


def _label_names(dataset: str, features: Mapping[str, Any], label: str) -> tuple[str, ...] | None:
    """The names of a ClassLabel in their order; None where the labels are texts."""
    feature = features.get(label)
    if isinstance(feature, tfds.features.ClassLabel):
        return tuple(feature.names)
    if isinstance(feature, tfds.features.Text):
        return None
    kinds = (tfds.features.ClassLabel, tfds.features.Text)
    usable = [key for key, other in features.items() if isinstance(other, kinds)]
    raise UserError(
        f"the TFDS set {dataset} has no label or text feature {label!r}: choose one of "
        f"{', '.join(usable) or '(none)'} with the option label=NAME"
    )


def _records(
    source: Sequence[Any], columns: Mapping[str, str], label: str | None, names: tuple[str, ...] | None
) -> Iterator[tuple[int, dict[str, Any] | BadRecord]]:
    """Rows, numbered from 0 as TFDS numbers them, with their label as text under "label".

    `columns` says which feature holds each field. Without a label feature, a row has the label in `names`.
    """
    for number, row in enumerate(source):
        try:
            record = {field: row[feature].decode() for field, feature in columns.items()}
            if label is None:
                (record["label"],) = names
            elif names is None:
                record["label"] = row[label].decode()
            elif 0 <= row[label] < len(names):
                record["label"] = names[row[label]]
            else:
                raise BadRecord(f"its label {row[label]} has no name, as in an unlabelled split")
        except UnicodeDecodeError:
            yield number, BadRecord("it is not UTF-8")
        except BadRecord as problem:
            yield number, problem
        else:
            yield number, record


def _first_sentence(description: str | None) -> str:
    text = " ".join((description or "").split())
    sentence, stop, _ = text.partition(". ")
    return sentence + "." if stop else sentence
