"""Tasks from folders: every form that is accepted, and one clear sentence for every mistake."""

import csv
import gzip
import io
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from streamsynth.errors import UserError
from streamsynth.tasks import files, splits
from streamsynth.tasks.task import join_fields

LABELS = ("bad", "good")


def make_rows(count=40, labels=LABELS, start=0):
    return [{"text": f"text number {start + i}", "label": labels[i % len(labels)]} for i in range(count)]


def to_jsonl(rows):
    return "".join(json.dumps(row) + "\n" for row in rows)


def to_csv(rows):
    out = io.StringIO()
    writer = csv.DictWriter(out, list(rows[0]))
    writer.writeheader()
    writer.writerows(rows)
    return out.getvalue()


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "train.jsonl").write_text(to_jsonl(make_rows()))
    return tmp_path


def load(folder, **options):
    return files.load_task(str(folder), **({"examples_per_label": 2} | options))


def keys(examples):
    return {splits.normalise(example.text) for example in examples}


def test_only_train(folder):
    task = load(folder)
    assert task.labels == LABELS
    assert task.fields == ("text",)
    assert task.name == folder.name
    assert (len(task.train), len(task.test)) == (28, 8)  # of 20 a label 4 for test, 2 for validation
    assert not keys(task.train) & keys(task.test)
    assert set(task.examples) <= set(task.train)
    assert {e.label for e in task.test} == set(LABELS)


def test_seeds_change_the_examples_only(folder):
    one, other = load(folder, seed=1), load(folder, seed=2)
    assert one == load(folder, seed=1)
    assert one.examples != other.examples
    assert (one.train, one.test) == (other.train, other.test)


@pytest.mark.parametrize("suffix", [".jsonl", ".jsonl.gz", ".csv"])
def test_all_formats_hold_the_same(tmp_path, suffix):
    for part, start in (("train", 0), ("validation", 100), ("test", 200)):
        rows = make_rows(20, start=start)
        rows[3]["text"] = 'He said: "a, b".\nThen — nothing;  ünïcode'
        content = (to_csv(rows) if suffix == ".csv" else to_jsonl(rows)).encode()
        content = gzip.compress(content) if suffix.endswith(".gz") else content
        (tmp_path / (part + suffix)).write_bytes(content)
    task = load(tmp_path)
    # The odd text is in all parts, so that it may stay in test only; white space is collapsed.
    assert len(task.train) == 19
    assert len(task.test) == 20
    assert task.test[3].text == 'He said: "a, b". Then — nothing; ünïcode'
    assert task.test[3].label == LABELS[1]
    assert load(tmp_path, test="validation").test[0].text == "text number 100"


def test_ids_name_the_line(tmp_path):
    rows = make_rows(20)
    rows[0]["text"] = "over\ntwo lines"
    (tmp_path / "train.csv").write_text("\ufeff" + to_csv(rows), encoding="utf-8")
    (tmp_path / "test.jsonl").write_text("\n" + to_jsonl(make_rows(4, start=50)))
    (tmp_path / "validation.jsonl").write_text(to_jsonl(make_rows(4, start=70)))
    task = load(tmp_path)
    assert [e.id for e in task.train[:3]] == ["train:2", "train:4", "train:5"]
    assert [e.id for e in task.test[:2]] == ["test:2", "test:3"]


def test_two_fields_are_found_and_named(tmp_path):
    rows = [{"premise": f"it rains {i}", "hypothesis": f"wet {i}", "label": LABELS[i % 2]} for i in range(20)]
    (tmp_path / "train.csv").write_text(to_csv(rows))
    task = load(tmp_path)
    assert task.fields == ("premise", "hypothesis")
    assert task.train[0].text == join_fields(task.train[0].fields)
    (tmp_path / "task.json").write_text(json.dumps({"fields": ["hypothesis", "premise"]}))
    assert load(tmp_path).fields == ("hypothesis", "premise")


def test_task_json_gives_name_description_and_order(folder):
    card = {"name": "reviews", "description": "Short reviews.", "labels": ["good", "bad"], "licence": "none"}
    (folder / "task.json").write_text(json.dumps(card))
    task = load(folder)
    assert (task.name, task.description, task.labels) == ("reviews", "Short reviews.", ("good", "bad"))
    assert load(folder, name="other").name == "other"


