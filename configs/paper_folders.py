r"""Makes the folders of the paper's stream: Yelp-5, Amazon-5, Yahoo-10 and MNLI-3, as `files:DIR` reads them.

    python configs/paper_folders.py --output=data --yelp5=yelp_review_full_csv.tgz \
        --amazon5=amazon_review_full_csv.tgz --yahoo10=yahoo_answers_csv.tgz --mnli3=multinli_1.0.zip

Name the sets you have; each becomes a folder of its own (data/yelp5, ...) with train.jsonl, test.jsonl and
task.json. A source is the archive (.tgz, .tar.gz, .zip) as it was downloaded, or the folder it unpacks to.

Of each label 4,000 training and 1,000 test rows are drawn (--per_label, --test_per_label; 0 takes all). The
same seed draws the same rows, and a smaller draw is part of a larger one. A set is read once, and no more
than the draw is held in memory. The test rows of MNLI are those of dev_matched, since its test labels are not
public; no set has a validation part, so that the reader cuts one from train.

Where the archives are published (please read the terms of each set there):
  Yelp, Amazon, Yahoo: by Xiang Zhang, for "Character-level Convolutional Networks for Text Classification"
    (2015): the readme of github.com/zhangxiangxiao/Crepe links to the folder with the archives
    (*_csv.tar.gz). fast.ai mirrors them (*_csv.tgz); see registry.opendata.aws/fast-ai-nlp.
  MNLI: the page of MultiNLI at New York University, cims.nyu.edu/~sbowman/multinli (multinli_1.0.zip).

The mirrors on Hugging Face are parquet files, which need the library `datasets`. These lines (not tested with
it) write one as the folder that --yelp5=yelp_review_full_csv takes:

    import csv, os
    from datasets import load_dataset
    os.makedirs("yelp_review_full_csv")
    for part in ("train", "test"):
        with open(f"yelp_review_full_csv/{part}.csv", "w", newline="", encoding="utf-8") as file:
            for row in load_dataset("Yelp/yelp_review_full", split=part):
                csv.writer(file).writerow([row["label"] + 1, row["text"]])

Likewise community-datasets/yahoo_answers_topics for --yahoo10, with the cells topic + 1, question_title,
question_content and best_answer. Classes count from 1 in the archives and from 0 in the mirrors.
"""

import argparse
import contextlib
import csv
import dataclasses
import heapq
import json
import random
import re
import sys
import tarfile
import tempfile
import zipfile
import zlib
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import BinaryIO

from streamsynth.errors import UserError
from streamsynth.tasks.task import FIELD_SEPARATOR

NO_LABEL = "-"  # of a pair on whose label the annotators of MultiNLI did not agree
STARS = ("1 star", "2 stars", "3 stars", "4 stars", "5 stars")

# A label and the texts of the fields, as they stand in the source.
Row = tuple[str, tuple[str, ...]]


@dataclasses.dataclass(frozen=True)
class Source:
    """A published set and the task it becomes.

    Attributes:
      name: of the task, its folder and its option.
      inside: the folder in which the archive holds its files.
      files: name of the file of each part.
      columns: of a row, the label's first: keys of a JSON object, or what a cell of a headless CSV holds.
      read: gives the rows of an open file; the second argument names it in messages.
    """

    name: str
    inside: str
    files: dict[str, str]
    columns: tuple[str, ...]
    read: Callable[[BinaryIO, str, "Source"], Iterator[Row]]
    description: str
    labels: tuple[str, ...]
    fields: tuple[str, ...] = ("text",)


def main(argv: list[str]) -> int:
    """Carries out one command line (without the program's name) and returns its exit code."""
    arguments = _parse(argv)
    try:
        output = Path(arguments.output).expanduser()
        paths = {source.name: getattr(arguments, source.name) for source in SOURCES}
        chosen = [(source, Path(paths[source.name]).expanduser()) for source in SOURCES if paths[source.name]]
        if not chosen:
            options = ", ".join(f"--{source.name}" for source in SOURCES)
            raise UserError(f"there is nothing to read: name one or more sources with {options}")
        for source, path in chosen:  # all of them, before minutes are spent on the first
            if not path.exists():
                raise UserError(f"there is no file or folder {path}: give --{source.name} the archive's path")
            if (output / source.name).exists():
                raise UserError(f"{output / source.name} exists already: remove it, or name another --output")
        per_label = {"train": arguments.per_label, "test": arguments.test_per_label}
        for source, path in chosen:
            convert(source, path, output, per_label, arguments.seed)
    except (UserError, OSError) as error:
        print(f"paper_folders: error: {error}", file=sys.stderr)
        return 2
    return 0


