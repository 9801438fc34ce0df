"""A run whose policy proposes attributes: they are written down once, asked for, and read again."""

from __future__ import annotations

import json
import shutil

import chains
import named
import numpy as np
import pytest
import runs

from streamsynth import api, assemble, weights
from streamsynth import train as train_lib
from streamsynth.errors import UserError
from streamsynth.learner.proposals import with_proposed
from streamsynth.stream.formats import make_format
from streamsynth.stream.prompts import render
from streamsynth.tasks.attributes import Attribute, Value, asked_for
from streamsynth.workdir import Workdir


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("proposing")
    data = named.data(root / "data")
    shutil.copytree(data / "amazon5", data / "own")
    about = json.loads((data / "own" / "task.json").read_text())
    own = about | {"name": "own", "attributes": {"tone": ["polite", "angry"]}}
    (data / "own" / "task.json").write_text(json.dumps(own))
    return chains.folder_of(root), data


def config_of(folders, *tasks, **overrides):
    weights_folder, data = folders
    keys = {"stream.tasks": ",".join(f"files:{data}/{task}" for task in tasks)}
    keys |= {"stream.proposed_attributes": "2", "rollout.temperature": "1.0", "supervised.held_out": "0"}
    keys |= {key.replace("__", "."): value for key, value in overrides.items()}
    path = runs.ROOT / "configs" / "llama31_8b.py"
    return api.load(f"{path}:tiny,weights={weights_folder},data={data}", keys)


def refuse(*args, **keys):
    raise KeyboardInterrupt


def begun(config, workdir, patch, **keys):
    """The tasks and the policy that the stream of a run would go on with; it is killed there."""
    given = []
    patch.setattr(train_lib, "train", lambda config, place, *parts: given.extend(parts) or refuse())
    with pytest.raises(KeyboardInterrupt):
        api.train(config, workdir, **keys)
    return given


def test_what_was_proposed_is_written_down_once_and_asked_for(folders, tmp_path, monkeypatch, quick_xla):
    config, workdir = config_of(folders, "yelp5"), tmp_path / "run"
    (task,), policy = begun(config, workdir, monkeypatch)
    written = json.loads((workdir / "attributes.json").read_text())
    assert sorted(written["yelp5"]) == ["data", "form"] and len(task.cells) >= 4
    assert task.attributes == Workdir(workdir).attributes()["yelp5"]
    r = config.rollout
    form = make_format("auto", policy.tokenizer, r.prompt_length, r.completion_length)
    cell = np.arange(len(task.cells))
    strategy, rng = np.zeros(len(cell), np.int32), np.random.default_rng(0)
    prompts = render(form, task, 0 * cell, strategy, rng, cell).prompts
    for c in cell:
        first, second = (
            f"{one.name}: {v.name}" for one, v in zip(task.attributes, task.cells[c], strict=True)
        )
        said = form.tokenizer.decode(prompts.tokens[c][prompts.mask[c]])
        assert f"It must have: {first}; {second}." in said

    # Nothing is asked a second time, and only appended tasks that name none themselves are asked for.
    asked = []
    once = weights.propose
    monkeypatch.setattr(
        weights, "propose", lambda *args, **keys: asked.append(args[3].name) or once(*args, **keys)
    )
    assert begun(config, workdir, monkeypatch)[0] == (task,) and not asked
    longer = begun(config_of(folders, "yelp5", "own", "amazon5"), workdir, monkeypatch)[0]
    assert asked == ["amazon5"] and longer[0] == task
    assert longer[1].attributes == (Attribute("tone", (Value("polite"), Value("angry"))),)
    after = json.loads((workdir / "attributes.json").read_text())
    assert list(after) == ["yelp5", "amazon5"] and after["yelp5"] == written["yelp5"] and after["amazon5"]
    assert longer == with_proposed(longer, Workdir(workdir).attributes())


@pytest.mark.slow
def test_a_whole_run_goes_by_what_was_proposed_also_when_it_was_killed(
    folders, tmp_path, monkeypatch, quick_xla
):
    config, workdir = config_of(folders, "yelp5"), tmp_path / "run"
    results = api.train(config, workdir)
    written = json.loads((workdir / "attributes.json").read_text())
    assert results["attributes"] == written
    (task,) = assemble.load_tasks(config)
    (task,) = with_proposed([task], Workdir(workdir).attributes())
    rows = runs.read_jsonl(workdir / "datasets" / "yelp5" / "train.jsonl")
    assert rows and all(
        row["attributes"] in [asked_for(task.attributes, c) for c in task.cells] for row in rows
    )
    assert len({tuple(row["attributes"].values()) for row in rows}) > 1
    assert any("reward/attribute" in row for row in runs.read_jsonl(workdir / "metrics.jsonl"))
    text = (workdir / "datasets" / "yelp5" / "README.md").read_text()
    for name, values in written["yelp5"].items():
        assert f"| {name} | {', '.join(values)} | proposed by the policy |" in text
    with monkeypatch.context() as patch:
        begun(config, tmp_path / "again", patch)
    monkeypatch.setattr(weights, "propose", refuse)
    api.train(config, tmp_path / "again")
    assert runs.outcome(tmp_path / "again") == runs.outcome(workdir)
    # A finished run has its attributes without asking; a stream that starts from it asks for its own tasks.
    assert api.evaluate(workdir).keys() == {"yelp5"}
    with pytest.raises(KeyboardInterrupt):
        api.train(config_of(folders, "amazon5"), tmp_path / "next", init_from=workdir)
    assert not (tmp_path / "next" / "attributes.json").exists()
    monkeypatch.undo()
    begun(config_of(folders, "amazon5"), tmp_path / "next", monkeypatch, init_from=workdir)
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