def test_train_loses_what_is_in_test(folder):
    (folder / "test.jsonl").write_text(json.dumps({"text": "TEXT number 7!", "label": "good"}) + "\n")
    task = load(folder)
    assert "text number 7" not in keys(task.train)
    assert len(task.test) == 1


def test_commonest_keeps_the_frequent_labels(tmp_path):
    rows = make_rows(20, ("a", "b")) + make_rows(5, ("c",), start=30)
    (tmp_path / "train.jsonl").write_text(to_jsonl(rows))
    (tmp_path / "test.jsonl").write_text(to_jsonl(make_rows(6, ("a", "b", "c"), start=60)))
    task = load(tmp_path, commonest=2)
    assert task.labels == ("a", "b")
    assert {e.label for e in task.train + task.test} == {"a", "b"}


BAD_LINES = {
    "not JSON": "{oops",
    "no JSON object": '["text", "good"]',
    "no 'text'": '{"label": "good"}',
    "no 'label'": '{"text": "fine"}',
    "'text' is empty": '{"text": " ", "label": "good"}',
    "'text' has the type int": '{"text": 3, "label": "good"}',
    "'label' has the type bool": '{"text": "fine", "label": true}',
    "'middling' is not among": '{"text": "fine", "label": "middling"}',
    "contains '<field>'": '{"text": "one <field> two", "label": "good"}',
    "UTF-8 cannot hold": '{"text": "\\ud800", "label": "good"}',
    "not UTF-8": b'{"text": "\xff", "label": "good"}',
}


@pytest.mark.parametrize("problem", BAD_LINES)
@pytest.mark.parametrize("line", [1, 5])
def test_a_bad_line_is_named_or_skipped(folder, problem, line):
    lines = (folder / "train.jsonl").read_bytes().splitlines(keepends=True)
    bad = BAD_LINES[problem]
    lines.insert(line - 1, (bad if isinstance(bad, bytes) else bad.encode()) + b"\n")
    (folder / "train.jsonl").write_bytes(b"".join(lines))
    (folder / "task.json").write_text(json.dumps({"labels": list(LABELS)}))
    with pytest.raises(UserError, match=rf"train\.jsonl, line {line}, is bad: .*{problem}.*on_bad_row"):
        load(folder)
    task = load(folder, on_bad_row="skip")
    assert task.skipped_rows == 1
    assert len(task.train) == 28


def test_a_label_of_test_that_train_lacks_is_a_bad_row(folder):
    (folder / "test.jsonl").write_text(to_jsonl(make_rows(4, start=90)) + '{"text": "x", "label": "new"}\n')
    with pytest.raises(UserError, match=r"test\.jsonl, line 5, .*'new'"):
        load(folder)
    assert load(folder, on_bad_row="skip").skipped_rows == 1


def test_a_csv_row_with_another_number_of_cells_is_bad(tmp_path):
    (tmp_path / "train.csv").write_text(to_csv(make_rows()) + "no label\na,good,much\n")
    with pytest.raises(UserError, match=r"train\.csv, line 42, .*1 cell\(s\) where the header has 2"):
        load(tmp_path)
    assert load(tmp_path, on_bad_row="skip").skipped_rows == 2


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("text;label\na;good\n", r"train\.csv, line 1, has no column 'label' but 'text;label'"),
        ("", r"train\.csv, line 1, has no column 'label'"),
        ("text,label,label\na,good,bad\n", r"line 1, names a column twice"),
        ('text,label\na,good\n"b,bad\nc,good\n', r"train\.csv, line 4, is not CSV"),
        (b"text,label\na,good\n\xff,bad\n", r"train\.csv, line 3, is not UTF-8"),
        ("label\ngood\n", r"no usable row"),
        ("a,b,c,label\n1,2,3,good\n", r"columns a, b, c, label: name the text column"),
    ],
)
def test_a_csv_file_that_cannot_be_read_on_is_an_error_even_under_skip(tmp_path, content, message):
    (tmp_path / "train.csv").write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(UserError, match=message):
        load(tmp_path, on_bad_row="skip")