def convert(source: Source, path: Path, output: Path, per_label: dict[str, int], seed: int) -> None:
    """Writes the folder output/name, whole or not at all, and prints how many rows it has.

    Args:
      path: the archive or folder.
      per_label: how many rows a label "train" and "test" get; 0 takes all.
      seed: of the draw.

    Raises:
      UserError: a file that is missing, damaged or not in the published form.
    """
    mend = f"name the archive {source.inside} or its folder"
    output.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{source.name}-", dir=output) as scratch:
        folder = Path(scratch) / source.name  # the scratch folder itself is closed to other users
        folder.mkdir()
        seen: set[str] = set()
        for part, place, file in open_parts(path, source):
            if part in seen:
                raise UserError(f"{path} holds {source.files[part]} twice: unpack it and name one folder")
            seen.add(part)
            left_out: Counter[str] = Counter()
            records = clean(source.read(file, place, source), source.fields, left_out)
            if per_label[part]:
                records = draw(records, per_label[part], f"{seed} {source.name} {part}")
            counts = _write(folder / f"{part}.jsonl", records)
            for label in source.labels:
                if not counts[label]:
                    raise UserError(f"{place} has no usable row with the label {label!r}: {mend}")
            print(_summary(f"{source.name} {part}", counts, left_out))
        for part, file_name in source.files.items():
            if part not in seen:
                raise UserError(f"{path} holds no {file_name}: {mend}")
        card = {"name": source.name, "kind": "classification", "description": source.description}
        card |= {"labels": source.labels, "fields": source.fields}
        (folder / "task.json").write_text(json.dumps(card, indent=1) + "\n", encoding="utf-8")
        folder.rename(output / source.name)


def open_parts(path: Path, source: Source) -> Iterator[tuple[str, str, BinaryIO]]:
    """Yields (part, name for messages, open file) in the order of the archive.

    A file must be read before the next is asked for: a compressed archive is unpacked as a stream, once.
    """
    part_of = {file_name: part for part, file_name in source.files.items()}
    if path.is_dir():
        for file_name, part in part_of.items():
            for place in (path / file_name, path / source.inside / file_name):
                if place.is_file():
                    with open(place, "rb") as file:
                        yield part, str(place), file
        return
    with _undamaged(path):
        if zipfile.is_zipfile(path):
            with zipfile.ZipFile(path) as archive:
                for name in archive.namelist():
                    if part := part_of.get(name.rpartition("/")[2]):
                        with archive.open(name) as file:
                            yield part, f"{path}/{name}", file
            return
        if not tarfile.is_tarfile(path):
            # Often the page of a download service, saved under the archive's name.
            raise UserError(f"{path} is neither a .tgz nor a .zip archive: download it again")
        with tarfile.open(path, "r|*") as archive:
            for member in archive:
                part = part_of.get(member.name.rpartition("/")[2])
                if part and (file := archive.extractfile(member)):
                    yield part, f"{path}/{member.name}", file


def csv_rows(file: BinaryIO, place: str, source: Source) -> Iterator[Row]:
    r"""Rows of a CSV without header: the class, counted from 1, and pieces of text that become one.

    A new line is written as a backslash and an n. Quotes are doubled, as in any CSV; in the Yelp set they
    have a backslash besides.
    """
    reader = csv.reader(_text_lines(file, place))  # not strict: what was published is taken as it is
    mend = f"name the archive {source.inside}"
    last_line = 0
    try:
        for cells in reader:
            line, last_line = last_line + 1, reader.line_num  # a quoted cell may run over several lines
            if not cells:
                continue
            if len(cells) != len(source.columns):
                wanted = f"{len(source.columns)} ({', '.join(source.columns)})"
                raise UserError(f"{place}, line {line}, has {len(cells)} cell(s), not {wanted}: {mend}")
            index = cells[0].strip()
            if not (re.fullmatch("[0-9]{1,4}", index) and 1 <= int(index) <= len(source.labels)):
                wanted = f"a number from 1 to {len(source.labels)}"
                raise UserError(f"{place}, line {line}, has the class {cells[0]!r}, not {wanted}: {mend}")
            yield source.labels[int(index) - 1], (join_pieces(map(unescape, cells[1:])),)
    except csv.Error as error:
        raise UserError(f"{place}, line {last_line + 1}, is not CSV ({error}): download it again") from error


