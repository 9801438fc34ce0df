"""The policy's network: a Linen decoder (pre-norm, grouped-query attention, rotary, gated MLP).

It maps tokens to hidden states and the keys and values of the segment it read. Logits are a method of
their own, so that nothing computes more of them than it needs.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from streamsynth.errors import UserError
from streamsynth.policy.attention import Segment, rotate, two_segment_attention
from streamsynth.pytrees import Array


@dataclasses.dataclass(frozen=True)
class TransformerConfig:
    """The shape of the network.

    `scan_layers` compiles one layer and loops over it (deep models, accelerators); unrolled layers
    train and decode faster on a CPU. `remat` recomputes a layer's activations in the backward pass.
    """

    vocab_size: int
    width: int = 96
    layers: int = 3
    heads: int = 4
    kv_heads: int = 2
    head_width: int = 24
    mlp_width: int = 256
    rope_theta: float = 10_000.0
    norm_epsilon: float = 1e-6
    scan_layers: bool = False
    remat: bool = False

    def __post_init__(self):
        if self.heads % self.kv_heads:
            raise UserError(
                f"policy.heads = {self.heads} is not a multiple of policy.kv_heads = {self.kv_heads}: "
                "make every key-value head serve the same number of query heads."
            )
        if self.head_width % 2:
            raise UserError(f"policy.head_width = {self.head_width} must be even for rotary positions.")


def _dense(features: int, axes: tuple[str, str], name: str) -> nn.Dense:
    init = nn.with_logical_partitioning(nn.initializers.variance_scaling(1.0, "fan_in", "normal"), axes)
    return nn.Dense(features, use_bias=False, kernel_init=init, name=name)


class RMSNorm(nn.Module):
    """Root mean square normalisation (arXiv 1910.07467, eq. 4), computed in float32."""

    epsilon: float

    @nn.compact
    def __call__(self, x: Array) -> Array:
        scale = self.param(
            "scale", nn.with_logical_partitioning(nn.initializers.ones, ("embed",)), (x.shape[-1],)
        )
        x32 = x.astype(jnp.float32)
        x32 *= jax.lax.rsqrt(jnp.mean(x32 * x32, axis=-1, keepdims=True) + self.epsilon)
        return (x32 * scale).astype(x.dtype)


class Block(nn.Module):
    """One decoder layer."""

    config: TransformerConfig

    @nn.compact
    def __call__(
        self,
        x: Array,
        shared: Segment | None,
        own: Segment | None,
        positions: Array,
        shared_mask: Array | None,
        index: Array | None,
    ) -> tuple[Array, Segment]:
        c = self.config

        def heads(array: Array, count: int) -> Array:
            return array.reshape(*array.shape[:2], count, c.head_width).swapaxes(1, 2)

        h = RMSNorm(c.norm_epsilon, name="attention_norm")(x)
        query = heads(_dense(c.heads * c.head_width, ("embed", "heads"), "query")(h), c.heads)
        key = heads(_dense(c.kv_heads * c.head_width, ("embed", "kv_heads"), "key")(h), c.kv_heads)
        value = heads(_dense(c.kv_heads * c.head_width, ("embed", "kv_heads"), "value")(h), c.kv_heads)
        query, key = rotate(query, positions, c.rope_theta), rotate(key, positions, c.rope_theta)
        if own is None:
            own = Segment(key, value)
            own_mask = jnp.tril(jnp.ones((x.shape[1], x.shape[1]), bool))
        else:
            own = Segment(
                jax.lax.dynamic_update_slice_in_dim(own.keys, key, index, axis=2),
                jax.lax.dynamic_update_slice_in_dim(own.values, value, index, axis=2),
            )
            own_mask = jnp.arange(own.keys.shape[2])[None, :] <= index
        attended = two_segment_attention(query, own, own_mask, shared, shared_mask)
        attended = attended.swapaxes(1, 2).reshape(*x.shape[:2], c.heads * c.head_width)
        x = x + _dense(c.width, ("heads", "embed"), "out")(attended)

        h = RMSNorm(c.norm_epsilon, name="mlp_norm")(x)
        gate = _dense(c.mlp_width, ("embed", "mlp"), "gate")(h)
        up = _dense(c.mlp_width, ("embed", "mlp"), "up")(h)
        x = x + _dense(c.width, ("mlp", "embed"), "down")(nn.silu(gate) * up)
        return nn.with_logical_constraint(x, ("batch", "length", "embed_act")), own


class Transformer(nn.Module):
    """The decoder. One call serves prefill, teacher forcing and a decoding step.

    * Prefill: `model(tokens [B, P], positions)` gives the hidden states and the prompts' segments.
    * Teacher forcing: `model(tokens [N, T], positions, shared=segments, shared_mask=mask)`.
    * Decoding: the same with [N, 1] tokens, `own` caches and the `index` that is written.

    Padding stands on the right, so a causal mask keeps it out of every real position's sight.
    """

    config: TransformerConfig

    def setup(self):
        c = self.config
        init = nn.with_logical_partitioning(nn.initializers.normal(c.width**-0.5), ("vocab", "embed"))
        self.embedding = self.param("embedding", init, (c.vocab_size, c.width))
        block = nn.remat(Block, prevent_cse=not c.scan_layers) if c.remat else Block
        if c.scan_layers:
            self.layers = nn.scan(
                block,
                variable_axes={"params": 0},
                split_rngs={"params": True},
                in_axes=(0, 0, nn.broadcast, nn.broadcast, nn.broadcast),
                length=c.layers,
                metadata_params={nn.PARTITION_NAME: "layers"},
            )(c)
        else:
            self.layers = [block(c) for _ in range(c.layers)]
        self.final_norm = RMSNorm(c.norm_epsilon)

    def __call__(
        self,
        tokens: Array,
        positions: Array,
        shared: Any = None,
        shared_mask: Array | None = None,
        own: Any = None,
        index: Array | None = None,
    ) -> tuple[Array, Any]:
        """Hidden states [N, Q, width] after the last norm, and every layer's segment.

        Args:
          tokens: [N, Q] int32.
          positions: [N, Q] int32, position of each token in its whole text.
          shared: the prompts' segments as prefill returned them, or None.
          shared_mask: [B, P] bool.
          own: caches that decoding writes into, or None where this call is a segment of its own.
          index: int32 scalar, the place in `own` that is written.
        """
        # Constrained before the gather: otherwise a sharded table is rebuilt on every device.
        table = nn.with_logical_constraint(self.embedding, ("vocab", "embed_act"))
        x = jnp.take(table, tokens, axis=0)
        if self.config.scan_layers:
            x, segments = self.layers(x, shared, own, positions, shared_mask, index)
        else:
            segments = []
            for i, layer in enumerate(self.layers):
                x, segment = layer(
                    x,
                    None if shared is None else shared[i],
                    None if own is None else own[i],
                    positions,
                    shared_mask,
                    index,
                )
                segments.append(segment)
            segments = tuple(segments)
        return self.final_norm(x), segments

    def logits(self, hidden: Array) -> Array:
        """[..., V] float32 logits of hidden states [..., width]; the embedding is tied."""
        return jnp.einsum("...w,vw->...v", hidden, self.embedding, preferred_element_type=jnp.float32)


def empty_cache(config: TransformerConfig, batch: int, length: int, dtype: Any = jnp.float32) -> Any:
    """Caches for `batch` samples of at most `length` own tokens, in the layout the network expects."""
    shape = (batch, config.kv_heads, length, config.head_width)
    if config.scan_layers:
        zeros = jnp.zeros((config.layers, *shape), dtype)
        return Segment(zeros, zeros)
    return tuple(Segment(jnp.zeros(shape, dtype), jnp.zeros(shape, dtype)) for _ in range(config.layers))


def init_params(config: TransformerConfig, key: jax.Array) -> Any:
    """Fresh parameters as a plain tree, logical axis metadata removed."""
    tokens = jnp.zeros((1, 1), jnp.int32)
    init = jax.jit(lambda key: nn.meta.unbox(Transformer(config).init(key, tokens, tokens)["params"]))
    return init(key)


def logical_axes(config: TransformerConfig) -> Any:
    """The tree of logical axis names of every parameter, as Linen's partition specs."""
    tokens = jnp.zeros((1, 1), jnp.int32)
    variables = jax.eval_shape(Transformer(config).init, jax.random.key(0), tokens, tokens)
    return nn.get_partition_spec(variables)["params"]


def stack_layers(params: Any, layers: int) -> Any:
    """Parameters of an unrolled network in the layout of a scanned one."""
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *(params[f"layers_{i}"] for i in range(layers)))
    return {**{k: v for k, v in params.items() if not k.startswith("layers_")}, "layers": stacked}
