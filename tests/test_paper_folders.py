"""The script that makes the folders of the paper's stream, on small archives in the published forms."""

from __future__ import annotations

import csv
import io
import json
import os
import random
import subprocess
import sys
import tarfile
import zipfile
from collections import Counter
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from streamsynth.presets import PAPER_STREAM
from streamsynth.tasks import sources

SCRIPT = Path(__file__).resolve().parent.parent / "configs" / "paper_folders.py"
sys.path.append(str(SCRIPT.parent))
import paper_folders  # noqa: E402

SOURCES = {source.name: source for source in paper_folders.SOURCES}
CSV_SETS = ("yelp5", "amazon5", "yahoo10")
LABELS = {"yelp5": 5, "amazon5": 5, "yahoo10": 10, "mnli3": 3}


def content_of(source, part, rows_per_label, texts=None):
    """A file in the published form, labels in turn; `texts` replaces the texts of the first rows."""
    rows = []
    for i in range(rows_per_label * len(source.labels)):
        index = i % len(source.labels)
        cells = [f"{column} {i} of {part}" for column in source.columns[1:]]
        if texts and i < len(texts):
            cells = texts[i]
        rows.append((index, cells))
    if source.name == "mnli3":
        objects = [dict(zip(source.columns, (source.labels[i], *cells), strict=True)) for i, cells in rows]
        return "".join(json.dumps({**row, "genre": "fiction"}) + "\n" for row in objects).encode()
    out = io.StringIO()
    csv.writer(out, quoting=csv.QUOTE_ALL, lineterminator="\n").writerows(
        [i + 1, *cells] for i, cells in rows
    )
    return out.getvalue().encode()


def files_of(source, train=6, test=3, texts=None):
    """The archive's files by name."""
    return {
        source.files["train"]: content_of(source, "train", train, texts),
        source.files["test"]: content_of(source, "test", test),
    }


def pack(path, inside, files):
    """Writes an archive, by its suffix, or a folder."""
    if path.suffix == ".zip":
        with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
            for name, content in files.items():
                archive.writestr(f"{inside}/{name}", content)
                archive.writestr(f"__MACOSX/{inside}/._{name}", b"\0")
    elif path.suffix in (".tgz", ".gz"):
        with tarfile.open(path, "w:gz") as archive:
            for name, content in {"readme.txt": b"About.", **files}.items():
                member = tarfile.TarInfo(f"{inside}/{name}")
                member.size = len(content)
                archive.addfile(member, io.BytesIO(content))
    else:
        path.mkdir()
        for name, content in files.items():
            (path / name).write_bytes(content)
    return path


def make(folder, name, files=None, suffix=".tgz", options=()):
    """Runs the script on one set; returns its exit code."""
    source = SOURCES[name]
    path = folder / (source.inside + suffix)
    if not path.exists():
        pack(path, source.inside, files or files_of(source))
    return paper_folders.main([f"--output={folder}/data", f"--{name}={path}", *options])


def records(folder, name, part="train"):
    return [json.loads(line) for line in (folder / "data" / name / f"{part}.jsonl").open(encoding="utf-8")]


def refusal(capsys, folder, name, files=None, suffix=".tgz", options=()):
    """The sentence with which the script refuses; nothing may be left behind."""
    assert make(folder, name, files, suffix, options) == 2
    captured = capsys.readouterr().err
    assert captured.startswith("paper_folders: error: ") and captured.count("\n") == 1
    assert not (folder / "data" / name).exists()
    assert not any((folder / "data").glob("*") if (folder / "data").exists() else ())
    return captured


def test_names_are_those_of_the_configs():
    assert tuple(SOURCES) == PAPER_STREAM


@pytest.mark.parametrize("suffix", [".tgz", ".tar.gz", ".zip", ""])
@pytest.mark.parametrize("name", PAPER_STREAM)
def test_each_form_of_each_set_loads(tmp_path, name, suffix):
    assert make(tmp_path, name, suffix=suffix) == 0
    task = sources.load(f"files:{tmp_path}/data/{name}", examples_per_label=2, seed=0)
    assert task.name == name
    assert len(task.labels) == LABELS[name]
    assert task.labels == SOURCES[name].labels
    assert task.fields == (("premise", "hypothesis") if name == "mnli3" else ("text",))
    assert len(task.test) == 3 * LABELS[name]
    # All training rows are there: the reader cuts one of six a label, for want of a validation part.
    assert len(records(tmp_path, name)) == 6 * LABELS[name] == len(task.train) + LABELS[name]
    assert [path.name for path in (tmp_path / "data").iterdir()] == [name]