def jsonl_rows(file: BinaryIO, place: str, source: Source) -> Iterator[Row]:
    """Rows of a file with one JSON object a line; the label is NO_LABEL where there is none."""
    mend = f"name the archive {source.inside}"
    for line, content in enumerate(_text_lines(file, place), start=1):
        if not content.strip():
            continue
        try:
            record = json.loads(content)
        except (ValueError, RecursionError) as error:
            raise UserError(f"{place}, line {line}, is not JSON: download it again") from error
        for column in source.columns:
            if not (isinstance(record, dict) and isinstance(record.get(column), str)):
                raise UserError(f"{place}, line {line}, has no text {column!r}: {mend}")
        label, *texts = (record[column] for column in source.columns)
        if label not in (*source.labels, NO_LABEL):
            wanted = f"one of {', '.join(source.labels)} and {NO_LABEL}"
            raise UserError(f"{place}, line {line}, has the label {label!r}, not {wanted}: {mend}")
        yield label, tuple(texts)


def unescape(text: str) -> str:
    r"""Turns a backslash and n into a new line, and a backslash and a quote into the quote.

    >>> unescape(r'A \"fine\" place.\nReally.')
    'A "fine" place.\nReally.'
    """
    return re.sub(r'\\([n"])', lambda match: "\n" if match[1] == "n" else '"', text)


def join_pieces(pieces: Iterable[str]) -> str:
    """Joins title and text, or a question and its answer; a title without a sign at its end gets a full stop.

    >>> join_pieces(["Great CD", "", "I love it"])
    'Great CD. I love it'
    """
    kept = [piece.strip() for piece in pieces if piece.strip()]
    ended = [piece if piece[-1] in ".!?:;,…" else piece + "." for piece in kept[:-1]]
    return " ".join(ended + kept[-1:])


def clean(rows: Iterable[Row], fields: tuple[str, ...], left_out: Counter[str]) -> Iterator[dict[str, str]]:
    """Rows as records that `files:` takes, with white space collapsed.

    Rows it would refuse are left out and counted by reason in `left_out`.
    """
    for label, texts in rows:
        texts = tuple(" ".join(text.split()) for text in texts)
        if label == NO_LABEL:
            left_out["without an agreed label"] += 1
        elif not all(texts):
            left_out["empty"] += 1
        elif any(FIELD_SEPARATOR in text for text in texts):
            left_out[f"containing {FIELD_SEPARATOR}"] += 1
        elif any(re.search("[\ud800-\udfff]", text) for text in texts):
            left_out["with half a character"] += 1  # JSON can write one of a surrogate pair
        else:
            yield {**dict(zip(fields, texts, strict=True)), "label": label}


def draw(records: Iterable[dict[str, str]], per_label: int, seed: str) -> Iterator[dict[str, str]]:
    """Draws `per_label` records of each label, or all it has, in one pass and keeps their order.

    Each record gets a random key, and a label keeps those with the largest keys: a uniform draw without
    replacement, in which a smaller draw is part of a larger one.
    """
    rng = random.Random(seed)  # its floats are the same in every version of Python
    kept: dict[str, list[tuple[float, int, dict[str, str]]]] = defaultdict(list)  # heaps, smallest key first
    for number, record in enumerate(records):
        heap, entry = kept[record["label"]], (rng.random(), number, record)
        if len(heap) < per_label:
            heapq.heappush(heap, entry)
        else:
            heapq.heappushpop(heap, entry)
    drawn = [entry[1:] for heap in kept.values() for entry in heap]
    yield from (record for _, record in sorted(drawn, key=lambda entry: entry[0]))


