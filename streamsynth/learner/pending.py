"""A batch that is being written: its prompts are with the device, and nothing of its answers is read yet."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import flax.struct
import jax
import numpy as np
from jax.sharding import Mesh

from streamsynth.pytrees import Array, Prompts, Rollouts
from streamsynth.runtime import mesh as mesh_lib


@flax.struct.dataclass
class Pending:
    """B prompts of one task and their N samples, which the device may still be writing.

    rollouts: reading any of it waits for all of it.
    label, strategy, cell: [B] int32; the cell is an index into the task's `cells`.
    version: [] int32, of the policy that writes.
    shown: for each prompt the ids of the examples it shows.   dropped: examples that did not fit.
    """

    rollouts: Rollouts
    label: Array
    strategy: Array
    cell: Array
    version: Array
    shown: tuple[tuple[str, ...], ...] = flax.struct.field(pytree_node=False)
    dropped: int = flax.struct.field(pytree_node=False)

    def told(self) -> dict[str, Any]:
        """What is no array, as JSON: a checkpoint keeps it beside the arrays."""
        return {"shown": [list(ids) for ids in self.shown], "dropped": self.dropped}


def template(shapes: Mapping[str, Any], told: Mapping[str, Any], mesh: Mesh | None) -> Pending:
    """What a stored batch is restored into.

    Args:
      shapes: of its arrays, as `Checkpoints.shapes` gives them.
      told: what `Pending.told` had said.
      mesh: on which the rollouts are to lie, as the sampler leaves them; None for the host.
    """

    def placed(leaf: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
        sharding = mesh_lib.sharding("rollouts", mesh, leaf.shape)
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)

    empty = jax.tree.map(lambda leaf: np.zeros(leaf.shape, leaf.dtype), dict(shapes))
    if mesh is not None:
        empty["rollouts"] = jax.tree.map(placed, shapes["rollouts"])
    return Pending(
        rollouts=Rollouts(**{**empty["rollouts"], "prompts": Prompts(**empty["rollouts"]["prompts"])}),
        **{name: empty[name] for name in ("label", "strategy", "cell", "version")},
        shown=tuple(tuple(ids) for ids in told["shown"]),
        dropped=told["dropped"],
    )
