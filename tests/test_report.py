"""The report of a made-up run: figures worked by hand, pages that hold them, mistakes that are said."""

from __future__ import annotations

import json
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import numpy as np
import pytest
from made_up_run import STEPS, STRATEGIES, TASKS, Page, accuracy, make_run, write_lines

from streamsynth.errors import UserError
from streamsynth.evaluation import diversity, figures, learning, report, tables
from streamsynth.evaluation.markdown import shown

# What runs did not record before there were pages of it.
NEW = ("pattern/", "advantage/", "sigma/", "scorer/", "reject/", "group/", "completion/", "logprob/")


def words_of(folder: Path, page: str) -> list[str]:
    return Page((folder / "report" / f"{page}.html").read_text()).words


def read_lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> tuple[Path, dict]:
    folder = make_run(tmp_path_factory.mktemp("finished"))
    return folder, report.write(folder)


def test_results_hold_the_figures(finished):
    folder, found = finished
    assert json.loads((folder / "report" / "results.json").read_text()) == found
    assert found["tasks"] == list(TASKS) and found["turns"] == 5
    expected = [[accuracy(turn, j) for j in range(5)] for turn in range(6)]
    np.testing.assert_allclose(found["transfer_matrix"], expected)
    # Before its own turn task j has seen j turns of 0.02 each: the mean over j = 1 .. 4.
    assert found["forward_transfer"] == pytest.approx(0.02 * (1 + 2 + 3 + 4) / 4)
    # Each later turn takes 0.03 and gives 0.02.
    assert found["backward_transfer"] == pytest.approx(-0.01 * (4 + 3 + 2 + 1) / 4)
    assert found["forgetting"] == pytest.approx(0.01 * (4 + 3 + 2 + 1) / 4)
    assert found["average_performance"] == pytest.approx(np.mean(expected[5]))
    assert found["student"]["bank_2"] == {
        "examples": 0.55, "base": 0.7, "base_best_of_n": 0.81, "synthetic": 0.86,
        "synthetic_all": 0.91, "real": 0.97,
    }  # fmt: skip
    assert found["verifier"]["film_3"] == pytest.approx({"before": 0.57, "after": 0.87, "last": 0.87})
    assert found["diversity"]["kitchen_1"]["after"]["distinct_2"] == pytest.approx(0.56)
    assert found["commit"].startswith("0123") and found["seconds"]["stream"] == 251.0


def test_pages_load_nothing_and_link_to_each_other(finished):
    folder, _ = finished
    words = {}
    for name in ("index", "patterns", "rewards"):
        page = Page((folder / "report" / f"{name}.html").read_text())
        assert page.loads == [] and not page.tags & {"script", "link", "img", "iframe"}
        assert len(set(page.ids)) == len(page.ids)
        assert page.links and all((folder / "report" / link).is_file() for link in page.links)
        words[name] = " ".join(page.words)
        assert "nan" not in words[name].lower().split()
    for name, expected in {
        "index": (*TASKS, "reward/quality", "diversity/statistic", "entropy", "loss/policy", "after turn 5"),
        "rewards": (*TASKS, "reward/verifier", "diversity/credit", "alpha", "gate/parses", "sigma/quality"),
        "patterns": (*TASKS, "imitate_elites", "probability"),
    }.items():
        for word in expected:
            assert word in words[name], (name, word)


def test_figures_are_valid_svg_and_the_same_again(finished):
    folder, found = finished
    files = {path.stem: path.read_text() for path in (folder / "report").glob("*.svg")}
    assert {"transfer", "transfer_valid", "diversity", "curves_reward", "curves_health"} <= files.keys()
    for svg in files.values():
        assert ElementTree.fromstring(svg).tag.endswith("svg")
    records, patterns = report.load(folder).metrics, found["patterns"]["tasks"]
    reward = report.curve_groups(records)["reward"]
    assert figures.learning_curves(records, reward, TASKS) == files["curves_reward"]
    assert figures.strategy_rewards(patterns, STRATEGIES) == files["pattern_rewards"]
    winners = dict(zip(TASKS, STRATEGIES, strict=False))
    assert figures.strategy_chances(records, STRATEGIES, winners) == files["pattern_chances"]


def test_markdown_tables_are_rectangular_and_figures_exist(finished):
    folder, _ = finished
    lines = (folder / "report" / "report.md").read_text().split("\n")
    for line, following in zip(lines, lines[1:], strict=False):
        if line.startswith("|") and following.startswith("|"):
            assert line.count("|") == following.count("|")
    images = [line.split("(")[1].rstrip(")") for line in lines if line.startswith("![")]
    assert images and all((folder / "report" / image).is_file() for image in images)