def test_all_sets_at_once_from_the_command_line(tmp_path):
    paths = [pack(tmp_path / f"{s.inside}.tgz", s.inside, files_of(s)) for s in SOURCES.values()]
    options = [f"--{name}={path}" for name, path in zip(SOURCES, paths, strict=True)]
    command = [sys.executable, str(SCRIPT), f"--output={tmp_path}/new/data", *options]
    env = {**os.environ, "PYTHONPATH": str(SCRIPT.parent.parent)}
    run = subprocess.run(command, capture_output=True, text=True, check=True, env=env)
    assert "yelp5 train: 30 rows, 6 a label\n" in run.stdout
    assert "mnli3 test: 9 rows, 3 a label\n" in run.stdout
    assert {path.name for path in (tmp_path / "new" / "data").iterdir()} == set(PAPER_STREAM)


def test_classes_count_from_one(tmp_path):
    files = files_of(SOURCES["yahoo10"])
    assert make(tmp_path, "yahoo10", files) == 0
    rows = csv.reader(io.StringIO(files["train.csv"].decode()))
    for row, record in zip(rows, records(tmp_path, "yahoo10"), strict=True):
        assert record["label"] == SOURCES["yahoo10"].labels[int(row[0]) - 1]


def test_escapes_and_quoted_lines(tmp_path):
    texts = [["Great CD", r"Who sang?\n\nShe \"did\".", ""], ["Why?", "", 'One\ntwo\t "three",  four']]
    yahoo = SOURCES["yahoo10"]
    content = content_of(yahoo, "train", 6, texts)
    assert b'""did\\""' in content and b"One\ntwo" in content  # as published, and a cell of two lines
    assert make(tmp_path, "yahoo10", {**files_of(yahoo), "train.csv": content}) == 0
    first, second, third, *_ = (record["text"] for record in records(tmp_path, "yahoo10"))
    assert first == 'Great CD. Who sang? She "did".'
    assert second == 'Why? One two "three", four'
    assert third == "question title 2 of train. question content 2 of train. best answer 2 of train"


def test_json_has_escapes_of_its_own(tmp_path):
    texts = [[r"C:\new", "a\nb"], ["ünïcode 🙂", "ok"]]
    assert make(tmp_path, "mnli3", files_of(SOURCES["mnli3"], texts=texts)) == 0
    first, second, *_ = records(tmp_path, "mnli3")
    assert first == {"premise": r"C:\new", "hypothesis": "a b", "label": "entailment"}
    assert second == {"premise": "ünïcode 🙂", "hypothesis": "ok", "label": "neutral"}


def test_unusable_rows_are_left_out_and_counted(tmp_path, capsys):
    texts = [["a <field> b", "c"], ["  ", "d"], ["e", ""], ["\ud83d", "f"]]
    mnli = SOURCES["mnli3"]
    unlabelled = b'{"gold_label": "-", "sentence1": "g", "sentence2": "h"}\n\n'
    files = files_of(mnli, texts=texts)
    files[mnli.files["train"]] += unlabelled
    assert make(tmp_path, "mnli3", files) == 0
    out = capsys.readouterr().out
    left_out = "1 containing <field>, 2 empty, 1 with half a character, 1 without an agreed label"
    assert f"mnli3 train: 14 rows, 5 contradiction, 4 entailment, 5 neutral; left out {left_out}\n" in out
    assert len(records(tmp_path, "mnli3")) == 14
    # The reader refuses none of what is left.
    assert sources.load(f"files:{tmp_path}/data/mnli3", examples_per_label=2, seed=0).skipped_rows == 0


