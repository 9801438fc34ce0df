"""Journals, checkpoints, metric writers and progress: what must hold when a run is killed."""

from __future__ import annotations

import io
import json
import os
import random
import signal
import subprocess
import sys
import textwrap
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import traverse_util
from hypothesis import given, settings
from hypothesis import strategies as st

from streamsynth.errors import UserError
from streamsynth.runtime import files, journal
from streamsynth.runtime.checkpoint import Checkpoints
from streamsynth.runtime.metrics import JournalWriter, MultiWriter, TensorBoardWriter
from streamsynth.runtime.progress import Progress

# ---------------------------------------------------------------------------------------------- files


def test_atomic_write_replaces_and_leaves_nothing_beside(tmp_path):
    path = tmp_path / "deep" / "card.md"
    files.atomic_write(path, "first")
    files.atomic_write(path, "Zürich".encode())
    assert path.read_text(encoding="utf-8") == "Zürich"
    assert os.listdir(path.parent) == ["card.md"]


def test_a_write_that_fails_keeps_the_old_content(tmp_path, monkeypatch):
    path = tmp_path / "a.txt"
    files.atomic_write(path, "old")

    def full_disk(descriptor):
        raise OSError("no space left")

    monkeypatch.setattr(os, "fsync", full_disk)
    with pytest.raises(OSError, match="no space"):
        files.atomic_write(path, "new")
    assert path.read_text() == "old"
    assert os.listdir(tmp_path) == ["a.txt"]


# -------------------------------------------------------------------------------------------- journal

values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)
records = st.lists(st.dictionaries(st.text(), values, max_size=3), max_size=6)


@settings(max_examples=30, deadline=None)
@given(records, records, st.data())
def test_journal_gives_back_what_was_appended_and_truncates_to_a_size(tmp_path_factory, before, after, data):
    path = tmp_path_factory.mktemp("journal") / "rows.jsonl"
    with journal.Journal(path) as rows:
        for record in before:
            rows.append(record)
        length = rows.size()
        for record in after:
            rows.append(record)
    assert journal.read(path) == before + after

    # A kill may cut the file anywhere behind the checkpoint's length.
    cut = data.draw(st.integers(length, path.stat().st_size))
    os.truncate(path, cut)
    whole = journal.read(path)
    assert whole == (before + after)[: len(whole)] and len(whole) >= len(before)
    with journal.Journal(path) as rows:
        rows.truncate(length)
        for record in after:
            rows.append(record)
    assert journal.read(path) == before + after


