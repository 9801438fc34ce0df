"""The pieces of a page: its style, sections, tables, and figures in the page's own colours."""

from __future__ import annotations

import html
import re
from collections.abc import Iterable, Sequence
from typing import Any

from streamsynth.evaluation import figures
from streamsynth.evaluation.markdown import shown

PAGES = {"index": "Report", "patterns": "Patterns", "rewards": "Reward parts"}

_STYLE = """
:root { color-scheme: light dark; --page: #ffffff; --text: #1f2328; --soft: #59636e; --line: #d8dee4;
  --panel: #f6f8fa; --run: #3f7fd9; --anchor: #aab4bf; --good: #1a7f4b; --bad: #c0392b; }
@media (prefers-color-scheme: dark) { :root { --page: #0f1419; --text: #e4e8ec; --soft: #9aa5b1;
  --line: #2c343d; --panel: #171e26; --run: #5a96ea; --anchor: #56616d; --good: #4cc38a; --bad: #ff7b6b; } }
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 1104px; padding: 40px 32px 80px;
  background: var(--page); color: var(--text);
  font: 15px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", "DejaVu Sans", sans-serif; }
nav { color: var(--soft); margin-bottom: 20px; }
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
td .won { color: var(--run); }
.yes { color: var(--good); } .no { color: var(--bad); }
details { border-top: 1px solid var(--line); padding: 10px 0; }
section + details { margin-top: 48px; }
summary { cursor: pointer; font-weight: 600; }
pre { overflow-x: auto;
  font: 12.5px/1.45 ui-monospace, "SF Mono", Menlo, Consolas, "DejaVu Sans Mono", monospace; }
"""


def document(title: str, here: str, body: Iterable[str]) -> str:
    """A whole page, with links to the others above; it loads nothing.

    Args:
      title: of the window.
      here: which of PAGES it is.
      body: its parts; empty ones are left out.
    """
    links = " · ".join(
        f"<b>{name}</b>" if page == here else f'<a href="{page}.html">{name}</a>'
        for page, name in PAGES.items()
    )
    parts = "\n".join((f"<nav>{links}</nav>", *filter(None, body)))
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{title}</title>\n<style>{_STYLE}</style>\n</head>\n"
        f"<body>\n{parts}\n</body>\n</html>\n"
    )


def section(title: str, lead: str, content: str) -> str:
    return f"<section>\n<h2>{title}</h2>\n{f'<p>{lead}</p>' if lead else ''}\n{content}\n</section>"


def details(title: str, content: str, is_open: bool = False) -> str:
    return f"<details{' open' if is_open else ''}><summary>{title}</summary>{content}</details>"


def table(heads: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table of HTML cells; a column whose cells are all numbers is set right."""
    rows = list(rows)
    kinds = [_kind(name, [row[column] for row in rows]) for column, name in enumerate(heads)]
    head = "".join(f"<th{kind}>{name}</th>" for name, kind in zip(heads, kinds, strict=True))
    lines = "".join(
        f"<tr>{''.join(f'<td{kind}>{cell}</td>' for cell, kind in zip(row, kinds, strict=True))}</tr>"
        for row in rows
    )
    return f'<div class="scroll"><table><thead><tr>{head}</tr></thead><tbody>{lines}</tbody></table></div>'


def plain_table(heads: Sequence[str], rows: Iterable[Sequence[str | float | None]]) -> str:
    """A table of plain cells, as `tables` has them."""
    return table(
        [escaped(head) for head in heads], [[escaped(shown(value)) for value in row] for row in rows]
    )


def _kind(name: str, cells: Sequence[str]) -> str:
    if name in ("task", "label"):
        return ' class="name"'
    words = (re.sub(r"<[^>]*>", "", cell) for cell in cells)
    return ' class="number"' if all(re.fullmatch(r"(?:[-+–→\d.,\s]|e-\d)*", word) for word in words) else ""


def figure(svg: str) -> str:
    # As wide as the page, though no wider than drawn, and in the page's own text colour.
    sized = re.sub(r'width="([\d.]+)pt" height="[\d.]+pt"', r'style="max-width:\1px"', svg, count=1)
    return f"<figure>{sized.replace(figures.INK, 'currentColor')}</figure>"


def escaped(value: Any) -> str:
    return html.escape(str(value))
