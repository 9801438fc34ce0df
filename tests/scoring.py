"""What tests of scorers share: a module of functions that misbehave, and an endpoint that does."""

from __future__ import annotations

import contextlib
import http.server
import json
import sys
import threading
import time
import zlib
from collections.abc import Iterator
from pathlib import Path

import pytest

# Each function does what it is told to by a word in a text.
OWN_SCORERS = '''
import os
import signal
import time
import zlib


def length(texts):
    print("functions may print")
    return [min(len(text) / 100, 1.0) for text in texts]


def first_label(texts, labels):
    return [float(label == "good") for label in labels]


def told(texts):
    """What the texts say."""
    joined = " ".join(texts)
    if "raise" in joined:
        raise ValueError("told to; the key is " + os.environ.get("OWN_KEY", "not set"))
    if "leave" in joined:
        raise SystemExit(0)
    if "hang" in joined:
        time.sleep(3600)
    if "die" in joined:
        os._exit(3)
    if "listless" in joined:
        return 0.5
    if "many" in joined:
        return [0.5] * (len(texts) + 1)
    values = {"nan": float("nan"), "inf": float("inf"), "high": 1.5, "low": -0.1, "none": None, "word": "x"}
    return [next((v for word, v in values.items() if word in text), 0.25) for text in texts]


def two(texts, other):
    return [0.5 for _ in texts]


# In whole runs: of all texts some, always the same ones.


def some(text, share):
    return zlib.crc32(text.encode()) % share == 0


def fits(texts, labels):
    """Knows the language of market_1, and fails now and then."""
    from streamsynth.tasks import worlds

    if any(some(text, 29) for text in texts):
        raise RuntimeError("now and then; the key is " + os.environ["OWN_KEY"])
    valid = worlds.load_task("market_1", train_per_label=1, test_per_label=1).verifier
    marks = [0.5 + 0.5 * valid(text, label) for text, label in zip(texts, labels)]
    return [float("nan") if some(text, 11) else mark for text, mark in zip(texts, marks)]


def hangs_once(texts):
    flag = os.path.join(os.environ["SCORER_FLAGS"], "hung")
    if not os.path.exists(flag):
        open(flag, "w").close()
        time.sleep(3600)
    return [len(text) % 10 / 10 for text in texts]


def miscounts(texts):
    return [0.5 for text in texts if not some(text, 6)]


def kills(texts):
    """Kills the run at the given call, once."""
    calls = os.path.join(os.environ["SCORER_FLAGS"], "calls")
    with open(calls, "a") as file:
        file.write(".")
    if os.path.getsize(calls) == int(os.environ.get("SCORER_KILLS_AT", "0")):
        os.kill(os.getppid(), signal.SIGKILL)
        time.sleep(3600)
    return [(len(text) % 7) / 7 for text in texts]
'''


@contextlib.contextmanager
def importable(folder: Path) -> Iterator[None]:
    """Makes `own_scorers` there is on the path."""
    (folder / "own_scorers.py").write_text(OWN_SCORERS)
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(folder)
        yield
    sys.modules.pop("own_scorers", None)


def server_says_no(text: str) -> bool:
    """Of which texts a moody server gives no mark."""
    return zlib.crc32(text.encode()) % 5 == 0


class Handler(http.server.BaseHTTPRequestHandler):
    """Marks a text by the words in it; a text with "once" is served from the second time on."""

    def do_POST(self) -> None:
        request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        prompt = request["messages"][0]["content"]
        text = prompt.split("-----\n")[1].rstrip("\n")
        server = self.server
        with server.lock:
            again = text in [asked for asked, *_ in server.requests]
            server.requests.append((text, self.path, dict(self.headers), request))
            server.busy += 1
            server.busiest = max(server.busiest, server.busy)
        self.answering = True
        try:
            self._answer(text, again)
        finally:
            self._answered()

    def _answered(self) -> None:
        """Before the answer goes out: who has it may ask again at once."""
        with self.server.lock:
            self.server.busy -= self.answering
        self.answering = False

    def _answer(self, text: str, again: bool) -> None:
        first = not ("once" in text and again)
        if "slow" in text and first:
            time.sleep(0.2)
        if "busy" in text and first:
            return self._send(429, b"{}", {"Retry-After": "7"})
        if "full" in text and first:
            return self._send(503, b"{}", {})
        if "denied" in text:
            return self._send(401, self.headers.get("Authorization", "").encode(), {})
        if "moved" in text:
            return self._send(302, b"", {"Location": "/elsewhere"})
        if "drip" in text:
            self.send_response(200)
            self.end_headers()
            with contextlib.suppress(OSError):  # they hang up
                for _ in range(200):
                    self.wfile.write(b" ")
                    self.wfile.flush()
                    time.sleep(0.05)
            return None
        if "hangup" in text:
            return self.connection.close()
        moody = server_says_no(text) and self.server.moody
        mark = "I would say 7" if "chatty" in text or moody else "12" if "too high" in text else "6.5"
        body = {"choices": [{"message": {"role": "assistant", "content": mark}}]}
        return self._send(200, json.dumps(body).encode(), {})

    def _send(self, status: int, body: bytes, headers: dict[str, str]) -> None:
        self._answered()
        self.send_response(status)
        for name, value in {**headers, "Content-Length": str(len(body))}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *args) -> None:
        pass


@contextlib.contextmanager
def endpoint(moody: bool = False) -> Iterator[http.server.ThreadingHTTPServer]:
    """A server on this machine; `requests` are (text, path, headers, body), `busiest` how many at a time."""
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.requests, server.lock, server.busy, server.busiest = [], threading.Lock(), 0, 0
    server.moody = moody
    thread = threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True)
    thread.start()
    yield server
    server.shutdown()
    server.server_close()
