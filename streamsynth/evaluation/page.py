"""index.html: the report as one page that needs nothing beside itself."""

from __future__ import annotations

import html
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from streamsynth.evaluation import figures
from streamsynth.evaluation.markdown import (
    QUESTION_HEADS,
    SCORER_HEADS,
    number,
    question_rows,
    scale_note,
    scorer_rows,
    signed,
)

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
    "reward": "Reward parts",
    "diversity": "Diversity and its weight alpha",
    "gate": "Gates: share that passes, and rows kept",
    "policy": "Policy",
    "replay": "Replay",
}
_OPEN_CURVES = ("reward", "diversity", "gate")

_STYLE = """
:root { color-scheme: light dark; --page: #ffffff; --text: #1f2328; --soft: #59636e; --line: #d8dee4;
  --panel: #f6f8fa; --run: #3f7fd9; --anchor: #aab4bf; --good: #1a7f4b; --bad: #c0392b; }
@media (prefers-color-scheme: dark) { :root { --page: #0f1419; --text: #e4e8ec; --soft: #9aa5b1;
  --line: #2c343d; --panel: #171e26; --run: #5a96ea; --anchor: #56616d; --good: #4cc38a; --bad: #ff7b6b; } }
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 1104px; padding: 40px 32px 80px;
  background: var(--page); color: var(--text);
  font: 15px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", "DejaVu Sans", sans-serif; }
h1 { font-size: 30px; margin: 0 0 4px; letter-spacing: -0.02em; }
h2 { font-size: 20px; margin: 48px 0 6px; letter-spacing: -0.01em; }
h3 { font-size: 15px; margin: 24px 0 6px; }
p { margin: 4px 0 14px; max-width: 78ch; color: var(--soft); }
a { color: var(--run); }
.tiles, .cards { display: grid; gap: 12px; }
.tiles { grid-template-columns: repeat(auto-fit, minmax(200px, 1fr)); margin-top: 24px; }
.cards { grid-template-columns: repeat(auto-fill, minmax(320px, 1fr)); }
.tile, .card, pre { background: var(--panel); border: 1px solid var(--line); border-radius: 8px;
  padding: 14px 16px; }
.tile b { display: block; font-size: 26px; font-variant-numeric: tabular-nums; line-height: 1.25; }
.tile small { color: var(--soft); display: block; line-height: 1.35; }
.card h3 { margin: 0 0 8px; }
.bar { display: grid; grid-template-columns: 108px 1fr 46px; gap: 10px; align-items: center;
  font-size: 13px; }
.bar span:first-child { color: var(--soft); white-space: nowrap; }
.bar i { display: block; height: 10px; border-radius: 2px; background: var(--anchor); min-width: 1px; }
.bar.run i { background: var(--run); }
.bar.run span { color: var(--text); font-weight: 600; }
.bar span:last-child, td.number { text-align: right; font-variant-numeric: tabular-nums; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; width: 100%; font-size: 14px; }
th { text-align: left; font-weight: 600; color: var(--soft); font-size: 13px; vertical-align: bottom; }
th.number { text-align: right; }
th, td { padding: 5px 12px 5px 0; border-bottom: 1px solid var(--line); vertical-align: top; }
td.name, td.number { white-space: nowrap; }
figure { margin: 12px 0; color: var(--soft); overflow-x: auto; }
figure svg { display: block; width: 100%; height: auto; }
figure svg text { font-family: inherit !important; }
.pair { display: grid; grid-template-columns: repeat(auto-fit, minmax(440px, 1fr)); gap: 24px; }
.samples { display: grid; grid-template-columns: 1fr 1fr; gap: 32px; }
@media (max-width: 760px) { .samples { grid-template-columns: 1fr; } .pair { grid-template-columns: 1fr; } }
.samples td { overflow-wrap: anywhere; }
.yes { color: var(--good); } .no { color: var(--bad); }
details { border-top: 1px solid var(--line); padding: 10px 0; }
section + details { margin-top: 48px; }
summary { cursor: pointer; font-weight: 600; }
pre { overflow-x: auto;
  font: 12.5px/1.45 ui-monospace, "SF Mono", Menlo, Consolas, "DejaVu Sans Mono", monospace; }
"""


