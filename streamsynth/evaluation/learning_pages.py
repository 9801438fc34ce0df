"""patterns.html and rewards.html: which strategies won, and what the reward was made of."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from streamsynth.evaluation import learning, tables
from streamsynth.evaluation.markdown import FAILURE_NOTE, PART_NOTE, PATTERN_NOTE, number
from streamsynth.evaluation.markup import details, document, escaped, figure, plain_table, section, table

# Groups of learning curves: title, and what they show.
REWARD_CURVES = {
    "reward": (
        "Quality and its judges",
        "What the samples earned on average. A part that is weighed is drawn dashed after its weight.",
    ),
    "advantage": (
        "Parts of the advantage",
        "How much each part says of a sample: its mean size over its own running deviation, and, dashed, as "
        "it stands in the sum.",
    ),
    "sigma": ("Running deviations", "What each part is divided by."),
    "diversity": (
        "Diversity and its weight",
        "The statistic that is to be held, dashed its target, and the weight alpha that follows from both.",
    ),
    "gate": ("Gates", "The share of samples that each gate passes, and the rows that were kept."),
    "scorer": ("Scorer failures", "Samples at each step that a scorer failed on."),
    "reject": ("Rejections", "Samples at each step that had no valid form, by what was wrong with them."),
}


def patterns(found: Mapping[str, Any], drawn: Mapping[str, str]) -> str:
    """The page of the strategies.

    Args:
      found: of `report.results`.
      drawn: figures by name, as SVG text.
    """
    stream, tasks = found["patterns"]["stream"], found["patterns"]["tasks"]
    groups = {**tasks, **({"the whole stream": stream} if stream else {})}
    body = [
        "<h1>Synthesis patterns</h1>",
        "<p>A prompt asks for a text of a label by a strategy. Which strategies are asked for is learned, "
        "from what their samples earned next to those of the others.</p>",
    ]
    if not groups:
        return document("StreamSynth patterns", "patterns", [*body, "<p>This run has no record.</p>"])
    names = learning.strategies(found["patterns"])
    won = _chances(groups, names)
    if "pattern_chances" in drawn:
        won += "<h3>Step by step: the thick line won the turn</h3>" + figure(drawn["pattern_chances"])
    body.append(section("Which strategies won", PATTERN_NOTE, won))
    earned = figure(drawn["pattern_rewards"]) if "pattern_rewards" in drawn else ""
    lead = "The mean reward of each strategy's samples, with one standard error to either side."
    body.append(section("What their samples earned", lead, earned + _cards(groups, found["elites"])))
    return document("StreamSynth patterns", "patterns", body)


def _chances(groups: Mapping[str, Mapping[str, Mapping]], names: Sequence[str]) -> str:
    """A row for each task with the chances of all strategies, the winner's set off."""
    rows = []
    for group, figures in groups.items():
        won = learning.winner(figures)
        chances = {name: number(figures.get(name, {}).get("probability")) for name in names}
        marked = (f'<b class="won">{p}</b>' if name == won else p for name, p in chances.items())
        rows.append([escaped(group), *marked])
    return table(("task", *map(escaped, names)), rows)


def _cards(groups: Mapping[str, Mapping[str, Mapping]], elites: Mapping[str, int]) -> str:
    cards = []
    for group, figures in groups.items():
        won = learning.winner(figures)
        title = f"{escaped(group)}: {escaped(won) if won else 'none'} won"
        kept = f"<p>{elites[group]:,} elites in the archive</p>" if group in elites else ""
        content = plain_table(tables.STRATEGY_HEADS[:-1], (row[:-1] for row in tables.strategies(figures)))
        cards.append(f"<div><h3>{title}</h3>{content}{kept}</div>")
    return f'<div class="pair">{"".join(cards)}</div>'


def rewards(found: Mapping[str, Any], drawn: Mapping[str, str]) -> str:
    """The page of the reward's parts; arguments as of `patterns`."""
    body = [
        "<h1>Reward parts</h1>",
        "<p>Every part of the reward before and after its weight. Colours are tasks, dotted lines begin "
        "turns.</p>",
    ]
    curves = "".join(
        f"<h3>{title}</h3><p>{lead}</p>{figure(drawn[f'curves_{group}'])}"
        for group, (title, lead) in REWARD_CURVES.items()
        if f"curves_{group}" in drawn
    )
    body.append(section("Over the stream", "", curves or "<p>No step was recorded yet.</p>"))
    parts = "".join(
        details(escaped(task), plain_table(tables.PART_HEADS, tables.parts(figures)), index == 0)
        for index, (task, figures) in enumerate(found["reward_parts"].items())
    )
    if parts:
        body.append(section("First and last", PART_NOTE, parts))
    rows = tables.failures(found)
    if rows:
        body.append(section("Failures", FAILURE_NOTE, plain_table(tables.FAILURE_HEADS, rows)))
    if found["judges"]:
        rows = [
            [task, judge, measured["auc"], measured["weight"]]
            for task, judges in found["judges"].items()
            for judge, measured in judges.items()
        ]
        lead = (
            "Each judge was measured on held-back examples before it was trusted; its AUC scales its weight."
        )
        body.append(section("Judges", lead, plain_table(("task", "judge", "AUC", "weight"), rows)))
    return document("StreamSynth reward parts", "rewards", body)
