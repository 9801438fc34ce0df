"""The report's figures, as SVG text.

Nothing is drawn on a background, and everything that is not data has the one colour INK, so that a page
can replace it by its own text colour and a figure fits light and dark pages alike. One unit of a figure
is one CSS pixel at full width. The same data give the same bytes.
"""

from __future__ import annotations

import functools
import io
import math
import re
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

INK = "#6e7781"  # readable on white and on black, for files that stand alone
COLOURS = ("#3f7fd9", "#d97f26", "#2f9e6e", "#c4508f", "#8468d8", "#a8901a", "#d0483f", "#259fb3")

_WIDTH = 1040
_DOTS = 72  # matplotlib's SVG unit is 1/72 inch: with as many dots an inch, sizes are pixels
_PANEL_COLUMNS = 3
_PANEL_HEIGHT = 190
_SMOOTHED_FROM = 12  # steps; a shorter segment is drawn as it is
_STYLE = {
    "svg.fonttype": "none",
    "svg.hashsalt": "streamsynth",
    "font.family": "sans-serif",
    "font.size": 12,
    "text.parse_math": False,  # a task may have a dollar sign in its name
    "text.color": INK,
    "axes.edgecolor": INK,
    "axes.labelcolor": INK,
    "axes.titlesize": 12,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.linewidth": 0.6,
    "xtick.color": INK,
    "ytick.color": INK,
    "xtick.labelsize": 11,
    "ytick.labelsize": 11,
    "legend.frameon": False,
    "legend.fontsize": 12,
    "lines.linewidth": 1.8,
}


def _styled(draw: Callable[..., str]) -> Callable[..., str]:
    """Draws in this module's style and leaves matplotlib's as it was; imports matplotlib on first use."""

    @functools.wraps(draw)
    def styled(*args, **kwargs) -> str:
        from matplotlib import rc_context

        with rc_context(_STYLE):
            return draw(*args, **kwargs)

    return styled


def colour(index: int) -> str:
    """The colour of a task, or of a strategy, by its place."""
    return COLOURS[index % len(COLOURS)]


@_styled
def heat_map(scores: np.ndarray, tasks: Sequence[str], title: str) -> str:
    """The transfer matrix; the cell after a task's own turn has a frame.

    Args:
      scores: [turns + 1, tasks], NaN where not measured.
      tasks: names.
      title: what is scored.
    """
    from matplotlib import colormaps, colors

    rows, columns = scores.shape
    figure = _figure(_WIDTH / 2 if columns <= 6 else _WIDTH, 90 + 34 * rows + 5 * max(map(len, tasks)))
    axes = figure.subplots()
    measured = scores[~np.isnan(scores)]
    low, high = (measured.min(), measured.max()) if len(measured) else (0.0, 1.0)
    scale = colors.Normalize(low, max(high, low + 0.05))
    shades = colormaps["YlGnBu"]
    for row, column in np.ndindex(rows, columns):
        value = scores[row, column]
        if math.isnan(value):
            axes.text(column, row, "–", ha="center", va="center")
            continue
        shade = shades(0.08 + 0.8 * scale(value))
        axes.add_patch(_cell(column, row, 0.48, facecolor=shade, edgecolor="none"))
        luminance = np.dot(shade[:3], (0.3, 0.59, 0.11))
        ink = "#10222e" if luminance > 0.5 else "#ffffff"
        axes.text(
            column, row, f"{value:.3f}"[1 if 0 <= value < 1 else 0 :], ha="center", va="center", color=ink
        )
        if row == column + 1:
            axes.add_patch(_cell(column, row, 0.46, fill=False, edgecolor=COLOURS[1], linewidth=2.5))
    axes.set_xlim(-0.5, columns - 0.5)
    axes.set_ylim(rows - 0.5, -0.5)
    axes.set_xticks(range(columns), tasks, rotation=35, ha="right", rotation_mode="anchor")
    labels = ["before anything", *(f"after turn {turn}" for turn in range(1, rows))]
    axes.set_yticks(range(rows), labels)
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
    axes.set_title(title, loc="left")
    return _svg(figure, f"heat-{title}")


def _cell(column: int, row: int, half: float, **style: Any):
    from matplotlib.patches import Rectangle

    return Rectangle((column - half, row - half), 2 * half, 2 * half, **style)


