"""The process that a scorer's function runs in. It is started by `function.py` and imports no JAX.

Requests and replies are lines of JSON on what were its standard input and output. The function itself finds
an empty input, and what it prints goes to standard error.
"""

from __future__ import annotations

import importlib
import inspect
import json
import os
import queue
import sys
import threading
import traceback
from collections.abc import Callable
from typing import Any


def main(spec: str) -> None:
    """Serves requests for "package.module:function" until the other side is gone."""
    requests, replies = os.fdopen(os.dup(0), "rb"), os.fdopen(os.dup(1), "wb")
    with open(os.devnull, "rb") as nothing:
        os.dup2(nothing.fileno(), 0)
    os.dup2(2, 1)

    def say(reply: dict[str, Any]) -> None:
        replies.write(json.dumps(reply).encode() + b"\n")
        replies.flush()

    lines: queue.SimpleQueue[bytes] = queue.SimpleQueue()

    def listen() -> None:
        for line in requests:
            lines.put(line)
        os._exit(0)  # the run is over or was killed: a function that hangs must not outlive it

    threading.Thread(target=listen, daemon=True).start()
    try:
        score = load(spec)
    except BaseException as error:  # whatever the module does when it is imported, sys.exit() included
        say({"error": f"{type(error).__name__}: {error}"})
        os._exit(1)
    say({"ready": True})
    while True:
        request = json.loads(lines.get())
        try:
            say({"scores": [_number(value) for value in score(request["texts"], request["labels"])]})
        except BaseException:  # not printed here: the log of the run shows it once, and without a key
            say({"error": traceback.format_exc().strip()})


def load(spec: str) -> Callable[[list[str], list[str]], Any]:
    """The function, called with labels where it has a parameter of that name.

    Raises:
      TypeError: it can be called neither way.   Whatever importing its module raises.
    """
    module, _, name = spec.partition(":")
    function = getattr(importlib.import_module(module), name)
    try:
        signature = inspect.signature(function)
    except ValueError:  # some built-in functions tell no signature
        return lambda texts, labels: function(texts)
    if "labels" in signature.parameters:
        signature.bind([], labels=[])
        return lambda texts, labels: function(texts, labels=labels)
    signature.bind([])
    return lambda texts, labels: function(texts)


def _number(value: Any) -> float | None:
    """A Python float of whatever number a function returns; None for what is none."""
    try:
        return float(value)
    except (TypeError, ValueError, OverflowError):
        return None


if __name__ == "__main__":
    main(sys.argv[1])
