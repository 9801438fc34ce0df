"""FLOPs and bytes of the network's programs, counted by hand from its shape.

A multiplication with an addition is two FLOPs. Counted is what the programs compute, masked scores included;
what is not a product of matrices (norms, activations, softmax, the optimizer) is left out: at the sizes that
these counts are for it is a few percent. XLA's own cost analysis counts the body of a loop once, and layers,
chunks, microbatches and decoding steps are loops; it can be compared where all of them are unrolled.

A training step takes, for one pass forward through the layers, two passes backward (Kaplan et al. 2020, arXiv
2001.08361, section 2.1): one in the activations and one in the weights. Frozen weights (LoRA) need the first
alone, and `remat` computes the layers once more.
"""

from __future__ import annotations

import dataclasses
import math

import jax.numpy as jnp

from streamsynth.policy.chunks import chunk_size
from streamsynth.policy.transformer import TransformerConfig


@dataclasses.dataclass(frozen=True)
class Costs:
    """What a program costs, over all devices together.

    flops: products of matrices.
    weight_bytes: of the network's weights, read once for each pass through it. A device reads its part of
      the tensor axis, gathered over the others.
    cache_bytes: keys and values read and written while decoding.
    state_bytes: optimizer's state, parameters and gradients, read and written by a step of the optimizer.
    """

    flops: float
    weight_bytes: float = 0.0
    cache_bytes: float = 0.0
    state_bytes: float = 0.0

    def __add__(self, other: Costs) -> Costs:
        mine, others = dataclasses.astuple(self), dataclasses.astuple(other)
        return Costs(*(a + b for a, b in zip(mine, others, strict=True)))

    def bytes_on_a_device(self, data: int, fsdp: int, tensor: int) -> float:
        """The least bytes that one device of a mesh moves to and from its memory."""
        return (
            self.weight_bytes / tensor
            + self.cache_bytes / (data * fsdp * tensor)
            + self.state_bytes / (fsdp * tensor)
        )


@dataclasses.dataclass(frozen=True)
class Batch:
    """Sizes of a batch: `prompts` B, `samples` G a prompt, lengths P and T."""

    prompts: int
    samples: int
    prompt_length: int
    completion_length: int

    @property
    def completions(self) -> int:
        return self.prompts * self.samples


def layer_weights(config: TransformerConfig) -> int:
    """Entries of one layer's matrices: query, key, value, out, gate, up, down."""
    heads = config.head_width * (2 * config.heads + 2 * config.kv_heads)
    return config.width * (heads + 3 * config.mlp_width)


def adapter_weights(config: TransformerConfig) -> int:
    """Entries of one layer's adapter, r * (in + out) for each projection that has one; 0 without."""
    if config.lora is None:
        return 0
    query, key = config.heads * config.head_width, config.kv_heads * config.head_width
    sizes = {
        "query": (config.width, query),
        "key": (config.width, key),
        "value": (config.width, key),
        "out": (query, config.width),
        "gate": (config.width, config.mlp_width),
        "up": (config.width, config.mlp_width),
        "down": (config.mlp_width, config.width),
    }
    return config.lora.rank * sum(sum(sizes[name]) for name in config.lora.modules)


def kept_of_prompt(config: TransformerConfig, prompt_length: int) -> list[int]:
    """How many of a prompt's keys each layer keeps for its completions: all, or what its window reaches."""
    windows = (config.windows[i % len(config.windows)] for i in range(config.layers))
    return [min(prompt_length, max(window - 1, 1)) if window else prompt_length for window in windows]


def own_places(config: TransformerConfig, length: int) -> list[int]:
    """Places of each layer's cache of own tokens."""
    windows = (config.windows[i % len(config.windows)] for i in range(config.layers))
    return [min(length, window) if window else length for window in windows]


def read_prompts(config: TransformerConfig, batch: Batch) -> float:
    """FLOPs of B prompts through the layers: 2 B P weights, and 4 B H d P^2 a layer for the attention."""
    tokens = batch.prompts * batch.prompt_length
    weights = layer_weights(config) + adapter_weights(config)
    attention = 4 * tokens * config.heads * config.head_width * batch.prompt_length
    return float(config.layers * (2 * tokens * weights + attention))


def read_completions(config: TransformerConfig, batch: Batch) -> float:
    """FLOPs of N completions over their prompts: 2 N T weights, and 4 N H d T (P' + T) a layer.

    P' is what the layer keeps of the prompt.
    """
    tokens = batch.completions * batch.completion_length
    weights = layer_weights(config) + adapter_weights(config)
    keys = sum(kept_of_prompt(config, batch.prompt_length)) + config.layers * batch.completion_length
    attention = 4 * tokens * config.heads * config.head_width * keys
    return float(config.layers * 2 * tokens * weights + attention)


