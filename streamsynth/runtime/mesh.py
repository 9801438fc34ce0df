"""The device mesh, and which array axis lies along which of its axes.

Three mesh axes: `data` holds copies of the parameters, `fsdp` splits the parameters and is gathered where
they are used, `tensor` splits heads, the MLP and the vocabulary. A batch is split over `data` and `fsdp`.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import flax.linen as nn
import jax
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from streamsynth.errors import UserError

AXES = ("data", "fsdp", "tensor")
BATCH_AXES = ("data", "fsdp")

# Every logical axis name that the policy uses, and the mesh axes it is split over.
LOGICAL_AXIS_RULES = (
    ("batch", BATCH_AXES),
    ("length", None),
    ("embed", "fsdp"),
    ("embed_act", None),  # activations: `fsdp` is taken by their batch axis
    ("vocab", "tensor"),
    ("heads", "tensor"),
    ("kv_heads", "tensor"),
    ("mlp", "tensor"),
    ("layers", None),
)


def make_mesh(shape: Mapping[str, int], devices: Sequence[jax.Device] | None = None) -> Mesh:
    """A mesh with the axes `AXES`.

    Args:
      shape: devices along each axis, as in `config.mesh`; at most one is -1 and takes what is left.
      devices: all devices there are, unless named.

    Raises:
      UserError: for an unknown or missing axis, or where the sizes do not multiply to the devices.
    """
    devices = jax.devices() if devices is None else list(devices)
    wrong = sorted(shape.keys() ^ set(AXES))
    if wrong:
        raise UserError(f"mesh.{wrong[0]}: a mesh has exactly the axes {', '.join(AXES)}.")
    sizes = {axis: shape[axis] for axis in AXES}
    for axis, size in sizes.items():
        if size < 1 and size != -1:
            raise UserError(f"mesh.{axis} = {size}: an axis has 1 device or more, or -1 for those left.")
    free = [axis for axis, size in sizes.items() if size == -1]
    if len(free) > 1:
        raise UserError(f"mesh.{free[0]} and mesh.{free[1]} are both -1; only one can take what is left.")
    fixed = math.prod(size for size in sizes.values() if size != -1)
    if free:
        sizes[free[0]] = len(devices) // fixed
    if math.prod(sizes.values()) != len(devices):
        named = ", ".join(f"mesh.{axis} = {shape[axis]}" for axis in AXES)
        raise UserError(
            f"{named} do not fit {len(devices)} device{'s' * (len(devices) != 1)}: the sizes must multiply "
            "to that number; set one of them to -1."
        )
    # jax.make_mesh would make explicit axes, which Linen's logical constraints do not know.
    return jax.make_mesh(
        tuple(sizes.values()), AXES, axis_types=(AxisType.Auto,) * len(AXES), devices=devices
    )


@contextlib.contextmanager
def use(mesh: Mesh) -> Iterator[None]:
    """Within it, `nn.with_logical_constraint` places activations on `mesh` by `LOGICAL_AXIS_RULES`."""
    with jax.set_mesh(mesh), nn.logical_axis_rules(LOGICAL_AXIS_RULES):
        yield


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """The leading axis split over `data` and `fsdp`, the others whole."""
    return NamedSharding(mesh, PartitionSpec(BATCH_AXES))


def replicated(mesh: Mesh) -> NamedSharding:
    """The whole array on every device."""
    return NamedSharding(mesh, PartitionSpec())


def check_batch(size: int, key: str, mesh: Mesh) -> None:
    """Raises UserError where a batch of `size`, set by config key `key`, cannot be split over the mesh."""
    shards = math.prod(mesh.shape[axis] for axis in BATCH_AXES)
    if size % shards:
        raise UserError(f"{key} = {size} is not a multiple of mesh.data x mesh.fsdp = {shards}; make it one.")


def param_shardings(params: Any, logical_axes: Any, mesh: Mesh) -> Any:
    """Where each parameter lies: a tree of NamedSharding in the structure of `params`.

    Args:
      params: tree of arrays or `jax.ShapeDtypeStruct`s, Linen metadata removed.
      logical_axes: the same tree with a PartitionSpec of logical axis names for every array, as
        `nn.get_partition_spec` gives it for parameters made with `nn.with_logical_partitioning`.
      mesh: from `make_mesh`.

    Raises:
      UserError: where a dimension is not a multiple of the mesh axes it is split over.
      ValueError: for a logical name that has no rule; it would silently be replicated.
    """
    known = {name for name, _ in LOGICAL_AXIS_RULES} | {None}

    def place(path: tuple, array: Any, names: PartitionSpec) -> NamedSharding:
        where = "/".join(str(getattr(entry, "key", entry)) for entry in path)
        unknown = set(names) - known
        if unknown:
            raise ValueError(f"{where}: no rule for logical axis {unknown.pop()!r}")
        spec = nn.logical_to_mesh_axes(names, LOGICAL_AXIS_RULES)
        for size, name, axis in zip(array.shape, names, spec, strict=False):
            if axis is not None and size % mesh.shape[axis]:
                raise UserError(
                    f"mesh.{axis} = {mesh.shape[axis]} does not divide the {name} axis of parameter {where}, "
                    f"which is {size} long; change mesh.{axis} or the policy's shape."
                )
        # As programs name the placement of what they return: otherwise the second step compiles anew.
        while spec and spec[-1] is None:
            spec = PartitionSpec(*spec[:-1])
        return NamedSharding(mesh, spec)

    return jax.tree_util.tree_map_with_path(place, params, logical_axes)