def test_a_torn_last_line_is_not_glued_to_the_next_record(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text('{"a":1}\n{"b":')
    assert journal.read(path) == [{"a": 1}]
    with journal.Journal(path) as rows:
        rows.append({"c": 2})
    assert journal.read(path) == [{"a": 1}, {"c": 2}]


def test_a_torn_file_longer_than_a_block_is_cut_at_its_last_newline(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text('{"a":1}\n' + "x" * 200_000)
    journal.Journal(path).close()
    assert path.read_text() == '{"a":1}\n'


def test_numbers_of_numpy_become_plain_and_nan_becomes_null(tmp_path):
    path = tmp_path / "metrics.jsonl"
    with journal.Journal(path) as rows:
        record = {"step": np.int64(3), "loss": np.float32(0.5), "a": np.array([1.0, np.nan]), "b": np.inf}
        rows.append(record)
    assert path.read_text() == '{"step":3,"loss":0.5,"a":[1.0,null],"b":null}\n'


def test_a_jax_array_is_refused_since_it_would_hide_a_fetch(tmp_path):
    with journal.Journal(tmp_path / "metrics.jsonl") as rows, pytest.raises(TypeError):
        rows.append({"loss": jnp.float32(1.0)})


def test_damaged_journals_are_said_with_file_and_line(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text('{"a":1}\n[2]\n{"b":2}\n')
    with pytest.raises(UserError, match=r"rows\.jsonl, line 2"):
        journal.read(path)
    with journal.Journal(path) as rows:
        with pytest.raises(UserError, match="has 20 bytes but the checkpoint counts on 99"):
            rows.truncate(99)
        with pytest.raises(UserError, match="no line end at byte 9"):
            rows.truncate(9)
    assert journal.read(tmp_path / "absent.jsonl") == []


# ---------------------------------------------------------------------------------------- checkpoints


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


_SAVES_FOREVER = """
    import itertools, sys
    import numpy as np
    from streamsynth.runtime.checkpoint import Checkpoints
    checkpoints = Checkpoints(sys.argv[1])
    first = (checkpoints.latest_step() or 0) + 1
    for step in itertools.count(first):
        tree = {"a": {str(i): np.full((50, 50), step, np.float32) for i in range(20)}}
        checkpoints.save(step, tree, {"step": step})
        print(step, flush=True)
"""


def test_sigkill_at_any_moment_leaves_a_whole_latest_checkpoint(tmp_path):
    """Two writers are killed at random moments, one is started again on what it left."""
    script = textwrap.dedent(_SAVES_FOREVER)
    delays = random.Random(0)
    folders = [tmp_path / "a", tmp_path / "b"]
    last_said = dict.fromkeys(folders, 0)

    def start(folder):
        command = [sys.executable, "-c", script, str(folder)]
        return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)

    for round_folders in (folders, folders[:1]):
        processes = {folder: start(folder) for folder in round_folders}
        for folder, process in processes.items():
            last_said[folder] = int(process.stdout.readline())
            time.sleep(delays.uniform(0.0, 0.5))
            process.send_signal(signal.SIGKILL)
            said = process.stdout.read().split("\n")[:-1]
            last_said[folder] = int(said[-1]) if said else last_said[folder]
            process.wait()

    for folder in folders:
        checkpoints = Checkpoints(folder)
        step = checkpoints.latest_step()
        # The writer may have been killed between the rename and its print.
        assert step in (last_said[folder], last_said[folder] + 1)
        assert checkpoints.meta(step) == {"step": step}
        state = checkpoints.restore(step, checkpoints.shapes(step))
        assert {float(value) for leaf in state["a"].values() for value in np.unique(leaf)} == {float(step)}
        checkpoints.save(step + 1, state, {})
        assert not [name for name in os.listdir(folder) if "tmp" in name]


# -------------------------------------------------------------------------------------------- metrics


def read_events(directory) -> list:
    """The events of all files, by tensorboardX's own protobufs and TensorFlow's record framing."""
    from tensorboardX.proto.event_pb2 import Event

    events = []
    for path in sorted(directory.iterdir()):
        data = path.read_bytes()
        position = 0
        while position < len(data):
            length = int.from_bytes(data[position : position + 8], "little")
            event = Event()
            event.ParseFromString(data[position + 12 : position + 12 + length])
            events.append(event)
            position += 12 + length + 4  # length, its checksum, the event, its checksum
    return events


def test_tensorboard_files_hold_scalars_texts_and_histograms(tmp_path):
    writer = TensorBoardWriter(tmp_path, purge_step=7)
    writer.write_hparams({"learner.alpha": 0.5})
    writer.write_scalars(7, {"reward/quality": np.float32(0.25), "kl": 2})
    writer.write_texts(7, {"sample": "the soup came cold"})
    writer.write_histograms(7, {"weights": np.arange(100.0).reshape(10, 10)}, {"weights": 5})
    writer.flush()
    writer.close()
    events = read_events(tmp_path)
    values = {value.tag: (event.step, value) for event in events for value in event.summary.value}
    step, scalar = values["reward/quality"]
    assert (step, scalar.simple_value) == (7, 0.25)
    assert values["kl"][1].simple_value == 2.0
    assert values["sample/text_summary"][1].tensor.string_val == [b"the soup came cold"]
    histogram = values["weights"][1].histo
    assert (histogram.min, histogram.max, histogram.num, histogram.sum) == (0.0, 99.0, 100.0, 4950.0)
    assert sum(histogram.bucket) == 100.0
    assert b"learner.alpha" in values["hparams/text_summary"][1].tensor.string_val[0]
    # TensorBoard drops what an earlier process wrote from this step on.
    assert any(event.step == 7 and event.session_log.status for event in events)


def test_journal_writer_merges_a_step_into_one_line(tmp_path):
    path = tmp_path / "metrics.jsonl"
    rows = journal.Journal(path)
    writer = MultiWriter([JournalWriter(rows), TensorBoardWriter(tmp_path / "tensorboard")])
    writer.write_hparams({"seed": 1})
    writer.write_scalars(1, {"turn": 1, "kl": 0.5})
    writer.write_texts(1, {"task": "mood"})
    writer.write_histograms(1, {"credit": np.ones(3)})
    writer.write_scalars(2, {"kl": 0.25})
    with pytest.raises(ValueError, match="step 2: kl written twice"):
        writer.write_scalars(2, {"kl": 0.75})
    writer.flush()
    expected = [{"step": 1, "turn": 1, "kl": 0.5, "task": "mood"}, {"step": 2, "kl": 0.25}]
    assert journal.read(path) == expected
    writer.close()
    assert journal.read(path) == expected


# ------------------------------------------------------------------------------------------- progress


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


class Clock:
    def __init__(self):
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def screen(text: str) -> list[str]:
    """The lines that a terminal shows after the carriage returns."""
    lines = []
    for line in text.split("\n"):
        cells: list[str] = []
        for part in line.split("\r"):
            cells[: len(part)] = part
        lines.append("".join(cells).rstrip())
    return lines


def test_the_bar_on_a_terminal_is_one_line_with_rate_and_time_left():
    stream, clock = Terminal(), Clock()
    with Progress(total=100, what="train", stream=stream, clock=clock) as progress:
        assert screen(stream.getvalue()) == ["[........................] train 0/100"]
        for _ in range(50):
            clock.now += 0.5
            progress.advance(quality=0.75)
        assert progress.rate() == pytest.approx(2.0)
        shown = "[############............] train 50/100, 2.0/s, 0:25 left, quality 0.75"
        assert screen(stream.getvalue()) == [shown]
        progress.message("compiled 2 programs")
        assert screen(stream.getvalue()) == ["compiled 2 programs", shown]
    assert screen(stream.getvalue())[-1] == ""


def test_the_rate_forgets_a_slow_first_step_and_a_resumed_run_counts_its_own_steps():
    clock = Clock()
    progress = Progress(total=1000, what="train", stream=io.StringIO(), done=500, clock=clock)
    assert progress.rate() is None
    clock.now += 60.0  # the compile
    progress.advance()
    assert progress.line() == "train 501/1000, 60.0 s each, 8:19:00 left"
    for _ in range(30):
        clock.now += 0.25
        progress.advance()
    assert progress.rate() == pytest.approx(4.0)
    assert progress.line() == "train 531/1000, 4.0/s, 1:57 left"


def test_a_line_is_cut_to_the_width_of_the_terminal(monkeypatch):
    monkeypatch.setenv("COLUMNS", "40")
    stream = Terminal()
    with Progress(total=3, what="a loop with quite a long name", stream=stream):
        assert max(map(len, screen(stream.getvalue()))) < 40


def test_elsewhere_a_heartbeat_comes_even_while_the_loop_hangs():
    stream = io.StringIO()
    with Progress(total=10, what="train", stream=stream, interval=0.05) as progress:
        progress.advance(3)
        deadline = time.monotonic() + 5.0
        while "no step for" not in stream.getvalue() and time.monotonic() < deadline:
            time.sleep(0.01)
    lines = stream.getvalue().splitlines()
    assert any(line.startswith("train 3/10, ") and "no step for 0:0" in line for line in lines[:-1])
    assert "took 0:0" in lines[-1]
    assert "\r" not in stream.getvalue()
    assert json.dumps(lines)  # plain text, no control characters
