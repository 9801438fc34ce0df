"""The report of `streamsynth compile`: a tree of plain values, and the same as text."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from streamsynth.costs.chips import GIB, Chip
from streamsynth.costs.counts import Costs
from streamsynth.costs.fit import Memory
from streamsynth.costs.hlo import Found

# What of a run's is kept on a device from its start to its end, by the names of `programs.Kept`.
KEPT = {
    "trained": "trained parameters",
    "frozen": "frozen parameters",
    "reference": "snapshot for KL",
    "base": "base policy",
    "opt_state": "optimizer's state",
    "copies": "copies for stopping early",
    "replay": "replay buffers",
}


def floors(chip: Chip, mesh: Mapping[str, int], costs: Costs, found: Found | None) -> dict[str, float]:
    """Seconds below which a program cannot run, each by one published rate of the chip alone.

    compute: products of matrices by hand, split evenly.   memory: bytes by hand.
    links: bytes that the collectives send, over all links of a chip at once; without compiling, unknown.
    """
    devices = mesh["data"] * mesh["fsdp"] * mesh["tensor"]
    seconds = {
        "compute": costs.flops / devices / chip.flops,
        "memory": costs.bytes_on_a_device(**mesh) / chip.memory_rate,
    }
    if found is not None:
        seconds["links"] = sum(one.sent for one in found.collectives) / chip.link_rate
    return seconds


def memory_fields(memory: Memory) -> dict[str, int]:
    """By name, bytes on one device."""
    return {**vars(memory), "needed": memory.needed}


def text(report: Mapping[str, Any]) -> str:
    """The report for a terminal."""
    chip, mesh = report["chip"], report["mesh"]
    shape = " x ".join(f"{axis} {size}" for axis, size in mesh.items())
    lines = [
        f"{report['config']} on {report['topology']}: {report['devices']} devices, mesh {shape}",
        f"a device: {_gib(chip['memory'])} GiB of memory, {_gib(chip['usable'])} for programs, "
        f"{chip['memory_rate'] / 1e9:.0f} GB/s; {chip['flops'] / 1e12:.0f} bfloat16 TFLOP/s; links "
        f"{chip['link_rate'] / 1e9:.0f} GB/s each way",
        f"{report['parameters']:,} parameters, of which {report['trained']:,} are trained",
        "",
        "Kept on each device (GiB): "
        + ", ".join(f"{KEPT[name]} {_gib(size)}" for name, size in report["kept"].items() if size),
        "",
    ]
    head = ("program", "arguments", "cache", "temporary", "peak", "code", "kept beside", "in all")
    rows = [
        (one["name"], *_memory_cells(one["memory"]), _gib(one["beside"]), _gib(one["total"]))
        for one in report["programs"]
    ]
    lines += ["Memory on each device while a program runs, GiB:", *_table(head, rows), ""]
    head = ("program", "TFLOP by hand", "by XLA*", "GB by hand", "by XLA*", "compute", "memory", "links")
    rows = [
        (
            one["name"],
            _or_none(one["flops"]["hand"], 1e12),
            _or_none(one["flops"].get("xla"), 1e12),
            _or_none(one["bytes"]["hand"], 1e9),
            _or_none(one["bytes"].get("xla"), 1e9),
            *(_or_none(one["floor_seconds"].get(key), 1) for key in ("compute", "memory", "links")),
        )
        for one in report["programs"]
    ]
    lines += [
        "Work of each device, and the seconds it takes at the chip's published rates, one rate at a time:",
        *_table(head, rows),
        "* XLA counts the body of a loop once; layers, chunks, microbatches and decoding steps are loops.",
        "",
        "Collectives of a device (loops counted as often as they turn, decoding to the last token):",
    ]
    head = ("program", "kind", "devices", "places", "times", "GB", "GB sent")
    rows = [
        (
            program["name"],
            one["kind"],
            str(one["devices"]),
            str(one["places"]),
            str(one["count"]),
            f"{one['size'] / 1e9:.2f}",
            f"{one['sent'] / 1e9:.2f}",
        )
        for program in report["programs"]
        for one in program["collectives"]
        if one["sent"] >= 1e6
    ]
    lines += [*_table(head, rows), ""]
    lines += [
        f"{one['name']}: {one['unknown_loops']} loops of unknown length are counted once."
        for one in report["programs"]
        if one["unknown_loops"]
    ]
    lines += [f"{one['name']}: {one['error']}" for one in report["programs"] if one["error"]]
    least = min((chip["usable"] - one["total"] for one in report["programs"]), default=chip["usable"])
    lines += (
        [f"It fits: {_gib(least)} GiB are left on each device."]
        if report["fits"]
        else ["It does not fit.", *report["advice"]]
    )
    return "\n".join(lines)


def _memory_cells(memory: Mapping[str, int] | None) -> tuple[str, ...]:
    if memory is None:
        return ("", "", "ran out", "", "")
    return tuple(_gib(memory[key]) for key in ("arguments", "cache", "temporary", "peak", "code"))


def _gib(size: float) -> str:
    return f"{size / GIB:.2f}"


def _or_none(value: float | None, unit: float) -> str:
    return "" if value is None else f"{value / unit:.3g}"


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    widths = [max(len(row[i]) for row in (head, *rows)) for i in range(len(head))]

    def line(row: Sequence[str]) -> str:
        first, *others = (cell.ljust(width) if i == 0 else cell.rjust(width)
                          for i, (cell, width) in enumerate(zip(row, widths, strict=True)))  # fmt: skip
        return "  ".join([first, *others]).rstrip()

    return [line(head), *map(line, rows)]
