"""Tasks from TFDS, read back from data sets that TFDS itself writes here."""

import shutil
import subprocess
import sys

import numpy as np
import pytest
import tensorflow_datasets as tfds

from streamsynth.errors import UserError
from streamsynth.tasks import sources, tfds_source

TRAIN = [(f"text number {i}", i % 2) for i in range(30)]
TEST = [(f"other number {i}", i % 2) for i in range(10)] + [("Text number 4!", 0)]


class _Builder(tfds.core.GeneratorBasedBuilder, skip_registration=True):
    """Not registered: the source finds the set by its files, as with any set whose code is elsewhere."""

    VERSION = tfds.core.Version("1.0.0")
    FEATURES: dict
    SPLITS: dict

    def _info(self):
        return tfds.core.DatasetInfo(
            builder=self,
            description="Short texts\nof two kinds. Nothing else.",
            features=tfds.features.FeaturesDict(self.FEATURES),
        )

    def _split_generators(self, dl_manager):
        return {split: self._generate_examples(rows) for split, rows in self.SPLITS.items()}

    def _generate_examples(self, rows):
        return enumerate(rows)


def build(data_dir, name, features, splits):
    members = {"name": name, "FEATURES": features, "SPLITS": splits}
    builder_class = type(name, (_Builder,), members, skip_registration=True)
    builder_class(data_dir=data_dir, file_format="array_record").download_and_prepare()


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory):
    """Holds: "kinds" with a ClassLabel and an unlabelled split, "pairs" with two texts and a text label."""
    folder = tmp_path_factory.mktemp("tfds")
    tfds.disable_progress_bar()
    text, names = tfds.features.Text(), tfds.features.ClassLabel(names=["bad", "good"])

    def rows(pairs):
        return [{"text": text, "label": label} for text, label in pairs]

    moods = [{"body": body, "mood": label} for body, label in TRAIN]
    build(folder, "unnamed", {"body": text, "mood": names}, {"train": moods})
    splits = {"train": rows(TRAIN), "test": rows(TEST), "unlabelled": rows([("who knows", -1)] + TEST)}
    build(folder, "kinds", {"text": text, "label": names}, splits)
    pairs = [
        {"premise": f"it rains {i}", "hypothesis": f"wet {i}", "source": "x", "answer": ("no", "yes")[i % 2]}
        for i in range(30)
    ]
    features = dict.fromkeys(("premise", "hypothesis", "source", "answer"), text)
    features["number"] = tfds.features.Scalar(np.int64)
    build(folder, "pairs", features, {"train": [{**row, "number": 1} for row in pairs]})
    return folder


def load(dataset, data_dir, **options):
    return tfds_source.load_task(dataset, **({"data_dir": str(data_dir), "examples_per_label": 3} | options))


def test_rows_come_back_as_written(data_dir):
    task = load("kinds", data_dir)
    assert task.name == "kinds"
    assert task.description == "Short texts of two kinds."
    assert task.labels == ("bad", "good")
    # The train text that is also in test is gone.
    train = {(text, task.labels[i]) for text, i in TRAIN}
    assert {(e.text, e.label) for e in task.train} == train - {("text number 4", "bad")}
    assert {(e.text, e.label) for e in task.test} == {(t, task.labels[i]) for t, i in TEST}
    assert all(e.id.startswith("test:") for e in task.test)
    assert [e.label for e in task.examples] == ["bad"] * 3 + ["good"] * 3


def test_a_name_and_the_folder_of_a_version_give_the_same(data_dir):
    by_name = load("kinds", data_dir)
    assert load(str(data_dir / "kinds" / "1.0.0"), data_dir) == by_name
    assert load("kinds:1.0.0", data_dir) == by_name


def test_two_text_features_and_a_text_label_by_the_table(data_dir):
    spec = f"tfds:pairs?text=premise,hypothesis&label=answer&data_dir={data_dir}&name=entailment"
    task = sources.load(spec, examples_per_label=2, seed=0, test_limit=4)
    assert task.name == "entailment"
    assert task.labels == ("no", "yes")
    assert task.fields == ("premise", "hypothesis")
    assert all(e.fields[0].startswith("it rains") and e.fields[1].startswith("wet") for e in task.train)
    assert (len(task.train), len(task.test)) == (24, 4)  # no test split: a fifth of train, here limited to 4


