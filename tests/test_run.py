"""A whole run, from nothing to the report: what it leaves behind, and what can be done with it."""

from __future__ import annotations

import json
import math
from collections import Counter

import numpy as np
import pytest
import runs
from flax import traverse_util
from runs import STEPS, TASKS, TUNING
from tensorboardX.proto.event_pb2 import Event

from streamsynth import api
from streamsynth import main as main_lib
from streamsynth.dataset.rows import read_rows
from streamsynth.errors import UserError
from streamsynth.policy.store import load_policy
from streamsynth.stream.patterns import STRATEGIES
from streamsynth.tasks import sources, worlds

KEYS = {
    "tasks",
    "transfer_matrix",
    "average_performance",
    "forward_transfer",
    "backward_transfer",
    "student",
    "diversity",
    "config",
    "commit",
    "seconds",
}


@pytest.fixture(scope="module")
def metrics(finished):
    return runs.read_jsonl(finished.workdir / "metrics.jsonl")


def test_results(finished):
    written = json.loads((finished.workdir / "report" / "results.json").read_text())
    assert written == json.loads(json.dumps(finished.results)) == api.results(finished.workdir)
    assert set(written) >= KEYS
    assert written["tasks"] == list(TASKS)
    assert np.array(written["transfer_matrix"], float).shape == (1 + len(TASKS), len(TASKS))
    assert all(0 <= cell <= 1 for row in written["transfer_matrix"] for cell in row)
    for key in ("average_performance", "forward_transfer", "backward_transfer"):
        assert isinstance(written[key], float)
    for task in TASKS:
        assert set(written["student"][task]) >= {"examples", "synthetic", "synthetic_all", "real"}
        assert written["student"][task]["real"] > written["student"][task]["examples"] > 0.25
        assert written["diversity"][task]["last"]["vendi"] > 1
    assert written["config"]["stream"]["tasks"] == [f"worlds:{name}" for name in TASKS]
    assert set(written["seconds"]) == {"pretrain", "stream", "summary"}


def test_the_first_row_of_the_transfer_matrix_is_from_before_anything(finished):
    records = runs.read_jsonl(finished.workdir / "evaluations.jsonl")
    assert [(r["turn"], r["task"]) for r in records] == [(row, name) for row in range(3) for name in TASKS]
    matrix = finished.results["transfer_matrix"]
    assert [r["accuracy"] for r in records] == [cell for row in matrix for cell in row]
    evaluated = api.evaluate(finished.workdir)
    for record in records[-2:]:
        assert evaluated[record["task"]] == {k: v for k, v in record.items() if k != "turn"}


def test_the_report_can_be_read(finished):
    page = (finished.workdir / "report" / "index.html").read_text()
    assert all(name in page for name in TASKS)
    assert "<svg" in page
    assert "<script src" not in page
    assert "| " in (finished.workdir / "report" / "report.md").read_text()


@pytest.mark.parametrize("name", TASKS)
def test_data_sets(finished, name):
    folder = finished.workdir / "datasets" / name
    rows = runs.read_jsonl(folder / "train.jsonl")
    task = sources.load(f"worlds:{name}", examples_per_label=8, seed=0)
    counts = Counter(row["label"] for row in rows)
    assert set(counts) == set(task.labels)
    assert len(set(counts.values())) == 1  # balanced
    assert len({row["text"] for row in rows}) == len(rows)
    assert not {row["text"] for row in rows} & {example.text for example in task.test}
    ids = {example.id for example in task.examples}
    for row in rows:
        assert row["pattern"] in STRATEGIES
        best = {one for one in row["examples"] if one.startswith(f"{name}/kept/")}
        assert set(row["examples"]) - best <= ids
        assert not best or row["pattern"] == "imitate_best"
        assert bool(row["examples"]) == (row["pattern"] != "label_only")
        assert 0.1 <= row["scores"]["quality"] <= 1
        assert set(row["scores"]) == {"quality", "posterior", "diversity"}
        assert row["step"] > 0
        assert row["policy_version"] >= 0
    kept = read_rows(finished.workdir / "kept" / f"{name}.jsonl")
    assert {row["text"] for row in rows} <= {row.text for row in kept}
    card = (folder / "README.md").read_text()
    assert name in card
    assert str(len(rows)) in card


def test_every_part_of_the_reward_is_logged_before_and_after_its_weight(metrics):
    # A turn's first step measures and tunes, the others learn by reward.
    assert [(m["turn"], m["task"]) for m in metrics] == [
        (turn, name) for turn, name in enumerate(TASKS, start=1) for _ in range(1 + STEPS)
    ]
    steps = [m["step"] for m in metrics]
    assert steps == sorted(set(steps))
    for record in metrics:
        if "alpha" not in record:
            continue
        for part in ("quality", "diversity"):
            assert {f"advantage/{part}", f"advantage/{part}_weighted"} <= set(record)
        assert {"reward/quality", "reward/posterior", "reward/posterior_weighted"} <= set(record)
        assert record["advantage/diversity_weighted"] == pytest.approx(
            record["alpha"] / (1 + record["alpha"]) * record["advantage/diversity"], rel=1e-4
        )
        assert 0 <= record["gate/all"] <= min(v for k, v in record.items() if k.startswith("gate/"))
        assert all(math.isfinite(v) for v in record.values() if isinstance(v, float))
    assert any(record.get("kept", 0) > 0 for record in metrics)


