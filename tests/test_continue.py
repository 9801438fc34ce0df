"""Streams that go on, that begin with old experience, and that are not allowed to."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pytest
import runs
from flax import traverse_util
from runs import STEPS, TASKS, THIRD, TUNING

from streamsynth import api
from streamsynth import main as main_lib
from streamsynth.errors import UserError
from streamsynth.policy.store import load_policy
from streamsynth.stream.patterns import SHARED, STRATEGIES


@pytest.fixture(scope="module")
def longer(finished, tmp_path_factory):
    """The finished run with a third task appended."""
    workdir = tmp_path_factory.mktemp("longer") / "run"
    shutil.copytree(finished.workdir, workdir)
    tasks = ",".join(f"worlds:{name}" for name in (*TASKS, THIRD))
    results = api.train(runs.config(finished.cache, stream__tasks=tasks), workdir)
    return workdir, results


def test_appended_tasks_continue_the_stream(finished, longer):
    workdir, results = longer
    before = np.array(finished.results["transfer_matrix"], float)
    after = np.array(results["transfer_matrix"], float)
    assert results["tasks"] == [*TASKS, THIRD]
    assert after.shape == (4, 3)
    np.testing.assert_array_equal(after[:3, :2], before)  # what was measured stays
    # Before anything and before its own turn the new task can still be measured, in between no more.
    np.testing.assert_array_equal(np.isnan(after[:, 2]), [False, True, False, False])
    old, new = (runs.read_jsonl(folder / "metrics.jsonl") for folder in (finished.workdir, workdir))
    assert new[: len(old)] == old
    assert [record["task"] for record in new[len(old) :]] == [THIRD] * (1 + STEPS)
    assert new[-1]["replay/samples"] == 10  # the share is fully grown
    for name in TASKS:
        was, now = (folder / "datasets" / name / "train.jsonl" for folder in (finished.workdir, workdir))
        assert now.read_bytes() == was.read_bytes()
    assert (workdir / "datasets" / THIRD / "train.jsonl").is_file()
    was, now = runs.state(finished.workdir), runs.state(workdir)
    assert now["policy_version"] == was["policy_version"] + TUNING + STEPS
    for name in ("buffer/samples/tokens", "archive/matrix", "kept"):
        for task in range(len(TASKS)):
            np.testing.assert_array_equal(now[f"tasks/{task}/{name}"], was[f"tasks/{task}/{name}"])


def test_a_finished_run_that_is_started_again_changes_nothing(finished, tmp_path):
    workdir = tmp_path / "run"
    shutil.copytree(finished.workdir, workdir)
    api.train(runs.config(finished.cache), workdir)
    assert runs.outcome(workdir) == runs.outcome(finished.workdir)


@pytest.mark.parametrize(
    "change, sentence",
    [
        ("--config.stream.tasks=worlds:restaurant_1,worlds:market_1", "may only append tasks"),
        ("--config.stream.tasks=worlds:market_1", "may only append tasks"),
        ("--config.objective.kl_weight=0.5", "objective.kl_weight was 0.25 and is now 0.5"),
    ],
)
def test_a_changed_prefix_or_key_is_refused(finished, change, sentence, capsys):
    argv = runs.arguments(finished.cache, finished.workdir)
    argv = [word for word in argv if word.split("=")[0] != change.split("=")[0]]
    before = (finished.workdir / "config.json").read_bytes()
    assert main_lib.main([*argv, change]) == 2
    error = capsys.readouterr().err
    assert sentence in error
    assert error.count("\n") == 1
    assert (finished.workdir / "config.json").read_bytes() == before


def test_keys_that_change_nothing_of_the_result_may_change(finished):
    workdir = api.Workdir(finished.workdir)
    free = {"checkpoint__keep": "5", "checkpoint__asynchronous": "False", "mesh__data": "1"}
    assert workdir.check(runs.config(finished.cache / "elsewhere", **free)) == len(TASKS)


@pytest.mark.slow
def test_a_new_stream_with_old_experience(finished, tmp_path):
    workdir = tmp_path / "run"
    config = runs.config(finished.cache, stream__tasks=f"worlds:{THIRD}", learner__steps="1")
    results = api.train(config, workdir, init_from=finished.workdir)
    assert np.array(results["transfer_matrix"]).shape == (2, 1)
    was, now = runs.state(finished.workdir), runs.state(workdir)
    for path, leaf in traverse_util.flatten_dict(load_policy(workdir / "policy").params, sep="/").items():
        np.testing.assert_array_equal(leaf, was[f"params/params/{path}"])
    # The turn's four batches of 40 add to what was inherited, decayed with each; statistics by task start
    # from nothing.
    decay = config.patterns.shared_decay
    added = now["patterns/shared_count"] - decay**4 * was["patterns/shared_count"]
    assert was["patterns/shared_count"].sum() > 0
    assert added.sum() == pytest.approx(40 * (1 + decay + decay**2 + decay**3), rel=1e-4)
    assert now["patterns/count"].sum() == 4 * 40
    assert now["patterns/task_count"].shape == (1, len(STRATEGIES))
    # The same command goes on in it, and one without the experience is another command's.
    assert (
        api.train(config, workdir, init_from=finished.workdir)["transfer_matrix"]
        == results["transfer_matrix"]
    )
    experience = json.loads((workdir / "experience.json").read_text())
    assert set(experience) == set(SHARED)
    for name, values in experience.items():
        np.testing.assert_array_equal(np.float32(values), was[f"patterns/{name}"])


def test_experience_for_a_run_that_began_without(finished):
    with pytest.raises(UserError, match="began without --init_from"):
        api.train(runs.config(finished.cache), finished.workdir, init_from=finished.workdir)


def test_experience_of_another_shape_of_policy(finished, tmp_path):
    with pytest.raises(UserError, match="has policy.layers = 1, and this config 2"):
        api.train(
            runs.config(finished.cache, policy__layers="2"), tmp_path / "run", init_from=finished.workdir
        )
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_the_isolated_learner_forgets_everything(finished, tmp_path):
    workdir = tmp_path / "run"
    config = runs.config(finished.cache, stream__experience="isolated", learner__steps="1")
    [key] = api.config_lib.differences(runs.config(finished.cache, learner__steps="1"), config)
    assert key == "stream.experience"
    results = api.train(config, workdir)
    state = runs.state(workdir)
    # What is left is of the second turn alone: the base policy's batch, two rounds and one step.
    assert state["patterns/count"].sum() == 4 * 40
    assert not state["patterns/task_count"][0].any()
    assert state["tasks/0/buffer/seen"] == 0
    assert state["tasks/1/buffer/seen"] == 4 * 40
    assert state["scheduler/visits"].tolist() in ([0, 1], [1, 1])
    assert state["policy_version"] == 2 * (TUNING + 1)
    assert (workdir / "datasets" / TASKS[0] / "train.jsonl").stat().st_size > 0
    second = runs.read_jsonl(workdir / "metrics.jsonl")[-1]
    assert second["turn"] == 2
    assert second.get("replay/samples", 0) == 0
    assert results["transfer_matrix"][0] == finished.results["transfer_matrix"][0]
