"""What asking a scorer gives: a score, or the reason why there is none."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any, Protocol

from streamsynth.tasks.task import Task

# Why a text has no score. Those that may pass by themselves are tried again.
REASONS = {
    "raised": True,  # the function raised an exception
    "timeout": True,  # no answer within scorers.timeout_seconds
    "died": True,  # the function's process ended
    "connection": True,  # the endpoint could not be reached, or hung up
    "busy": True,  # HTTP 408, 425 or 429
    "server_error": True,  # HTTP 5xx
    "refused": False,  # any other HTTP status but 200
    "unparsable": False,  # an answer that is not one number on the scale
    "wrong_number": False,  # not as many scores as texts
    "not_finite": False,  # NaN, an infinity, or no number at all
    "out_of_range": False,  # below 0 or above 1
    "cap": False,  # scorers.max_requests was used up
}


@dataclasses.dataclass(frozen=True)
class Answer:
    """Of one text: a score in [0, 1], or None and a reason among `REASONS`."""

    score: float | None
    reason: str = ""


@dataclasses.dataclass(frozen=True)
class Reply:
    """Of one request.

    answers: one for each text.
    detail: of a failure, for the log; never a key.
    wait: seconds before which it must not be repeated.
    """

    answers: tuple[Answer, ...]
    detail: str = ""
    wait: float = 0.0


class Source(Protocol):
    """Whoever is asked. `ask` comes back in bounded time and raises nothing but UserError.

    batch: the most texts in one request.   concurrency: the most requests at one time.
    """

    batch: int
    concurrency: int

    def ask(self, task: Task, texts: Sequence[str], labels: Sequence[str]) -> Reply: ...


def failure(reason: str, count: int, detail: str = "", wait: float = 0.0) -> Reply:
    """The reply to a request of `count` texts that came to nothing."""
    return Reply((Answer(None, reason),) * count, detail, wait)


def read_scores(values: Any, count: int) -> Reply:
    """Scores as they came, checked one by one: what is wrong with one of them costs no other."""
    if not isinstance(values, list) or len(values) != count:
        got = len(values) if isinstance(values, list) else "no list of"
        return failure("wrong_number", count, f"{got} scores for {count} texts")
    return Reply(tuple(map(_read_score, values)))


def _read_score(value: Any) -> Answer:
    if not isinstance(value, (int, float)) or not math.isfinite(value):
        return Answer(None, "not_finite")
    if not 0 <= value <= 1:
        return Answer(None, "out_of_range")
    return Answer(float(value))