@pytest.mark.parametrize("name", ["amazon5", "mnli3"])
def test_the_draw_is_balanced_and_repeatable(tmp_path, name):
    files = files_of(SOURCES[name], train=60, test=20)
    options = ["--per_label=7", "--test_per_label=4"]
    drawn = {}
    for run, suffix, seed in (("a", ".tgz", 1), ("b", ".zip", 1), ("c", "", 1), ("d", ".tgz", 2)):
        folder = tmp_path / run
        folder.mkdir()
        assert make(folder, name, files, suffix, [*options, f"--seed={seed}"]) == 0
        drawn[run] = [(folder / "data" / name / f"{part}.jsonl").read_bytes() for part in ("train", "test")]
        for part, count in (("train", 7), ("test", 4)):
            labels = Counter(record["label"] for record in records(folder, name, part))
            assert labels == dict.fromkeys(SOURCES[name].labels, count)
    assert drawn["a"] == drawn["b"] == drawn["c"]
    assert drawn["a"][0] != drawn["d"][0] and drawn["a"][1] != drawn["d"][1]


def test_zero_takes_all(tmp_path):
    files = files_of(SOURCES["yelp5"], train=30, test=10)
    assert make(tmp_path, "yelp5", files, options=["--per_label=0", "--test_per_label=0"]) == 0
    rows = csv.reader(io.StringIO(files["train.csv"].decode()))
    assert [record["text"] for record in records(tmp_path, "yelp5")] == [text for _, text in rows]


@given(st.lists(st.sampled_from("abc"), max_size=60), st.integers(1, 20), st.integers(0, 3))
def test_draws_keep_the_order_and_are_nested(labels, count, seed):
    rows = [{"text": str(i), "label": label} for i, label in enumerate(labels)]
    drawn = list(paper_folders.draw(iter(rows), count, str(seed)))
    assert Counter(r["label"] for r in drawn) == {k: min(n, count) for k, n in Counter(labels).items()}
    numbers = [int(record["text"]) for record in drawn]
    assert numbers == sorted(set(numbers)) and all(rows[i] == r for i, r in zip(numbers, drawn, strict=True))
    more = list(paper_folders.draw(iter(rows), count + 1, str(seed)))
    assert {r["text"] for r in drawn} <= {r["text"] for r in more}


def test_the_draw_is_uniform():
    rows = [{"text": str(i), "label": "a"} for i in range(10)]
    counts = Counter(r["text"] for seed in range(3000) for r in paper_folders.draw(rows, 3, str(seed)))
    # 900 each; five standard deviations of a binomial are 126.
    assert all(abs(counts[str(i)] - 900) < 126 for i in range(10))


def test_the_draw_holds_no_more_than_it_keeps():
    alive = Counter()

    class Record(dict):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, **kwargs)
            alive["now"] += 1
            alive["most"] = max(alive["most"], alive["now"])

        def __del__(self):
            alive["now"] -= 1

    rows = (Record(text=str(i), label="ab"[i % 2]) for i in range(20_000))
    assert len(list(paper_folders.draw(rows, 5, "0"))) == 10
    assert alive["most"] <= 10 + 3


def test_an_existing_folder_is_kept(tmp_path, capsys):
    assert make(tmp_path, "yelp5") == 0
    before = (tmp_path / "data" / "yelp5" / "train.jsonl").read_bytes()
    capsys.readouterr()
    # The refusal comes before any other set is read.
    other = pack(tmp_path / "mnli.zip", "multinli_1.0", files_of(SOURCES["mnli3"]))
    assert make(tmp_path, "yelp5", options=[f"--mnli3={other}"]) == 2
    assert "yelp5 exists already: remove it, or name another --output" in capsys.readouterr().err
    assert (tmp_path / "data" / "yelp5" / "train.jsonl").read_bytes() == before
    assert [path.name for path in (tmp_path / "data").iterdir()] == ["yelp5"]


