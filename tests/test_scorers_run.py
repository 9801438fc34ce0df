"""Whole runs with scorers that fail: they end well, the report counts it, and a killed one goes on."""

from __future__ import annotations

import collections
import json
import signal
from collections import Counter

import pytest
import runs
import scoring

from streamsynth import api
from streamsynth.dataset.rows import read_rows

KEY = "sk-very-secret-3141592653"
SCORERS = ("fits", "hangs_once", "miscounts", "kills", "mark")
SECONDARY = SCORERS[1:]


def keys(server):
    functions = [f"{name}=own_scorers:{name}" for name in SCORERS[:-1]]
    mark = f"mark=openai:small@http://127.0.0.1:{server.server_port}/v1"
    return {
        "stream.tasks": "worlds:market_1",
        "learner.steps": "2",
        "supervised.rounds": "1",
        "checkpoint.every": "1",
        "feedback.scorers": ",".join([*functions, mark]),
        "feedback.judges.fits": "1",
        **{f"feedback.secondary.{name}": "0.25" for name in SECONDARY},
        "scorers.key_variable": "OWN_KEY",
        "scorers.timeout_seconds": "10",
        "scorers.retries": "0",
        "scorers.batch_size": "4",
    }


@pytest.fixture(scope="module")
def scored(finished, tmp_path_factory):
    """A run with a judge and four secondary parts, each of which fails in a way of its own."""
    root = tmp_path_factory.mktemp("scored")
    (root / "flags").mkdir()
    with (
        scoring.endpoint(moody=True) as server,
        scoring.importable(root),
        pytest.MonkeyPatch.context() as patch,
    ):
        patch.setenv("OWN_KEY", KEY)
        patch.setenv("SCORER_FLAGS", str(root / "flags"))
        overrides = {key.replace(".", "__"): value for key, value in keys(server).items()}
        results = api.train(runs.config(finished.cache, **overrides), root / "run")
        yield root, results, server


def journal(workdir, name):
    return runs.read_jsonl(workdir / "scores" / f"{name}.jsonl")


def test_the_run_ends_well_and_counts_every_failure(scored):
    root, results, server = scored
    found = results["scorers"]
    assert set(found) == set(SCORERS)
    for name, counts in found.items():
        assert counts["asked"] == counts["scored"] + sum(counts["failed"].values())
        assert counts["scored"] > 20, name
        assert counts["requests"] == sum(record["request"] for record in journal(root / "run", name))
    assert set(found["fits"]["failed"]) == {"raised", "not_finite"}
    assert set(found["hangs_once"]["failed"]) == {"timeout"} and found["hangs_once"]["failed"]["timeout"] <= 4
    assert set(found["miscounts"]["failed"]) == {"wrong_number"}
    assert found["kills"]["failed"] == {}
    assert "unparsable" in found["mark"]["failed"]
    assert found["mark"]["requests"] == len(server.requests) == found["mark"]["asked"]
    assert results["judges"]["market_1"]["fits"] == {"auc": 1.0, "weight": 1.0}
    assert results["transfer_matrix"][1][0] > 0


def test_the_metrics_count_them_by_step_and_the_report_shows_them(scored):
    root, results, _ = scored
    metrics = runs.read_jsonl(root / "run" / "metrics.jsonl")
    for name in SCORERS:
        of_steps = Counter(
            record["failed"]
            for record in journal(root / "run", name)
            if "failed" in record and record["purpose"] in ("measure", "explore", "rollout")
        )
        assert sum(record[f"scorer/{name}/failed"] for record in metrics) == of_steps.total()
        for reason, count in of_steps.items():
            assert sum(record.get(f"scorer/{name}/failed/{reason}", 0) for record in metrics) == count
        for record in metrics[1:]:
            assert 0 <= record[f"reward/{name}_weighted"] <= record[f"reward/{name}"] <= 1
            if name in SECONDARY:
                assert record[f"sigma/{name}"] > 0 and record[f"advantage/{name}"] >= 0
    for page in ("report.md", "index.html"):
        text = (root / "run" / "report" / page).read_text()
        for name, counts in results["scorers"].items():
            assert name in text and all(f"{why} {n}" in text for why, n in counts["failed"].items())