@pytest.mark.parametrize("turns", [0, 2])
def test_a_run_that_is_not_over(tmp_path, turns):
    found = report.write(make_run(tmp_path / "run", turns=turns))
    assert found["turns"] == turns and len(found["transfer_matrix"]) == turns + 1
    assert (found["average_performance"] is None) == (turns == 0)
    assert found["student"]["bank_2"]["real"] is None
    assert found["student"]["bank_2"]["synthetic"] == pytest.approx(accuracy(turns, 2))
    assert found["patterns"]["stream"] == {} and set(found["patterns"]["tasks"]) == set(TASKS[:turns])
    words = {page: " ".join(words_of(tmp_path / "run", page)) for page in ("index", "patterns", "rewards")}
    assert ("market_1: label_only won" in words["patterns"]) == (turns > 0)
    assert ("No step was recorded yet." in words["rewards"]) == (turns == 0)


def test_tasks_without_verifier_and_too_few_texts(tmp_path):
    folder = make_run(tmp_path / "run", turns=1)
    records = read_lines(folder / "evaluations.jsonl")
    for record in records:
        record |= {"valid": None, "diversity": dict.fromkeys(diversity.METRICS)}
    write_lines(folder / "evaluations.jsonl", records)
    found = report.write(folder)
    assert found["verifier"]["bank_2"] == dict.fromkeys(("before", "after", "last"))
    assert not (folder / "report" / "transfer_valid.svg").exists()


def test_hostile_texts_and_names_stay_text(tmp_path):
    name = "a|b <b>$x^{</b>"
    folder = make_run(tmp_path / "run", turns=1, tasks=(name,))
    records = read_lines(folder / "evaluations.jsonl")
    records[-1]["samples"] = [{"text": "<script>alert(1)</script> | x\ny", "label": "&", "valid": None}]
    write_lines(folder / "evaluations.jsonl", records)
    steps = read_lines(folder / "metrics.jsonl")
    steps = [{**step, "pattern/<i>|$x": 0.5, "scorer/<b>/a|b": 1} for step in steps]
    write_lines(folder / "metrics.jsonl", steps)
    report.write(folder)
    page = Page((folder / "report" / "index.html").read_text())
    assert "script" not in page.tags
    assert any("<script>alert(1)</script>" in words for words in page.words)
    assert name in page.words
    assert "<i>|$x" in words_of(folder, "patterns") and "scorer/<b>/a|b" in words_of(folder, "rewards")
    markdown = (folder / "report" / "report.md").read_text()
    assert "&lt;script>alert(1)&lt;/script> \\| x y" in markdown and "scorer/&lt;b>/a\\|b" in markdown


def test_a_stream_that_goes_on_shows_its_new_tasks(tmp_path):
    folder = make_run(tmp_path / "run", turns=2, tasks=TASKS[:2])
    summary = (folder / "summary.json").read_text()
    make_run(folder, turns=2, tasks=TASKS[:3])
    (folder / "summary.json").write_text(summary)
    found = report.results(report.load(folder))
    assert found["tasks"] == list(TASKS[:3]) and found["turns"] == 2
    assert found["student"]["bank_2"]["synthetic"] == pytest.approx(accuracy(2, 2))


def test_a_tasks_chances_are_those_at_the_end_of_its_turn(finished):
    _, found = finished
    gain = 0.3 * (STEPS - 1) / STEPS
    for j, task in enumerate(TASKS):
        figures = found["patterns"]["tasks"][task]
        assert list(figures) == list(STRATEGIES)
        assert figures[STRATEGIES[j]]["probability"] == pytest.approx(1 / 7 + gain)
        assert figures[STRATEGIES[j - 1]]["probability"] == pytest.approx(1 / 7 - gain / 6)
        assert figures["imitate"]["count"] == 1200 + 7 * j + 1
        assert learning.winner(figures) == STRATEGIES[j]
    assert learning.winner(found["patterns"]["stream"]) == "change_form"


def test_where_two_share_the_highest_chance_none_won():
    tied = {"a": {"probability": 0.4}, "b": {"probability": 0.4}, "c": {"probability": 0.2}}
    assert learning.winner(tied) is None
    assert learning.winner({"a": {"probability": 0.4}, "b": {"probability": None}}) == "a"
    assert learning.winner({}) is None


