"""A line between the processes of a run, over TCP and beside the devices' own.

Process 0 is its hub. On it go what the hosts' programs have to tell each other (texts, scores, small
arrays), that one of them has failed, and signs of life. A thread of its own listens: it ends the process when
another one has failed or is gone, also while the main thread waits for a device that will never answer.
Where that thread cannot run, because another one keeps Python's lock, a watchdog ends the process.
"""

from __future__ import annotations

import contextlib
import faulthandler
import os
import selectors
import socket
import sys
import threading
import time
from collections.abc import Callable, Mapping
from typing import Any, TextIO

from streamsynth.runtime.messages import encode, frames

_BEAT_SECONDS = 2.0  # between signs of life
_READ_BYTES = 1 << 20
# How long a process that failed waits for the others to have heard of it.
_FAREWELL_SECONDS = 5.0

# Exit code where another process was lost, and not by a mistake that it told of.
LOST = 1


def end_unless_called_again(seconds: float | None, stream: TextIO) -> None:
    """Ends the process with `LOST` after so many seconds, and prints the stacks of its threads before.

    Called again, it counts anew; with None, not at all. It takes no lock of Python's, and so is there also
    where a thread keeps that one for ever. A process has one such clock: faulthandler's.
    """
    faulthandler.cancel_dump_traceback_later()
    if seconds is not None:
        faulthandler.dump_traceback_later(seconds, exit=True, file=stream)