def render(found: Mapping[str, Any], drawn: Mapping[str, str], samples: Mapping[str, Mapping]) -> str:
    """The page.

    Args:
      found: of `report.results`.
      drawn: figures by name, as SVG text.
      samples: of `report.samples`.
    """
    body = "\n".join(
        [
            _head(found),
            _anchors(found),
            _transfer(found, drawn),
            _quality(found, drawn),
            _curves(drawn),
            _samples(samples),
            _tables(found),
            _details("Config", f"<pre>{_text(json.dumps(found['config'], indent=2))}</pre>"),
        ]
    )
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>StreamSynth report</title>\n<style>{_STYLE}</style>\n</head>\n"
        f"<body>\n{body}\n</body>\n</html>\n"
    )


def _head(found: Mapping[str, Any]) -> str:
    turns, tasks = found["turns"], len(found["tasks"])
    facts = [f"{tasks} tasks" if turns >= tasks else f"{turns} of {tasks} turns are over"]
    if found["seconds"]:
        facts.append(f"{_duration(sum(found['seconds'].values()))} in all")
    if found["commit"]:
        facts.append(f"commit {_text(found['commit'][:12])}")
    tiles = "".join(
        f'<div class="tile">{name}<b>{form(found[key])}</b><small>{meaning}</small></div>'
        for key, (name, meaning, form) in _SUMMARY.items()
    )
    return f'<h1>StreamSynth report</h1>\n<p>{" · ".join(facts)}</p>\n<div class="tiles">{tiles}</div>'


