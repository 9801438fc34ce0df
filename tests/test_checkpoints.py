"""Checkpoints: exact, atomic, written while the run goes on, and what happens to damaged ones."""

from __future__ import annotations

import logging
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import textwrap
import threading
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import traverse_util

from streamsynth.errors import UserError
from streamsynth.runtime import journal, seal
from streamsynth.runtime.checkpoint import Checkpoints


def make_tree(seed: int) -> dict:
    rng = np.random.default_rng(seed)
    return {
        "params": {"w": jnp.asarray(rng.normal(size=(3, 4)), jnp.bfloat16), "b": jnp.zeros((4,))},
        "replay": {"tokens": rng.integers(0, 9, (2, 5), np.int32), "empty": np.zeros((0, 7), np.float16)},
        "optimizer": {"0": {}, "1": {"count": np.uint32(seed), "none": None}},
        "flags": np.array([True, False]),
        "float64": rng.normal(size=(2,)),
    }


def leaves(tree: dict) -> dict:
    return traverse_util.flatten_dict(tree, keep_empty_nodes=True, sep="/")


def assert_same(a: dict, b: dict) -> None:
    assert leaves(a).keys() == leaves(b).keys()
    for name, leaf in leaves(a).items():
        other = leaves(b)[name]
        if not hasattr(leaf, "dtype"):
            assert leaf is other, name  # None or an empty node
            continue
        assert (leaf.shape, leaf.dtype) == (other.shape, other.dtype), name
        assert np.asarray(leaf).tobytes() == np.asarray(other).tobytes(), name


def test_checkpoint_gives_back_every_bit_and_the_kind_of_array(tmp_path):
    tree = make_tree(5)
    checkpoints = Checkpoints(tmp_path / "checkpoints")
    assert checkpoints.latest_step() is None
    assert not (tmp_path / "checkpoints").exists()  # asking leaves no trace
    checkpoints.save(3, tree, {"journals": {"metrics": 120}, "rate": 0.1})

    again = Checkpoints(tmp_path / "checkpoints")
    step = again.latest_step()
    assert step == 3
    assert again.meta(step) == {"journals": {"metrics": 120}, "rate": 0.1}
    restored = again.restore(step, make_tree(0))
    assert_same(tree, restored)
    assert isinstance(restored["params"]["w"], jax.Array)
    assert isinstance(restored["replay"]["tokens"], np.ndarray)
    # What `shapes` says is itself a template.
    from_shapes = again.restore(step, again.shapes(step))
    np.testing.assert_array_equal(from_shapes["float64"], tree["float64"])
    assert from_shapes["replay"]["empty"].shape == (0, 7)
    assert from_shapes["params"]["w"].dtype == jnp.bfloat16


def test_the_last_ones_are_kept_and_steps_must_grow(tmp_path):
    checkpoints = Checkpoints(tmp_path, keep=2)
    for step in (1, 4, 9):
        checkpoints.save(step, {"x": np.full(2, step)}, {"step": step})
    assert sorted(name for name in os.listdir(tmp_path) if name.isdigit()) == ["4", "9"]
    assert checkpoints.restore(4, {"x": np.zeros(2, np.int64)})["x"].tolist() == [4, 4]
    with pytest.raises(ValueError, match="not above the latest one, 9"):
        checkpoints.save(9, {"x": np.zeros(2)}, {})
    with pytest.raises(UserError, match="no checkpoint 1; its latest is 9"):
        checkpoints.meta(1)


@pytest.mark.parametrize(
    "template, sentence",
    [
        ({"x": np.zeros((2, 3), np.float32)}, r"x is float32\[4, 3\] but this run needs float32\[2, 3\]"),
        ({"x": np.zeros((4, 3), np.float64)}, r"x is float32\[4, 3\] but this run needs float64\[4, 3\]"),
        ({"x": np.zeros((4, 3), np.float32), "z": np.zeros(1)}, "has no array z"),
        ({"y": np.zeros((4, 3), np.float32)}, "holds an array x that this run does not know"),
    ],
)
def test_a_checkpoint_of_another_config_is_refused(tmp_path, template, sentence):
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(1, {"x": np.zeros((4, 3), np.float32)}, {})
    with pytest.raises(UserError, match=sentence):
        checkpoints.restore(1, template)


@pytest.mark.parametrize("leaf", [jax.random.key(0), 3.0, "text"])
def test_leaves_that_would_not_come_back_are_refused(tmp_path, leaf):
    with pytest.raises(TypeError, match="a/b is no array"):
        Checkpoints(tmp_path).save(1, {"a": {"b": leaf}}, {})


# ------------------------------------------------------------------------------ written in the meantime


