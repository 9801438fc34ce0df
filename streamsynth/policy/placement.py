"""Where a network's variables, and whatever is kept beside each of them, lie on a mesh."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import jax
from jax.sharding import Mesh, PartitionSpec

from streamsynth.errors import UserError
from streamsynth.policy.lora import adapter_axes
from streamsynth.policy.transformer import TransformerConfig, logical_axes
from streamsynth.runtime import mesh as mesh_lib


def variable_axes(config: TransformerConfig, collections: Iterable[str]) -> dict[str, Any]:
    """The logical axis names of every array in the named collections, "params" and "lora"."""
    axes = logical_axes(config)
    return {name: axes if name == "params" else adapter_axes(config.lora, axes) for name in collections}


def variable_shardings(config: TransformerConfig, shapes: dict[str, Any], mesh: Mesh) -> dict[str, Any]:
    """Where variables lie, from their shapes by collection.

    Raises:
      UserError: where a dimension is not a multiple of the mesh axes it is split over.
    """
    return mesh_lib.param_shardings(shapes, variable_axes(config, shapes), mesh)


def constrain_variables(config: TransformerConfig, variables: dict[str, Any]) -> dict[str, Any]:
    """Within a program: variables, or their gradients, where `variable_shardings` says."""
    if mesh_lib.current() is None:
        return variables
    return mesh_lib.constrain_like(variables, variable_axes(config, variables))


def gather_variables(config: TransformerConfig, variables: dict[str, Any]) -> dict[str, Any]:
    """Within a program: variables whole along `fsdp`, and split along `tensor` alone."""
    if mesh_lib.current() is None:
        return variables

    def whole(names: PartitionSpec) -> PartitionSpec:
        return PartitionSpec(*("embed_act" if name == "embed" else name for name in names))

    axes = variable_axes(config, variables)
    axes = jax.tree.map(whole, axes, is_leaf=lambda leaf: isinstance(leaf, PartitionSpec))
    return mesh_lib.constrain_like(variables, axes)


def optimizer_shardings(
    config: TransformerConfig, state: Any, variables: dict[str, Any], mesh: Mesh | jax.sharding.AbstractMesh
) -> Any:
    """Where an optimizer's state lies: what has the path and shape of a variable as that does.

    What else there is, counters and factored moments, lies whole on every device.

    Args:
      config: of the network.
      state, variables: trees of arrays, or of their shapes.
      mesh: of `runtime.mesh`.
    """
    of_variables = dict(jax.tree_util.tree_leaves_with_path(variables))
    names = dict(jax.tree_util.tree_leaves_with_path(variable_axes(config, variables)))
    depths = {len(path) for path in of_variables}

    def place(path: tuple, leaf: Any) -> jax.sharding.NamedSharding:
        for depth in depths:
            own = of_variables.get(path[-depth:])
            if own is not None and own.shape == leaf.shape:
                return mesh_lib.named(names[path[-depth:]], leaf.shape, mesh)
        return mesh_lib.named((), leaf.shape, mesh)

    return jax.tree_util.tree_map_with_path(place, state)


def constrain_optimizer(config: TransformerConfig, state: Any, variables: dict[str, Any]) -> Any:
    """Within a program: an optimizer's state where `optimizer_shardings` says."""
    mesh = mesh_lib.current()
    if mesh is None:
        return state
    return jax.lax.with_sharding_constraint(state, optimizer_shardings(config, state, variables, mesh))


def check_network(config: TransformerConfig, mesh: Mesh, *, vocabulary: bool = True) -> None:
    """Whether a mesh divides a network.

    Args:
      config: of the network.
      mesh: that it is to lie on.
      vocabulary: whether the size of the vocabulary is known yet.

    Raises:
      UserError: naming the sizes that it does not divide.
    """
    sizes = {
        "tensor": ("heads", "kv_heads", "mlp_width", *(("vocab_size",) if vocabulary else ())),
        "fsdp": ("width",),
    }
    wrong = []
    for axis, names in sizes.items():
        own = [f"{n} = {getattr(config, n)}" for n in names if getattr(config, n) % mesh.shape[axis]]
        if own:
            wrong.append(f"mesh.{axis} = {mesh.shape[axis]} does not divide the policy's {', '.join(own)}")
    if wrong:
        raise UserError(f"{' and '.join(wrong)}: choose a mesh that does, or another shape.")
