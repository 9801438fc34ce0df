"""Journals, checkpoints, metric writers and progress: what must hold when a run is killed."""

from __future__ import annotations

import io
import json
import os
import time

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from streamsynth.errors import UserError
from streamsynth.runtime import files, journal
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
