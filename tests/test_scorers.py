"""Scorers: whatever they do costs their samples and nothing else, and nothing is asked or paid for twice."""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import scoring
from hypothesis import given, settings
from hypothesis import strategies as st

from streamsynth.errors import UserError
from streamsynth.feedback.scorers.endpoint import Endpoint, read_mark, retry_after
from streamsynth.feedback.scorers.function import Function
from streamsynth.feedback.scorers.records import Records, digest, tally
from streamsynth.feedback.scorers.reply import REASONS, Answer, Reply, failure
from streamsynth.feedback.scorers.scorer import Limits, Scorer
from streamsynth.tasks.task import Task

ROOT = Path(__file__).resolve().parent.parent
TASK = Task("mood", "Short reviews.", ("good", "bad"), (), (), ())
WHERE = ("rollout", 3)


# --- Functions, each in a process of its own ---


@pytest.fixture(scope="module")
def own(tmp_path_factory):
    with scoring.importable(tmp_path_factory.mktemp("own")):
        yield


@pytest.fixture(scope="module")
def told(own):
    return Function("own_scorers:told", batch=4, timeout=1.0)


def reasons(reply: Reply) -> list[str]:
    return [answer.reason or answer.score for answer in reply.answers]


def test_a_function_scores_texts_and_labels_where_it_asks_for_them(own):
    length = Function("own_scorers:length", batch=4, timeout=30.0)
    assert reasons(length.ask(TASK, ["a" * 30, "b" * 200], ["good", "bad"])) == [0.3, 1.0]
    first = Function("own_scorers:first_label", batch=4, timeout=30.0)
    assert reasons(first.ask(TASK, ["x", "y", "z"], ["good", "bad", "good"])) == [1.0, 0.0, 1.0]


@pytest.mark.parametrize(
    "word, reason",
    [
        ("raise", "raised"), ("leave", "raised"), ("hang", "timeout"), ("die", "died"),
        ("listless", "raised"), ("many", "wrong_number"),
    ],
)  # fmt: skip
def test_a_function_that_fails_costs_its_request_and_not_the_next(told, word, reason):
    start = time.monotonic()
    assert reasons(told.ask(TASK, ["fine", word], ["good"] * 2)) == [reason] * 2
    assert time.monotonic() - start < 20
    assert reasons(told.ask(TASK, ["fine"], ["good"])) == [0.25]


def test_a_wrong_score_costs_its_own_text_alone(told):
    texts = ["fine", "nan", "inf", "none", "word", "high", "low"]
    found = reasons(told.ask(TASK, texts, ["good"] * 7))
    assert found == [0.25, *["not_finite"] * 4, *["out_of_range"] * 2]


@pytest.mark.parametrize("spec", ["own_scorers:missing", "no_such_module:f", "own_scorers:two"])
def test_a_function_that_cannot_be_called_is_found_at_once(own, spec):
    with pytest.raises(UserError, match="cannot import " + spec):
        Function(spec, batch=1, timeout=1.0).probe()
    Function("own_scorers:length", batch=1, timeout=1.0).probe()


