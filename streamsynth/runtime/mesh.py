"""The device mesh, and which array axis lies along which of its axes.

Three mesh axes: `data` holds copies of the parameters, `fsdp` splits the parameters and is gathered where
they are used, `tensor` splits heads, the MLP and the vocabulary. A batch is split over `data` and `fsdp`.
"""

from __future__ import annotations

import contextlib
import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.experimental import mesh_utils
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec

from streamsynth.errors import UserError

AXES = ("data", "fsdp", "tensor")
BATCH_AXES = ("data", "fsdp")

# Every logical axis name, and the mesh axes it is split over.
LOGICAL_AXIS_RULES = (
    ("batch", BATCH_AXES),  # prompts, and samples with their prompts
    ("length", None),
    ("embed", "fsdp"),
    ("embed_act", None),  # activations: `fsdp` is taken by their batch axis
    ("vocab", "tensor"),
    ("heads", "tensor"),
    ("kv_heads", "tensor"),
    ("head_width", None),
    ("mlp", "tensor"),
    ("layers", None),
    ("slot", None),
    ("label", None),
    ("feature", None),
)

# Every array of a run, by the logical names of its axes; axes beyond those that are named are whole.
#
# Parameters name their axes where they are made (`policy.transformer`, `policy.lora`), and whatever has the
# path and shape of a parameter (moments, master copies, gradients, the KL reference) lies as it does.
ARRAYS = {
    # --- One row a prompt [B], or a sample [N]: placed by `batch_sharding` ---
    "prompts": ("batch", "length"),  # and their labels and strategies [B]
    "keys": ("batch",),
    "rollouts": ("batch", "length"),  # tokens, masks, log-probabilities [N, T]; replayed ones too
    "scores": ("batch",),  # gates, qualities, parts, credit, advantages
    "features": ("batch", "feature"),  # [N, D]
    "microbatches": (None, "batch", "length"),  # of any of these, along the first axis
    # --- Within a program ---
    "hidden": ("batch", "length", "embed_act"),  # [N, Q, width]
    "queries": ("batch", "heads", "length", "head_width"),  # [N, H, Q, d]
    "cache": ("batch", "kv_heads", "length", "head_width"),  # prompts' [B, Hkv, P, d], own [N, Hkv, T, d]
    "stacked_cache": ("layers", "batch", "kv_heads", "length", "head_width"),  # where layers are scanned
    "logits": ("batch", "vocab"),  # of a decoding step
    "head": ("vocab", "embed_act"),  # the matrix logits are taken with, gathered for its use
    # --- What is remembered: small, or bounded by `replay.megabytes` a task ---
    "archive": ("label", "feature", "feature"),  # [K, D, D]
    "replay": ("slot",),  # [C, ...]
    "statistics": (),  # running deviations and means, alpha, patterns, scheduler, counters
}


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
    # On most chips jax.make_mesh refuses an axis that is a part of one of the torus's: 2 on 4 x 4 x 4.
    placed = mesh_utils.create_device_mesh(tuple(sizes.values()), devices, allow_split_physical_axes=True)
    # Explicit axes, JAX's default, are not known to Linen's logical constraints.
    return Mesh(placed, AXES, axis_types=(AxisType.Auto,) * len(AXES))


@contextlib.contextmanager
def use(mesh: Mesh) -> Iterator[None]:
    """Within it, `nn.with_logical_constraint` places activations on `mesh` by `LOGICAL_AXIS_RULES`."""
    with jax.set_mesh(mesh), nn.logical_axis_rules(LOGICAL_AXIS_RULES):
        yield


def current() -> AbstractMesh | None:
    """The mesh of `use`, as a traced function sees it; None without one, or where it is of one device."""
    mesh = jax.sharding.get_abstract_mesh()
    return None if mesh.empty or mesh.size == 1 or mesh.manual_axes else mesh


def shards(mesh: Mesh | AbstractMesh) -> int:
    """Into how many parts a batch is split."""
    return math.prod(mesh.shape[axis] for axis in BATCH_AXES)


def padded(array: Any, mesh: Mesh | AbstractMesh) -> jax.Array:
    """With rows of zeros added, so that the leading axis can be split as a batch is."""
    extra = -array.shape[0] % shards(mesh)
    return jnp.pad(array, [(0, extra), *[(0, 0)] * (array.ndim - 1)]) if extra else array