def test_damaged_gzip_files_are_named(tmp_path):
    path = tmp_path / "train.jsonl.gz"
    whole = gzip.compress(to_jsonl(make_rows(500)).encode())
    for content, message in (
        (whole[: len(whole) // 2], "train.jsonl.gz is a truncated gzip file"),
        (whole[:-6], "train.jsonl.gz is a truncated gzip file"),
        (b"no gzip at all", "train.jsonl.gz is not a sound gzip file"),
        (whole[:200] + bytes(50) + whole[250:], "train.jsonl.gz is not a sound gzip file"),
    ):
        path.write_bytes(content)
        with pytest.raises(UserError, match=message):
            load(tmp_path, on_bad_row="skip")


def test_missing_pieces(tmp_path):
    with pytest.raises(UserError, match="there is no folder .*nowhere"):
        load(tmp_path / "nowhere")
    with pytest.raises(UserError, match=r"has none of train\.jsonl"):
        load(tmp_path)
    (tmp_path / "train.jsonl").write_text("")
    with pytest.raises(UserError, match="no usable row"):
        load(tmp_path)
    (tmp_path / "train.jsonl").write_text(to_jsonl(make_rows(8, ("only",))))
    with pytest.raises(UserError, match="classification needs two or more"):
        load(tmp_path)
    (tmp_path / "train.csv").write_text("text,label\n")
    with pytest.raises(UserError, match=r"has train\.jsonl and train\.csv"):
        load(tmp_path)


def test_a_label_with_too_few_examples_is_named_with_counts(tmp_path):
    (tmp_path / "train.jsonl").write_text(to_jsonl(make_rows(40) + make_rows(3, ("rare",), start=90)))
    message = r"'rare' of the task \w+ has 1 usable training text\(s\), but examples_per_label=2: .*commonest"
    with pytest.raises(UserError, match=message):
        load(tmp_path, name="reviews")


def test_an_empty_test_part_is_refused(folder):
    (folder / "test.jsonl").write_text("")
    with pytest.raises(UserError, match="the test part of the task"):
        load(folder)


@pytest.mark.parametrize(
    ("card", "message"),
    [
        ("{", r"task\.json is not JSON"),
        ("[]", r"task\.json must hold one JSON object"),
        ('{"name": 3}', "the key 'name'"),
        ('{"name": "a/b"}', "'a/b'.*name=NAME"),
        ('{"labels": "good"}', "the key 'labels' .* must be a list"),
        ('{"labels": ["good", "good"]}', "the key 'labels' .* twice"),
        ('{"fields": ["a", "b", "c"]}', "the key 'fields'"),
        ('{"fields": ["label"]}', "text column 'label'"),
        ('{"kind": "translation"}', "the kind 'translation' .*classification, qa, math"),
    ],
)
def test_mistakes_in_task_json(folder, card, message):
    (folder / "task.json").write_text(card)
    with pytest.raises(UserError, match=message):
        load(folder)


LINES = st.binary(max_size=60) | st.sampled_from(
    [b'{"text": "a", "label": "good"}', b'{"question": "1 + 1?", "answer": "2"}', b"{}"]
)


@given(st.lists(LINES, max_size=6))
def test_no_bytes_raise_anything_but_user_errors(tmp_path_factory, lines):
    folder = tmp_path_factory.mktemp("fuzz")
    for suffix in (".jsonl", ".csv", ".jsonl.gz"):
        path = folder / f"train{suffix}"
        path.write_bytes(b"\n".join(lines))
        for on_bad_row in ("error", "skip"):
            try:
                load(folder, on_bad_row=on_bad_row, examples_per_label=1)
            except UserError as error:
                assert str(folder) in str(error) or folder.name in str(error)
                assert "\n" not in str(error)
        path.unlink()


def test_every_shared_set_loads(shared):
    loaded = 0
    for folder in sorted(path for path in (shared / "data").iterdir() if path.is_dir()):
        card = json.loads((folder / "task.json").read_text())
        task = load(folder, examples_per_label=4)
        loaded += 1
        assert task.name == folder.name
        assert task.skipped_rows == 0
        if task.kind == "qa":  # test_question_answer.py has more on these
            assert card["kind"] in ("qa", "math")
            continue
        assert task.labels == tuple(card["labels"])
        assert (len(task.train), len(task.test)) == (card["counts"]["train"], card["counts"]["test"])
        assert not keys(task.train) & keys(task.test)
    assert loaded >= 31


def test_the_ten_commonest_of_a_real_set(shared):
    task = load(shared / "data" / "banking77", commonest=10, examples_per_label=8)
    assert len(task.labels) == 10
    assert len(task.examples) == 80
    assert {e.label for e in task.test} == set(task.labels)