@pytest.mark.parametrize("killed", [False, True])
def test_a_function_that_hangs_outlives_no_run(own, tmp_path, killed):
    (tmp_path / "own_scorers.py").write_text(scoring.OWN_SCORERS)
    program = (
        "import threading, time\n"
        "from streamsynth.feedback.scorers.function import Function\n"
        "function = Function('own_scorers:told', batch=1, timeout=3600.0)\n"
        "function.ask(None, ['fine'], ['x'])\n"
        "threading.Thread(target=function.ask, args=(None, ['hang'], ['x']), daemon=True).start()\n"
        "time.sleep(0.2)\n"
        "print(function._process.pid, flush=True)\n" + ("time.sleep(3600)\n" if killed else "")
    )
    env = {**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{tmp_path}"}
    run = subprocess.Popen([sys.executable, "-c", program], env=env, stdout=subprocess.PIPE, text=True)
    worker = int(run.stdout.readline())
    if killed:
        run.send_signal(signal.SIGKILL)
    assert run.wait(30) == (-signal.SIGKILL if killed else 0)
    for _ in range(300):
        if not Path(f"/proc/{worker}").exists():
            return
        time.sleep(0.1)
    pytest.fail("the function's process is still there")


# --- Judges over HTTP ---


@pytest.fixture(scope="module")
def server():
    with scoring.endpoint() as server:
        yield server


@pytest.fixture
def judge(server, monkeypatch):
    server.requests.clear()
    monkeypatch.setenv("OWN_KEY", "sk-very-secret")
    return Endpoint(
        model="small",
        url=f"http://127.0.0.1:{server.server_port}/v1",
        key_variable="OWN_KEY",
        scale=10.0,
        max_tokens=8,
        timeout=2.0,
        concurrency=3,
    )


def test_a_judge_is_asked_with_its_rubric_and_key(server, judge):
    assert reasons(judge.ask(TASK, ["a fine text {braces}"], ["good"])) == [0.65]
    [(text, path, headers, body)] = server.requests
    assert text == "a fine text {braces}" and path == "/v1/chat/completions"
    assert headers["Authorization"] == "Bearer sk-very-secret"
    assert (body["model"], body["max_tokens"], body["temperature"]) == ("small", 8, 0)
    prompt = body["messages"][0]["content"]
    assert "Short reviews." in prompt and '"good"' in prompt and "from 0 to 10" in prompt


@pytest.mark.parametrize(
    "text, reason",
    [
        ("busy", "busy"), ("full", "server_error"), ("denied", "refused"), ("moved", "refused"),
        ("chatty", "unparsable"), ("too high", "unparsable"), ("drip", "timeout"), ("hangup", "connection"),
    ],
)  # fmt: skip
def test_a_judge_that_fails(server, judge, text, reason):
    start = time.monotonic()
    reply = judge.ask(TASK, [text], ["good"])
    assert reasons(reply) == [reason]
    assert time.monotonic() - start < 8  # "drip" sends a byte every 0.05 s for 10 s
    assert reply.wait == (7.0 if text == "busy" else 0.0)
    assert "secret" not in reply.detail  # not even where the server sends it back
    assert len(server.requests) == 1  # no redirect is followed


def test_nobody_is_there(judge):
    gone = dataclasses.replace(judge, url="http://127.0.0.1:9/v1")
    assert reasons(gone.ask(TASK, ["x"], ["good"])) == ["connection"]


@pytest.mark.parametrize("key", ["", "two\nlines", "schlüssel"])
def test_a_key_that_cannot_be_sent_is_not_shown(judge, monkeypatch, key):
    monkeypatch.setenv("OWN_KEY", key)
    with pytest.raises(UserError, match="OWN_KEY") as caught:
        judge.probe()
    assert not key or key not in str(caught.value)


@pytest.mark.parametrize(
    "answer, scale, mark",
    [
        ("7", 10.0, 0.7), (" 10\n", 10.0, 1.0), ("0", 10.0, 0.0), ("0.85", 1.0, 0.85), ("7.5", 10.0, 0.75),
        ("11", 10.0, None), ("7/10", 10.0, None), ("-1", 10.0, None), ("seven", 10.0, None), ("", 10.0, None),
        ("7 or 8", 10.0, None), ("1e0", 10.0, None), ("nan", 10.0, None), (None, 10.0, None), (7, 10.0, None),
    ],
)  # fmt: skip
def test_only_one_number_on_the_scale_is_a_mark(answer, scale, mark):
    body = json.dumps({"choices": [{"message": {"content": answer}}]}).encode()
    assert read_mark(body, scale) == (None if mark is None else pytest.approx(mark))


@pytest.mark.parametrize("body", [b"", b"[]", b"{}", b'{"choices": []}', b'{"choices": [{"message": null}]}'])
def test_another_body_is_no_mark(body):
    assert read_mark(body, 10.0) is None


def test_retry_after_is_seconds_or_a_date():
    now = 1_700_000_000.0
    assert [retry_after(value, now) for value in (None, "", "12", "soon")] == [0.0, 0.0, 12.0, 0.0]
    assert retry_after("Tue, 14 Nov 2023 22:14:20 GMT", now) == 60.0
    assert retry_after("Tue, 14 Nov 2000 22:14:20 GMT", now) == 0.0


# --- Attempts, the cap and the journal ---


def scorer_of(source, path=None, pauses=None, **limits):
    limits = Limits(**{"retries": 2, "backoff": 1.0, "max_requests": 100} | limits)
    sleep = (lambda seconds: None) if pauses is None else pauses.append
    return Scorer("tone", source, limits, Records(path), sleep)


def test_waves_pause_as_long_as_they_are_asked_to(server, judge):
    pauses = []
    scorer = scorer_of(judge, pauses=pauses)
    texts = ["once busy", "once full", "fine", "denied", "full"]
    scores, failed = scorer.score(TASK, texts, ["good"] * 5, WHERE)
    np.testing.assert_allclose(scores, [0.65, 0.65, 0.65, np.nan, np.nan], rtol=1e-6)
    assert failed == {"refused": 1, "server_error": 1}
    assert pauses == [7.0, 2.0]  # Retry-After is longer than the first backoff
    asked = Counter(text for text, *_ in server.requests)
    assert asked == {"once busy": 2, "once full": 2, "fine": 1, "denied": 1, "full": 3}


def test_requests_run_side_by_side_and_scores_keep_their_order(server, judge):
    server.busiest = 0
    texts = [f"slow {i}" if i % 2 else f"denied {i}" for i in range(12)]
    scores, _ = scorer_of(judge).score(TASK, texts, ["good"] * 12, WHERE)
    np.testing.assert_array_equal(np.isfinite(scores), np.arange(12) % 2 == 1)
    assert server.busiest == 3


class Source:
    """Answers by a plan: what the k-th attempt at a text comes to. It can end the run at a request."""

    concurrency = 1

    def __init__(self, plan, batch=2, ends_at=None):
        self.plan, self.batch, self.ends_at = plan, batch, ends_at
        self.asked, self.requests = Counter(), 0

    def ask(self, task, texts, labels):
        if self.requests == self.ends_at:
            raise KeyboardInterrupt
        self.requests += 1
        answers = []
        for text in texts:
            outcome = self.plan[text][min(self.asked[text], len(self.plan[text]) - 1)]
            self.asked[text] += 1
            answers.append(Answer(outcome) if isinstance(outcome, float) else Answer(None, outcome))
        return Reply(tuple(answers))


OUTCOMES = st.one_of(st.sampled_from(sorted(REASONS.keys() - {"cap"})), st.floats(0, 1, width=32))


def end_of(outcomes):
    """What a text comes to in at most three attempts."""
    for attempt in range(3):
        outcome = outcomes[min(attempt, len(outcomes) - 1)]
        if isinstance(outcome, float) or not REASONS[outcome]:
            break
    return outcome


@settings(max_examples=40)
@given(
    st.lists(st.lists(OUTCOMES, min_size=1, max_size=4), min_size=1, max_size=6),
    st.integers(1, 3),
    st.integers(1, 12),
    st.integers(0, 8),
)
def test_a_run_that_ended_between_two_requests_goes_on_as_if_it_had_not(
    tmp_path_factory, plans, batch, cap, ends_at
):
    folder = tmp_path_factory.mktemp("scores")
    texts = [f"text {i}" for i in range(len(plans))]
    plan, labels = dict(zip(texts, plans, strict=True)), ["good"] * len(texts)

    def score(source, path):
        return scorer_of(source, path, max_requests=cap).score(TASK, texts, labels, WHERE)

    whole = Source(plan, batch)
    scores, failed = score(whole, folder / "whole.jsonl")
    assert whole.requests <= cap and np.isfinite(scores).sum() + sum(failed.values()) == len(texts)
    if "cap" not in failed:
        ends = [end_of(outcomes) for outcomes in plans]
        expected = [end if isinstance(end, float) else np.nan for end in ends]
        np.testing.assert_array_equal(scores, np.float32(expected))
        assert failed == Counter(end for end in ends if isinstance(end, str))

    parts = Source(plan, batch, ends_at)
    if ends_at < whole.requests:
        with pytest.raises(KeyboardInterrupt):
            score(parts, folder / "parts.jsonl")
        with open(folder / "parts.jsonl", "ab") as file:
            file.write(b'{"purpose": "rollout", "steps": [3], "sam')  # half a line, as a kill may leave
        parts.ends_at = None
    resumed = score(parts, folder / "parts.jsonl")
    np.testing.assert_array_equal(resumed[0], scores)
    assert resumed[1] == failed and parts.asked == whole.asked
    assert (folder / "parts.jsonl").read_bytes() == (folder / "whole.jsonl").read_bytes()

    again = Source(plan, batch)
    np.testing.assert_array_equal(score(again, folder / "whole.jsonl")[0], scores)
    assert again.requests == 0
    counts = tally(map(json.loads, (folder / "whole.jsonl").read_text().splitlines()))
    assert counts == {
        "asked": len(texts), "scored": np.isfinite(scores).sum(), "failed": failed, "requests": whole.requests
    }  # fmt: skip


def test_the_cap_ends_all_requests_with_one_warning(tmp_path, caplog):
    source = Source({f"text {i}": [0.5] for i in range(9)}, batch=2)
    scorer = scorer_of(source, tmp_path / "tone.jsonl", max_requests=2)
    texts = [f"text {i}" for i in range(9)]
    for step in range(3):
        scores, failed = scorer.score(TASK, texts, ["good"] * 9, ("rollout", step))
        assert np.isfinite(scores).sum() == (4 if step == 0 else 0)
        assert failed == {"cap": 5 if step == 0 else 9}
    assert source.requests == 2
    assert [record.getMessage().count("max_requests = 2 are used up") for record in caplog.records] == [1]


def test_another_text_in_the_same_place_is_asked_for_and_then_counts(tmp_path):
    path = tmp_path / "tone.jsonl"
    source = Source({"old": [0.1], "new": [0.9]})
    for text, score in (("old", 0.1), ("new", 0.9), ("new", 0.9)):
        found, _ = scorer_of(source, path).score(TASK, [text], ["good"], WHERE)
        assert found == np.float32(score)
    assert source.asked == {"old": 1, "new": 1}
    other_label, _ = scorer_of(source, path).score(TASK, ["new"], ["bad"], WHERE)
    assert source.asked["new"] == 2 and digest("new", "good") != digest("new", "bad")


def test_without_a_place_nothing_is_journaled_and_all_is_counted(tmp_path):
    source = Source({"text": [0.5]}, batch=1)
    scorer = scorer_of(source, tmp_path / "tone.jsonl", max_requests=3)
    for _ in range(4):
        scorer.score(TASK, ["text"], ["good"])
    assert source.requests == 3 and not (tmp_path / "tone.jsonl").exists()


def test_texts_that_are_not_asked_for_cost_nothing():
    source = Source({"a": [0.1], "b": [0.2], "c": [0.3]})
    scores, failed = scorer_of(source).score(
        TASK, ["a", "b", "c"], ["x"] * 3, WHERE, np.array([1, 0, 1], bool)
    )
    np.testing.assert_allclose(scores, [0.1, np.nan, 0.3], rtol=1e-6)
    assert not failed and source.asked == {"a": 1, "c": 1}


def test_a_failure_is_logged_once_and_without_the_key(own, monkeypatch, caplog):
    monkeypatch.setenv("OWN_KEY", "sk-very-secret")
    source = Function("own_scorers:told", batch=1, timeout=30.0)
    scorer = scorer_of(source, retries=0, secret="OWN_KEY")
    assert scorer.score(TASK, ["raise", "raise too"], ["good"] * 2)[1] == {"raised": 2}
    [record] = caplog.records
    assert "told to; the key is ***" in record.getMessage() and "secret" not in caplog.text


def test_who_asks_for_a_longer_pause_than_a_run_can_take_is_not_asked_again():
    class Closed:
        batch = concurrency = 1

        def ask(self, task, texts, labels):
            return failure("busy", 1, wait=86_400.0)

    pauses = []
    _, failed = scorer_of(Closed(), pauses=pauses).score(TASK, ["x"], ["good"])
    assert failed == {"busy": 1} and pauses == []
