"""The policy's network: a Linen decoder whose families differ by config alone.

It maps tokens to hidden states and the keys and values of the segment it read. Logits are a method of
their own, so that nothing computes more of them than it needs.

The functions here take the network's *variables*: {"params": tree}, and with an adapter beside it
{"params": base, "lora": adapter} (see `lora`).
"""

from __future__ import annotations

import dataclasses
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from streamsynth.errors import UserError
from streamsynth.policy.attention import (
    NOWHERE,
    RopeScaling,
    Segment,
    last_seen,
    rope_frequencies,
    rotate,
    two_segment_attention,
    write,
)
from streamsynth.policy.embedding import embed
from streamsynth.policy.lora import LoraConfig
from streamsynth.pytrees import Array
from streamsynth.runtime.mesh import constrain

ACTIVATIONS = {"silu": nn.silu, "gelu_tanh": lambda x: nn.gelu(x, approximate=True)}
DTYPES = ("float32", "bfloat16", "float16")


@dataclasses.dataclass(frozen=True)
class TransformerConfig:
    """The shape of the network, and what its layers do.

    Attributes:
      family: row of `families.FAMILIES`; it names the architecture when weights are exported.
      activation: of the gated MLP, of `ACTIVATIONS`.
      tied_embeddings: whether logits are taken with the embedding, or with a matrix `head` of their own.
      attention_bias: on query, key and value (Qwen2).
      query_key_norm: norms over each head's query and key before they are rotated (Qwen3, Gemma 3).
      norm_offset: what is added to a norm's stored scale; 1 for Gemma.
      post_norms: norms after attention and MLP as well (Gemma 2, arXiv 2408.00118).
      scaled_embedding: embeddings times sqrt(width) (Gemma).
      attention_scale: of scores; None: head_width ** -0.5.
      attention_softcap, logit_softcap: c of c * tanh(x / c), or None.
      windows: for each layer of a period, how many keys back it sees, its own included; 0: all. The period
        repeats over the layers and may be cut at the end.
      local_rope_theta: rotary base of layers with a window, which then have no scaling; None: as the others.
      rope_scaling: of the other layers.
      param_dtype, compute_dtype, logit_dtype: names of dtypes. Norms and the softmax of attention are float32
        whatever they are.
      scan_layers: compiles one period and loops over it (deep models, accelerators); unrolled layers train
        and decode faster on a CPU.
      remat: recomputes a layer's activations in the backward pass.
      gather_to_sample: on a mesh, parameters are gathered along `fsdp` once a rollout, and not once a token.
      lora: how an adapter counts, where the variables hold one.
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
    family: str = "llama"
    activation: str = "silu"
    tied_embeddings: bool = True
    attention_bias: bool = False
    query_key_norm: bool = False
    norm_offset: float = 0.0
    post_norms: bool = False
    scaled_embedding: bool = False
    attention_scale: float | None = None
    attention_softcap: float | None = None
    logit_softcap: float | None = None
    windows: tuple[int, ...] = (0,)
    local_rope_theta: float | None = None
    rope_scaling: RopeScaling | None = None
    param_dtype: str = "float32"
    compute_dtype: str = "float32"
    logit_dtype: str = "float32"
    scan_layers: bool = False
    remat: bool = False
    gather_to_sample: bool = False
    lora: LoraConfig | None = None

    def __post_init__(self):
        if self.heads % self.kv_heads:
            raise UserError(
                f"policy.heads = {self.heads} is not a multiple of policy.kv_heads = {self.kv_heads}: "
                "make every key-value head serve the same number of query heads."
            )
        if self.head_width % 2:
            raise UserError(f"policy.head_width = {self.head_width} must be even for rotary positions.")
        for name in ("param_dtype", "compute_dtype", "logit_dtype"):
            if getattr(self, name) not in DTYPES:
                raise UserError(
                    f"policy.{name} = {getattr(self, name)!r} is unknown: choose one of {', '.join(DTYPES)}."
                )

    @property
    def periods(self) -> int:
        """How many whole periods of `windows` are scanned; the layers left over stand by themselves."""
        return self.layers // len(self.windows) if self.scan_layers else 0


def layer_place(config: TransformerConfig, layer: int) -> tuple[tuple[str, ...], int | None]:
    """Where the parameters of a layer lie: the path to them, and the row of their leading axis if scanned."""
    period = len(config.windows)
    if layer < config.periods * period:
        return ("periods", f"layer_{layer % period}"), layer // period
    return (f"layers_{layer}",), None


class Projection(nn.Module):
    """x @ kernel, with the bias and the adapter that the variables hold."""

    config: TransformerConfig
    features: int
    axes: tuple[str, str]
    bias: bool = False

    @nn.compact
    def __call__(self, x: Array) -> Array:
        c = self.config
        init = nn.initializers.variance_scaling(1.0, "fan_in", "normal")
        kernel = self.param(
            "kernel",
            nn.with_logical_partitioning(init, self.axes),
            (x.shape[-1], self.features),
            jnp.dtype(c.param_dtype),
        )
        y = x @ kernel.astype(x.dtype)
        if self.bias:
            init = nn.with_logical_partitioning(nn.initializers.zeros, self.axes[1:])
            y += self.param("bias", init, (self.features,), jnp.dtype(c.param_dtype)).astype(x.dtype)
        if c.lora is not None and self.has_variable("lora", "a"):
            a, b = (self.get_variable("lora", name).astype(x.dtype) for name in "ab")
            y += c.lora.scale * ((x @ a) @ b)
        return y


class RMSNorm(nn.Module):
    """Root mean square normalisation (arXiv 1910.07467, eq. 4), computed in float32."""

    config: TransformerConfig
    axis: str | None = "embed"

    @nn.compact
    def __call__(self, x: Array) -> Array:
        c = self.config
        init = nn.initializers.constant(1.0 - c.norm_offset)
        scale = self.param(
            "scale",
            nn.with_logical_partitioning(init, (self.axis,)),
            (x.shape[-1],),
            jnp.dtype(c.param_dtype),
        )
        x32 = x.astype(jnp.float32)
        x32 *= jax.lax.rsqrt(jnp.mean(x32 * x32, axis=-1, keepdims=True) + c.norm_epsilon)
        return (x32 * (c.norm_offset + scale.astype(jnp.float32))).astype(x.dtype)


class Block(nn.Module):
    """One decoder layer, which sees `window` keys back, or all with 0."""

    config: TransformerConfig
    window: int

    @nn.compact
    def __call__(
        self, x: Array, shared: Segment | None, own: Segment | None, positions: Array, index: Array | None
    ) -> tuple[Array, Segment]:
        c = self.config
        local = self.window and c.local_rope_theta is not None
        frequency = rope_frequencies(
            c.head_width, c.local_rope_theta if local else c.rope_theta, None if local else c.rope_scaling
        )

        def heads(name: str, axis: str, count: int, h: Array) -> Array:
            width = count * c.head_width
            flat = Projection(c, width, ("embed", axis), c.attention_bias, name=name)(h)
            return flat.reshape(*flat.shape[:2], count, c.head_width).swapaxes(1, 2)

        h = RMSNorm(c, name="attention_norm")(x)
        query = heads("query", "heads", c.heads, h)
        key = heads("key", "kv_heads", c.kv_heads, h)
        value = heads("value", "kv_heads", c.kv_heads, h)
        if c.query_key_norm:
            query = RMSNorm(c, axis=None, name="query_norm")(query)
            key = RMSNorm(c, axis=None, name="key_norm")(key)
        query, key = rotate(query, positions, frequency), rotate(key, positions, frequency)
        query = constrain(query, "queries")
        segment = Segment(*constrain((key, value), "cache"), positions)
        if own is not None:
            segment = write(own, segment, index)
        attended = two_segment_attention(
            query,
            positions,
            segment,
            shared,
            scale=c.head_width**-0.5 if c.attention_scale is None else c.attention_scale,
            window=self.window,
            softcap=c.attention_softcap,
        )
        if own is None:
            segment = last_seen(segment, self.window)
        attended = attended.swapaxes(1, 2).reshape(*x.shape[:2], c.heads * c.head_width)
        attended = Projection(c, c.width, ("heads", "embed"), name="out")(attended)
        if c.post_norms:
            attended = RMSNorm(c, name="attention_post_norm")(attended)
        x = x + attended

        h = RMSNorm(c, name="mlp_norm")(x)
        gate = Projection(c, c.mlp_width, ("embed", "mlp"), name="gate")(h)
        up = Projection(c, c.mlp_width, ("embed", "mlp"), name="up")(h)
        mixed = Projection(c, c.width, ("mlp", "embed"), name="down")(ACTIVATIONS[c.activation](gate) * up)
        if c.post_norms:
            mixed = RMSNorm(c, name="mlp_post_norm")(mixed)
        return constrain(x + mixed, "hidden"), segment


def _block(config: TransformerConfig, scanned: bool) -> Any:
    # Within a scan nothing can be merged with what is recomputed; elsewhere it has to be kept apart.
    return nn.remat(Block, prevent_cse=not scanned) if config.remat else Block


class Period(nn.Module):
    """The layers of one period of `windows`; what scanning repeats."""

    config: TransformerConfig

    @nn.compact
    def __call__(
        self, x: Array, shared: Any, own: Any, positions: Array, index: Array | None
    ) -> tuple[Array, tuple[Segment, ...]]:
        segments = []
        for j, window in enumerate(self.config.windows):
            layer = _block(self.config, True)(self.config, window, name=f"layer_{j}")
            x, segment = layer(x, _at(shared, j), _at(own, j), positions, index)
            segments.append(segment)
        return x, tuple(segments)


class Transformer(nn.Module):
    """The decoder. One call serves prefill, teacher forcing and a decoding step.

    * Prefill: `model(tokens [B, P], positions)` gives the hidden states and the prompts' segments.
    * Teacher forcing: `model(tokens [N, T], positions, shared=segments)`.
    * Decoding: the same with [N, 1] tokens, `own` caches and the `index` that is written.

    Padding stands on the right, at position -1: nothing sees it. Of a layer with a window, the segment of a
    prompt and the cache of own tokens hold no more than the window.
    """

    config: TransformerConfig

    def setup(self):
        c = self.config
        init = nn.with_logical_partitioning(nn.initializers.normal(c.width**-0.5), ("vocab", "embed"))
        shape, dtype = (c.vocab_size, c.width), jnp.dtype(c.param_dtype)
        self.embedding = self.param("embedding", init, shape, dtype)
        self.head = self.embedding if c.tied_embeddings else self.param("head", init, shape, dtype)
        if c.periods:
            self.periods = nn.scan(
                Period,
                variable_axes={"params": 0, "lora": 0},
                split_rngs={"params": True},
                in_axes=(0, 0, nn.broadcast, nn.broadcast),
                length=c.periods,
                metadata_params={nn.PARTITION_NAME: "layers"},
            )(c)
        for i in self._rest():
            setattr(self, f"layers_{i}", _block(c, False)(c, c.windows[i % len(c.windows)]))
        self.final_norm = RMSNorm(c)

    def __call__(
        self,
        tokens: Array,
        positions: Array,
        shared: Any = None,
        own: Any = None,
        index: Array | None = None,
    ) -> tuple[Array, Any]:
        """Hidden states [N, Q, width] after the last norm, and the segments of all layers.

        Args:
          tokens: [N, Q] int32.
          positions: [N, Q] int32, position of each token in its whole text, -1 for padding.
          shared: the prompts' segments as prefill returned them, or None.
          own: caches that decoding writes into, or None where this call is a segment of its own.
          index: int32 scalar, how many tokens `own` was given before this one.

        Returns:
          hidden, and the pair (segments of scanned periods, segments of the other layers).
        """
        c = self.config
        dtype = jnp.dtype(c.compute_dtype)
        x = constrain(embed(self.embedding, tokens).astype(dtype), "hidden")
        if c.scaled_embedding:
            x *= jnp.asarray(c.width**0.5, dtype)
        scanned, rest = (), []
        if c.periods:
            x, scanned = self.periods(x, _at(shared, 0), _at(own, 0), positions, index)
        for place, i in enumerate(self._rest()):
            layer = getattr(self, f"layers_{i}")
            x, segment = layer(x, _at(_at(shared, 1), place), _at(_at(own, 1), place), positions, index)
            rest.append(segment)
        return self.final_norm(x), (scanned, tuple(rest))

    def logits(self, hidden: Array) -> Array:
        """[..., V] logits of hidden states [..., width], in the config's `logit_dtype`."""
        head = constrain(self.head.astype(hidden.dtype), "head")
        return project(self.config, hidden, head)

    def _rest(self) -> range:
        """The layers that are not scanned."""
        return range(self.config.periods * len(self.config.windows), self.config.layers)