def _parse(argv: list[str]) -> argparse.Namespace:
    summary, _, details = __doc__.partition("\n")
    parser = argparse.ArgumentParser(
        prog="paper_folders",
        description=summary,
        epilog=details,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--output", default="data", metavar="DIR", help="where the folders go (data)")
    for source in SOURCES:
        parser.add_argument(f"--{source.name}", metavar="PATH", help=f"archive or folder {source.inside}")
    for option, count, what in (("per_label", 4000, "training"), ("test_per_label", 1000, "test")):
        text = f"{what} rows a label ({count}); 0 takes all"
        parser.add_argument(f"--{option}", type=_count, default=count, metavar="N", help=text)
    parser.add_argument("--seed", type=_count, default=0, metavar="N", help="of the draw (0)")
    return parser.parse_args(argv)


def _count(text: str) -> int:
    if not re.fullmatch("[0-9]+", text):
        raise argparse.ArgumentTypeError(f"must be a whole number, 0 or more, not {text!r}")
    return int(text)


@contextlib.contextmanager
def _undamaged(place: str | Path) -> Iterator[None]:
    """Says of an archive that cannot be read what to do about it."""
    try:
        yield
    except (EOFError, zlib.error, tarfile.TarError, zipfile.BadZipFile) as error:
        raise UserError(f"{place} is damaged or cut off ({error}): download it again") from error


def _text_lines(file: BinaryIO, place: str) -> Iterator[str]:
    """Lines with their ends, decoded one by one so that a message can name the line."""
    with _undamaged(place):
        for line, content in enumerate(file, start=1):
            try:
                yield content.decode("utf-8-sig" if line == 1 else "utf-8")
            except UnicodeDecodeError as error:
                raise UserError(f"{place}, line {line}, is not UTF-8: download it again") from error


def _write(path: Path, records: Iterable[dict[str, str]]) -> Counter[str]:
    """Writes one record a line and returns how many of each label there are."""
    counts: Counter[str] = Counter()
    with open(path, "w", encoding="utf-8") as file:
        for record in records:
            file.write(json.dumps(record, ensure_ascii=False) + "\n")
            counts[record["label"]] += 1
    return counts


def _summary(title: str, counts: Counter[str], left_out: Counter[str]) -> str:
    """One line, such as "yelp5 train: 20000 rows, 4000 a label; left out 2 empty"."""
    if len(set(counts.values())) == 1:
        shares = f"{max(counts.values())} a label"
    else:
        shares = ", ".join(f"{count} {label}" for label, count in sorted(counts.items()))
    reasons = ", ".join(f"{count} {reason}" for reason, count in sorted(left_out.items()))
    return f"{title}: {counts.total()} rows, {shares}" + (f"; left out {reasons}" if reasons else "")


CSV_FILES = {"train": "train.csv", "test": "test.csv"}
SOURCES = (
    Source(
        name="yelp5",
        inside="yelp_review_full_csv",
        files=CSV_FILES,
        columns=("class", "text"),
        read=csv_rows,
        description="Reviews on Yelp, and how many stars of five their writers gave.",
        labels=STARS,
    ),
    Source(
        name="amazon5",
        inside="amazon_review_full_csv",
        files=CSV_FILES,
        columns=("class", "title", "text"),
        read=csv_rows,
        description="Reviews of products on Amazon, and how many stars of five their writers gave.",
        labels=STARS,
    ),
    Source(
        name="yahoo10",
        inside="yahoo_answers_csv",
        files=CSV_FILES,
        columns=("class", "question title", "question content", "best answer"),
        read=csv_rows,
        description="Questions on Yahoo! Answers with their best answers, and the topic they are about.",
        labels=(
            "Society & Culture",
            "Science & Mathematics",
            "Health",
            "Education & Reference",
            "Computers & Internet",
            "Sports",
            "Business & Finance",
            "Entertainment & Music",
            "Family & Relationships",
            "Politics & Government",
        ),
    ),
    Source(
        name="mnli3",
        inside="multinli_1.0",
        files={"train": "multinli_1.0_train.jsonl", "test": "multinli_1.0_dev_matched.jsonl"},
        columns=("gold_label", "sentence1", "sentence2"),
        read=jsonl_rows,
        description="A premise and a hypothesis that it entails, contradicts or leaves open.",
        labels=("entailment", "neutral", "contradiction"),
        fields=("premise", "hypothesis"),
    ),
)

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