def test_a_checkpoint_is_written_while_its_arrays_are_given_away(tmp_path, monkeypatch):
    """Held up just before it counts: until then the one before is the latest, and what was saved is safe."""
    step = jax.jit(lambda x: x + 1, donate_argnums=0)
    given = {"x": jnp.arange(100_000, dtype=jnp.float32), "n": np.arange(5)}
    checkpoints = Checkpoints(tmp_path, asynchronous=True)
    checkpoints.save(1, {"x": np.zeros(3)}, {})
    checkpoints.wait()
    may_go_on = threading.Event()
    write = seal.write

    def hold_up(folder):
        assert may_go_on.wait(60)
        write(folder)

    monkeypatch.setattr(seal, "write", hold_up)
    checkpoints.save(2, given, {})
    x = given["x"]
    for _ in range(3):
        x = step(x)
    given["n"][:] = -1
    assert float(x[0]) == 3  # the loop has gone on
    assert checkpoints.latest_step() == 1
    threading.Timer(0.3, may_go_on.set).start()
    checkpoints.save(3, {"x": x}, {})  # waits for the second
    assert may_go_on.is_set()
    assert checkpoints.latest_step() in (2, 3)
    checkpoints.close()
    assert checkpoints.latest_step() == 3
    restored = checkpoints.restore(2, checkpoints.shapes(2))
    np.testing.assert_array_equal(restored["x"], np.arange(100_000, dtype=np.float32))
    np.testing.assert_array_equal(restored["n"], np.arange(5))


def test_a_write_that_fails_is_said_and_does_not_count(tmp_path, monkeypatch):
    checkpoints = Checkpoints(tmp_path, asynchronous=True)
    checkpoints.save(1, {"x": np.zeros(3)}, {})
    checkpoints.wait()

    def full_disk(folder):
        raise OSError("no space left")

    with monkeypatch.context() as patch:
        patch.setattr(seal, "write", full_disk)
        checkpoints.save(2, {"x": np.ones(3)}, {})
        with pytest.raises(OSError, match="no space left"):
            checkpoints.wait()
    assert checkpoints.latest_step() == 1
    checkpoints.save(2, {"x": np.ones(3)}, {})
    checkpoints.close()
    assert sorted(os.listdir(tmp_path)) == ["1", "2"]


_SAVES_FOREVER = """
    import itertools, sys
    import numpy as np
    from streamsynth.runtime.checkpoint import Checkpoints
    from streamsynth.runtime.journal import Journal
    folder, asynchronous = sys.argv[1], sys.argv[2] == "asynchronous"
    checkpoints = Checkpoints(folder, asynchronous=asynchronous)
    first = (checkpoints.last_whole() or 0) + 1
    rows = Journal(folder + ".jsonl")
    rows.truncate(checkpoints.meta(first - 1)["length"] if first > 1 else 0)
    for step in itertools.count(first):
        rows.append({"step": step, "text": "x" * (step % 50)})
        rows.flush()
        tree = {"a": {str(i): np.full((50, 50), step, np.float32) for i in range(20)}}
        checkpoints.save(step, tree, {"step": step, "length": rows.size()})
        for leaf in tree["a"].values():
            leaf += 1000
        print(step, flush=True)
"""


def test_sigkill_at_any_moment_leaves_a_whole_latest_checkpoint(tmp_path):
    """Two writers are killed at random moments, one is started again on what it left and killed again."""
    script = textwrap.dedent(_SAVES_FOREVER)
    delays = random.Random(0)
    folders = {tmp_path / name: name for name in ("asynchronous", "synchronous")}
    last_said = dict.fromkeys(folders, 0)

    def start(folder):
        command = [sys.executable, "-c", script, str(folder), folders[folder]]
        return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)

    for round_folders in (list(folders), list(folders)[:1]):
        processes = {folder: start(folder) for folder in round_folders}
        for folder, process in processes.items():
            for _ in range(2):  # with the second, the first is complete
                last_said[folder] = int(process.stdout.readline())
            time.sleep(delays.uniform(0.0, 0.5))
            process.send_signal(signal.SIGKILL)
            said = process.stdout.read().split("\n")[:-1]
            last_said[folder] = int(said[-1]) if said else last_said[folder]
            process.wait()

    for folder, kind in folders.items():
        checkpoints = Checkpoints(folder)
        step = checkpoints.last_whole()
        # The writer may have been killed between the rename and its print; what was said to be saved may
        # not have been written yet, but the one before it was.
        assert last_said[folder] - (kind == "asynchronous") <= step <= last_said[folder] + 1
        meta = checkpoints.meta(step)
        assert meta["step"] == step
        state = checkpoints.restore(step, checkpoints.shapes(step))
        assert {float(value) for leaf in state["a"].values() for value in np.unique(leaf)} == {float(step)}
        # What it counts on is there, and no step was lost or written twice.
        with journal.Journal(f"{folder}.jsonl") as rows:
            rows.truncate(meta["length"])
        records = journal.read(f"{folder}.jsonl")
        assert [record["step"] for record in records] == list(range(1, step + 1))
        checkpoints.save(step + 1, state, {})
        assert not [name for name in os.listdir(folder) if "tmp" in name]


# -------------------------------------------------------------------------------------------- damaged


