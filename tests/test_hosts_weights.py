"""Named weights on two processes: proposed attributes, an encoder, a stream from another run's end."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import chains
import golden_files
import named
import numpy as np
import processes
import pytest
import runs

from streamsynth import api
from streamsynth.policy.huggingface.architectures import read_config

pytestmark = pytest.mark.slow

CONFIG = runs.ROOT / "configs" / "llama31_8b.py"
KEYS = {
    "mesh.data": "2",
    "mesh.fsdp": "2",
    "rollout.temperature": "1.0",
    "stream.proposed_attributes": "2",
    "supervised.held_out": "0",
    "feedback.features": "encoder",
    "feedback.encoder": str(golden_files.FOLDER / "encoder"),
    "feedback.judges.posterior": "0",
    "feedback.judges.encoder": "1",
}


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """Folders: `weights` that propose attributes, `data`, `run_1` and `run_2` of one and of two processes."""
    root = tmp_path_factory.mktemp("named")
    chains.folder_of(root)
    named.data(root / "data")
    for count in (1, 2):
        train(root, f"run_{count}", count, "yelp5")
    return root


def command(root: Path, workdir: Path, data: Path, task: str, *more: str) -> list[str]:
    arg = f"tiny,weights={root / 'weights'},data={data}"
    keys = {**KEYS, "stream.tasks": f"files:{data / task}"}
    return [
        *("-m", "streamsynth.main", "train", f"--config={CONFIG}:{arg}", f"--workdir={workdir}"),
        *(f"--config.{key}={value}" for key, value in keys.items()),
        *more,
    ]


def train(root: Path, name: str, count: int, task: str, *more: str) -> None:
    argv = command(root, root / name, root / "data", task, *more)
    started = processes.start(argv, root / f"{name}_logs", count, JAX_DISABLE_MOST_OPTIMIZATIONS="1")
    assert processes.finish(started, 600) == [0] * count, (root / f"{name}_logs" / "0.log").read_text()[
        -3000:
    ]


def test_they_give_what_one_process_gives(root):
    one, two = root / "run_1", root / "run_2"
    proposed = json.loads((two / "attributes.json").read_text())
    assert len(proposed["yelp5"]) == 2 and proposed == json.loads((one / "attributes.json").read_text())
    for path in (Path("kept", "yelp5.jsonl"), Path("datasets", "yelp5", "train.jsonl")):
        # Sums are taken in another order, so that scores may differ in their last digits.
        rows = [[row | {"scores": None} for row in runs.read_jsonl(run / path)] for run in (one, two)]
        assert rows[0] and rows[0] == rows[1]
    before, after = runs.state(one), runs.state(two)
    assert before.keys() == after.keys()
    moved = [name for name in before if name.startswith("params/lora/") and name.endswith("/b")]
    assert moved and all(np.abs(after[name]).max() > 0 for name in moved)
    for name in before:
        if name != "journals":
            np.testing.assert_allclose(after[name], before[name], atol=1e-5, err_msg=name)


def test_a_process_with_other_files_is_found_before_anything_is_computed(root, tmp_path):
    for process in range(2):
        shutil.copytree(root / "data", tmp_path / f"data_{process}")
    with open(tmp_path / "data_1" / "yelp5" / "train.jsonl", "a") as file:
        file.write(json.dumps({"text": "one more", "label": "1 stars"}) + "\n")
    argv = command(root, tmp_path / "run", tmp_path / "data_PROCESS", "yelp5")
    started = processes.start(argv, tmp_path / "logs", JAX_DISABLE_MOST_OPTIMIZATIONS="1")
    assert processes.finish(started, 120) == [2, 2]
    for process in range(2):
        text = (tmp_path / "logs" / f"{process}.log").read_text()
        assert "process 1 has another data set yelp5 than process 0: start the same command" in text
    assert not (tmp_path / "run").exists()


def test_a_stream_starts_from_what_two_processes_learned(root):
    """On two processes again; what comes of it is read by one."""
    train(root, "next", 2, "amazon5", f"--init_from={root / 'run_2'}")
    assert list(json.loads((root / "next" / "attributes.json").read_text())) == ["amazon5"]
    assert api.results(root / "next")["tasks"] == ["amazon5"]
    lineage = [json.loads((root / name / "policy" / "policy.json").read_text()) for name in ("run_2", "next")]
    assert lineage[1]["hash"] != lineage[0]["hash"]
    api.export(root / "next", root / "model")
    assert read_config(root / "model").family == "llama"