def test_every_kept_row_was_scored(scored):
    root, results, _ = scored
    rows = read_rows(root / "run" / "kept" / "market_1.jsonl")
    assert len(rows) > 20
    failed = {
        (record["purpose"], *record["steps"], record["sample"])
        for record in journal(root / "run", "fits")
        if "failed" in record
    }
    assert failed
    for row in rows:
        assert {"quality", "posterior", "fits", "diversity"} <= set(row.scores)
        assert row.scores["fits"] >= 0.5
    assert {name for row in rows for name in row.scores} >= set(SCORERS)
    state = runs.state(root / "run")
    written = 3 * 40 + 40  # the base policy's batch, one round, two steps
    lost = [place for place in failed if place[0] in ("measure", "explore", "rollout")]
    assert int(state["tasks/0/buffer/seen"]) == written - len(lost)
    # A sample without a score counts as its prompt's others do, and a prompt without any not at all.
    places = collections.Counter((*place[:-1], place[-1] // 8) for place in lost)
    whole = sum(count == 8 for count in places.values())
    assert int(state["patterns/count"].sum()) == written - 8 * whole


def test_the_key_is_in_no_file(scored):
    root, _, server = scored
    assert all(headers["Authorization"] == f"Bearer {KEY}" for _, _, headers, _ in server.requests)
    files = [path for path in (root / "run").rglob("*") if path.is_file()]
    assert len(files) > 30
    assert [path for path in files if KEY.encode() in path.read_bytes()] == []


def test_more_texts_are_written_and_scored_by_the_same_journals(scored):
    root, _, server = scored
    before = len(server.requests)
    summary = api.synthesize(root / "run", "market_1", rows=6, output=root / "rows")
    assert summary["rows"] > 0
    added = len(server.requests) - before
    assert added > 0
    api.synthesize(root / "run", "market_1", rows=6, output=root / "rows_again")
    assert len(server.requests) == before + added  # the same texts, found in the journal
    rows = (root / "rows" / "train.jsonl").read_bytes()
    assert (root / "rows_again" / "train.jsonl").read_bytes() == rows


@pytest.mark.slow
def test_killed_between_two_calls(finished, scored, tmp_path, monkeypatch):
    """At the second call of the last step by reward, and started again: all is as without the kill."""
    root, _, server = scored
    requests = [record for record in journal(root / "run", "kills") if record["request"]]
    last = max(record["steps"][0] for record in requests if record["purpose"] == "rollout")
    kill_at = next(i for i, r in enumerate(requests) if (r["purpose"], *r["steps"]) == ("rollout", last)) + 2
    monkeypatch.setenv("SCORER_FLAGS", str(tmp_path))
    more = [f"--config.{key}={value}" for key, value in keys(server).items()]
    argv = runs.arguments(finished.cache, tmp_path / "run")
    argv = [word for word in argv if word.partition("=")[0] not in {m.partition("=")[0] for m in more}] + more

    monkeypatch.setenv("SCORER_KILLS_AT", str(kill_at))
    process = runs.start(argv, root)
    _, stderr = process.communicate()
    assert process.returncode == -signal.SIGKILL, stderr[-3000:]
    assert not (tmp_path / "run" / "summary.json").exists()
    monkeypatch.delenv("SCORER_KILLS_AT")
    before = len(journal(tmp_path / "run", "kills"))
    runs.finish(argv, root)
    assert runs.outcome(tmp_path / "run") == runs.outcome(root / "run")
    for name in SCORERS:
        ours, theirs = (
            Counter(
                json.dumps(record)
                for record in journal(place, name)
                if record["purpose"] != "synthesize/market_1"
            )
            for place in (tmp_path / "run", root / "run")
        )
        assert ours == theirs, name
    assert before < len(journal(tmp_path / "run", "kills"))
