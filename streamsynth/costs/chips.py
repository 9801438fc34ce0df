"""The accelerators that a config can be compiled for, and the published rates of a chip.

Sources: the pages of Cloud TPU's documentation on v4, v5e, v5p and v6e (docs.cloud.google.com/tpu/docs); for
the links of v4 table 4 of arXiv 2304.01433; NVIDIA's data sheets of the A100 80GB, H100 and H200 on SXM
boards, without sparsity. What is given for both directions of the links together is halved here.
"""

from __future__ import annotations

import dataclasses
import math

from streamsynth.costs.gpus import KINDS
from streamsynth.errors import UserError

GIB = 2.0**30


@dataclasses.dataclass(frozen=True)
class Chip:
    """One chip.

    memory: bytes of its own memory (HBM), as published, of a GPU as its driver reports them.
    usable: bytes of it for programs: of a TPU what libtpu 0.0.42 lets one have, as it says where one asks for
      more; of a GPU the share that JAX takes by default (XLA_PYTHON_CLIENT_MEM_FRACTION, 0.75).
    memory_rate: bytes a second to and from it.
    flops: bfloat16 FLOPs a second of its matrix units.
    link_rate: bytes a second over all its links to other chips, in one direction.
    """

    memory: float
    usable: float
    memory_rate: float
    flops: float
    link_rate: float


CHIPS = {
    "v4": Chip(memory=32 * GIB, usable=30.75 * GIB, memory_rate=1200e9, flops=275e12, link_rate=6 * 50e9),
    "v5e": Chip(memory=16 * GIB, usable=15.75 * GIB, memory_rate=819e9, flops=197e12, link_rate=400e9 / 2),
    # libtpu says 95.74 GiB; the smaller number stands.
    "v5p": Chip(memory=95 * GIB, usable=95 * GIB, memory_rate=2765e9, flops=459e12, link_rate=1200e9 / 2),
    "v6e": Chip(memory=32 * GIB, usable=31.25 * GIB, memory_rate=1638e9, flops=918e12, link_rate=800e9 / 2),
    "a100": Chip(85.10e9, usable=0.75 * 85.10e9, memory_rate=2039e9, flops=312e12, link_rate=600e9 / 2),
    "h100": Chip(84.94e9, usable=0.75 * 84.94e9, memory_rate=3350e9, flops=989e12, link_rate=900e9 / 2),
    "h200": Chip(151.4e9, usable=0.75 * 151.4e9, memory_rate=4800e9, flops=989e12, link_rate=900e9 / 2),
}
GPUS = tuple(KINDS)


@dataclasses.dataclass(frozen=True)
class Topology:
    """A slice of TPUs, or GPUs of one host: its kind, a row of `CHIPS`, and its size in each dimension."""

    kind: str
    grid: tuple[int, ...]

    @property
    def chip(self) -> Chip:
        return CHIPS[self.kind]

    @property
    def count(self) -> int:
        return math.prod(self.grid)

    def __str__(self) -> str:
        return f"{self.kind}:{'x'.join(map(str, self.grid))}"


# Dimensions of a slice, by kind.
_DIMENSIONS = {"v4": 3, "v5e": 2, "v5p": 3, "v6e": 2, **dict.fromkeys(GPUS, 1)}
# GPUs of one host, whose links are counted; between hosts they are slower.
_MOST_GPUS = 8


def parse_topology(text: str) -> Topology:
    """A topology from the way Cloud TPU writes it, such as `v5e:16x16` or `v5p:4x4x4`; of GPUs, `h100:8`.

    Raises:
      UserError: it is none, or of an unknown kind of chip.
    """
    kind, _, grid = text.partition(":")
    if kind not in CHIPS:
        raise UserError(
            f"--topology={text}: the chip {kind!r} is not known: choose one of {', '.join(CHIPS)}, as in "
            "v5e:4x4 or h100:8."
        )
    sizes = grid.split("x")
    if len(sizes) != _DIMENSIONS[kind] or not all(size.isdecimal() and int(size) for size in sizes):
        example = "x".join("4" * _DIMENSIONS[kind])
        raise UserError(
            f"--topology={text}: a slice of {kind} has {_DIMENSIONS[kind]} dimensions, as in "
            f"{kind}:{example}."
        )
    found = Topology(kind, tuple(int(size) for size in sizes))
    if kind in GPUS and found.count > _MOST_GPUS:
        raise UserError(
            f"--topology={text}: name the GPUs of one host, at most {_MOST_GPUS}; slower links between hosts "
            "are not counted."
        )
    return found
