"""The golden files of `tests/golden`: what transformers computes with a tiny model of each family."""

from __future__ import annotations

import dataclasses
import pathlib
from typing import Any

import jax
import numpy as np
from flax import traverse_util
from jax.sharding import SingleDeviceSharding
from safetensors.numpy import load_file

from streamsynth.policy.huggingface.architectures import read_config
from streamsynth.policy.huggingface.names import sources
from streamsynth.policy.huggingface.reading import load_params
from streamsynth.policy.transformer import TransformerConfig

FOLDER = pathlib.Path(__file__).resolve().parent / "golden"
FAMILIES = ("llama", "qwen2", "qwen3", "gemma2", "gemma3")


@dataclasses.dataclass(frozen=True)
class Golden:
    """config, params: the model.   tokens: [B, T] int32, padded on the right.   lengths: [B] int32.

    logits: [B, T, V] float32, 0 at padding.   greedy: [B, S] int32, the continuation of each text.
    """

    config: TransformerConfig
    params: Any
    tokens: np.ndarray
    lengths: np.ndarray
    logits: np.ndarray
    greedy: np.ndarray

    @property
    def positions(self) -> np.ndarray:
        """[B, T] int32, -1 at padding."""
        return positions(self.tokens, self.lengths)


def load(family: str, **runtime: Any) -> Golden:
    """The golden files of a family; `runtime` are fields of `TransformerConfig`, such as scan_layers."""
    config = read_config(FOLDER / family, **runtime)
    params = load_params(FOLDER / family, config, on_one_device(config))
    return Golden(config, params, **load_file(FOLDER / family / "expected.safetensors"))


def on_one_device(config: TransformerConfig) -> Any:
    """Shardings that place every parameter on the first device."""
    here = SingleDeviceSharding(jax.devices()[0])
    return traverse_util.unflatten_dict(dict.fromkeys(sources(config), here))


def positions(tokens: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """[B, T] int32 positions of tokens [B, T], -1 beyond `lengths` [B]."""
    places = np.arange(tokens.shape[1], dtype=np.int32)
    return np.where(places < lengths[:, None], places, np.int32(-1))
