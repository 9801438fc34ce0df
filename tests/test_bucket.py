"""A workdir in a bucket, over a server on loopback that speaks as much of its API as is used."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import textwrap
import time

import buckets
import pytest
import runs

from streamsynth import api
from streamsynth import main as main_lib
from streamsynth.errors import UserError
from streamsynth.runtime import files
from streamsynth.workdir import Workdir

WITHOUT = "needs gcsfs, of the extra gcs"


@pytest.fixture
def bucket():
    pytest.importorskip("gcsfs", reason=WITHOUT)
    with buckets.serve() as served:
        yield served


def run(script: str, bucket: buckets.Bucket, *arguments: str) -> subprocess.Popen:
    """A process that finds the bucket: tensorstore reads its address once, where it is first used."""
    env = {**os.environ, **bucket.environment, "PYTHONPATH": os.pathsep.join([str(runs.ROOT), *sys.path])}
    command = [sys.executable, "-c", textwrap.dedent(script), *arguments]
    return subprocess.Popen(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def finish(process: subprocess.Popen) -> str:
    out, err = process.communicate(timeout=300)
    assert process.returncode == 0, err[-4000:]
    return out


_FILES = """
    import numpy as np
    from streamsynth.runtime import files, journal
    from streamsynth.runtime.checkpoint import Checkpoints
    from streamsynth.runtime.metrics import TensorBoardWriter

    run = files.as_path("gs://bucket/runs/one")
    assert not run.exists() and not run.is_dir()
    files.atomic_write(run / "deep" / "card.md", "Zürich")
    assert (run / "deep" / "card.md").read_text() == "Zürich" and files.names_within(run) == ["deep/card.md"]
    assert files.size(run / "deep" / "card.md") == 7
    for missing in (lambda: files.size(run / "none"), lambda: (run / "none").read_bytes()):
        try:
            missing()
        except FileNotFoundError:
            continue
        raise AssertionError("a missing object was read")

    # A journal is appended to, torn, cut back and appended to again.
    path = run / "kept" / "bank.jsonl"
    with journal.Journal(path) as rows:
        rows.append({"step": 1})
        rows.flush()
        length = rows.size()
        rows.append({"step": 2})
        assert journal.read(path) == [{"step": 1}]  # as of the last flush
    assert journal.read(path) == [{"step": 1}, {"step": 2}]
    files.atomic_write(path, path.read_bytes() + b'{"step":')
    with journal.Journal(path) as rows:
        rows.append({"step": 3})
    assert [record["step"] for record in journal.read(path)] == [1, 2, 3]
    with journal.Journal(path) as rows:
        rows.truncate(length)
        rows.append({"step": 4})
    assert [record["step"] for record in journal.read(path)] == [1, 4]
    journal.Journal(run / "kept" / "empty.jsonl").close()
    assert (run / "kept" / "empty.jsonl").read_bytes() == b""

    writer = TensorBoardWriter(run / "tensorboard")
    writer.write_scalars(1, {"kl": 0.5})
    writer.flush()
    [events] = files.names_within(run / "tensorboard")
    before = files.size(run / "tensorboard" / events)
    writer.write_scalars(2, {"kl": 0.25})
    writer.close()
    assert 0 < before < files.size(run / "tensorboard" / events)

    checkpoints = Checkpoints(run / "checkpoints", asynchronous=True)
    assert checkpoints.last_whole() is None
    for step in (1, 2, 3):
        checkpoints.save(step, {"x": np.arange(1000.0) + step, "empty": np.zeros((0, 2))}, {"step": step})
    checkpoints.close()
    assert sorted(path.name for path in (run / "checkpoints").iterdir()) == ["2", "3"]
"""

_DAMAGED = """
    import numpy as np
    from streamsynth.runtime import files
    from streamsynth.runtime.checkpoint import Checkpoints

    folder = files.as_path("gs://bucket/runs/one/checkpoints")
    checkpoints = Checkpoints(folder)
    assert checkpoints.latest_step() == 3  # 4 was not finished
    assert checkpoints.last_whole() == 2
    state = checkpoints.restore(2, checkpoints.shapes(2))
    np.testing.assert_array_equal(state["x"], np.arange(1000.0) + 2)
    assert state["empty"].shape == (0, 2) and checkpoints.meta(2) == {"step": 2}
    checkpoints.save(3, state, {})
    checkpoints.save(4, state, {})
    assert sorted(path.name for path in folder.iterdir()) == ["3", "3.damaged", "4"]
    assert Checkpoints(folder).last_whole() == 4