def head(config: TransformerConfig, positions: int) -> float:
    """FLOPs of the logits of so many positions: 2 D V each."""
    return 2.0 * positions * config.width * config.vocab_size


def rollout(config: TransformerConfig, batch: Batch) -> Costs:
    """B prompts read once, then T - 1 steps of N tokens, none of which ends early.

    Every step attends to what was kept of the prompts and to all places of the caches, the empty ones too.
    It reads all weights, each prompt's keys and values once, and each sample's own, and writes one more.
    """
    steps, n = batch.completion_length - 1, batch.completions
    weights = layer_weights(config) + adapter_weights(config)
    prompt_keys = sum(kept_of_prompt(config, batch.prompt_length))
    own_keys = sum(own_places(config, batch.completion_length))
    attention = 4 * config.heads * config.head_width * (prompt_keys + own_keys)
    per_token = config.layers * 2 * weights + attention
    flops = read_prompts(config, batch) + head(config, batch.prompts) + steps * n * per_token
    written = _pair_bytes(config) * n * config.layers
    return Costs(
        flops=flops + steps * head(config, n),
        weight_bytes=float((steps + 1) * network_bytes(config)),
        cache_bytes=float((steps + 1) * cache_bytes(config, batch) + steps * written),
    )


def cache_bytes(config: TransformerConfig, batch: Batch) -> int:
    """Bytes of the keys and values that decoding keeps: of each prompt once, of each sample's own."""
    prompts = batch.prompts * sum(kept_of_prompt(config, batch.prompt_length))
    own = batch.completions * sum(own_places(config, batch.completion_length))
    return _pair_bytes(config) * (prompts + own)


def _pair_bytes(config: TransformerConfig) -> int:
    """Bytes of one token's key and value in one layer."""
    return 2 * config.kv_heads * config.head_width * _size(config.compute_dtype)


def logprobs(config: TransformerConfig, batch: Batch, positions: int, microbatches: int = 1) -> Costs:
    """Teacher forcing without gradient of one batch cut into so many, and the logits of so many positions."""
    flops = read_prompts(config, batch) + read_completions(config, batch) + head(config, positions)
    return Costs(flops, weight_bytes=float(microbatches * network_bytes(config)))


def gradient(config: TransformerConfig, batch: Batch, positions: int, microbatches: int = 1) -> Costs:
    """Teacher forcing with its gradient, of one batch cut into so many microbatches.

    Logits are always computed once more in the backward pass (see `logprobs.token_statistics`).
    """
    frozen = config.lora is not None
    layers = read_prompts(config, batch) + read_completions(config, batch)
    backward = 1 if frozen else 2
    flops = (1 + backward) * layers + (2 + backward) * head(config, positions)
    if config.remat:
        flops += layers - _not_recomputed(config, batch)
    reads = (2 + config.remat) * microbatches
    return Costs(flops, weight_bytes=float(reads * network_bytes(config)))


def _not_recomputed(config: TransformerConfig, batch: Batch) -> float:
    """FLOPs of each layer's last product, which no gradient needs again unless a norm follows it."""
    tokens = batch.prompts * batch.prompt_length + batch.completions * batch.completion_length
    return 0.0 if config.post_norms else 2.0 * config.layers * tokens * config.mlp_width * config.width


def optimizer_step(trained: int, param_bytes: int, state_bytes: int) -> Costs:
    """The optimizer: reads and writes its state and the parameters, and reads float32 gradients.

    Args:
      trained: parameters that are trained.
      param_bytes, state_bytes: of all of them, and of the optimizer's state.
    """
    return Costs(0.0, state_bytes=float(2 * (param_bytes + state_bytes) + 4 * trained))


def chunk_positions(positions: int, chunk: int) -> int:
    """Positions whose logits are computed, at most `chunk` at a time: the last chunk is filled."""
    size = chunk_size(positions, chunk)
    return math.ceil(positions / size) * size


def network_weights(config: TransformerConfig) -> int:
    """Entries of the matrices that a pass multiplies with: those of all layers, and the head."""
    return config.layers * layer_weights(config) + config.width * config.vocab_size


def network_bytes(config: TransformerConfig) -> int:
    """Bytes of those matrices as they are multiplied with."""
    return network_weights(config) * _size(config.compute_dtype)


def _size(dtype: str) -> int:
    return jnp.dtype(dtype).itemsize