class Line:
    """The line of one process.

    Args:
      index, count: which process this is, of how many.
      sockets: connected, by the process at the other end: of process 0 all others, of the others process 0.
      silence: seconds without a sign of life after which a process counts as lost.
      stopping: whether this process was asked to stop, which its signs of life tell the hub (`stop_heard`).
      stall: seconds without progress of any process (`tick`) after which every process prints the stacks of
        its threads.
      exit: ends the process at once.
      watchdog: `end_unless_called_again`, which the listening thread calls at every beat with `silence`
        seconds: a process that cannot call it has been silent for the others too.
      stream: where stacks and the last words of a process go.
    """

    def __init__(
        self,
        index: int,
        count: int,
        sockets: Mapping[int, socket.socket],
        *,
        silence: float = 60.0,
        stall: float = 600.0,
        stopping: Callable[[], bool] = lambda: False,
        exit: Callable[[int], None] = os._exit,
        watchdog: Callable[[float | None, TextIO], None] = end_unless_called_again,
        stream: TextIO | None = None,
    ):
        self.index, self.count = index, count
        self._sockets = dict(sockets)
        self._silence, self.stall, self._exit = silence, stall, exit
        self._stream = _standard_error() if stream is None else stream
        self._watchdog, self._stopping = watchdog, stopping
        self.stop_heard = False
        self._sending = {peer: threading.Lock() for peer in sockets}
        self._changed = threading.Condition()
        self._arrived: dict[tuple[int, int], tuple[str, Any]] = {}  # (peer, number of the gather)
        self._number = 0
        self._ticks = 0
        self._their_ticks = dict.fromkeys(sockets, 0)
        self._heard = dict.fromkeys(sockets, time.monotonic())
        self._left: set[int] = set()  # who has said goodbye, or whose socket is closed
        self._closing = False
        watchdog(silence, self._stream)
        self._thread = threading.Thread(target=self._run, daemon=True, name="line between processes")
        self._thread.start()

    def gather(self, what: str, own: Any) -> list[Any]:
        """What every process gives, in the order of the processes; the same list on each of them.

        Args:
          what: says what is gathered. Where processes name different things their programs have parted, and
            all of them end.
          own: nested lists and dicts of what JSON knows, and of numpy arrays of numbers.
        """
        self._number += 1
        number = self._number
        if self.index:
            self._send(0, {"kind": "value", "number": number, "what": what}, own)
            _, values = self._wait(0, number)
        else:
            others = [self._wait(peer, number) for peer in range(1, self.count)]
            for peer, (named, _) in enumerate(others, start=1):
                if named != what:
                    self._lost(-1, f"the processes have parted: {peer} is at {named!r} and 0 at {what!r}")
            header = {"kind": "value", "number": number, "what": what}
            frame = encode(header, [own, *(value for _, value in others)])
            for peer in self._sockets:
                self._write(peer, frame)
            # Its own value goes through the same form as those of the others: tuples have become lists.
            ((_, values),) = frames(bytearray(frame))
        self.tick()
        return values

    def tick(self) -> None:
        """Says that this process has made progress."""
        self._ticks += 1

    def fail(self, message: str, code: int) -> None:
        """Tells the others that this process has failed; they print `message` and end with `code`.

        Returns when they have heard it, or after a few seconds.
        """
        self._closing = True
        for peer in self._sockets:
            told = f"process {self.index} failed: {message}"
            self._send(peer, {"kind": "failed", "message": told, "code": code})
        self._shut()
        with self._changed:
            self._changed.wait_for(lambda: self._left >= set(self._sockets), _FAREWELL_SECONDS)

    def close(self) -> None:
        """Leaves the line; no other process takes it for a loss. All of them call it."""
        self._closing = True
        for peer in self._sockets:
            self._send(peer, {"kind": "bye"})
        self._shut()
        self._thread.join(_FAREWELL_SECONDS)
        for connected in self._sockets.values():
            connected.close()

    # --- Sending ---

    def _send(self, peer: int, header: Mapping[str, Any], value: Any = None) -> None:
        self._write(peer, encode(header, value))

    def _write(self, peer: int, frame: bytes) -> None:
        # Where the other end is gone the listening thread finds that, and says it.
        with self._sending[peer], contextlib.suppress(OSError):
            self._sockets[peer].sendall(frame)

    def _shut(self) -> None:
        for connected in self._sockets.values():
            with contextlib.suppress(OSError):
                connected.shutdown(socket.SHUT_WR)

    # --- Receiving: what follows runs in the listening thread ---

    def _wait(self, peer: int, number: int) -> tuple[str, Any]:
        """In the main thread: what a peer gave to a gather."""
        with self._changed:
            self._changed.wait_for(lambda: (peer, number) in self._arrived)
            return self._arrived.pop((peer, number))

    def _run(self) -> None:
        try:
            self._listen()
        except Exception as error:  # without its thread a process would wait for ever
            self._end(f"the line between the processes broke: {type(error).__name__}: {error}", LOST)
        else:
            self._watchdog(None, self._stream)

    def _listen(self) -> None:
        selector = selectors.DefaultSelector()
        buffers = {peer: bytearray() for peer in self._sockets}
        for peer, connected in self._sockets.items():
            selector.register(connected, selectors.EVENT_READ, peer)
        beat = min(_BEAT_SECONDS, self._silence / 4)
        beaten = moved = time.monotonic()
        ticks = -1
        while len(self._left) < len(self._sockets):
            for key, _ in selector.select(beat):
                peer = key.data
                try:
                    received = key.fileobj.recv(_READ_BYTES)
                except OSError:
                    received = b""
                if not received:
                    selector.unregister(key.fileobj)
                    self._gone(peer)
                    continue
                self._heard[peer] = time.monotonic()
                buffers[peer] += received
                for header, value in frames(buffers[peer]):
                    self._take(peer, header, value)
            now = time.monotonic()
            if now - beaten >= beat:
                beaten = now
                self._watchdog(self._silence, self._stream)
                self._beat()
            self._find_silent(now)
            if self.index == 0:  # it hears of everyone's progress
                progress = self._ticks + sum(self._their_ticks.values())
                if progress != ticks:
                    ticks, moved = progress, now
                elif now - moved >= self.stall:
                    moved = now
                    self._stalled()

    def _beat(self) -> None:
        frame = encode({"kind": "alive", "ticks": self._ticks, "stop": self._stopping()})
        for peer, connected in self._sockets.items():
            lock = self._sending[peer]
            if peer in self._left or not lock.acquire(blocking=False):
                continue  # a message is on its way, which is a sign of life
            with contextlib.suppress(OSError):
                connected.sendall(frame)
            lock.release()

    def _take(self, peer: int, header: Mapping[str, Any], value: Any) -> None:
        if header["kind"] == "value":
            with self._changed:
                self._arrived[peer, header["number"]] = header["what"], value
                self._changed.notify_all()
        elif header["kind"] == "alive":
            self._their_ticks[peer] = header["ticks"]
            self.stop_heard |= header["stop"]
        elif header["kind"] == "failed":
            self._pass_on(header, but=peer)
            self._send(peer, {"kind": "bye"})  # it is heard, and may end
            self._end(header["message"], header["code"])
        elif header["kind"] == "stalled":
            self._print_stacks()
        elif header["kind"] == "bye":
            self._leave(peer)

    def _gone(self, peer: int) -> None:
        if not self._closing and peer not in self._left:
            self._lost(peer, f"process {peer} is gone: it was killed, or its machine was lost")
        self._leave(peer)

    def _find_silent(self, now: float) -> None:
        for peer, heard in self._heard.items():
            if peer not in self._left and not self._closing and now - heard > self._silence:
                self._lost(peer, f"process {peer} has not been heard of for {now - heard:.0f} s")

    def _lost(self, peer: int, message: str) -> None:
        """Ends all because of what no process said of itself; `peer` needs not be told."""
        self._leave(peer)
        self._pass_on({"kind": "failed", "message": message, "code": LOST}, but=peer)
        self._end(message, LOST)

    def _pass_on(self, header: Mapping[str, Any], but: int) -> None:
        for peer in self._sockets.keys() - {but} - self._left:
            self._send(peer, header)

    def _leave(self, peer: int) -> None:
        with self._changed:
            self._left.add(peer)
            self._changed.notify_all()

    def _stalled(self) -> None:
        for peer in self._sockets.keys() - self._left:
            self._send(peer, {"kind": "stalled"})
        self._print_stacks()

    def _print_stacks(self) -> None:
        print(
            f"streamsynth: no progress for {self.stall:g} s; process {self.index} is here:",
            file=self._stream,
            flush=True,
        )
        faulthandler.dump_traceback(file=self._stream, all_threads=True)

    def _end(self, message: str, code: int) -> None:
        # Whatever another thread holds from here on, this process ends.
        self._watchdog(2 * _FAREWELL_SECONDS, self._stream)
        print(f"streamsynth: error: {message}", file=self._stream, flush=True)
        if self.index == 0:
            self._outlast()
        self._exit(code)

    def _outlast(self) -> None:
        """Waits until the others have ended.

        JAX's coordination service lives in process 0, and aborts them before they have spoken if it ends.
        """
        end = time.monotonic() + _FAREWELL_SECONDS
        for peer in self._sockets.keys() - self._left:
            connected = self._sockets[peer]
            with contextlib.suppress(OSError):
                while (left := end - time.monotonic()) > 0:
                    connected.settimeout(left)
                    if not connected.recv(_READ_BYTES):
                        break