def _anchors(found: Mapping[str, Any]) -> str:
    cards = "".join(
        f'<div class="card"><h3>{_text(task)}</h3>{"".join(_bars(found["student"][task]))}</div>'
        for task in found["tasks"]
        if found["score"][task] == "student accuracy"
    )
    if not cards:
        return ""
    return _section(
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
    maps = "".join(_figure(drawn[name]) for name in ("transfer", "transfer_valid") if name in drawn)
    return _section(
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
        return [_text(task), *cells]

    heads = ("task", "valid", "gate pass", "copies", "Vendi", "distinct-2", "self-BLEU")
    content = _table(heads, map(row, found["tasks"]))
    if "diversity" in drawn:
        content += _figure(drawn["diversity"])
        content += (
            "<p>Hollow: before anything. Filled: after the task's own turn. Cross: at the last evaluation. "
            "Up and to the right is better.</p>"
        )
    rows = [[_text(task), name, *map(number, values)] for task, name, *values in question_rows(found)]
    if rows:
        content += "<h3>Questions and answers</h3>" + _table(QUESTION_HEADS, rows)
    return _section(
        "Quality and diversity",
        "Of unselected texts, drawn alike at every moment: before anything → after the task's own turn → at "
        "the last evaluation. Diversity is measured at a fixed number of texts, by metrics nothing was "
        "trained on.",
        content,
    )


def _curves(drawn: Mapping[str, str]) -> str:
    parts = []
    for name, svg in drawn.items():
        group = name.removeprefix("curves_")
        if group != name:
            parts.append(
                _details(_CURVES.get(group, _text(group.capitalize())), _figure(svg), group in _OPEN_CURVES)
            )
    if not parts:
        return ""
    return _section(
        "Learning curves",
        "One point a step, with its moving average within the turn; a dotted line begins a turn.",
        "".join(parts),
    )


def _samples(samples: Mapping[str, Mapping]) -> str:
    parts = []
    for task, of_task in samples.items():
        unselected = ([*_label_and_text(s), _validity(s.get("valid"))] for s in of_task["unselected"])
        best = ([*_label_and_text(s), number(s["quality"])] for s in of_task["best"])
        columns = (
            f"<div><h3>Unselected, as they come</h3>{_table(('label', 'text', 'valid'), unselected)}</div>"
        )
        if of_task["best"]:
            columns += f"<div><h3>Best of the data set</h3>{_table(('label', 'text', 'quality'), best)}</div>"
        parts.append(_details(_text(task), f'<div class="samples">{columns}</div>', not parts))
    return _section(
        "Samples",
        "What the policy writes at the last evaluation, beside the best rows that were kept.",
        "".join(parts),
    )


def _label_and_text(sample: Mapping[str, Any]) -> tuple[str, str]:
    text = sample["text"]
    shown = text if len(text) <= _LONGEST_SAMPLE else text[:_LONGEST_SAMPLE] + "…"
    return _text(sample["label"]), _text(shown)


def _tables(found: Mapping[str, Any]) -> str:
    content = ""
    if found["datasets"]:
        names = ("rows", "kept", "near_duplicates", "test_overlap", "unbalanced")
        rows = ([_text(t), *(_plain(d.get(name)) for name in names)] for t, d in found["datasets"].items())
        heads = ("data set", "rows", "kept", "near-duplicates", "in the test set", "for balance")
        content += "<h3>Data sets: rows written, and of the kept rows those dropped</h3>" + _table(
            heads, rows
        )
    if found["judges"]:
        rows = (
            [_text(task), _text(judge), number(measured["auc"]), number(measured["weight"])]
            for task, judges in found["judges"].items()
            for judge, measured in judges.items()
        )
        content += "<h3>Judges: measured on held-back examples</h3>" + _table(
            ("task", "judge", "AUC", "weight"), rows
        )
    if rows := scorer_rows(found):
        rows = ([_text(str(value)) for value in row] for row in rows)
        content += "<h3>Scorers: texts that they were asked about</h3>" + _table(SCORER_HEADS, rows)
    if found["patterns"]:
        names = ("probability", "mean_reward", "count")
        rows = (
            [_text(p), *(_plain(stats.get(name)) for name in names)] for p, stats in found["patterns"].items()
        )
        content += "<h3>Patterns</h3>" + _table(("strategy", "probability", "mean reward", "samples"), rows)
    if found["seconds"]:
        rows = ([_text(phase), _duration(value)] for phase, value in found["seconds"].items())
        content += "<h3>Time</h3>" + _table(("phase", "time"), rows)
    return _section("Behind it", "", content) if content else ""


def _section(title: str, lead: str, content: str) -> str:
    return f"<section>\n<h2>{title}</h2>\n{f'<p>{lead}</p>' if lead else ''}\n{content}\n</section>"


def _details(title: str, content: str, is_open: bool = False) -> str:
    return f"<details{' open' if is_open else ''}><summary>{title}</summary>{content}</details>"


def _table(heads: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table of HTML cells; a column whose cells are all numbers is set right."""
    rows = list(rows)
    kinds = [_kind(name, [row[column] for row in rows]) for column, name in enumerate(heads)]
    head = "".join(f"<th{kind}>{name}</th>" for name, kind in zip(heads, kinds, strict=True))
    lines = "".join(
        f"<tr>{''.join(f'<td{kind}>{cell}</td>' for cell, kind in zip(row, kinds, strict=True))}</tr>"
        for row in rows
    )
    return f'<div class="scroll"><table><thead><tr>{head}</tr></thead><tbody>{lines}</tbody></table></div>'


def _kind(name: str, cells: Sequence[str]) -> str:
    if name in ("task", "label"):
        return ' class="name"'
    return ' class="number"' if all(re.fullmatch(r"[-+–→\d.,\s]*", cell) for cell in cells) else ""


def _journey(moments: Mapping[str, float | None]) -> str:
    values = [moments[name] for name in ("before", "after", "last")]
    if all(value is None for value in values):
        return "–"
    digits = 1 if max(value for value in values if value is not None) >= 10 else 2
    return " → ".join("–" if value is None else f"{value:.{digits}f}" for value in values)


def _validity(valid: bool | None) -> str:
    return {True: '<span class="yes">yes</span>', False: '<span class="no">no</span>', None: "–"}[valid]


def _figure(svg: str) -> str:
    # As wide as the page, though no wider than drawn, and in the page's own text colour.
    sized = re.sub(r'width="([\d.]+)pt" height="[\d.]+pt"', r'style="max-width:\1px"', svg, count=1)
    return f"<figure>{sized.replace(figures.INK, 'currentColor')}</figure>"


def _plain(value: Any) -> str:
    if isinstance(value, float) and not value.is_integer():
        return number(value)
    return "–" if value is None else _text(f"{value:,.0f}" if isinstance(value, (int, float)) else value)


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours} h {minutes} min"
    return f"{minutes} min {rest} s" if minutes else f"{seconds:.1f} s"


def _text(value: Any) -> str:
    return html.escape(str(value))