def project(config: TransformerConfig, hidden: Array, head: Array) -> Array:
    """Logits [..., V] of hidden states [..., width] and a head [V, width] of their dtype."""
    logits = jnp.einsum("...w,vw->...v", hidden, head, preferred_element_type=jnp.float32)
    if config.logit_softcap is not None:
        logits = config.logit_softcap * jnp.tanh(logits / config.logit_softcap)
    return logits.astype(config.logit_dtype)


def head_of(config: TransformerConfig, variables: Any) -> Array:
    """[V, width]: what logits are taken with."""
    return variables["params"]["embedding" if config.tied_embeddings else "head"]


def _at(parts: Any, i: int) -> Any:
    return None if parts is None else parts[i]


def empty_cache(config: TransformerConfig, batch: int, length: int) -> Any:
    """Caches for `batch` samples of at most `length` own tokens, in the layout the network expects.

    That of a layer with a window has no more places than the window: it is written as a ring.
    """
    dtype = jnp.dtype(config.compute_dtype)

    def cache(window: int, *lead: int) -> Segment:
        size = min(length, window) if window else length
        zeros = jnp.zeros((*lead, batch, config.kv_heads, size, config.head_width), dtype)
        zeros = constrain(zeros, "stacked_cache" if lead else "cache")
        return Segment(zeros, zeros, jnp.full((*lead, batch, size), NOWHERE, jnp.int32))

    windows = config.windows
    first = config.periods * len(windows)
    scanned = tuple(cache(window, config.periods) for window in windows) if config.periods else ()
    return scanned, tuple(cache(windows[i % len(windows)]) for i in range(first, config.layers))


def init_params(config: TransformerConfig, key: jax.Array, shardings: Any = None) -> Any:
    """Fresh parameters as a plain tree, made where `shardings`, a tree like it, says."""

    def init(key: jax.Array) -> Any:
        return nn.meta.unbox(_init(config, key)["params"])

    return jax.jit(init, out_shardings=shardings)(key)


def param_shapes(config: TransformerConfig) -> Any:
    """The tree of `jax.ShapeDtypeStruct`s of the parameters, without computing any."""
    return jax.eval_shape(lambda: init_params(config, jax.random.key(0)))


def logical_axes(config: TransformerConfig) -> Any:
    """The tree of logical axis names of every parameter, as Linen's partition specs."""
    variables = jax.eval_shape(lambda: _init(config, jax.random.key(0)))
    return nn.get_partition_spec(variables)["params"]


def _init(config: TransformerConfig, key: jax.Array) -> Any:
    tokens = np.zeros((1, 1), np.int32)
    return Transformer(config).init(key, tokens, tokens)