def _standard_error() -> TextIO:
    """Where stacks can be printed: a notebook's own standard error has no descriptor."""
    try:
        sys.stderr.fileno()
    except (AttributeError, OSError, ValueError):
        return sys.__stderr__
    return sys.stderr


# --- Who is at the other end ---


def host(processes: int, token: str, listener: socket.socket, seconds: float) -> dict[int, socket.socket]:
    """Of process 0: its connections to all others.

    Args:
      processes: how many there are in all.
      token: that a caller must know; others are turned away.
      listener: bound, and listening.
      seconds: to wait for them all.

    Raises:
      TimeoutError: naming those that did not call.
    """
    found: dict[int, socket.socket] = {}
    end = time.monotonic() + seconds
    while len(found) < processes - 1:
        listener.settimeout(max(0.01, end - time.monotonic()))
        try:
            connected, _ = listener.accept()
            connected.settimeout(5.0)
            said = _read_line(connected).split()
        except OSError:
            if time.monotonic() >= end:
                missing = sorted(set(range(1, processes)) - found.keys())
                raise TimeoutError(", ".join(map(str, missing))) from None
            continue
        if len(said) != 2 or said[0] != token or not said[1].isdecimal():
            connected.close()
            continue
        found[int(said[1])] = _ready(connected)
    return found


def call(addresses: list[tuple[str, int]], index: int, token: str, seconds: float) -> socket.socket:
    """Of another process: its connection to process 0, at the first of the addresses that answers.

    Raises:
      OSError: none does.
    """
    end = time.monotonic() + seconds
    while True:
        for address in addresses:
            try:
                connected = socket.create_connection(address, timeout=5.0)
                connected.sendall(f"{token} {index}\n".encode())
                return _ready(connected)
            except OSError as error:
                failure = error
        if time.monotonic() >= end:
            raise failure
        time.sleep(0.2)


def _ready(connected: socket.socket) -> socket.socket:
    connected.settimeout(None)
    connected.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return connected


def _read_line(connected: socket.socket) -> str:
    said = b""
    while not said.endswith(b"\n") and len(said) < 256:
        byte = connected.recv(1)
        if not byte:
            break
        said += byte
    return said.decode(errors="replace").strip()
