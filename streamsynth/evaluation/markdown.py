"""report.md: the report's figures and tables for a code host or a terminal."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any


def render(found: Mapping[str, Any], figures: Sequence[str], samples: Mapping[str, Mapping]) -> str:
    """The Markdown text.

    Args:
      found: of `report.results`.
      figures: names of the SVG files beside the report.
      samples: of `report.samples`.
    """
    tasks = found["tasks"]
    with_student = [task for task in tasks if found["score"][task] == "student accuracy"]
    sections = [
        "# StreamSynth report",
        f"{found['turns']} of {len(tasks)} turns are over. {_commit(found['commit'])}",
        "## Summary",
        table(
            ("average performance", "forward transfer", "backward transfer", "forgetting"),
            [
                [
                    number(found["average_performance"]),
                    *(
                        signed(found[name])
                        for name in ("forward_transfer", "backward_transfer", "forgetting")
                    ),
                ]
            ],
        ),
        *_students(found, with_student),
        "## Transfer",
        *scale_note(found),
        table(
            ("after turn", *tasks),
            ([turn, *map(number, row)] for turn, row in enumerate(found["transfer_matrix"])),
        ),
        "## Quality and diversity",
        "Unselected texts: before anything → after the task's own turn → at the last evaluation.",
        table(
            ("task", "valid", "gate pass", "copies", "Vendi", "distinct-2"),
            (
                [
                    task,
                    *(_journey(found[name][task]) for name in ("verifier", "gate_pass", "copy_rate")),
                    *(_journey(_metric(found["diversity"][task], name)) for name in ("vendi", "distinct_2")),
                ]
                for task in tasks
            ),
        ),
        *_questions(found),
        *_scorers(found),
        *(f"![{name.replace('_', ' ')}]({name}.svg)" for name in figures),
        "## Unselected samples",
    ]
    for task, of_task in samples.items():
        rows = ([s["label"], _validity(s.get("valid")), s["text"]] for s in of_task["unselected"])
        sections += [f"### {cell(task)}", table(("label", "valid", "text"), rows)]
    return "\n\n".join(sections) + "\n"


def _students(found: Mapping[str, Any], tasks: Sequence[str]) -> list[str]:
    if not tasks:
        return []
    return [
        "## Student accuracy on the real test sets",
        "Every student takes as many gradient steps, whatever it is trained on.",
        table(
            ("task", *(name.replace("_", " ") for name in found["student"][tasks[0]])),
            ([task, *map(number, found["student"][task].values())] for task in tasks),
        ),
    ]


def scale_note(found: Mapping[str, Any]) -> list[str]:
    """What must be said of a transfer matrix that holds the scores of tasks without a student; or else []."""
    tasks = [task for task, score in found["score"].items() if score == "validity"]
    if not tasks:
        return []
    note = (
        f"No student learns from questions and answers: the score of {', '.join(map(cell, tasks))} is the "
        "validity, the share of unselected texts that pass the gates and, where there is one, the verifier."
    )
    if len(tasks) < len(found["tasks"]):
        note += " It is another scale than accuracy, and the figures of the summary are means over both."
    return [note]


QUESTION_FIGURES = (
    ("numeric answers", "numeric"),
    ("commonest answer", "commonest_answer"),
    ("words of a question", "question_words"),
    ("words of an answer", "answer_words"),
)


def question_rows(found: Mapping[str, Any]) -> list[list[Any]]:
    """Of each task with questions: what was written at each moment, and the real test set beside it."""
    rows = []
    for task, moments in found["questions"].items():
        for moment, name in (("before", "before anything"), ("after", "after its turn"), ("last", "last")):
            figures = moments[moment]
            if figures is not None:
                shares = [figures["written"][key] for _, key in QUESTION_FIGURES]
                rows.append([task, name, *shares, figures["test_exact"], figures["test_near"]])
        real = moments["last"]["real"]
        rows.append([task, "real test set", *(real[key] for _, key in QUESTION_FIGURES), None, None])
    return rows


QUESTION_HEADS = (
    "task", "texts", *(name for name, _ in QUESTION_FIGURES), "test questions", "near test questions",
)  # fmt: skip


def _questions(found: Mapping[str, Any]) -> list[str]:
    rows = question_rows(found)
    if not rows:
        return []
    return [
        "## Questions and answers",
        "Of the unselected texts that are a question with an answer. The last two columns are the shares "
        "whose question is in the real test set, or nearly.",
        table(QUESTION_HEADS, ([task, name, *map(number, values)] for task, name, *values in rows)),
    ]


SCORER_HEADS = ("scorer", "texts", "scored", "failed", "why", "requests")


def scorer_rows(found: Mapping[str, Any]) -> list[list[Any]]:
    """Of each scorer: the texts it was asked about, those it failed on and why, and the requests it took."""
    return [
        [
            name,
            counts["asked"],
            counts["scored"],
            counts["asked"] - counts["scored"],
            ", ".join(f"{reason} {count}" for reason, count in counts["failed"].items()) or "–",
            counts["requests"],
        ]
        for name, counts in found["scorers"].items()
    ]


def _scorers(found: Mapping[str, Any]) -> list[str]:
    rows = scorer_rows(found)
    if not rows:
        return []
    return [
        "## Scorers",
        "Texts that a scorer failed on have no score; where it is a judge, nothing was learned from them.",
        table(SCORER_HEADS, rows),
    ]


def table(head: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    """A Markdown table."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(map(cell, line))} |" for line in lines)


def cell(value: Any) -> str:
    """Text that breaks neither a table nor the page: no pipes, line ends or HTML."""
    text = " ".join(str(value).split())
    for character, escaped in (("&", "&amp;"), ("<", "&lt;"), ("|", "\\|")):
        text = text.replace(character, escaped)
    return text


def number(value: float | None) -> str:
    """Three digits after the point, a dash for "not measured"."""
    return "–" if value is None else f"{value:.3f}"


def signed(value: float | None) -> str:
    """Like `number`, with its sign."""
    return "–" if value is None else f"{value:+.3f}"


def _metric(moments: Mapping[str, Mapping[str, float | None]], metric: str) -> dict[str, float | None]:
    return {name: values[metric] for name, values in moments.items()}


def _journey(moments: Mapping[str, float | None]) -> str:
    return " → ".join(number(moments[name]) for name in ("before", "after", "last"))


def _validity(valid: bool | None) -> str:
    return {True: "yes", False: "no", None: "–"}[valid]


def _commit(commit: str | None) -> str:
    return f"Commit {commit}." if commit else "The code's commit is not known."