@_styled
def learning_curves(records: Sequence[Mapping[str, Any]], keys: Sequence[str], tasks: Sequence[str]) -> str:
    """One panel for each quantity over all steps; colours are tasks, dotted lines begin turns.

    `NAME_weighted` is drawn dashed in the panel of `NAME`, and the target of the diversity statistic in
    the panel of that. The thin line is every step, the thick one a moving average within the turn.

    Args:
      records: of metrics.jsonl, each with "step", "turn" and "task".
      keys: the quantities.
      tasks: names, in the order of their colours.
    """
    dashed = {key: _companion_of(key) for key in keys if _companion_of(key) in keys}
    panels = [key for key in keys if key not in dashed]
    rows = math.ceil(len(panels) / _PANEL_COLUMNS)
    figure = _figure(_WIDTH, 30 + _PANEL_HEIGHT * rows)
    axes = figure.subplots(rows, _PANEL_COLUMNS, squeeze=False).flat
    segments = turn_segments(records)
    for panel, ax in zip(panels, axes, strict=False):
        _curve(ax, segments, panel, tasks, "-")
        title = panel
        for key in (key for key, owner in dashed.items() if owner == panel):
            _curve(ax, segments, key, tasks, "--")
            title += f" (dashed: {key.rpartition('/')[2].rpartition('_')[2]})"
        for segment in segments[1:]:
            ax.axvline(segment[0]["step"], color=INK, linewidth=0.8, linestyle=":", alpha=0.7)
        ax.set_title(title, loc="left")
        steps = records[-1]["step"] - records[0]["step"]
        ax.set_xlim(records[0]["step"] - 0.01 * steps - 0.5, records[-1]["step"] + 0.01 * steps + 0.5)
        ax.grid(axis="y", color=INK, alpha=0.15, linewidth=0.6)
    for ax in axes[len(panels) :]:
        ax.set_visible(False)
    present = [task for task in tasks if any(segment[0]["task"] == task for segment in segments)]
    _task_legend(figure, present, tasks)
    return _svg(figure, f"curves-{panels[0]}")


def _companion_of(key: str) -> str | None:
    """The quantity in whose panel this one is drawn dashed."""
    if key == "diversity/target":
        return "diversity/statistic"
    return key.removesuffix("_weighted") if key.endswith("_weighted") else None


def turn_segments(records: Sequence[Mapping[str, Any]]) -> list[list[Mapping[str, Any]]]:
    """Runs of consecutive records of one turn."""
    segments: list[list[Mapping[str, Any]]] = []
    for record in records:
        if not segments or segments[-1][-1]["turn"] != record["turn"]:
            segments.append([])
        segments[-1].append(record)
    return segments