def cut_in_half(path):
    os.truncate(path, path.stat().st_size // 2)


def flip_a_bit(path):
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 4
    path.write_bytes(data)


def largest(step):
    """The file that holds most of the arrays."""
    return max((path for path in step.rglob("*") if path.is_file()), key=lambda path: path.stat().st_size)


DAMAGE = {
    "an array file is cut off": (
        lambda step: cut_in_half(largest(step)),
        r"state/\S+ has \d+ bytes instead of",
    ),
    "a bit of an array is flipped": (lambda step: flip_a_bit(largest(step)), r"state/\S+ has other bytes"),
    "an array file is gone": (lambda step: largest(step).unlink(), r"state/\S+ is missing"),
    "the manifest is gone": (lambda step: shutil.rmtree(step / "manifest"), "manifest/metadata is missing"),
    "the manifest is garbage": (
        lambda step: (step / "manifest" / "metadata").write_text("{]"),
        "manifest/metadata is no JSON object",
    ),
    "the rest is garbage": (
        lambda step: (step / "meta" / "metadata").write_bytes(b"\xff\x00"),
        "meta/metadata is",
    ),
    "the metadata of the arrays are gone": (
        lambda step: (step / "state" / "_METADATA").unlink(),
        "state/_METADATA is missing",
    ),
    "the seal is gone": (lambda step: (step / "seal.json").unlink(), "seal.json is missing"),
    "the seal is cut off": (lambda step: cut_in_half(step / "seal.json"), "seal.json is no JSON object"),
    "all of it is gone": (lambda step: [shutil.rmtree(step), step.mkdir()], "manifest/metadata is missing"),
}


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    """Checkpoints 3 and 5."""
    folder = tmp_path_factory.mktemp("two")
    checkpoints = Checkpoints(folder)
    for step in (3, 5):
        values = np.random.default_rng(step).normal(size=(40, 50)).astype(np.float32)
        checkpoints.save(step, {"values": values, "step": np.int32(step)}, {"step": step})
    return folder


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_newest_checkpoint_is_passed_over(two, tmp_path, damage, caplog):
    folder = tmp_path / "checkpoints"
    shutil.copytree(two, folder)
    spoil, reason = DAMAGE[damage]
    spoil(folder / "5")
    checkpoints = Checkpoints(folder)
    with caplog.at_level(logging.WARNING):
        assert checkpoints.last_whole() == 3
        assert checkpoints.last_whole() == 3
    [warning] = [record.getMessage() for record in caplog.records if "damaged" in record.getMessage()]
    assert re.search(rf"damaged: checkpoint 5 \({reason}", warning)
    assert checkpoints.meta(3) == {"step": 3}
    state = checkpoints.restore(3, checkpoints.shapes(3))
    # The run gets to the same step again.
    checkpoints.save(5, state, {"step": 5})
    assert sorted(os.listdir(folder)) == ["3", "5", "5.damaged"]
    again = Checkpoints(folder)
    assert again.last_whole() == 5
    np.testing.assert_array_equal(again.restore(5, again.shapes(5))["values"], state["values"])


def test_no_step_is_good(two, tmp_path):
    folder = tmp_path / "checkpoints"
    shutil.copytree(two, folder)
    flip_a_bit(largest(folder / "5"))
    (folder / "3" / "manifest" / "metadata").unlink()
    sentence = r"every checkpoint is damaged: 5 \(.*other bytes.*\); 3 \(manifest/metadata is missing\)\. Put"
    with pytest.raises(UserError, match=sentence):
        Checkpoints(folder).last_whole()
    assert sorted(os.listdir(folder)) == ["3", "5"]


def test_a_step_that_is_damaged_again_is_put_beside_the_first(two, tmp_path):
    folder = tmp_path / "checkpoints"
    shutil.copytree(two, folder)
    for names in (["3", "5", "5.damaged"], ["3", "5", "5.damaged", "5.damaged.2"]):
        flip_a_bit(largest(folder / "5"))
        checkpoints = Checkpoints(folder)
        checkpoints.save(5, checkpoints.restore(checkpoints.last_whole(), checkpoints.shapes(3)), {})
        assert sorted(os.listdir(folder)) == names


def test_another_config_is_no_damage(two, tmp_path):
    folder = tmp_path / "checkpoints"
    shutil.copytree(two, folder)
    checkpoints = Checkpoints(folder)
    step = checkpoints.last_whole()
    assert step == 5
    with pytest.raises(UserError, match=r"values is float32\[40, 50\] but this run needs float32\[40, 60\]"):
        checkpoints.restore(step, {"values": np.zeros((40, 60), np.float32), "step": np.int32(0)})
    assert sorted(os.listdir(folder)) == ["3", "5"]


def test_a_reader_leaves_a_checkpoint_alone_that_another_process_writes(two, tmp_path):
    folder = tmp_path / "checkpoints"
    shutil.copytree(two, folder)
    (folder / "7.orbax-checkpoint-tmp").mkdir()
    reader = Checkpoints(folder, keep=1)
    assert reader.last_whole() == 5
    reader.restore(5, reader.shapes(5))
    reader.close()
    assert sorted(os.listdir(folder)) == ["3", "5", "7.orbax-checkpoint-tmp"]
    writer = Checkpoints(folder)
    writer.save(6, {"values": np.zeros(1)}, {})
    assert sorted(os.listdir(folder)) == ["5", "6"]
