"""A run whose policy proposes attributes: they are written down once, asked for, and read again."""

from __future__ import annotations

import json
import shutil

import chains
import named
import pytest
import runs

from streamsynth import api, weights
from streamsynth import train as train_lib
from streamsynth.errors import UserError
from streamsynth.learner.proposals import with_proposed
from streamsynth.tasks.attributes import Attribute, Value
from streamsynth.workdir import Workdir


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("proposing")
    return chains.folder_of(root), named.data(root / "data")


def config_of(folders, *tasks, **overrides):
    weights_folder, data = folders
    keys = {"stream.tasks": ",".join(f"files:{data}/{task}" for task in tasks)}
    keys |= {"stream.proposed_attributes": "2", "rollout.temperature": "1.0", "supervised.held_out": "0"}
    keys |= {key.replace("__", "."): value for key, value in overrides.items()}
    path = runs.ROOT / "configs" / "llama31_8b.py"
    return api.load(f"{path}:tiny,weights={weights_folder},data={data}", keys)


@pytest.fixture(scope="module")
def run(folders, tmp_path_factory, quick_xla):
    workdir = tmp_path_factory.mktemp("run") / "run"
    return workdir, api.train(config_of(folders, "yelp5"), workdir)


def refuse(*args, **keys):
    raise KeyboardInterrupt


def test_a_run_asks_for_the_combinations_that_its_policy_proposed(run):
    workdir, results = run
    written = json.loads((workdir / "attributes.json").read_text())
    assert results["attributes"] == written and sorted(written["yelp5"]) == ["data", "form"]
    setting, *_ = api._finished(workdir)
    (task,) = setting.tasks
    assert task.attributes == Workdir(workdir).attributes()["yelp5"] and len(task.cells) >= 4
    rows = runs.read_jsonl(workdir / "datasets" / "yelp5" / "train.jsonl")
    possible = [
        {one: value.name for one, value in zip(written["yelp5"], cell, strict=True)} for cell in task.cells
    ]
    assert rows and all(row["attributes"] in possible for row in rows)
    assert len({tuple(row["attributes"].values()) for row in rows}) > 1
    assert any("reward/attribute" in row for row in runs.read_jsonl(workdir / "metrics.jsonl"))
    text = (workdir / "datasets" / "yelp5" / "README.md").read_text()
    for name, values in written["yelp5"].items():
        assert f"| {name} | {', '.join(values)} | proposed by the policy |" in text


def test_a_run_killed_before_its_first_step_goes_on_with_what_was_proposed(
    run, folders, tmp_path, monkeypatch
):
    config = config_of(folders, "yelp5")
    with monkeypatch.context() as patch:
        patch.setattr(train_lib, "train", refuse)
        with pytest.raises(KeyboardInterrupt):
            api.train(config, tmp_path / "run")
    assert (tmp_path / "run" / "attributes.json").read_bytes() == (run[0] / "attributes.json").read_bytes()
    monkeypatch.setattr(weights, "propose", refuse)  # nothing is asked a second time
    api.train(config, tmp_path / "run")
    assert runs.outcome(tmp_path / "run") == runs.outcome(run[0])


def test_only_appended_tasks_are_proposed_for(run, folders, tmp_path, monkeypatch):
    workdir = shutil.copytree(run[0], tmp_path / "run")
    before = json.loads((workdir / "attributes.json").read_text())
    card_path = folders[1] / "amazon5" / "task.json"
    own = json.loads(card_path.read_text()) | {"name": "own", "attributes": {"tone": ["polite", "angry"]}}
    shutil.copytree(card_path.parent, folders[1] / "own", dirs_exist_ok=True)
    (folders[1] / "own" / "task.json").write_text(json.dumps(own))
    given = []
    monkeypatch.setattr(
        train_lib, "train", lambda config, place, tasks, policy: given.extend(tasks) or refuse()
    )
    with pytest.raises(KeyboardInterrupt):
        api.train(config_of(folders, "yelp5", "own", "amazon5"), workdir)
    after = json.loads((workdir / "attributes.json").read_text())
    assert list(after) == ["yelp5", "amazon5"] and after["yelp5"] == before["yelp5"] and after["amazon5"]
    assert given[1].attributes == (Attribute("tone", (Value("polite"), Value("angry"))),)
    assert tuple(given) == with_proposed(given, Workdir(workdir).attributes())
    # A stream that starts from another one proposes for its own tasks.
    with pytest.raises(KeyboardInterrupt):
        api.train(config_of(folders, "amazon5"), tmp_path / "next", init_from=run[0])
    assert list(Workdir(tmp_path / "next").attributes()) == ["amazon5"]


def test_a_damaged_file_is_named(tmp_path):
    place = Workdir(tmp_path)
    assert place.attributes() == {}
    found = {"bank": (Attribute("tone", (Value("polite"), Value("angry")), proposed=True),), "none": ()}
    place.write_attributes(found)
    assert place.attributes() == found
    for content, said_of_it in (
        ("{", "does not hold"),
        ("[1]", "does not hold"),
        ('{"bank": {"tone": 3}}', "tone"),
    ):
        (tmp_path / "attributes.json").write_text(content)
        with pytest.raises(UserError, match=f"attributes.json.*{said_of_it}|{said_of_it}.*attributes.json"):
            place.attributes()


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        ({"stream__proposed_attributes": "-1"}, "stream.proposed_attributes = -1 is out of range"),
        ({"rollout__prompt_length": "150"}, r"too short for a prompt that asks for attributes"),
    ],
)
def test_what_cannot_be_asked_is_said_before_anything_is_read(folders, tmp_path, overrides, words):
    with pytest.raises(UserError, match=words):
        api.train(config_of(folders, "yelp5", **overrides), tmp_path / "run")


def test_a_policy_of_our_own_has_no_words_to_propose_with(tmp_path):
    with pytest.raises(UserError, match="stream.proposed_attributes is for named weights") as error:
        api.train(runs.config(tmp_path, stream__proposed_attributes="1"), tmp_path / "run")
    assert str(error.value).count(". ") == 0
