"""What several tests share: a policy small enough to compile in a second, a tokenizer and a task for it."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from streamsynth.policy.store import Policy
from streamsynth.policy.tokenizer import MarkerTokenizer, train_tokenizer
from streamsynth.policy.transformer import Transformer, TransformerConfig, init_params, param_shapes
from streamsynth.pytrees import Prompts
from streamsynth.stream.patterns import STRATEGIES
from streamsynth.tasks import worlds
from streamsynth.tasks.task import Task

# Half the time to compile, for functions that run a few times on small arrays.
quick_jit = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})

SHAPE = dict(width=16, layers=1, heads=4, kv_heads=2, head_width=4, mlp_width=24)
VOCAB = 31
CONFIG = TransformerConfig(vocab_size=VOCAB, **SHAPE)
MODEL = Transformer(CONFIG)


def fresh_params(config: TransformerConfig, seed: int = 0) -> Any:
    """Parameters as `init_params` draws them, by numpy: its program takes seconds to compile, each time."""
    rng = np.random.default_rng(seed)

    def draw(path: Any, leaf: Any) -> jax.Array:
        name = path[-1].key
        if name in ("scale", "bias"):
            drawn = np.full(leaf.shape, 1.0 - config.norm_offset if name == "scale" else 0.0)
        else:
            inputs = config.width if name in ("embedding", "head") else leaf.shape[-2]
            drawn = rng.normal(size=leaf.shape) * inputs**-0.5
        return jnp.asarray(drawn.astype(leaf.dtype))

    return jax.tree_util.tree_map_with_path(draw, param_shapes(config))


@functools.cache
def params(seed: int = 0):
    """The network's variables, large enough that the distributions are far from uniform."""
    return {"params": jax.tree.map(lambda leaf: 2.0 * leaf, fresh_params(CONFIG, seed))}


@functools.cache
def initial_params():
    """The same as the network itself draws them."""
    return {"params": jax.tree.map(lambda leaf: 2.0 * leaf, init_params(CONFIG, jax.random.key(0)))}


def prompts(rng: np.random.Generator, batch: int, length: int) -> Prompts:
    """B prompts of random tokens and lengths."""
    mask = np.arange(length) < rng.integers(1, length + 1, size=batch)[:, None]
    tokens = np.where(mask, rng.integers(3, VOCAB, size=(batch, length)), 0).astype(np.int32)
    return Prompts(tokens, mask, np.zeros(batch, np.int32), np.zeros(batch, np.int32))


def completions(rng: np.random.Generator, count: int, length: int) -> tuple[np.ndarray, np.ndarray]:
    """Tokens and mask [N, T], of random lengths from 1 on."""
    mask = np.arange(length) < rng.integers(1, length + 1, size=count)[:, None]
    return rng.integers(3, VOCAB, size=(count, length)).astype(np.int32), mask


def flat(tree) -> np.ndarray:
    """All leaves of a tree as one vector in float64."""
    return np.concatenate([np.asarray(leaf, np.float64).ravel() for leaf in jax.tree.leaves(tree)])


def away(found, wanted) -> float:
    """The distance of one tree from another, a gradient say, as a part of the other's length."""
    found, wanted = flat(found), flat(wanted)
    return float(np.linalg.norm(found - wanted) / np.linalg.norm(wanted))


@functools.cache
def tokenizer() -> MarkerTokenizer:
    """A tokenizer of the worlds' words."""
    return train_tokenizer(worlds.corpus(0, 1500), 1200, STRATEGIES)


@functools.cache
def world_task(name: str = "bank_1", examples_per_label: int = 8) -> Task:
    """An embedded world with few rows of real data."""
    return worlds.load_task(name, examples_per_label=examples_per_label, train_per_label=4, test_per_label=2)


@functools.cache
def policy() -> Policy:
    """An untrained policy with that tokenizer."""
    config = TransformerConfig(vocab_size=tokenizer().vocab_size, **SHAPE)
    return Policy(Transformer(config), fresh_params(config), tokenizer(), "tiny")


def stack_layers(params: Any, config: TransformerConfig) -> Any:
    """Parameters of an unrolled network in the layout of `config`, whose layers are scanned."""
    period = len(config.windows)
    first = config.periods * period
    stacked = {
        f"layer_{j}": jax.tree.map(
            lambda *leaves: jnp.stack(leaves), *(params[f"layers_{i}"] for i in range(j, first, period))
        )
        for j in range(period)
    }
    moved = {f"layers_{i}" for i in range(first)}
    return {**{k: v for k, v in params.items() if k not in moved}, "periods": stacked}
