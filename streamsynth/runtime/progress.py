"""How far a long loop has come: a bar on a terminal, a heartbeat line elsewhere."""

from __future__ import annotations

import collections
import shutil
import sys
import threading
import time
from collections.abc import Callable
from typing import Self, TextIO

from streamsynth.runtime import hosts

_REDRAW_SECONDS = 0.1  # faster than the eye, slow enough to cost nothing
_RECENT = 20  # advances that the rate is taken over: the first, which compiles, soon drops out
_BAR_WIDTH = 24


class Progress:
    """Reports progress while it is open.

        with Progress(total=100, what="train") as progress:
            for _ in range(100):
                ...
                progress.advance(quality=0.7)

    On a terminal one line is redrawn with a bar, the rate and the time left. Elsewhere a line is printed
    every `interval` seconds, by a thread, so that it comes while the loop hangs, too: such a line says how
    long ago the loop last moved.

    Args:
      total: how many advances the loop has.
      what: the name at the start of the line.
      stream: where to; a terminal if its `isatty` says so.
      interval: seconds between heartbeat lines.
      done: advances made before, by a run that is now resumed; they do not count in the rate.
      clock: seconds from any origin, never backwards.
    """

    def __init__(
        self,
        total: int,
        what: str,
        stream: TextIO | None = None,
        interval: float = 30.0,
        done: int = 0,
        clock: Callable[[], float] = time.monotonic,
    ):
        self.total = total
        self.done = done
        self._what = what
        self._stream = sys.stderr if stream is None else stream
        self._silent = stream is None and not hosts.first()  # one of a run's processes tells for all
        self._interval = interval
        self._clock = clock
        self._terminal = self._stream.isatty() and not self._silent
        self._figures: dict[str, float] = {}
        self._recent = collections.deque([(clock(), done)], maxlen=_RECENT + 1)
        self._started = clock()
        self._drawn_at = -float("inf")
        self._drawn_width = 0
        self._lock = threading.Lock()
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._beat, daemon=True, name=f"progress of {what}")

    def __enter__(self) -> Self:
        if self._terminal:
            self._draw()
        elif not self._silent:
            self._thread.start()
        return self

    def __exit__(self, *exc_info) -> None:
        self._closed.set()
        if self._terminal:
            self._draw()
            self._stream.write("\n")
            self._stream.flush()
        elif not self._silent:
            self._thread.join()
            self._print_line(f"{self.line()}, took {_duration(self._clock() - self._started)}")

    def advance(self, count: int = 1, **figures: float) -> None:
        """Counts `count` more as done; `figures` stand at the end of the line until they are replaced."""
        hosts.tick()
        with self._lock:
            self.done += count
            self._figures.update(figures)
            self._recent.append((self._clock(), self.done))
        if self._terminal and self._clock() - self._drawn_at >= _REDRAW_SECONDS:
            self._draw()

    def message(self, text: str) -> None:
        """Prints a line of its own without tearing the bar."""
        if self._silent:
            return
        if self._terminal:
            self._stream.write("\r" + " " * self._drawn_width + "\r")
            self._drawn_width = 0
        self._print_line(text)
        if self._terminal and not self._closed.is_set():
            self._draw()

    def rate(self) -> float | None:
        """Advances a second over the most recent ones; None before the first."""
        with self._lock:
            (start, before), (end, after) = self._recent[0], self._recent[-1]
        return (after - before) / (end - start) if after > before and end > start else None

    def line(self) -> str:
        """What the line says now: `train 12/100, 3.1/s, 0:28 left, quality 0.7`."""
        parts = [f"{self._what} {self.done}/{self.total}"]
        rate = self.rate()
        if rate is not None:
            parts.append(f"{rate:.1f}/s" if rate >= 1 else f"{1 / rate:.1f} s each")
            if self.done < self.total:
                parts.append(f"{_duration((self.total - self.done) / rate)} left")
        with self._lock:
            still = self._clock() - self._recent[-1][0]
            parts += [f"{name} {value:.3g}" for name, value in self._figures.items()]
        if still >= self._interval and self.done < self.total:
            parts.append(f"no step for {_duration(still)}")
        return ", ".join(parts)

    def _beat(self) -> None:
        while not self._closed.wait(self._interval):
            self._print_line(self.line())

    def _print_line(self, text: str) -> None:
        self._stream.write(text + "\n")
        self._stream.flush()

    def _draw(self) -> None:
        filled = _BAR_WIDTH * min(self.done, self.total) // max(1, self.total)
        text = f"[{'#' * filled}{'.' * (_BAR_WIDTH - filled)}] {self.line()}"
        text = text[: shutil.get_terminal_size().columns - 1]  # a wrapped line could not be redrawn
        # Blanks wipe the rest of a longer line before; no escape codes, so any terminal will do.
        self._stream.write("\r" + text.ljust(self._drawn_width))
        self._stream.flush()
        self._drawn_width = len(text)
        self._drawn_at = self._clock()


def _duration(seconds: float) -> str:
    """`0:28`, `12:05` or `3:07:30`."""
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"
