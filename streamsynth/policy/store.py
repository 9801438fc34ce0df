"""A policy on disk: safetensors, its shape as JSON, its tokenizer; or the name of the weights it has."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
from typing import Any

import numpy as np
from flax import traverse_util
from jax.sharding import Mesh
from safetensors import SafetensorError
from safetensors.numpy import load_file, save

from streamsynth.errors import UserError
from streamsynth.policy.attention import RopeScaling
from streamsynth.policy.huggingface.architectures import read_config, read_context
from streamsynth.policy.huggingface.fields import GENERATION_FILE
from streamsynth.policy.huggingface.reading import content_hash, load_params
from streamsynth.policy.lora import LoraConfig
from streamsynth.policy.tokenizer import MarkerTokenizer, Tokenizer
from streamsynth.policy.tokenizer_files import load_tokenizer
from streamsynth.policy.transformer import Transformer, TransformerConfig, logical_axes, param_shapes
from streamsynth.runtime import arrays, hosts
from streamsynth.runtime import mesh as mesh_lib
from streamsynth.runtime.files import as_path, atomic_write, local_copy


@dataclasses.dataclass(frozen=True)
class Policy:
    """A network, its parameters and its tokenizer.

    hash: names what they follow from.   origin: the folder of named weights they were read from, or "".
    context: the longest text that named weights were made for, in tokens; 0 where nothing says it.
    """

    model: Transformer
    params: Any
    tokenizer: Tokenizer
    hash: str
    origin: str = ""
    context: int = 0

    @property
    def variables(self) -> dict[str, Any]:
        """What the network is applied with."""
        return {"params": self.params}

    def on_mesh(self, mesh: Mesh) -> Policy:
        """The policy with its parameters where their shards lie on a mesh."""
        shardings = mesh_lib.param_shardings(self.params, logical_axes(self.model.config), mesh)
        return dataclasses.replace(self, params=arrays.place(self.params, shardings))


def save_policy(directory: str | os.PathLike[str], policy: Policy) -> None:
    """Writes a policy; policy.json comes last and says that the folder is whole.

    Of one with an origin only that and the hash are written: its weights stay where they are.
    """
    # Those of several hosts are gathered by all, and written by one.
    params = {} if policy.origin else arrays.fetch(policy.params, here=hosts.first())
    if not hosts.first():
        return
    directory = as_path(directory)
    card: dict[str, Any] = {"hash": policy.hash, "context": policy.context}
    if policy.origin:
        card["origin"] = policy.origin
    else:
        flat = traverse_util.flatten_dict(params, sep="/")
        content = save({name: np.ascontiguousarray(array) for name, array in flat.items()})
        atomic_write(directory / "params.safetensors", content)
        for name, content in policy.tokenizer.files().items():
            atomic_write(directory / name, content)
        if not isinstance(policy.tokenizer, MarkerTokenizer):
            # A tokenizer's own files do not name all tokens that end a text.
            stops = json.dumps({"eos_token_id": policy.tokenizer.stops})
            atomic_write(directory / GENERATION_FILE, stops + "\n")
        card["transformer"] = dataclasses.asdict(policy.model.config)
    atomic_write(directory / "policy.json", json.dumps(card, indent=1) + "\n")


def has_policy(directory: str | os.PathLike[str]) -> bool:
    """Whether a whole policy lies there."""
    return (as_path(directory) / "policy.json").exists()


def named_weights(directory: str | os.PathLike[str]) -> str | None:
    """The hash of the named weights that a saved policy refers to; None if it holds its own.

    Raises:
      UserError: policy.json cannot be read.
    """
    try:
        card = json.loads((as_path(directory) / "policy.json").read_text())
        return str(card["hash"]) if "origin" in card else None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise _unreadable(directory, error) from error


def load_policy(directory: str | os.PathLike[str]) -> Policy:
    """Reads what `save_policy` wrote of a policy without an origin.

    Raises:
      UserError: a file is missing or damaged, or the files do not belong together.
    """
    directory = as_path(directory)
    try:
        card = json.loads((directory / "policy.json").read_text())
        config, digest = _config(card["transformer"]), str(card["hash"])
        context = int(card["context"])
        with local_copy(directory / "params.safetensors") as path:
            params = load_file(path)
        tokenizer = load_tokenizer(directory)
        _check_shapes(config, params)
        if isinstance(tokenizer, MarkerTokenizer) and tokenizer.vocab_size != config.vocab_size:
            raise ValueError("the tokenizer has another vocabulary than policy.json says")
    except (OSError, ValueError, KeyError, TypeError, SafetensorError, UserError) as error:
        raise _unreadable(directory, error) from error
    params = traverse_util.unflatten_dict(params, sep="/")
    return Policy(Transformer(config), params, tokenizer, digest, context=context)


def read_weights(directory: str | os.PathLike[str], mesh: Mesh, **choices: Any) -> Policy:
    """The policy of a Hugging Face folder: its network, weights and tokenizer.

    Args:
      directory: the folder.
      mesh: the weights go straight to where their shards lie on it.
      **choices: what the folder leaves open, see `families.choices`.

    Raises:
      UserError: a file is missing, damaged or not supported, or the mesh does not divide the network.
    """
    network = read_config(directory, **choices)
    shardings = mesh_lib.param_shardings(param_shapes(network), logical_axes(network), mesh)
    tokenizer = load_tokenizer(directory)
    params = load_params(directory, network, shardings)
    digest = hashlib.sha256(content_hash(directory).encode())
    for name, content in sorted({**tokenizer.files(), "stops": repr(tokenizer.stops).encode()}.items()):
        digest.update(name.encode() + hashlib.sha256(content).digest())
    return Policy(
        Transformer(network),
        params,
        tokenizer,
        digest.hexdigest()[:16],
        origin=str(directory),
        context=read_context(directory),
    )


def _unreadable(directory: str | os.PathLike[str], error: Exception) -> UserError:
    return UserError(
        f"{directory} holds no readable policy ({error}): remove the folder, and it is made anew."
    )


def _config(values: dict[str, Any]) -> TransformerConfig:
    """The config from what JSON made of it."""
    scaling, lora = values.get("rope_scaling"), values.get("lora")
    return TransformerConfig(
        **{
            **values,
            "windows": tuple(values["windows"]),
            "rope_scaling": RopeScaling(**scaling) if scaling else None,
            "lora": LoraConfig(**{**lora, "modules": tuple(lora["modules"])}) if lora else None,
        }
    )


def _check_shapes(config: TransformerConfig, params: dict[str, np.ndarray]) -> None:
    wanted = traverse_util.flatten_dict(param_shapes(config), sep="/")
    if {name: leaf.shape for name, leaf in wanted.items()} != {name: p.shape for name, p in params.items()}:
        raise ValueError("the parameters have another shape than policy.json says")