def _curve(ax: Axes, segments: Sequence, key: str, tasks: Sequence[str], line: str) -> None:
    for segment in segments:
        points = [(record["step"], record[key]) for record in segment if record.get(key) is not None]
        if not points:
            continue
        steps, values = np.array(points, float).T
        style = {"color": colour(tasks.index(segment[0]["task"])), "linestyle": line}
        if len(points) < _SMOOTHED_FROM:
            ax.plot(steps, values, marker="o" if len(points) == 1 else None, markersize=4, **style)
        else:
            ax.plot(steps, values, alpha=0.3, **{**style, "linewidth": 0.8})
            ax.plot(steps, _moving_average(values, max(3, len(values) // 8)), **style)


def _moving_average(values: np.ndarray, window: int) -> np.ndarray:
    """Centred, over the part of the window that exists; same length as `values`."""
    kernel = np.ones(window)
    return np.convolve(values, kernel, "same") / np.convolve(np.ones(len(values)), kernel, "same")


@_styled
def strategy_chances(
    records: Sequence[Mapping[str, Any]], strategies: Sequence[str], winners: Mapping[str, str | None]
) -> str:
    """Each strategy's probability over all steps, in its own colour; dotted lines begin turns.

    Above each turn stand its task and, where there is room, the strategy that won it, whose line is thick.

    Args:
      records: of metrics.jsonl, with the probabilities as "pattern/NAME".
      strategies: names, in the order of their colours.
      winners: {task: name}.
    """
    figure = _figure(_WIDTH, 330)
    ax = figure.subplots()
    segments = turn_segments(records)
    first, last = records[0]["step"], records[-1]["step"]
    letters = 110 * (last - first + 1) ** -1  # a letter is 1/110 of the figure's width, roughly
    for segment in segments:
        start, end, task = segment[0]["step"], segment[-1]["step"], segment[0]["task"]
        won = winners.get(task)
        for index, name in enumerate(strategies):
            points = [(r["step"], r[f"pattern/{name}"]) for r in segment if f"pattern/{name}" in r]
            if points:
                width = 2.6 if name == won else 1.3
                marker = "o" if len(points) == 1 else None
                ax.plot(
                    *zip(*points, strict=True),
                    color=colour(index),
                    linewidth=width,
                    marker=marker,
                    markersize=4,
                )
        if start != first:
            ax.axvline(start, color=INK, linewidth=0.8, linestyle=":", alpha=0.7)
        room = (end - start + 1) * letters
        above = {"xycoords": ax.get_xaxis_transform(), "textcoords": "offset points", "va": "bottom"}
        if len(task) <= room:
            ax.annotate(task, (start, 1.0), xytext=(3, 18), **above)
        if won and len(won) <= room:
            ax.annotate(won, (start, 1.0), xytext=(3, 3), color=colour(strategies.index(won)), **above)
    ax.set_ylabel("probability")
    ax.set_xlabel("step")
    ax.set_ylim(bottom=0.0)
    ax.margins(x=0.005)
    ax.grid(axis="y", color=INK, alpha=0.15, linewidth=0.6)
    _legend(figure, {name: colour(index) for index, name in enumerate(strategies)})
    return _svg(figure, "strategy-chances")


@_styled
def strategy_rewards(
    figures_of: Mapping[str, Mapping[str, Mapping[str, float | None]]], strategies: Sequence[str]
) -> str:
    """A panel for each task: mean rewards of the strategies' samples, with a standard error to either side.

    Args:
      figures_of: {task: {strategy: {"mean_reward", "standard_error"}}}; a strategy without samples has None.
      strategies: names, from top to bottom and in the order of their colours.
    """
    rows = math.ceil(len(figures_of) / _PANEL_COLUMNS)
    figure = _figure(_WIDTH, 50 + (46 + 19 * len(strategies)) * rows)
    axes = figure.subplots(rows, _PANEL_COLUMNS, squeeze=False, sharex=True, sharey=True)
    for (task, figures), ax in zip(figures_of.items(), axes.flat, strict=False):
        for index, name in enumerate(strategies):
            mean, error = (figures.get(name, {}).get(key) for key in ("mean_reward", "standard_error"))
            if mean is not None:
                ax.errorbar(mean, index, xerr=error or 0.0, color=colour(index), marker="o", markersize=6)
        ax.set_title(task, loc="left")
        ax.tick_params(labelbottom=True)
        ax.grid(axis="x", color=INK, alpha=0.15, linewidth=0.6)
    axes.flat[0].set_yticks(range(len(strategies)), strategies)
    axes.flat[0].set_ylim(len(strategies) - 0.5, -0.5)
    for ax in axes.flat[len(figures_of) :]:
        ax.set_visible(False)
    return _svg(figure, "strategy-rewards")


@_styled
def diversity_against_quality(
    points: Mapping[str, Mapping[str, Mapping[str, float | None]]], metrics: Mapping[str, str], quality: str
) -> str:
    """A panel for each metric; for each task an arrow from before anything to after its own turn.

    Args:
      points: {task: {"before", "after", "last": {"quality": value, metric: value}}}; what is None or
        absent is left out.
      metrics: {diversity metric: its name on the axis}.
      quality: what the horizontal axis shows.
    """
    figure = _figure(_WIDTH, 370)
    axes = figure.subplots(1, len(metrics), squeeze=False).flat
    for (metric, name), ax in zip(metrics.items(), axes, strict=True):
        for index, moments in enumerate(points.values()):
            _journey(ax, moments, metric, colour(index))
        ax.set_xlabel(quality)
        ax.set_ylabel(name)
        ax.margins(0.08)
        ax.grid(color=INK, alpha=0.15, linewidth=0.6)
    _task_legend(figure, list(points), list(points))
    return _svg(figure, "diversity")


def _journey(ax: Axes, moments: Mapping[str, Mapping[str, float | None]], metric: str, shade: str) -> None:
    def place(moment: str) -> tuple[float, float] | None:
        x, y = (moments.get(moment, {}).get(key) for key in ("quality", metric))
        return None if x is None or y is None else (x, y)

    before, after, last = place("before"), place("after"), place("last")
    if before:
        ax.plot(*before, "o", color=shade, markersize=7, fillstyle="none", markeredgewidth=1.6)
    if after:
        ax.plot(*after, "o", color=shade, markersize=8)
    if before and after:
        arrow = {
            "arrowstyle": "->",
            "color": shade,
            "linewidth": 1.2,
            "shrinkA": 5,
            "shrinkB": 6,
            "alpha": 0.8,
        }
        ax.annotate("", xy=after, xytext=before, arrowprops=arrow)
    if last and last != after:
        ax.plot(*last, "x", color=shade, markersize=7, markeredgewidth=2)


def _task_legend(figure: Figure, shown: Sequence[str], tasks: Sequence[str]) -> None:
    _legend(figure, {task: colour(tasks.index(task)) for task in shown})


def _legend(figure: Figure, colours: Mapping[str, str]) -> None:
    from matplotlib.lines import Line2D

    handles = [Line2D([], [], color=shade, linewidth=3, label=name) for name, shade in colours.items()]
    if handles:
        columns = max(1, _WIDTH // (50 + 7 * max(map(len, colours))))  # as many as surely fit
        figure.legend(
            handles=handles, loc="outside upper left", ncols=min(len(handles), columns), handlelength=1.2
        )


def _figure(width: float, height: float) -> Figure:
    from matplotlib.figure import Figure

    return Figure(figsize=(width / _DOTS, height / _DOTS), dpi=_DOTS, layout="constrained")


def _svg(figure: Figure, name: str) -> str:
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    svg = buffer.getvalue()
    svg = svg[svg.index("<svg") :]
    # Several figures share a page, where ids must differ.
    prefix = re.sub(r"[^a-z0-9]+", "-", name.lower())
    svg = re.sub(r'\bid="', f'id="{prefix}-', svg)
    svg = re.sub(r'(url\(#|href="#)', rf"\1{prefix}-", svg)
    return re.sub(r"<metadata>.*?</metadata>\s*", "", svg, flags=re.DOTALL)
