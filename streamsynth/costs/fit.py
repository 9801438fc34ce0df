"""Whether a run fits on its devices, and which keys to change where it does not: from numbers alone."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

from streamsynth.costs.chips import GIB, Chip


@dataclasses.dataclass(frozen=True)
class Memory:
    """What XLA says of one device's memory for one program, in bytes.

    arguments, outputs: of the program; `aliased` of the outputs lie in the arguments' place.
    temporary: everything else while it runs.   code: the program itself.
    peak: the most that is in use at one time, by XLA's other way of counting. Neither is always the larger.
    """

    arguments: int
    outputs: int
    aliased: int
    temporary: int
    code: int
    peak: int

    @property
    def needed(self) -> int:
        """The larger of the two counts."""
        return max(self.arguments + self.outputs - self.aliased + self.temporary + self.code, self.peak)


@dataclasses.dataclass(frozen=True)
class Load:
    """One program on one device.

    name: of the program.   memory: None where it ran out of it while it was compiled.
    beside: bytes of what else the run keeps there.   asked: bytes that it asked for where it ran out, or 0.
    """

    name: str
    memory: Memory | None
    beside: int
    asked: int = 0

    @property
    def total(self) -> int:
        """Bytes in use while the program runs."""
        return self.beside + (self.asked if self.memory is None else self.memory.needed)

    def fits(self, chip: Chip) -> bool:
        return self.memory is not None and self.total <= chip.usable


@dataclasses.dataclass(frozen=True)
class Keys:
    """The keys of a config that decide about memory, as they are."""

    data: int
    fsdp: int
    tensor: int
    prompts: int
    samples: int
    microbatches: int
    remat: bool
    rank: int
    chunk: int
    early_stop: bool


def advice(loads: list[Load], kept: Mapping[str, int], keys: Keys, chip: Chip) -> list[str]:
    """What to change, one sentence each, most helpful first; none where every program fits.

    Args:
      loads: of the programs.
      kept: bytes on one device of what the run keeps there all the time, by name.
      keys: of the config.
      chip: that it is to fit on.
    """
    full = [load for load in loads if not load.fits(chip)]
    if not full:
        return []
    found, whole = [], sum(kept.values())
    if whole > chip.usable / 2:
        found.append(
            f"Parameters, snapshots and the optimizer's state take {gib(whole)} of {gib(chip.usable)} on "
            f"each device: {_spread(keys)}."
        )
        if keys.early_stop:
            found.append("supervised.early_stop keeps copies of parameters and optimizer: set it to 0.")
    for load in full:
        asks = "" if not load.total else f" ({gib(load.total)} of {gib(chip.usable)})"
        found.append(f"{load.name} does not fit{asks}: {_of_program(load.name, keys)}.")
    return found


def _spread(keys: Keys) -> str:
    """How to have less of the network on each device."""
    if keys.data > 1:
        return f"mesh.data = {keys.data} holds as many copies, set it to 1 and raise mesh.fsdp"
    more = f"raise mesh.fsdp (now {keys.fsdp}) or mesh.tensor (now {keys.tensor}) on a larger topology"
    return more if keys.rank else f"{more}, or train an adapter (policy.lora.rank)"


def _of_program(name: str, keys: Keys) -> str:
    name = name.partition(" P=")[0]  # of a shorter bucket
    if name == "rollout":
        return (
            f"lower rollout.prompts (now {keys.prompts}) or rollout.samples (now {keys.samples}), whose keys "
            f"and values are kept, or raise mesh.tensor (now {keys.tensor})"
        )
    if name == "evaluation":
        return "lower evaluation.prompts or evaluation.samples"
    if name.startswith("judge") or name == "features":
        return f"raise mesh.fsdp (now {keys.fsdp}), or choose another judge or feedback.features"
    ways = []
    if name != "reference" and not keys.remat:
        ways.append("set policy.remat = True")
    shards = keys.data * keys.fsdp
    if keys.prompts // shards > keys.microbatches:
        ways.append(f"raise learner.microbatches (now {keys.microbatches})")
    ways.append(f"lower objective.chunk (now {keys.chunk})")
    smaller = "supervised.samples" if name == "supervised" else f"rollout.samples (now {keys.samples})"
    ways.append(f"lower {smaller} or rollout.prompts (now {keys.prompts})")
    return ", or ".join(ways)


def gib(size: float) -> str:
    """Bytes for readers."""
    return f"{size / GIB:.2f} GiB"
