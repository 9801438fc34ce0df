"""index.html: the report as one page that needs nothing beside itself."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from typing import Any

from streamsynth.evaluation import tables
from streamsynth.evaluation.learning_pages import REWARD_CURVES
from streamsynth.evaluation.markdown import DIVERSITY_NOTE, TRAINING_NOTE, number, scale_note, signed
from streamsynth.evaluation.markup import details, document, escaped, figure, plain_table, section, table

_LONGEST_SAMPLE = 400
_ANCHORS = {
    "examples": "examples alone",
    "base": "base policy",
    "base_best_of_n": "base, best of n",
    "synthetic": "this run",
    "synthetic_all": "whole data set",
    "real": "all real data",
}
_SUMMARY = {
    "average_performance": (
        "average performance",
        "mean score at the end, over the tasks learned",
        number,
    ),
    "forward_transfer": ("forward transfer", "gain on a task from the turns before its own", signed),
    "backward_transfer": ("backward transfer", "change on a task from the turns after its own", signed),
    "forgetting": ("forgetting", "loss since a task's best moment; below 0 is gain", signed),
}
_CURVES = {
    "policy": "Policy",
    "replay": "Replay",
    "loss": "Losses",
    "gradient": "Gradients",
    "supervised": "Tuning to examples",
    "prompt": "Prompts",
}


def render(found: Mapping[str, Any], drawn: Mapping[str, str], samples: Mapping[str, Mapping]) -> str:
    """The page.

    Args:
      found: of `report.results`.
      drawn: figures by name, as SVG text.
      samples: of `report.samples`.
    """
    body = [
        _head(found),
        _anchors(found),
        _transfer(found, drawn),
        _quality(found, drawn),
        _curves(found, drawn),
        _samples(samples),
        _tables(found),
        details("Config", f"<pre>{escaped(json.dumps(found['config'], indent=2))}</pre>"),
    ]
    return document("StreamSynth report", "index", body)


def _head(found: Mapping[str, Any]) -> str:
    turns, tasks = found["turns"], len(found["tasks"])
    facts = [f"{tasks} tasks" if turns >= tasks else f"{turns} of {tasks} turns are over"]
    if found["seconds"]:
        facts.append(f"{_duration(sum(found['seconds'].values()))} in all")
    if found["commit"]:
        facts.append(f"commit {escaped(found['commit'][:12])}")
    tiles = "".join(
        f'<div class="tile">{name}<b>{form(found[key])}</b><small>{meaning}</small></div>'
        for key, (name, meaning, form) in _SUMMARY.items()
    )
    return f'<h1>StreamSynth report</h1>\n<p>{" · ".join(facts)}</p>\n<div class="tiles">{tiles}</div>'


def _anchors(found: Mapping[str, Any]) -> str:
    cards = "".join(
        f'<div class="card"><h3>{escaped(task)}</h3>{"".join(_bars(found["student"][task]))}</div>'
        for task in found["tasks"]
        if found["score"][task] == "student accuracy"
    )
    if not cards:
        return ""
    return section(
        "What the rows are worth",
        "Accuracy on the real test set of a student trained on each set of rows, always with as many "
        "gradient steps. The examples alone and all real data are the anchors; the base policy has not seen "
        "the stream.",
        f'<div class="cards">{cards}</div>',
    )


def _bars(scores: Mapping[str, float | None]) -> Iterable[str]:
    for anchor, name in _ANCHORS.items():
        value = scores[anchor]
        if value is not None:
            kind = "bar run" if anchor.startswith("synthetic") else "bar"
            yield (
                f'<div class="{kind}"><span>{name}</span>'
                f'<span><i style="width:{100 * value:.1f}%"></i></span><span>{number(value)}</span></div>'
            )


def _transfer(found: Mapping[str, Any], drawn: Mapping[str, str]) -> str:
    maps = "".join(figure(drawn[name]) for name in ("transfer", "transfer_valid") if name in drawn)
    return section(
        "Transfer",
        "Each row is a moment of the stream, each column a task; the framed cell follows the task's own "
        "turn. Above the frames nothing was learned on the task yet: what rises there is forward transfer."
        + "".join(f" {note}" for note in scale_note(found)),
        f'<div class="pair">{maps}</div>',
    )


def _quality(found: Mapping[str, Any], drawn: Mapping[str, str]) -> str:
    def row(task: str) -> list[Any]:
        diversity = found["diversity"][task]
        cells = [_journey(found[name][task]) for name in ("verifier", "gate_pass", "copy_rate")]
        for metric in ("vendi", "distinct_2", "self_bleu"):
            cells.append(_journey({moment: values[metric] for moment, values in diversity.items()}))
        return [escaped(task), *cells]

    heads = ("task", "valid", "gate pass", "copies", "Vendi", "distinct-2", "self-BLEU")
    content = table(heads, map(row, found["tasks"]))
    if "diversity" in drawn:
        content += figure(drawn["diversity"])
        content += (
            "<p>Hollow: before anything. Filled: after the task's own turn. Cross: at the last evaluation. "
            "Up and to the right is better.</p>"
        )
    rows = tables.diversity(found)
    if rows:
        every = f"<p>{DIVERSITY_NOTE}</p>" + plain_table(tables.DIVERSITY_HEADS, rows)
        content += details("All metrics of diversity", every)
    rows = tables.questions(found)
    if rows:
        content += "<h3>Questions and answers</h3>" + plain_table(tables.QUESTION_HEADS, rows)
    return section(
        "Quality and diversity",
        "Of unselected texts, drawn alike at every moment: before anything → after the task's own turn → at "
        "the last evaluation. Diversity is measured at a fixed number of texts, by metrics nothing was "
        "trained on.",
        content,
    )


def _curves(found: Mapping[str, Any], drawn: Mapping[str, str]) -> str:
    content = figure(drawn["curves_overview"]) if "curves_overview" in drawn else ""
    rows = tables.training(found)
    if rows:
        content += (
            "<h3>Training health</h3><p>Token entropy; the share of groups whose samples are all worth the "
            "same; the share of completions that were cut off; how far the learner's log-probabilities of "
            "what was sampled are from the sampler's; where that is an older policy (rollout.lag), the mean "
            "and the effective share of the weights that correct for it; and what replay weighs. "
            f"{TRAINING_NOTE}</p>"
        )
        content += figure(drawn["curves_health"]) + plain_table(tables.training_heads(found), rows)
    rest = {name.removeprefix("curves_"): svg for name, svg in drawn.items() if name.startswith("curves_")}
    for group, svg in rest.items():
        if group not in ("overview", "health", *REWARD_CURVES):
            content += details(_CURVES.get(group, escaped(group.capitalize())), figure(svg))
    if not content:
        return ""
    return section(
        "Learning",
        "One point a step, with its moving average within the turn; a dotted line begins a turn. The "
        '<a href="rewards.html">parts of the reward</a> and the <a href="patterns.html">patterns</a> have '
        "pages of their own.",
        content,
    )


def _samples(samples: Mapping[str, Mapping]) -> str:
    parts = []
    for task, of_task in samples.items():
        unselected = ([*_label_and_text(s), _validity(s.get("valid"))] for s in of_task["unselected"])
        best = ([*_label_and_text(s), number(s["quality"])] for s in of_task["best"])
        columns = (
            f"<div><h3>Unselected, as they come</h3>{table(('label', 'text', 'valid'), unselected)}</div>"
        )
        if of_task["best"]:
            columns += f"<div><h3>Best of the data set</h3>{table(('label', 'text', 'quality'), best)}</div>"
        parts.append(details(escaped(task), f'<div class="samples">{columns}</div>', not parts))
    return section(
        "Samples",
        "What the policy writes at the last evaluation, beside the best rows that were kept.",
        "".join(parts),
    )


def _label_and_text(sample: Mapping[str, Any]) -> tuple[str, str]:
    text = sample["text"]
    shown = text if len(text) <= _LONGEST_SAMPLE else text[:_LONGEST_SAMPLE] + "…"
    return escaped(sample["label"]), escaped(shown)


def _tables(found: Mapping[str, Any]) -> str:
    content = ""
    if found["datasets"]:
        names = ("rows", "kept", "near_duplicates", "test_overlap", "unbalanced")
        rows = ([task, *map(of_task.get, names)] for task, of_task in found["datasets"].items())
        heads = ("data set", "rows", "kept", "near-duplicates", "in the test set", "for balance")
        content += "<h3>Data sets: rows written, and of the kept rows those dropped</h3>"
        content += plain_table(heads, rows)
    if rows := tables.scorers(found):
        content += "<h3>Scorers: texts that they were asked about</h3>"
        content += plain_table(tables.SCORER_HEADS, rows)
    if found["seconds"]:
        rows = ([phase, _duration(value)] for phase, value in found["seconds"].items())
        content += "<h3>Time</h3>" + plain_table(("phase", "time"), rows)
    return section("Behind it", "", content) if content else ""


def _journey(moments: Mapping[str, float | None]) -> str:
    values = [moments[name] for name in ("before", "after", "last")]
    if all(value is None for value in values):
        return "–"
    digits = 1 if max(value for value in values if value is not None) >= 10 else 2
    return " → ".join("–" if value is None else f"{value:.{digits}f}" for value in values)


def _validity(valid: bool | None) -> str:
    return {True: '<span class="yes">yes</span>', False: '<span class="no">no</span>', None: "–"}[valid]


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours} h {minutes} min"
    return f"{minutes} min {rest} s" if minutes else f"{seconds:.1f} s"