def summed(x: Any, axis: str) -> jax.Array:
    """Within `jax.shard_map`: the sum over a mesh axis, for which one of a single device is not asked."""
    return jax.lax.psum(x, axis) if jax.lax.axis_size(axis) > 1 else x


def spec(names: Sequence[str | None], shape: Sequence[int], mesh: Mesh | AbstractMesh) -> PartitionSpec:
    """Where an array with these logical axes lies; an axis that its mesh axes do not divide stays whole."""
    axes = []
    for name, size in itertools.zip_longest(names[: len(shape)], shape):
        axis = None if name is None else dict(LOGICAL_AXIS_RULES)[name]
        parts = math.prod(mesh.shape[part] for part in (axis if isinstance(axis, tuple) else (axis,)) if part)
        axes.append(axis if size % parts == 0 else None)
    return _short(axes)


def constrain(tree: Any, array: str) -> Any:
    """Within a program: all arrays of a tree placed by row `array` of `ARRAYS` on the mesh of `use`."""
    mesh = current()
    if mesh is None:
        return tree
    return jax.tree.map(
        lambda leaf: jax.lax.with_sharding_constraint(leaf, spec(ARRAYS[array], leaf.shape, mesh)), tree
    )


def constrain_like(tree: Any, logical_axes: Any) -> Any:
    """Within a program: a tree of parameters, or of gradients, placed by their logical axis names."""
    mesh = current()
    if mesh is None:
        return tree
    return jax.tree.map(
        lambda leaf, names: jax.lax.with_sharding_constraint(leaf, spec(names, leaf.shape, mesh)),
        tree,
        logical_axes,
    )


def sharding(array: str, mesh: Mesh, shape: Sequence[int] | None = None) -> NamedSharding:
    """Of row `array` of `ARRAYS`; with a shape, axes that the mesh does not divide stay whole.

    Without one, only the leading axis is placed: it serves all arrays of a group, whatever their rank.
    """
    if shape is not None:
        return NamedSharding(mesh, spec(ARRAYS[array], shape, mesh))
    return NamedSharding(mesh, _short([dict(LOGICAL_AXIS_RULES)[name] for name in ARRAYS[array][:1]]))


def named(names: Sequence[str | None], shape: Sequence[int], mesh: Mesh | AbstractMesh) -> NamedSharding:
    """The placement of an array with these logical axes; what the mesh does not divide stays whole."""
    return NamedSharding(mesh, spec(names, shape, mesh))


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """The leading axis split over `data` and `fsdp`, the others whole."""
    return sharding("scores", mesh)


def rows_or_whole(size: int, mesh: Mesh) -> NamedSharding:
    """Where a batch of `size` rows lies that need not fill the mesh: split where it can be."""
    return replicated(mesh) if size % shards(mesh) else batch_sharding(mesh)


def replicated(mesh: Mesh) -> NamedSharding:
    """The whole array on every device."""
    return sharding("statistics", mesh)


def _short(axes: Sequence[Any]) -> PartitionSpec:
    """As programs name the placement of what they return: otherwise the second step compiles anew."""
    axes = list(axes)
    while axes and axes[-1] is None:
        axes.pop()
    return PartitionSpec(*axes)


def check_batch(size: int, key: str, mesh: Mesh) -> None:
    """Raises UserError where a batch of `size`, set by config key `key`, cannot be split over the mesh."""
    if size % shards(mesh):
        raise UserError(
            f"{key} = {size} is not a multiple of mesh.data x mesh.fsdp = {shards(mesh)}; make it one."
        )


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
        axes = nn.logical_to_mesh_axes(names, LOGICAL_AXIS_RULES)
        for size, name, axis in zip(array.shape, names, axes, strict=False):
            if axis is not None and size % mesh.shape[axis]:
                raise UserError(
                    f"mesh.{axis} = {mesh.shape[axis]} does not divide the {name} axis of parameter {where}, "
                    f"which is {size} long; change mesh.{axis} or the policy's shape."
                )
        return NamedSharding(mesh, _short(axes))

    return jax.tree_util.tree_map_with_path(place, params, logical_axes)
