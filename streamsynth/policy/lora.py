"""Low-rank adapters (LoRA, arXiv 2106.09685): a small tree of parameters beside a frozen network.

The adapter is a Linen collection of its own, "lora". Its tree follows the network's: where a projection has
`kernel` [in, out], its adapter has `a` [in, r] and `b` [r, out] (with the same leading axis where layers are
scanned), and the projection adds alpha / r * (x @ a) @ b. Without the collection the network is the base.
"""

from __future__ import annotations

import dataclasses
import zlib
from typing import Any

import jax
import jax.numpy as jnp
from flax import traverse_util
from jax.sharding import PartitionSpec

from streamsynth.errors import UserError

# The projections of a layer that may have an adapter.
MODULES = ("query", "key", "value", "out", "gate", "up", "down")


@dataclasses.dataclass(frozen=True)
class LoraConfig:
    """rank: r.   alpha: the adapter counts alpha / r.   modules: which projections have one, of `MODULES`."""

    rank: int
    alpha: float
    modules: tuple[str, ...] = MODULES

    def __post_init__(self):
        for name in self.modules:
            if name not in MODULES:
                raise UserError(
                    f"policy.lora.modules has {name!r}, which is no projection: choose among "
                    f"{', '.join(MODULES)}."
                )
        if not self.modules or len(set(self.modules)) < len(self.modules):
            raise UserError("policy.lora.modules must name at least one projection, and each once.")

    @property
    def scale(self) -> float:
        return self.alpha / self.rank


def init_adapter(config: LoraConfig, params: Any, key: jax.Array) -> Any:
    """A fresh adapter for a network: `a` uniform within 1 / sqrt(in), `b` zero, so that it changes nothing.

    Args:
      config: of the adapter.
      params: the network's parameters, or their shapes.
      key: random key; every projection draws from its own, folded from its path.

    Returns:
      The tree of the collection "lora", float32.
    """
    adapter = {}
    for path, kernel in traverse_util.flatten_dict(params).items():
        if path[-1] != "kernel" or path[-2] not in config.modules:
            continue
        *lead, fan_in, fan_out = kernel.shape
        own = jax.random.fold_in(key, zlib.crc32("/".join(path).encode()))
        shape = (*lead, fan_in, config.rank)
        adapter[*path[:-1], "a"] = jax.random.uniform(own, shape, minval=-1.0, maxval=1.0) * fan_in**-0.5
        adapter[*path[:-1], "b"] = jnp.zeros((*lead, config.rank, fan_out))
    return traverse_util.unflatten_dict(adapter)


def merge(config: LoraConfig, params: Any, adapter: Any) -> Any:
    """The network with the adapter in its kernels: W + alpha / r * a @ b, in the dtype of W."""
    flat, parts = traverse_util.flatten_dict(params), traverse_util.flatten_dict(adapter)
    # In the order of the tree, and not of a set: every process starts the same programs in the same order.
    for path in dict.fromkeys(path[:-1] for path in parts):
        kernel = flat[*path, "kernel"]
        added = _product(parts[*path, "a"], parts[*path, "b"], config.scale)
        flat[*path, "kernel"] = (kernel.astype(jnp.float32) + added).astype(kernel.dtype)
    return traverse_util.unflatten_dict(flat)


def adapter_axes(config: LoraConfig, axes: Any) -> Any:
    """Logical axis names of an adapter, from those of the network's parameters: the rank is never split."""
    found = {}
    for path, names in traverse_util.flatten_dict(axes).items():
        if path[-1] == "kernel" and path[-2] in config.modules:
            *lead, fan_in, fan_out = names
            found[*path[:-1], "a"] = PartitionSpec(*lead, fan_in, None)
            found[*path[:-1], "b"] = PartitionSpec(*lead, None, fan_out)
    return traverse_util.unflatten_dict(found)


@jax.jit
def _product(a: jax.Array, b: jax.Array, scale: float) -> jax.Array:
    return scale * jnp.matmul(a, b, precision=jax.lax.Precision.HIGHEST)