def test_the_second_turn_replays_the_first(metrics):
    first, second = (
        [m for m in metrics if m["turn"] == turn and "alpha" in m] for turn in range(1, 1 + len(TASKS))
    )
    assert not any(key.startswith("replay/") for m in first for key in m)
    for record in second:
        assert record["replay/samples"] == 5  # half of a quarter of 40
        assert 0 < record["replay/effective_samples"] <= 5
        assert 0 <= record["replay/gradient_share"] <= 1


def test_figures_of_training(metrics):
    by_reward = [m for m in metrics if "alpha" in m]
    for record in by_reward:
        assert 0 <= record["group/dead"] <= 1 and 0 <= record["completion/truncated"] <= 1
        assert record["completion/truncated"] == pytest.approx(1 - record["gate/finished"], abs=1e-6)
        assert 0 < record["logprob/gap"] < 1e-4  # float32 twice
        assert record["entropy"] > 0
    assert any(record["completion/truncated"] > 0 for record in by_reward)


def test_probes_and_the_budget(metrics):
    """Every second step of the second turn, and after each turn: a batch of 40 each."""
    probes = [(m["turn"], m["step"], key) for m in metrics for key in m if key.startswith("probe/")]
    first, second = TASKS
    assert probes == [(1, 4, f"probe/{first}"), (2, 9, f"probe/{first}"), (2, 10, f"probe/{second}")]
    assert all(0 < m[key] < 1 for m in metrics for key in m if key.startswith("probe/"))
    # The base policy's batch and two rounds; then a step each.
    batches = [3, 1, 1, 2, 3, 1, 2, 2]
    assert [m["budget/samples"] for m in metrics] == (40 * np.cumsum(batches)).tolist()


def test_tensorboard_files_say_what_the_journal_says(finished, metrics):
    [path] = (finished.workdir / "tensorboard").iterdir()
    data, found, position = path.read_bytes(), {}, 0
    while position < len(data):
        length = int.from_bytes(data[position : position + 8], "little")
        event = Event.FromString(data[position + 12 : position + 12 + length])
        for value in event.summary.value:
            found.setdefault(value.tag, {})[event.step] = value.simple_value
        position += 12 + length + 4
    quality = {m["step"]: m["reward/quality"] for m in metrics}
    assert found["reward/quality"] == pytest.approx(quality, rel=1e-6)
    assert len(found["alpha"]) == len(TASKS) * STEPS


def test_the_policy_has_changed(finished):
    base = load_policy(finished.workdir / "policy").params
    state = runs.state(finished.workdir)
    assert state["policy_version"] == len(TASKS) * (TUNING + STEPS)
    assert state["turn"] == len(TASKS)
    moved = [
        np.abs(state[f"params/params/{path}"] - leaf).max()
        for path, leaf in traverse_util.flatten_dict(base, sep="/").items()
    ]
    assert len(moved) > 5
    assert min(moved) > 0


# --- The other verbs ---


def synthesize(finished, task, rows, output):
    argv = ["synthesize", f"--workdir={finished.workdir}", f"--task={task}", f"--rows={rows}"]
    assert main_lib.main([*argv, f"--output={output}"]) == 0
    return runs.read_jsonl(output / "train.jsonl")


def test_synthesize_for_a_task_of_the_run(finished, tmp_path):
    rows = synthesize(finished, "market_1", 8, tmp_path / "rows")
    assert Counter(Counter(row["label"] for row in rows).values()) == {2: 4}
    assert {row["policy_version"] for row in rows} == {len(TASKS) * (TUNING + STEPS)}
    assert "market_1" in (tmp_path / "rows" / "README.md").read_text()
    assert synthesize(finished, "market_1", 8, tmp_path / "again") == rows


def test_synthesize_for_a_world_the_run_has_not_seen(finished, tmp_path):
    name = next(name for name in worlds.STREAMS["unrelated"] if name not in TASKS)
    rows = synthesize(finished, f"worlds:{name}", 4, tmp_path / "rows")
    labels = sources.load(f"worlds:{name}", examples_per_label=8, seed=0).labels
    assert {row["label"] for row in rows} == set(labels)


def test_synthesize_for_a_folder(finished, tmp_path):
    task = sources.load("worlds:school_1", examples_per_label=8, seed=0)
    folder = tmp_path / "mine"
    folder.mkdir()
    with open(folder / "train.jsonl", "w") as file:
        for example in task.train[::4]:
            row = {"text": example.text, "label": "a" if example.label == task.labels[0] else "b"}
            file.write(json.dumps(row) + "\n")
    rows = synthesize(finished, f"files:{folder}", 6, tmp_path / "rows")
    assert Counter(row["label"] for row in rows) == {"a": 3, "b": 3}


def test_a_task_that_is_neither_in_the_run_nor_a_spec(finished, tmp_path):
    with pytest.raises(UserError, match="the run has no such task .*market_1, restaurant_1"):
        api.synthesize(finished.workdir, "bank", 4, tmp_path / "rows")


def test_evaluate_prints_a_line_a_task(finished, capsys):
    assert main_lib.main(["evaluate", f"--workdir={finished.workdir}"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(":")[0] for line in lines] == list(TASKS)


def test_report_writes_the_same_again(finished):
    path = finished.workdir / "report" / "results.json"
    before = path.read_bytes()
    assert main_lib.main(["report", f"--workdir={finished.workdir}"]) == 0
    assert path.read_bytes() == before
