"""Task specs and what `load` does beside reading."""

import json

import pytest

from streamsynth.errors import UserError
from streamsynth.tasks import sources, worlds


@pytest.fixture
def folder(tmp_path):
    rows = [{"text": f"text number {i}", "label": "ab"[i % 2]} for i in range(100)]
    (tmp_path / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return tmp_path


@pytest.mark.parametrize(
    ("spec", "parts"),
    [
        ("worlds:tea", ("worlds", "tea", {})),
        ("files:my/dir?commonest=9&name=bank", ("files", "my/dir", {"commonest": "9", "name": "bank"})),
        ("tfds:glue/sst2:2.0.0?text=sentence", ("tfds", "glue/sst2:2.0.0", {"text": "sentence"})),
    ],
)
def test_specs(spec, parts):
    assert sources.parse_spec(spec) == parts


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("sst2", "no known source: write one of worlds:NAME, files:DIR, tfds:NAME"),
        ("file:x", "no known source"),
        ("files:", "names nothing after the colon: write files:DIR"),
        ("files:x?commonst=3", "unknown option 'commonst': known are name, commonest, test"),
        ("worlds:x?name=y", "unknown option 'name': known are attributes"),
        ("files:x?name", "needs a value"),
        ("files:x?name=", "needs a value"),
        ("files:x?name=a&name=b", "'name' twice"),
        ("files:x?commonest=ten", "commonest=ten must be a whole number"),
        ("files:x?commonest=1", "commonest=1 must be"),
    ],
)
def test_mistakes_in_a_spec(spec, message):
    with pytest.raises(UserError, match=message):
        sources.load(spec, examples_per_label=1, seed=0)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"on_bad_row": "ignore"}, "on_bad_row must be one of error, skip"),
        ({"examples_per_label": 0}, "examples_per_label"),
        ({"seed": -1}, "seed"),
        ({"train_limit": 3}, "train_limit=3 is fewer than the 4 examples"),
        ({"test_limit": 0}, "test_limit"),
    ],
)
def test_mistakes_in_arguments(folder, arguments, message):
    with pytest.raises(UserError, match=message):
        sources.load(f"files:{folder}", **({"examples_per_label": 2, "seed": 0} | arguments))


def test_limits_leave_the_examples_as_they_are(folder):
    whole = sources.load(f"files:{folder}", examples_per_label=5, seed=3)
    limited = sources.load(f"files:{folder}", examples_per_label=5, seed=3, train_limit=20, test_limit=6)
    assert limited.examples == whole.examples
    assert set(whole.examples) <= set(limited.train) < set(whole.train)
    assert [sum(e.label == label for e in limited.train) for label in "ab"] == [10, 10]
    assert [sum(e.label == label for e in limited.test) for label in "ab"] == [3, 3]


def test_options_reach_the_reader(folder):
    task = sources.load(f"files:{folder}?name=mine&test=validation", examples_per_label=2, seed=0)
    other = sources.load(f"files:{folder}", examples_per_label=2, seed=0)
    assert task.name == "mine"
    assert task.train == other.train
    assert not set(task.test) & set(other.test)


def test_an_embedded_world_comes_through_the_same_door():
    name = worlds.STREAM_WORLDS[0]
    task = sources.load(f"worlds:{name}", examples_per_label=3, seed=0, test_limit=20)
    assert task.name == name
    assert all(len(task.examples_of(label)) == 3 for label in task.labels)
    assert len(task.test) == 20
    assert all(task.verifier(e.text, e.label) for e in task.test)
