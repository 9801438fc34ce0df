"""A policy on disk: safetensors, its shape as JSON, its tokenizer."""

from __future__ import annotations

import dataclasses
import json
import os
import pathlib
from typing import Any

import jax
import numpy as np
from flax import traverse_util
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file

from streamsynth.errors import UserError
from streamsynth.policy.tokenizer import Tokenizer
from streamsynth.policy.transformer import Transformer, TransformerConfig, init_params
from streamsynth.runtime.files import atomic_write


@dataclasses.dataclass(frozen=True)
class Policy:
    """A network, its parameters and its tokenizer; `hash` names what they follow from."""

    model: Transformer
    params: Any
    tokenizer: Tokenizer
    hash: str


def save_policy(directory: str | os.PathLike[str], policy: Policy) -> None:
    """Writes a policy; policy.json comes last and says that the folder is whole."""
    directory = pathlib.Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    flat = traverse_util.flatten_dict(jax.device_get(policy.params), sep="/")
    save_file({k: np.ascontiguousarray(v) for k, v in flat.items()}, directory / "params.safetensors.new")
    os.replace(directory / "params.safetensors.new", directory / "params.safetensors")
    atomic_write(directory / "tokenizer.model", policy.tokenizer.model)
    shape = {"hash": policy.hash, "transformer": dataclasses.asdict(policy.model.config)}
    atomic_write(directory / "policy.json", json.dumps(shape, indent=1) + "\n")


def has_policy(directory: str | os.PathLike[str]) -> bool:
    """Whether a whole policy lies there."""
    return (pathlib.Path(directory) / "policy.json").exists()


def load_policy(directory: str | os.PathLike[str]) -> Policy:
    """Reads what `save_policy` wrote.

    Raises:
      UserError: a file is missing or damaged, or the files do not belong together.
    """
    directory = pathlib.Path(directory)
    try:
        shape = json.loads((directory / "policy.json").read_text())
        params = load_file(directory / "params.safetensors")
        tokenizer = Tokenizer((directory / "tokenizer.model").read_bytes())
        config, digest = TransformerConfig(**shape["transformer"]), str(shape["hash"])
        _check_shapes(config, tokenizer, params)
    except (OSError, ValueError, KeyError, TypeError, RuntimeError, SafetensorError, UserError) as error:
        # SentencePiece says RuntimeError to a damaged model.
        raise UserError(
            f"{directory} holds no readable policy ({error}): remove the folder, and it is made anew."
        ) from error
    return Policy(Transformer(config), traverse_util.unflatten_dict(params, sep="/"), tokenizer, digest)


def _check_shapes(config: TransformerConfig, tokenizer: Tokenizer, params: dict[str, np.ndarray]) -> None:
    wanted = traverse_util.flatten_dict(
        jax.eval_shape(lambda: init_params(config, jax.random.key(0))), sep="/"
    )
    if {name: leaf.shape for name, leaf in wanted.items()} != {name: p.shape for name, p in params.items()}:
        raise ValueError("the parameters have another shape than policy.json says")
    if tokenizer.vocab_size != config.vocab_size:
        raise ValueError("the tokenizer has another vocabulary than policy.json says")