@pytest.mark.parametrize(
    ("name", "line", "message"),
    [
        ("yelp5", b'"0","text"\n', "has the class '0', not a number from 1 to 5"),
        ("yelp5", b'"6","text"\n', "has the class '6', not a number from 1 to 5"),
        ("yelp5", b"label,text\n", "has the class 'label', not a number from 1 to 5"),
        ("yelp5", b'"1","title","text"\n', "has 3 cell(s), not 2 (class, text)"),
        ("amazon5", b'"1","text"\n', "has 2 cell(s), not 3 (class, title, text)"),
        ("yahoo10", b'"11","a","b","c"\n', "has the class '11', not a number from 1 to 10"),
        ("yelp5", b'"1","\xff"\n', "is not UTF-8"),
        ("yelp5", b'"1","' + b"x" * 200_000 + b'"\n', "is not CSV (field larger than field limit"),
        ("mnli3", b"text\n", "is not JSON"),
        ("mnli3", b'["neutral"]\n', "has no text 'gold_label'"),
        ("mnli3", b'{"gold_label": "neutral", "sentence1": "a"}\n', "has no text 'sentence2'"),
        (
            "mnli3",
            b'{"gold_label": "other", "sentence1": "a", "sentence2": "b"}\n',
            "has the label 'other', not one of entailment, neutral, contradiction and -",
        ),
    ],
)
def test_a_wrong_row_is_named(tmp_path, capsys, name, line, message):
    source = SOURCES[name]
    first = b'"1","two\nlines"\n' if name == "yelp5" else content_of(source, "train", 1)
    number = first.count(b"\n") + 1
    files = {**files_of(source), source.files["train"]: first + line}
    found = refusal(capsys, tmp_path, name, files)
    place = f"{source.inside}.tgz/{source.inside}/{source.files['train']}, line {number}, "
    assert place + message in found
    assert found.rstrip().endswith((f"name the archive {source.inside}", "download it again"))


@pytest.mark.parametrize("suffix", [".tgz", ".zip", ""])
def test_a_missing_file_is_named(tmp_path, capsys, suffix):
    files = {"train.csv": files_of(SOURCES["yelp5"])["train.csv"]}
    found = refusal(capsys, tmp_path, "yelp5", files, suffix)
    assert "holds no test.csv: name the archive yelp_review_full_csv or its folder" in found


def test_a_file_that_is_there_twice(tmp_path, capsys):
    files = files_of(SOURCES["yelp5"])
    found = refusal(capsys, tmp_path, "yelp5", {**files, "copy/train.csv": files["train.csv"]})
    assert "holds train.csv twice: unpack it and name one folder" in found


def test_a_label_without_rows(tmp_path, capsys):
    """As in the polarity sets of the same authors, which have the same columns."""
    files = {**files_of(SOURCES["yelp5"]), "test.csv": b'"1","one"\n"2","two"\n'}
    found = refusal(capsys, tmp_path, "yelp5", files)
    assert (
        "test.csv has no usable row with the label '3 stars': name the archive yelp_review_full_csv" in found
    )


@pytest.mark.parametrize("suffix", [".tgz", ".zip"])
def test_what_is_no_archive(tmp_path, capsys, suffix):
    (tmp_path / f"yelp_review_full_csv{suffix}").write_text("<html>Too many downloads</html>\n" * 200)
    found = refusal(capsys, tmp_path, "yelp5", suffix=suffix)
    assert "is neither a .tgz nor a .zip archive: download it again" in found


def test_an_archive_that_is_cut_off_or_damaged(tmp_path, capsys):
    source = SOURCES["amazon5"]
    rng = random.Random(0)
    noise = [["title", rng.randbytes(3000).hex()] for _ in range(20)]
    path = pack(tmp_path / f"{source.inside}.tgz", source.inside, files_of(source, texts=noise))
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    assert "is damaged or cut off" in refusal(capsys, tmp_path, "amazon5")
    path = pack(tmp_path / f"{source.inside}.zip", source.inside, files_of(source, texts=noise))
    content = bytearray(path.read_bytes())
    content[2000:2040] = bytes(40)
    path.write_bytes(content)
    found = refusal(capsys, tmp_path, "amazon5", suffix=".zip")
    assert "is damaged or cut off" in found and found.rstrip().endswith("download it again")


def test_what_is_not_there(tmp_path, capsys):
    assert paper_folders.main([f"--output={tmp_path}/data", f"--mnli3={tmp_path}/gone.zip"]) == 2
    assert "gone.zip: give --mnli3 the archive's path" in capsys.readouterr().err
    assert paper_folders.main([f"--output={tmp_path}/data"]) == 2
    assert "name one or more sources with --yelp5, --amazon5, --yahoo10, --mnli3" in capsys.readouterr().err
    with pytest.raises(SystemExit, match="2"):
        paper_folders.main(["--per_label=-1"])
    assert "must be a whole number, 0 or more, not '-1'" in capsys.readouterr().err
    assert not (tmp_path / "data").exists()