def test_first_and_last_are_means_of_fifths(finished):
    folder, found = finished
    fifth = STEPS // 5
    parts = found["reward_parts"]["market_1"]
    first, last = (fifth - 1) / 2 / STEPS, (STEPS - 1 - (fifth - 1) / 2) / STEPS  # mean progress
    expected = {"first": 0.8 - 0.6 * first, "last": 0.8 - 0.6 * last}
    assert parts["advantage/quality_weighted"] == pytest.approx(expected)
    assert parts["alpha"] == pytest.approx({"first": 0.5 + 0.3 * first, "last": 0.5 + 0.3 * last})
    assert found["training"]["market_1"]["entropy"] == pytest.approx(2.4 - last)
    assert learning.ends([1.0, 2.0, 9.0]) == (1.0, 9.0)
    recorded = {key for record in read_lines(folder / "metrics.jsonl") for key in record}
    assert set(parts) == set(filter(learning.is_reward_part, recorded))


def test_a_weighted_part_stands_beside_its_own():
    one = {"first": 1.0, "last": 2.0}
    names = ("gate/all", "advantage/x_weighted", "advantage/x", "reward/y_weighted")
    assert tables.parts(dict.fromkeys(names, one)) == [
        ["reward/y_weighted", 1.0, 2.0, None, None],
        ["advantage/x", 1.0, 2.0, 1.0, 2.0],
        ["gate/all", 1.0, 2.0, None, None],
    ]


def test_failures_are_counted_over_all_steps(finished):
    folder, found = finished
    failed = [r for r in read_lines(folder / "metrics.jsonl") if "scorer/http/timeout" in r]
    count = sum(record["task"] == "bank_2" for record in failed)
    assert count and found["failures"]["bank_2"] == {
        "scorer/http/timeout": 2 * count,
        "reject/no_label": count,
    }


def test_what_never_failed_is_not_listed():
    assert learning.failures([{"task": "a", "scorer/x/raised": 0, "reject/y": 0.0}]) == {}


def test_pages_and_markdown_hold_the_numbers_of_results(finished):
    folder, found = finished
    markdown = (folder / "report" / "report.md").read_text()
    patterns = (*found["patterns"]["tasks"].values(), found["patterns"]["stream"])
    parts = found["reward_parts"].values()
    expected = {
        "patterns": [row[:-1] for figures_of in patterns for row in tables.strategies(figures_of)],
        "rewards": [row for figures_of in parts for row in tables.parts(figures_of)] + tables.failures(found),
        "index": tables.training(found) + tables.diversity(found),
    }
    for page, rows in expected.items():
        words = words_of(folder, page)
        assert rows
        for row in rows:
            cells = [shown(value) for value in row]
            assert any(words[i : i + len(cells)] == cells for i in range(len(words))), (page, cells)
            assert f"| {' | '.join(cells)} |" in markdown, (page, cells)
    assert "33 elites in the archive" in " ".join(words_of(folder, "patterns"))
    assert "33 elites in the archive" in markdown


def test_an_old_run_still_reports(tmp_path):
    folder = make_run(tmp_path / "run", turns=1, tasks=TASKS[:1])
    records = read_lines(folder / "metrics.jsonl")
    old = [{key: value for key, value in r.items() if not key.startswith(NEW)} for r in records]
    write_lines(folder / "metrics.jsonl", old)
    summary = json.loads((folder / "summary.json").read_text())
    del summary["elites"]
    # As the report knew strategies before: of the whole stream alone, in another form.
    summary["patterns"] = {"imitate": {"probability": 0.2, "mean_reward": 0.5, "count": 500}}
    (folder / "summary.json").write_text(json.dumps(summary))
    evaluations = read_lines(folder / "evaluations.jsonl")
    for record in evaluations:
        for metric in ("coverage", "novel_sum", "self_repetition"):
            del record["diversity"][metric]
    write_lines(folder / "evaluations.jsonl", evaluations)
    found = report.write(folder)
    assert found["patterns"] == {"stream": {}, "tasks": {}} and found["failures"] == {}
    assert found["training"]["market_1"].keys() == {"entropy"}
    assert found["diversity"]["market_1"]["last"]["coverage"] is None
    assert "This run has no record." in " ".join(words_of(folder, "patterns"))
    assert not (folder / "report" / "pattern_chances.svg").exists()


def test_turn_segments_part_equal_tasks_of_different_turns():
    records = [{"turn": turn, "step": step} for step, turn in enumerate((1, 1, 2, 2, 2, 3))]
    assert [len(segment) for segment in figures.turn_segments(records)] == [2, 3, 1]


def test_no_run(tmp_path):
    with pytest.raises(UserError, match="holds no run"):
        report.write(tmp_path / "nowhere")
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(UserError, match="no evaluation yet"):
        report.write(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(UserError, match="config.json is not JSON"):
        report.write(tmp_path)
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "evaluations.jsonl").write_text('{"turn": 0, "task": "a"}\nbroken\n')
    with pytest.raises(UserError, match="evaluations.jsonl, line 2"):
        report.write(tmp_path)