def test_the_only_text_feature_is_found(data_dir):
    task = load("unnamed", data_dir, label="mood")
    assert task.fields == ("body",)
    assert (len(task.train), len(task.test)) == (24, 6)


def test_an_unlabelled_row_is_named_or_skipped(data_dir):
    with pytest.raises(UserError, match=r"kinds, split unlabelled, row \d+, is bad: its label -1"):
        load("kinds", data_dir, test="unlabelled")
    task = load("kinds", data_dir, test="unlabelled", on_bad_row="skip")
    assert task.skipped_rows == 1
    assert len(task.test) == len(TEST)


@pytest.mark.parametrize(
    ("dataset", "options", "message"),
    [
        ("no_such_set_anywhere", {}, "there is no TFDS set 'no_such_set_anywhere'"),
        ("not a name!", {}, "cannot open the TFDS set not a name!"),
        ("kinds:9.9.9", {}, "there is no TFDS set 'kinds:9.9.9': check name and version"),
        ("kinds", {"text": "body"}, "option text=body must name one or two text features .*: text"),
        ("kinds", {"text": "text,text"}, "option text=text,text"),
        ("kinds", {"text": "label"}, "option text=label must name"),
        ("kinds", {"label": "class"}, "no label or text feature 'class': choose one of label, text"),
        ("kinds", {"test": "tset"}, "option test=tset .*test, train, unlabelled"),
        ("kinds", {"test": "train"}, "option test=train"),
        ("kinds", {"examples_per_label": 16}, "examples_per_label=16"),
        ("pairs", {"label": "answer"}, "text features hypothesis, premise, source: choose one or two"),
        ("pairs", {"text": "premise", "label": "number"}, "no label or text feature 'number'"),
    ],
)
def test_mistakes(data_dir, dataset, options, message):
    with pytest.raises(UserError, match=message):
        load(dataset, data_dir, **options)


def test_a_folder_without_a_data_set_is_named(tmp_path):
    with pytest.raises(UserError, match="cannot open the TFDS set .*"):
        load(str(tmp_path), tmp_path)


def test_a_set_without_random_access_is_refused(data_dir, tmp_path):
    folder = shutil.copytree(data_dir / "kinds" / "1.0.0", tmp_path / "kinds" / "1.0.0")
    info = folder / "dataset_info.json"
    info.write_text(info.read_text().replace('"array_record"', '"tfrecord"'))
    for path in folder.glob("*.array_record-*"):
        path.rename(path.with_name(path.name.replace("array_record", "tfrecord")))
    with pytest.raises(UserError, match='not prepared in a format with random access: .*"array_record"'):
        load(str(folder), tmp_path)


def test_tensorflow_is_never_imported(data_dir):
    script = (
        "import sys\n"
        "from streamsynth.tasks import sources\n"
        "assert 'tensorflow_datasets' not in sys.modules\n"
        f"task = sources.load('tfds:kinds?data_dir={data_dir}', examples_per_label=2, seed=0)\n"
        "assert 'tensorflow' not in sys.modules\n"
        "print(len(task.test))"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=120)
    assert done.stdout.strip() == str(len(TEST)), done.stderr


def test_questions_and_answers(data_dir):
    task = load("pairs", data_dir, question="premise", answer="answer")
    assert (task.kind, task.fields, task.labels) == ("qa", ("question", "answer"), ("question",))
    assert {e.fields for e in task.train} <= {(f"it rains {i}", ("no", "yes")[i % 2]) for i in range(30)}
    assert len(task.examples) == 3


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"question": "premise"}, "question and answer together"),
        ({"question": "premise", "answer": "answer", "label": "answer"}, "without text, label"),
        ({"question": "premise", "answer": "number"}, "answer=number must name a text feature .* premise"),
    ],
)
def test_mistakes_in_the_options_of_questions(data_dir, options, message):
    with pytest.raises(UserError, match=message):
        load("pairs", data_dir, **options)
