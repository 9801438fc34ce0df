"""report.md: the report's figures and tables for a code host or a terminal."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from streamsynth.evaluation import tables

# Said by the pages, too.
DIVERSITY_NOTE = (
    "At a fixed number of texts. Higher is more diverse for distinct-n, Vendi, mean distance, NovelSum and "
    "coverage, lower for the others. Coverage is the share of real training texts that a written text comes "
    "near."
)
PATTERN_NOTE = (
    "The probability of each strategy at the end of the task's turn. The standard error of its samples' mean "
    "reward takes them for independent."
)
PART_NOTE = (
    "Means over the first and the last fifth of the steps of a turn, before and after the weight of the part."
)
FAILURE_NOTE = "Samples that a scorer failed on, or that had no valid form, counted over all steps."
TRAINING_NOTE = "Means over the last fifth of the steps of each turn."


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
        *_diversity(found),
        *_questions(found),
        *_scorers(found),
        *_patterns(found),
        *_reward_parts(found),
        *_training(found),
        "## Figures",
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


def _questions(found: Mapping[str, Any]) -> list[str]:
    rows = tables.questions(found)
    if not rows:
        return []
    return [
        "## Questions and answers",
        "Of the unselected texts that are a question with an answer. The last two columns are the shares "
        "whose question is in the real test set, or nearly.",
        table(tables.QUESTION_HEADS, rows),
    ]


def _scorers(found: Mapping[str, Any]) -> list[str]:
    rows = tables.scorers(found)
    if not rows:
        return []
    return [
        "## Scorers",
        "Texts that a scorer failed on have no score; where it is a judge, nothing was learned from them.",
        table(tables.SCORER_HEADS, rows),
    ]


def _diversity(found: Mapping[str, Any]) -> list[str]:
    rows = tables.diversity(found)
    if not rows:
        return []
    return ["### All metrics of diversity", DIVERSITY_NOTE, table(tables.DIVERSITY_HEADS, rows)]


def _patterns(found: Mapping[str, Any]) -> list[str]:
    patterns = found["patterns"]
    groups = {**patterns["tasks"], **({"the whole stream": patterns["stream"]} if patterns["stream"] else {})}
    if not groups:
        return []
    sections = ["## Patterns", PATTERN_NOTE]
    for name, figures in groups.items():
        kept = found["elites"].get(name)
        sections += [f"### {cell(name)}", table(tables.STRATEGY_HEADS, tables.strategies(figures))]
        sections += [f"{kept:,} elites in the archive."] if kept is not None else []
    return sections


def _reward_parts(found: Mapping[str, Any]) -> list[str]:
    sections = ["## Reward parts", PART_NOTE] if found["reward_parts"] else []
    for task, figures in found["reward_parts"].items():
        sections += [f"### {cell(task)}", table(tables.PART_HEADS, tables.parts(figures))]
    rows = tables.failures(found)
    if rows:
        sections += ["## Failures", FAILURE_NOTE, table(tables.FAILURE_HEADS, rows)]
    return sections


def _training(found: Mapping[str, Any]) -> list[str]:
    rows = tables.training(found)
    if not rows:
        return []
    return ["## Training health", TRAINING_NOTE, table(tables.training_heads(found), rows)]


def table(head: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    """A Markdown table of cells as `shown` takes them."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(cell(shown(value)) for value in line)} |" for line in lines)


def cell(value: Any) -> str:
    """Text that breaks neither a table nor the page: no pipes, line ends or HTML."""
    text = " ".join(str(value).split())
    for character, escaped in (("&", "&amp;"), ("<", "&lt;"), ("|", "\\|")):
        text = text.replace(character, escaped)
    return text


def shown(value: str | float | None) -> str:
    """A cell's text: names as they are, counts in full, other numbers as by `number` or with an exponent."""
    if isinstance(value, str):
        return value
    if isinstance(value, int):
        return f"{value:,}"
    return f"{value:.1e}" if value and abs(value) < 5e-4 else number(value)


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
