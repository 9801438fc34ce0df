"""Random keys, folded from (seed, purpose, step, prompt, sample) and never from a slot in memory.

A key is a function of what it is for, so a batch cut another way, a resumed run or another mesh
draws the same numbers, and no key is ever used twice.
"""

from __future__ import annotations

import functools
import zlib

import jax
import numpy as np


def purpose_key(seed: int, purpose: str, *steps: int) -> jax.Array:
    """The key of one purpose ("rollout", "replay", ...) at the given steps (step, turn, task ...)."""
    return _folded(seed, np.array([zlib.crc32(purpose.encode()), *steps], np.uint32))


@functools.partial(jax.jit, static_argnames="seed")
def _folded(seed: int, data: np.ndarray) -> jax.Array:
    key = jax.random.key(seed)
    for i in range(data.shape[0]):
        key = jax.random.fold_in(key, data[i])
    return key


def numpy_rng(seed: int, purpose: str, *steps: int) -> np.random.Generator:
    """The host's generator for one purpose at the given steps."""
    return np.random.default_rng((seed, zlib.crc32(purpose.encode()), *steps))


@functools.partial(jax.jit, static_argnames=("prompts", "samples"))
def sample_keys(key: jax.Array, prompts: int, samples: int) -> jax.Array:
    """Keys [N] of the `samples` samples of each of `prompts` prompts, in the order n = b * G + g."""
    by_prompt = jax.vmap(jax.random.fold_in, (None, 0))(key, np.arange(prompts))
    by_sample = jax.vmap(jax.vmap(jax.random.fold_in, (None, 0)), (0, None))(by_prompt, np.arange(samples))
    return by_sample.reshape(prompts * samples)
