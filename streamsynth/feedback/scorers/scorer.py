"""When a scorer is asked, how often and for how much; a text that it fails on has no score."""

from __future__ import annotations

import dataclasses
import os
import time
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed

import numpy as np
from absl import logging

from streamsynth.feedback.scorers.records import Records, Where, digest
from streamsynth.feedback.scorers.reply import REASONS, Answer, Reply, Source
from streamsynth.tasks.task import Task

# Who asks for a longer pause than this is not asked again.
_LONGEST_WAIT = 300.0


@dataclasses.dataclass(frozen=True)
class Limits:
    """retries: further attempts at a text.   backoff: seconds before the first; doubled each time.
    max_requests: of the whole run; where it has several processes, what this one may come to.
    secret: the environment variable whose value no log may show, or "".
    """

    retries: int
    backoff: float
    max_requests: int
    secret: str = ""


class Scorer:
    """A named source of scores, with its journal and its limits, for all tasks of a run.

    Attempts go in waves: all texts once, then those that failed, after a pause. So the order in which the
    cap is used up follows from the answers alone and not from which of several requests was faster, and a
    resumed run spends it as an uninterrupted one would.
    """

    def __init__(
        self,
        name: str,
        source: Source,
        limits: Limits,
        records: Records,
        sleep: Callable[[float], None] = time.sleep,
    ):
        self.name, self.source, self._limits, self._records, self._sleep = (
            name,
            source,
            limits,
            records,
            sleep,
        )
        self._said: set[str] = set()  # of which kinds of failure the log has one already

    def score(
        self,
        task: Task,
        texts: Sequence[str],
        labels: Sequence[str],
        where: Where = (),
        asked: np.ndarray | None = None,
    ) -> tuple[np.ndarray, dict[str, int]]:
        """Scores of N texts, from the journal or from the source.

        Args:
          task: that they were written for.
          texts, labels: N texts and the names of the labels asked for.
          where: (purpose, *steps), which with a text's index names its place in the journal; () for texts
            that are not journaled.
          asked: [N] bool, the texts whose score is wanted; all by default.

        Returns:
          [N] float32 in [0, 1], NaN where there is none; and how many of those asked failed, by reason.
        """
        scores = np.full(len(texts), np.nan, np.float32)
        asked = np.ones(len(texts), bool) if asked is None else np.asarray(asked)
        wave: dict[int, int] = {}  # texts to ask for, and which attempt it is
        failed: dict[int, str] = {}
        for i in map(int, np.flatnonzero(asked)):
            found = self._records.find(where, i, digest(texts[i], labels[i]))
            if found is None:
                wave[i] = 1
            elif "score" in found:
                scores[i] = found["score"]
            elif found["again"]:
                wave[i] = found["attempt"] + 1
            else:
                failed[i] = found["failed"]
        pause = 0.0
        while wave:
            attempt = min(wave.values())
            now = [i for i in wave if wave[i] == attempt]
            if pause:
                self._sleep(pause)
            pause = self._limits.backoff * 2 ** (attempt - 1)
            for i, answer, wait in self._ask(task, texts, labels, where, now, attempt):
                del wave[i]
                if answer.score is not None:
                    scores[i] = answer.score
                elif self._again(answer, attempt, wait):
                    wave[i], pause = attempt + 1, max(pause, wait)
                else:
                    failed[i] = answer.reason
        return scores, dict(sorted(Counter(failed.values()).items()))

    def _ask(
        self,
        task: Task,
        texts: Sequence[str],
        labels: Sequence[str],
        where: Where,
        wanted: Sequence[int],
        attempt: int,
    ) -> list[tuple[int, Answer, float]]:
        """One attempt at each text: its index, the answer, and the pause asked for; in the texts' order.

        Batches are cut by the texts' places, so that one of which half is in the journal is not joined with
        the next.
        """
        size = self.source.batch
        batches: dict[int, list[int]] = {}
        for i in wanted:
            batches.setdefault(i // size, []).append(i)
        requests = list(batches.values())
        allowed = max(0, self._limits.max_requests - self._records.requests)
        answers: dict[int, tuple[Answer, float]] = {}

        def take(batch: Sequence[int], reply: Reply, spent: int) -> None:
            self._records.write(
                self._record(
                    where, i, digest(texts[i], labels[i]), answer, attempt, reply.wait, spent * (not at)
                )
                for at, (i, answer) in enumerate(zip(batch, reply.answers, strict=True))
            )
            self._tell(reply)
            answers.update({i: (a, reply.wait) for i, a in zip(batch, reply.answers, strict=True)})

        pool = ThreadPoolExecutor(self.source.concurrency)
        try:
            running = {
                pool.submit(
                    self.source.ask, task, [texts[i] for i in batch], [labels[i] for i in batch]
                ): batch
                for batch in requests[:allowed]
            }
            for future in as_completed(running):  # what is answered is written down before the others are
                take(running[future], future.result(), 1)
        finally:
            pool.shutdown(cancel_futures=True)
        for batch in requests[allowed:]:
            detail = f"scorers.max_requests = {self._limits.max_requests} are used up"
            take(batch, Reply((Answer(None, "cap"),) * len(batch), detail), 0)
        return [(i, *answers[i]) for i in wanted]

    def _record(
        self, where: Where, i: int, content: str, answer: Answer, attempt: int, wait: float, spent: int
    ) -> dict[str, object]:
        purpose, *steps = where or ("",)
        place = {"purpose": purpose, "steps": steps, "sample": i, "digest": content}
        if answer.score is not None:
            return {**place, "score": answer.score, "request": spent}
        again = self._again(answer, attempt, wait)
        return {**place, "failed": answer.reason, "attempt": attempt, "again": again, "request": spent}

    def _again(self, answer: Answer, attempt: int, wait: float) -> bool:
        return REASONS[answer.reason] and attempt <= self._limits.retries and wait <= _LONGEST_WAIT

    def _tell(self, reply: Reply) -> None:
        """Logs the first failure of each kind."""
        for reason in {answer.reason for answer in reply.answers} - self._said - {""}:
            self._said.add(reason)
            detail = reply.detail
            if secret := os.environ.get(self._limits.secret, "").strip():
                detail = detail.replace(secret, "***")
            logging.warning(
                "scorer %s: %s%s; the texts that it fails on have no score, and further failures of this "
                "kind are only counted.",
                self.name, reason, f" ({detail})" if detail else "",
            )  # fmt: skip


@dataclasses.dataclass(frozen=True)
class TaskScorer:
    """A scorer as a judge of one task's texts."""

    scorer: Scorer
    task: Task

    def __call__(
        self, texts: Sequence[str], label: np.ndarray, where: Where = (), asked: np.ndarray | None = None
    ) -> tuple[np.ndarray, dict[str, int]]:
        """As `Scorer.score`, for indices of labels [N]."""
        return self.scorer.score(self.task, texts, [self.task.labels[k] for k in label], where, asked)
