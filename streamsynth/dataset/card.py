"""The card of a data set: the README.md beside train.jsonl."""

from __future__ import annotations

import json
import statistics
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from streamsynth.dataset.rows import Row
from streamsynth.tasks.question_answer import answer_form
from streamsynth.tasks.task import Task

_COLUMNS = {
    "label": "the label that was asked for",
    "pattern": "the synthesis strategy",
    "step": "the training step at which the row was written",
    "policy_version": "updates that the writing policy had seen",
    "examples": "ids of the real examples that the prompt showed",
    "attributes": "the values of the attributes that were asked for",
    "scores": "every part of the score by name",
}


def render(
    task: Task, rows: Sequence[Row], summary: Mapping[str, Any], config_summary: Mapping[str, Any]
) -> str:
    """The card's Markdown.

    Args:
      task: the task that the rows were written for.
      rows: the exported rows.
      summary: the counts of `export.export`.
      config_summary: what is worth telling of the config, by key.
    """
    without = {"label"} if task.kind == "qa" else set()
    without |= set() if task.attributes else {"attributes"}
    columns = [(name, text) for name, text in _COLUMNS.items() if name not in without]
    asked = "a question and its answer" if task.kind == "qa" else "one label"
    sections = [
        f"# {_cell(task.name)}: synthetic training data",
        task.description,
        *_labels(task, summary),
        *_attributes(task),
        "## Columns of train.jsonl",
        _table(
            ("column", "meaning"),
            [*((field, "text, written by the policy") for field in task.fields), *columns],
        ),
        "## How it was made",
        f"A language model wrote every row in answer to a prompt that asked for {asked} and could show some "
        f"of the {len(task.examples)} real examples of the task. Rows that passed the gates were kept; of "
        "those, this export",
        _steps(task, summary),
    ]
    if config_summary:
        settings = [(key, _plain(value)) for key, value in config_summary.items()]
        sections.append(_table(("setting", "value"), settings))
    if rows:
        sections += ["## Provenance", _provenance(rows), "## Scores", _scores(rows)]
    sections += [
        "## Terms",
        "The texts are synthetic, and no one has checked them: they can be wrong, or "
        f"{'wrongly answered' if task.kind == 'qa' else 'mislabelled'}. They were "
        "written after real examples, whose terms may reach to what is made from them; so may those of the "
        "model that wrote them. Check both before you pass this data set on.",
    ]
    return "\n\n".join(sections) + "\n"


def _labels(task: Task, summary: Mapping[str, Any]) -> list[str]:
    if task.kind == "qa":
        form = answer_form(task.examples)
        answers = "numbers, all in one form" if form.numeric else "short texts"
        return [f"Kind: questions and answers (qa). The answers are {answers}; there are no labels."]
    counts = _table(("label", "rows"), summary["per_label"].items())
    return ["Kind: classification.", "## Labels", counts, *_missing(summary)]


def _attributes(task: Task) -> list[str]:
    if not task.attributes:
        return []
    rows = [
        (
            one.name,
            ", ".join(value.name for value in one.values),
            "proposed by the policy" if one.proposed else "from the task",
        )
        for one in task.attributes
    ]
    return [
        "## Attributes",
        "Prompts asked for every combination of these values about equally often. A row has what was asked "
        "for in its column `attributes`; whether the text has it was not a condition for keeping it.",
        _table(("attribute", "values", "origin"), rows),
    ]


def _steps(task: Task, summary: Mapping[str, Any]) -> str:
    if task.kind == "qa":
        compared, fewer, order = "question", "for the number that was asked for", ""
    else:
        compared, fewer, order = "text", "to leave as many rows of each label", " and with the labels in turn"
    best = summary["chosen_by"] == "quality"
    stayed = "the best ones stayed" if best else "the most different ones stayed"
    written = "by falling quality" if best else "each the most different from those before it"
    steps = (
        f"took {summary['kept']} kept rows,",
        f"dropped {summary['test_overlap']} whose {compared} is also in the real test set,",
        f"dropped {summary['near_duplicates']} near-duplicates of better rows (a Jaccard similarity of word "
        f"bigrams of {summary['threshold']} or more),",
        f"dropped {summary['unbalanced']} {fewer}, {stayed},",
        f"and wrote {summary['rows']} rows, {written}{order}.",
    )
    return "\n".join(f"- {step}" for step in steps)


def _missing(summary: Mapping[str, Any]) -> list[str]:
    labels = summary["missing_labels"]
    return [f"No row was kept for: {', '.join(map(_cell, labels))}."] if labels else []


def _provenance(rows: Sequence[Row]) -> str:
    patterns = Counter(row.pattern for row in rows)
    steps = [row.step for row in rows]
    versions = [row.policy_version for row in rows]
    shown = {example for row in rows for example in row.examples}
    facts = [
        ("patterns", ", ".join(f"{name} {count}" for name, count in sorted(patterns.items()))),
        ("training steps", f"{min(steps)} to {max(steps)}"),
        ("policy versions", f"{min(versions)} to {max(versions)}"),
        ("different examples shown", len(shown)),
    ]
    return _table(("what", "value"), facts)


def _scores(rows: Sequence[Row]) -> str:
    names = sorted({name for row in rows for name in row.scores})
    lines = []
    for name in names:
        values = [row.scores[name] for row in rows if name in row.scores]
        numbers = (min(values), statistics.median(values), statistics.fmean(values), max(values))
        lines.append((name, len(values), *(f"{number:.3f}" for number in numbers)))
    return _table(("part", "rows", "lowest", "median", "mean", "highest"), lines)


def _table(head: Sequence[str], lines: Iterable[Sequence[Any]]) -> str:
    rows = [head, ["---"] * len(head), *lines]
    return "\n".join(f"| {' | '.join(_cell(cell) for cell in row)} |" for row in rows)


def _cell(value: Any) -> str:
    """Text that cannot break a Markdown table."""
    return " ".join(str(value).replace("|", "\\|").split())


def _plain(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)
