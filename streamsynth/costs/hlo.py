"""The collectives of a compiled program, read out of XLA's text for it.

A loop's body stands in the text once. Here each collective counts as often as the loops around it turn: a
scan's trip count is in its `known_trip_count`, or, on a TPU, in the constant that its condition compares the
counter with. The loop of decoding, which may end early, has such a constant as well: its collectives count
for the most turns it can take. A loop with neither counts once, and is counted as unknown.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterator

KINDS = (
    "all-gather",
    "all-reduce",
    "reduce-scatter",
    "all-to-all",
    "ragged-all-to-all",
    "collective-permute",
    "collective-broadcast",
)

_SIZES = {"pred": 1, "c64": 8, "c128": 16}  # of the types whose names do not tell their bits
_COMPUTATION = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\{\s*$")
_INSTRUCTION = re.compile(r"^\s*(ROOT )?%?([\w.\-]+) = (.*)$")
_OPCODE = re.compile(r" ([a-z][a-z0-9\-]*)\(")
_SHAPE = re.compile(r"\b([a-z]+\d*[a-z0-9]*)\[([\d,]*)\]")
_CALLED = re.compile(r"(?:calls|to_apply|true_computation|false_computation)=%?([\w.\-]+)")
_BRANCHES = re.compile(r"branch_computations=\{([^}]*)\}")
# Follow what is only handed on.
_PASSED_ON = ("copy", "bitcast", "convert", "copy-done")


@dataclasses.dataclass(frozen=True)
class Collective:
    """All collectives of one kind between as many devices.

    kind: a name in `KINDS`.   devices: that take part in each.
    places: in the program's text.   count: how often one is run, loops counted as this module says.
    size: bytes of the whole arrays, on one device, summed over `count`.
    sent: bytes that a device sends, with the devices in a ring (arXiv 1909.09756, section 3).
    """

    kind: str
    devices: int
    places: int
    count: int
    size: int
    sent: int


@dataclasses.dataclass(frozen=True)
class Instruction:
    """One line: its name, opcode, the text of its type, of what it is given, and of its attributes."""

    name: str
    opcode: str
    type: str
    operands: tuple[str, ...]
    rest: str
    root: bool


@dataclasses.dataclass(frozen=True)
class Module:
    """The computations of a program by name, and the name of the one it starts with."""

    computations: dict[str, dict[str, Instruction]]
    entry: str


def parse(text: str) -> Module:
    """The computations of a program from the text that `compiled.as_text()` gives."""
    computations: dict[str, dict[str, Instruction]] = {}
    entry, current = "", {}
    for line in text.splitlines():
        if head := _COMPUTATION.match(line):
            current = computations.setdefault(head[2], {})
            entry = head[2] if head[1] else entry
        elif found := _INSTRUCTION.match(line):
            instruction = _instruction(found[2], found[3], bool(found[1]))
            if instruction is not None:
                current[instruction.name] = instruction
    return Module(computations, entry)


def _instruction(name: str, text: str, root: bool) -> Instruction | None:
    opcode = _OPCODE.search(f" {text}")
    if opcode is None:
        return None
    start = opcode.start() - 1  # of the opcode in `text`
    end = _closing(text, opcode.end() - 2)
    given = text[opcode.end() - 1 : end]
    names = tuple(part.split()[-1].lstrip("%") for part in _split(given) if part.strip())
    if opcode[1] in ("constant", "parameter"):
        names = (given.strip(),)
    return Instruction(name, opcode[1], text[: max(start, 0)], names, text[end + 1 :], root)


def _closing(text: str, opening: int) -> int:
    """Where the parenthesis closes that opens at `opening`."""
    depth = 0
    for place in range(opening, len(text)):
        depth += {"(": 1, ")": -1}.get(text[place], 0)
        if depth == 0:
            return place
    return len(text)


def _split(text: str) -> Iterator[str]:
    """The parts between commas that stand in no bracket."""
    depth, start = 0, 0
    for place, letter in enumerate(text):
        depth += {"(": 1, "{": 1, "[": 1, ")": -1, "}": -1, "]": -1}.get(letter, 0)
        if letter == "," and depth == 0:
            yield text[start:place]
            start = place + 1
    yield text[start:]


def array_bytes(type_text: str) -> list[int]:
    """Bytes of every array in a type such as `(bf16[4,8]{1,0}, u32[])`."""
    return [_bits(dtype) * _count(sizes) // 8 for dtype, sizes in _SHAPE.findall(type_text)]


def _bits(dtype: str) -> int:
    """Of one element, from names such as `bf16`, `s32`, `f8e4m3fn`."""
    if dtype in _SIZES:
        return 8 * _SIZES[dtype]
    return int(re.search(r"\d+", dtype)[0]) if re.search(r"\d", dtype) else 0


def _count(sizes: str) -> int:
    count = 1
    for size in filter(None, sizes.split(",")):
        count *= int(size)
    return count


def group_size(rest: str, devices: int) -> int:
    """How many devices take part in a collective, from its attributes; `devices` is all there are."""
    if named := re.search(r"replica_groups=mesh\[([^\]]*)\] \{([^}]*)\}", rest):
        sizes = dict(re.findall(r"'(\w+)'=(\d+)", named[1]))
        return _count(",".join(sizes[axis] for axis in re.findall(r"'(\w+)'", named[2])))
    if iota := re.search(r"replica_groups=\[(\d+),(\d+)\]", rest):
        return int(iota[2])
    if listed := re.search(r"replica_groups=\{\{([\d,]*)\}", rest):
        return len(listed[1].split(","))
    return devices


def trip_count(module: Module, inside: dict[str, Instruction], loop: Instruction) -> int | None:
    """How often a `while` in the computation `inside` turns, at most; None where nothing says it."""
    if known := re.search(r'known_trip_count"?:\s*\{"n":"(\d+)"', loop.rest):
        return int(known[1])
    condition = _unfused(module, re.search(r"condition=%?([\w.\-]+)", loop.rest)[1])
    [root] = [line for line in condition.values() if line.root]
    bounds = [_bound(condition, inside, loop, compare) for compare in _compared(condition, root)]
    bounds = [bound for bound in bounds if bound is not None]
    return max(min(bounds), 0) if bounds else None


def _unfused(module: Module, name: str) -> dict[str, Instruction]:
    """The lines of a computation, with those of its fusions in their place."""
    lines = {}
    for line in module.computations[name].values():
        if line.opcode != "fusion":
            lines[line.name] = line
            continue
        called = _called(line)[0]
        for inner in _unfused(module, called).values():
            own = f"{line.name}/{inner.name}"
            if inner.opcode == "parameter":
                handed = dataclasses.replace(
                    inner, opcode="copy", operands=(line.operands[int(inner.operands[0])],)
                )
            else:
                handed = dataclasses.replace(
                    inner,
                    operands=tuple(f"{line.name}/{o}" for o in inner.operands)
                    if inner.opcode != "constant"
                    else inner.operands,
                )
            lines[own] = dataclasses.replace(handed, name=own, root=False)
            if inner.root:
                lines[line.name] = dataclasses.replace(line, opcode="copy", operands=(own,))
    return lines


def _compared(condition: dict[str, Instruction], line: Instruction) -> Iterator[Instruction]:
    """The comparisons that must all hold for a loop to go on."""
    if line.opcode == "compare":
        yield line
    elif line.opcode in ("and", *_PASSED_ON):
        for name in line.operands:
            if name in condition:
                yield from _compared(condition, condition[name])


def _bound(
    condition: dict[str, Instruction],
    outside: dict[str, Instruction],
    loop: Instruction,
    compare: Instruction,
) -> int | None:
    """Turns after which `counter < end` fails, for a counter that is raised by 1 in each."""
    if "direction=LT" not in compare.rest or len(compare.operands) != 2:
        return None

    def value(name: str) -> tuple[int | None, bool]:
        """What is known of an operand at the start of the loop, and whether the loop hands it on."""
        line = _source(condition, name)
        if line is None or line.opcode != "get-tuple-element":
            return _constant(line), False
        place = re.search(r"index=(\d+)", line.rest)
        given = _source(outside, loop.operands[0])
        if place is None or given is None or given.opcode != "tuple":
            return None, True
        return _constant(_source(outside, given.operands[int(place[1])])), True

    (start, changes), (end, _) = value(compare.operands[0]), value(compare.operands[1])
    if end is None or not changes:
        return None
    return end - (start or 0)


def _source(lines: dict[str, Instruction], name: str) -> Instruction | None:
    line = lines.get(name)
    while line is not None and line.opcode in _PASSED_ON:
        line = lines.get(line.operands[0])
    return line


def _constant(line: Instruction | None) -> int | None:
    if line is None or line.opcode != "constant":
        return None
    return int(line.operands[0]) if re.fullmatch(r"-?\d+", line.operands[0]) else None


def _base(opcode: str) -> str:
    return opcode.removesuffix("-start")


@dataclasses.dataclass(frozen=True)
class Found:
    """The collectives of a program, largest first, and how many of its loops have no known end."""

    collectives: tuple[Collective, ...]
    unknown_loops: int


def collectives(text: str, devices: int) -> Found:
    """Reads the collectives out of a program's text.

    Args:
      text: of the compiled program.
      devices: that it runs on.
    """
    module = parse(text)
    totals: dict[tuple[str, int], list[int]] = {}
    unknown = 0
    for computation, times in _executed(module):
        lines = module.computations[computation]
        unknown += sum(line.opcode == "while" and trip_count(module, lines, line) is None
                       for line in lines.values())  # fmt: skip
        for line, kind in _collectives_in(module, computation):
            group = group_size(line.rest, devices)
            size = _whole_size(line, kind, group)
            total = totals.setdefault((kind, group), [0, 0, 0, 0])
            for place, more in enumerate((1, times, times * size, times * _sent(kind, size, group))):
                total[place] += more
    found = [Collective(*key, *total) for key, total in totals.items()]
    return Found(tuple(sorted(found, key=lambda one: -one.sent)), unknown)


def _executed(module: Module) -> Iterator[tuple[str, int]]:
    """Computations that run by themselves, and how often: the entry, and bodies and branches in it.

    Fused computations are part of what they are fused into.
    """
    waiting = [(module.entry, 1)]
    while waiting:
        name, times = waiting.pop()
        yield name, times
        lines = module.computations[name]
        for line in lines.values():
            if line.opcode == "while":
                turns = trip_count(module, lines, line)
                turns = 1 if turns is None else turns
                for part, more in (("body", turns), ("condition", turns + 1)):
                    waiting.append((re.search(rf"{part}=%?([\w.\-]+)", line.rest)[1], times * more))
            elif line.opcode in ("conditional", "call"):
                waiting += [(called, times) for called in _called(line)]


def _called(line: Instruction) -> list[str]:
    branches = _BRANCHES.search(line.rest)
    named = [name.strip().lstrip("%") for name in branches[1].split(",")] if branches else []
    return named + _CALLED.findall(line.rest)


def _collectives_in(module: Module, computation: str) -> Iterator[tuple[Instruction, str]]:
    """The collectives of a computation and of what is fused into it, each once, and their kinds.

    A TPU cuts one into parts that run beside other work; the parts bear one `chain_id`.
    """
    seen = set()
    waiting = [computation]
    while waiting:
        name = waiting.pop()
        for line in module.computations.get(name, {}).values():
            if line.opcode in ("fusion", "async-start"):
                waiting += _called(line)
            kind = _base(line.opcode)
            if kind not in KINDS:
                continue
            if chain := re.search(r'chain_id="(\d+)"', line.rest):
                if chain[1] in seen:
                    continue
                seen.add(chain[1])
            # A TPU's reduce-scatter is a fusion that looks like an all-reduce with a slice of it.
            yield line, "reduce-scatter" if name.startswith("all-reduce-scatter") else kind


def _whole_size(line: Instruction, kind: str, group: int) -> int:
    """Bytes, on one device, of the whole array that is gathered, reduced or exchanged."""
    sizes = array_bytes(line.type)
    if line.opcode.endswith("-start") and kind != "all-reduce":
        return max(sizes, default=0)  # what is sent and what comes of it stand side by side
    if line.opcode == "reduce-scatter":
        return sum(sizes) * group
    return sum(sizes)


def _sent(kind: str, size: int, group: int) -> int:
    """Bytes a device sends when all of a group stand in a ring."""
    others = size * (group - 1) // max(group, 1)
    if kind == "all-reduce":
        return 2 * others
    return size if kind.startswith("collective-") else others