"""


_HOUSE = """
    import jax, numpy as np, runs, tiny
    from streamsynth.dataset.rows import Row, read_rows, write_rows
    from streamsynth.dataset.export import export
    from streamsynth.errors import UserError
    from streamsynth.evaluation import report
    from streamsynth.policy.store import has_policy, load_policy, save_policy
    from streamsynth.stream import patterns
    from streamsynth.workdir import Workdir

    workdir, config = Workdir("gs://bucket/runs/two"), runs.config("cache")
    assert workdir.check(config) == 0 and workdir.saved_with() == {} and not has_policy(workdir.policy)
    workdir.write_config(config)
    assert workdir.check(config) == 2 and workdir.config().to_dict() == config.to_dict()
    workdir.write_experience(patterns.empty(0))
    assert workdir.experience() is not None and workdir.attributes() == {}
    save_policy(workdir.policy, tiny.policy())
    found = load_policy(workdir.policy)
    jax.tree.map(np.testing.assert_array_equal, found.params, tiny.policy().params)
    assert found.tokenizer.vocab_size == tiny.policy().tokenizer.vocab_size

    task = tiny.world_task()
    row = Row(("it is so",), task.labels[0], "imitate", 3, 1, ("a",), {"quality": 1.0})
    write_rows(workdir.kept(task.name), [row])
    assert read_rows(workdir.kept(task.name)) == [row]
    try:
        read_rows(workdir.kept("none"))
    except UserError as error:
        assert "cannot read the rows in gs://bucket/runs/two/kept/none.jsonl: " in str(error)
    export(task, [row], workdir.dataset(task.name), config_summary={})
    [metrics, evaluations, *kept] = workdir.journals((task.name,))
    for turn, of_run in ((0, 0.5), (1, 0.75)):
        evaluations.append({"turn": turn, "task": task.name, "score": "accuracy", "accuracy": of_run})
    for one in (metrics, evaluations, *kept):
        one.close()
    assert report.write("gs://bucket/runs/two")["transfer_matrix"] == [[0.5], [0.75]]
"""


def test_files_journals_and_checkpoints_of_a_bucket(bucket):
    finish(run(_FILES, bucket))
    assert "runs/one/checkpoints/3/commit_success.txt" in bucket.objects
    # One object is lost, and another checkpoint was being written when its process was killed.
    [*_, lost] = sorted(
        (name for name in bucket.objects if name.startswith("runs/one/checkpoints/3/state/ocdbt")),
        key=lambda name: len(bucket.objects[name][0]),
    )
    del bucket.objects[lost]
    for name in [name for name in bucket.objects if name.startswith("runs/one/checkpoints/2/")]:
        if not name.endswith("commit_success.txt"):
            bucket.objects[name.replace("/2/", "/4/")] = bucket.objects[name]
    finish(run(_DAMAGED, bucket))


def test_a_bucket_without_its_library_is_one_sentence(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(files.importlib.util, "find_spec", lambda name: None)
    argv = runs.arguments(tmp_path / "cache", "gs://bucket/run")
    assert main_lib.main(argv) == 2
    said = capsys.readouterr().err
    assert said.endswith("gs://bucket/run: reading a bucket needs gcsfs: pip install 'streamsynth[gcs]'.\n")
    with pytest.raises(UserError, match=r"s3://bucket/run: give a local path or one of Google Cloud Storage"):
        Workdir("s3://bucket/run")
    with pytest.raises(UserError, match="--output=gs://bucket/model: a model goes to a local folder"):
        api.export(tmp_path, "gs://bucket/model")


@pytest.mark.slow
def test_a_run_in_a_bucket_is_killed_and_goes_on(bucket, finished, tmp_path, monkeypatch):
    for name, value in bucket.environment.items():
        monkeypatch.setenv(name, value)
    argv = runs.arguments(finished.cache, "gs://bucket/run")

    def steps() -> list[int]:
        names = [name.split("/") for name in list(bucket.objects) if name.startswith("run/checkpoints/")]
        return [int(name[2]) for name in names if name[3:] == ["commit_success.txt"]]

    rng = random.Random(0)
    for step in (3, 6, 9):
        process = runs.start(argv, *map(str, sys.path))
        while max(steps(), default=-1) < step:
            assert process.poll() is None, process.stderr.read()[-3000:]
            time.sleep(0.01)
        time.sleep(rng.uniform(0, 1))
        process.send_signal(signal.SIGKILL)
        process.communicate()
        assert process.returncode == -signal.SIGKILL
    runs.finish(argv, *map(str, sys.path))
    for name, (content, _) in bucket.objects.items():
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    assert runs.outcome(tmp_path / "run") == runs.outcome(finished.workdir)
    assert list((tmp_path / "run" / "tensorboard").iterdir())
    # What reads a run reads it there.
    synthesize = ["synthesize", "--workdir=gs://bucket/run", f"--task={runs.TASKS[0]}", "--rows=4"]
    runs.finish([*synthesize, "--output=gs://bucket/rows"], *map(str, sys.path))
    assert bucket.objects["rows/train.jsonl"][0].count(b"\n") == 4


def test_the_other_files_of_a_run_in_a_bucket(bucket):
    finish(run(_HOUSE, bucket))
    names = {name.removeprefix("runs/two/") for name in bucket.objects}
    assert {"config.json", "experience.json", "policy/params.safetensors", "kept/bank_1.jsonl"} < names
    assert {"datasets/bank_1/train.jsonl", "datasets/bank_1/README.md", "report/index.html"} < names
