"""The line between processes, here between threads of one: what goes over it, and how it ends a run."""

from __future__ import annotations

import contextlib
import functools
import io
import socket
import subprocess
import sys
import textwrap
import threading
import time
from pathlib import Path

import numpy as np
import pytest

from streamsynth.runtime.line import LOST, Line, call, host
from streamsynth.runtime.messages import encode, frames


class Ended(list):
    """Takes the place of the end of a process: the exit codes. Its sockets are closed, as the system does."""

    def __init__(self, sockets):
        super().__init__()
        self.event, self.sockets = threading.Event(), sockets

    def __call__(self, code: int) -> None:
        self.append(code)
        self.event.set()
        for connected in self.sockets.values():
            with contextlib.suppress(OSError):
                connected.shutdown(socket.SHUT_RDWR)


class Peer:
    """One process with its line."""

    def __init__(self, index: int, count: int, sockets, log: Path, **options):
        self.ended = Ended(sockets)
        self.log = log
        options = {"exit": self.ended, "watchdog": lambda seconds, stream: None, **options}
        self.line = Line(index, count, sockets, stream=open(log, "w"), **options)  # noqa: SIM115

    def said(self) -> str:
        return self.log.read_text()


@pytest.fixture
def peers(tmp_path):
    """Makes the lines of so many processes."""
    made = []

    def make(count: int, **options) -> list[Peer]:
        pairs = {peer: socket.socketpair() for peer in range(1, count)}
        made.append(Peer(0, count, {p: pair[0] for p, pair in pairs.items()}, tmp_path / "0.log", **options))
        for peer, pair in pairs.items():
            made.append(Peer(peer, count, {0: pair[1]}, tmp_path / f"{peer}.log", **options))
        return made

    yield make
    for peer in made:
        for connected in peer.line._sockets.values():
            connected.close()


def at_once(*calls):
    """Runs each in a thread of its own and returns what they gave."""
    results = [None] * len(calls)

    def run(i):
        results[i] = calls[i]()

    threads = [threading.Thread(target=run, args=(i,), daemon=True) for i in range(len(calls))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
        assert not thread.is_alive()
    return results


def test_messages_keep_arrays_to_the_bit():
    rng = np.random.default_rng(0)
    value = {
        "texts": ["it's é \ud800", ""],
        "nested": [{"floats": rng.normal(size=(3, 2)).astype(np.float32), "nan": np.array([np.nan, np.inf])}],
        "flags": np.array([True, False]),
        "none": None,
        "empty": np.zeros((0, 4), np.int64),
        "number": np.float32(0.1),
        "pair": (1, 2),
    }
    sent = encode({"kind": "value"}, value) + encode({"kind": "alive"})
    buffer, found = bytearray(), []
    for byte in sent:  # however it is cut on the way
        buffer.append(byte)
        found += list(frames(buffer))
    (header, got), (second, nothing) = found
    assert header == {"kind": "value"} and second == {"kind": "alive"} and nothing is None and not buffer
    assert got["texts"] == value["texts"] and got["none"] is None and got["pair"] == [1, 2]
    assert got["number"] == float(np.float32(0.1))
    for name in ("flags", "empty"):
        assert got[name].dtype == value[name].dtype and got[name].tobytes() == value[name].tobytes()
        assert got[name].shape == value[name].shape
    for name in ("floats", "nan"):
        was = value["nested"][0][name]
        assert got["nested"][0][name].dtype == was.dtype and got["nested"][0][name].tobytes() == was.tobytes()


@pytest.mark.parametrize("value", [np.array(["text"]), np.array([{}], object), {1, 2}, b"bytes"])
def test_nothing_but_json_and_numbers_is_sent(value):
    with pytest.raises(TypeError):
        encode({}, {"value": value})


def test_all_gather_the_same_in_the_order_of_the_processes(peers):
    lines = [peer.line for peer in peers(3)]

    def rounds(i):
        return [lines[i].gather(f"round {k}", {"from": i, "array": np.full(i + k, i)}) for k in range(5)]

    for found in at_once(*(functools.partial(rounds, i) for i in range(3))):
        for k, got in enumerate(found):
            assert [one["from"] for one in got] == [0, 1, 2]
            assert [one["array"].tolist() for one in got] == [[i] * (i + k) for i in range(3)]
    large = np.arange(200_000, dtype=np.float64)  # more than sockets hold
    found = at_once(*(lambda i=i: lines[i].gather("large", large + i) for i in range(3)))
    assert all(np.array_equal(got[2], large + 2) for got in found)


def test_leaving_together_is_no_loss(peers):
    made = peers(3)
    at_once(*(peer.line.close for peer in made))
    assert [list(peer.ended) for peer in made] == [[], [], []]
    assert [peer.said() for peer in made] == ["", "", ""]


@pytest.mark.parametrize("failing", [0, 1, 2])
def test_a_failure_ends_all_with_its_message_and_code(peers, failing):
    made = peers(3)
    waiting = [peer for peer in made if peer.line.index != failing]
    for peer in waiting:  # in a gather that will never be whole
        threading.Thread(target=peer.line.gather, args=("texts", None), daemon=True).start()
    start = time.monotonic()
    threading.Thread(target=made[failing].line.fail, args=("the disk is full", 2), daemon=True).start()
    for peer in waiting:
        assert peer.ended.event.wait(10)
        assert peer.ended[0] == 2
        assert f"process {failing} failed: the disk is full" in peer.said()
    assert time.monotonic() - start < 10
    assert not made[failing].ended


def test_all_hear_of_a_process_that_is_gone(tmp_path):
    (here, there), (killed, its) = socket.socketpair(), socket.socketpair()
    made = [Peer(0, 3, {1: here, 2: killed}, tmp_path / "0.log"), Peer(1, 3, {0: there}, tmp_path / "1.log")]
    its.close()  # as the system does for a process that was killed
    for peer in made:
        assert peer.ended.event.wait(10) and peer.ended[0] == LOST
        assert "process 2 is gone" in peer.said()


def test_without_process_0_the_others_end(tmp_path):
    here, there = socket.socketpair()
    peer = Peer(1, 2, {0: here}, tmp_path / "1.log")
    there.close()
    assert peer.ended.event.wait(10) and peer.ended[0] == LOST
    assert "process 0 is gone" in peer.said()


def test_a_silent_process_counts_as_lost(tmp_path):
    """A machine that is cut off closes nothing."""
    here, there = socket.socketpair()
    peer = Peer(0, 2, {1: here}, tmp_path / "0.log", silence=0.6)
    assert not peer.ended.event.wait(0.3)
    assert peer.ended.event.wait(10) and peer.ended[0] == LOST
    assert "process 1 has not been heard of" in peer.said()
    there.close()


# `keep` holds Python's lock for a minute: sleep() of the C library, called so that it does not let it go.
_PROCESS = """
    import ctypes, socket, sys, time
    from streamsynth.runtime.line import Line

    keep = lambda: ctypes.PyDLL(None).sleep(60)
    line = Line(1, 2, {0: socket.socket(fileno=int(sys.argv[1]))}, silence=1.0)
"""


def end_of_a_process(script: str, *heard: str) -> tuple[int, str]:
    """The exit code of a real process, and what it printed: it hears this on its line, in every 0.2 s one."""
    here, there = socket.socketpair()
    with here, there:
        process = subprocess.Popen(
            [sys.executable, "-c", textwrap.dedent(_PROCESS) + script, str(there.fileno())],
            pass_fds=[there.fileno()],
            stderr=subprocess.PIPE,
            text=True,
        )
        there.close()
        with contextlib.suppress(BrokenPipeError):  # it has ended
            for kind in heard:
                here.sendall(encode({"kind": kind, "ticks": 0, "stop": False}))
                time.sleep(0.2)
        return process.wait(40), process.stderr.read()


@pytest.mark.parametrize("before", [0.0, 1.5])
def test_a_process_whose_lock_is_never_let_go_ends_and_says_where_it_was(before):
    code, said = end_of_a_process(f"time.sleep({before}); keep()", *["alive"] * 25)
    assert code == LOST
    assert "Timeout" in said and "in <lambda>" in said


def test_the_watchdog_lets_a_living_process_be_and_ends_with_its_line():
    code, said = end_of_a_process("time.sleep(2); line.close(); time.sleep(1.5)", *["alive"] * 15, "bye")
    assert (code, said) == (0, "")


def test_stacks_go_to_the_process_where_a_notebook_has_taken_standard_error(monkeypatch):
    monkeypatch.setattr(sys, "stderr", io.StringIO())
    (here, there), streams = socket.socketpair(), []
    line = Line(1, 2, {0: here}, watchdog=lambda seconds, stream: streams.append(stream))
    there.sendall(encode({"kind": "bye"}))
    line.close()
    there.close()
    assert set(streams) == {sys.__stderr__}


def test_signs_of_life_keep_a_line_open(peers):
    made = peers(2, silence=0.6)
    time.sleep(1.5)
    assert not made[0].ended and not made[1].ended


def test_processes_that_have_parted_end(peers):
    made = peers(2)
    for peer, what in zip(made, ("texts of step 3", "texts of step 4"), strict=True):
        threading.Thread(target=peer.line.gather, args=(what, None), daemon=True).start()
    for peer in made:
        assert peer.ended.event.wait(10)
        assert "parted: 1 is at 'texts of step 4' and 0 at 'texts of step 3'" in peer.said()


def test_a_stall_prints_the_stacks_of_every_thread_of_every_process(peers):
    made = peers(2, stall=0.6, silence=2.0)

    def dwell_on_purpose(until):
        until.wait(20)

    until = threading.Event()
    threading.Thread(target=dwell_on_purpose, args=(until,), daemon=True).start()
    deadline = time.monotonic() + 10
    while not all("dwell_on_purpose" in peer.said() for peer in made):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    until.set()
    for peer in made:
        assert f"no progress for 0.6 s; process {peer.line.index} is here:" in peer.said()
        assert "line between processes" in peer.said() or "_listen" in peer.said()
        assert not peer.ended  # a stall may pass


def test_progress_of_any_process_is_no_stall(peers):
    made = peers(2, stall=1.0, silence=1.0)
    for _ in range(10):
        made[1].line.tick()
        time.sleep(0.2)
    assert [peer.said() for peer in made] == ["", ""]


def test_callers_must_know_the_token():
    listener = socket.create_server(("localhost", 0))
    address = listener.getsockname()[:2]

    def stranger():
        with socket.create_connection(address) as connected:
            connected.sendall(b"GET / HTTP/1.1\n")
            return connected.recv(1)

    def later():
        time.sleep(0.2)
        return call([("localhost", 1), address], 1, "secret", 10.0)

    with listener:
        hub, caller, turned_away = at_once(lambda: host(2, "secret", listener, 10.0), later, stranger)
    assert turned_away == b"" and set(hub) == {1}
    caller.sendall(b"x")
    assert hub[1].recv(1) == b"x"
    caller.close()
    hub[1].close()


def test_who_does_not_call_is_named():
    with socket.create_server(("localhost", 0)) as listener, pytest.raises(TimeoutError, match=r"^1, 2$"):
        host(3, "secret", listener, 0.2)
