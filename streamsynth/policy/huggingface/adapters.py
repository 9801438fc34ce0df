"""LoRA adapters in the folder format of PEFT."""

from __future__ import annotations

import os
import pathlib
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np
from flax import traverse_util

from streamsynth.errors import UserError
from streamsynth.policy.huggingface.fields import read_json, write_json
from streamsynth.policy.huggingface.names import PROJECTIONS, plain_name, projection_shape
from streamsynth.policy.huggingface.tensors import Tensor, read_file, write_file
from streamsynth.policy.huggingface.writing import Entry, fetch, file_shape
from streamsynth.policy.lora import LoraConfig
from streamsynth.policy.transformer import TransformerConfig, layer_place

ADAPTER_CONFIG = "adapter_config.json"
ADAPTER_WEIGHTS = "adapter_model.safetensors"

_ROOT = "base_model.model."
_PARTS = {"a": "lora_A", "b": "lora_B"}
# Variants of LoRA that compute something else, by the field that asks for them.
_VARIANTS = (
    "alpha_pattern",
    "alora_invocation_tokens",
    "fan_in_fan_out",
    "layer_replication",
    "layers_to_transform",
    "lora_bias",
    "modules_to_save",
    "rank_pattern",
    "target_parameters",
    "trainable_token_indices",
    "use_dora",
    "use_qalora",
    "use_rslora",
)


def save_adapter(
    directory: str | os.PathLike[str], config: TransformerConfig, adapter: Any, *, base: str
) -> None:
    """Writes an adapter that PEFT puts on the model in transformers; adapter_config.json comes last.

    Where there are several processes, all must call this, and the first one writes.

    Args:
      directory: the folder, made if missing.
      config: the network; its `lora` says how the adapter counts.
      adapter: the tree of the collection "lora", on any devices.
      base: name or path of the model that the adapter belongs to.
    """
    lora = config.lora
    if lora is None:
        raise ValueError("a network without lora has no adapter")
    folder = pathlib.Path(directory)
    leaves = traverse_util.flatten_dict(adapter)
    entries = [
        Entry(name, leaves[path], row, transposed=True) for name, path, row, _ in _tensors(config, lora)
    ]
    arrays = ((entry.name, fetch(entry)) for entry in entries)
    if jax.process_index() > 0:
        for _ in arrays:  # its part in gathering them
            pass
        return
    folder.mkdir(parents=True, exist_ok=True)
    (folder / ADAPTER_CONFIG).unlink(missing_ok=True)
    layout = {entry.name: (np.dtype(entry.leaf.dtype), file_shape(entry)) for entry in entries}
    write_file(folder / ADAPTER_WEIGHTS, layout, arrays)
    fields = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "r": lora.rank,
        "lora_alpha": int(lora.alpha) if float(lora.alpha).is_integer() else lora.alpha,
        "lora_dropout": 0.0,
        "target_modules": [PROJECTIONS[module].rpartition(".")[2] for module in lora.modules],
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
    }
    write_json(folder / ADAPTER_CONFIG, fields)


def load_adapter(
    directory: str | os.PathLike[str], config: TransformerConfig
) -> tuple[LoraConfig, dict[str, Any]]:
    """Reads an adapter, of PEFT's or `save_adapter`'s making, for the network of `config`.

    Returns:
      How it counts, and the tree of the collection "lora" in float32 on the host.

    Raises:
      UserError: a file is missing or damaged, the adapter is another variant than plain LoRA, lies on other
        matrices than the projections, or does not fit the network.
    """
    folder = pathlib.Path(directory)
    path = folder / ADAPTER_CONFIG
    fields = read_json(path, "a description of an adapter")
    if fields.get("peft_type") != "LORA":
        raise UserError(f"{path}: peft_type = {fields.get('peft_type')!r} is not supported: only LORA is.")
    for name in _VARIANTS:
        if fields.get(name):
            raise UserError(f"{path}: {name} = {fields[name]!r} is not supported: only plain LoRA is.")
    if fields.get("bias", "none") != "none":
        raise UserError(f"{path}: bias = {fields['bias']!r} is not supported: only 'none' is.")
    rank, alpha = fields.get("r"), fields.get("lora_alpha")
    for name, value, kinds in (("r", rank, int), ("lora_alpha", alpha, int | float)):
        if not isinstance(value, kinds) or isinstance(value, bool) or value <= 0:
            raise UserError(f"{path}: {name} = {value!r} must be a positive number.")
    tensors = {
        _ROOT + (plain_name(name.removeprefix(_ROOT)) or name): tensor
        for name, tensor in read_file(folder / ADAPTER_WEIGHTS).items()
    }
    present = tuple(
        module
        for module, name in PROJECTIONS.items()
        if any(f".{name}.lora_" in tensor for tensor in tensors)
    )
    if not present:
        raise UserError(f"{folder / ADAPTER_WEIGHTS} adapts no projection of a decoder: name another folder.")
    lora = LoraConfig(rank, float(alpha), present)
    return lora, _read(folder, config, lora, tensors)


def _read(
    folder: pathlib.Path, config: TransformerConfig, lora: LoraConfig, tensors: dict[str, Tensor]
) -> dict[str, Any]:
    rows: dict[tuple[str, ...], list[np.ndarray]] = {}
    stacked = {}
    for name, path, row, shape in _tensors(config, lora):
        tensor = tensors.pop(name, None)
        if tensor is None:
            raise UserError(
                f"{folder / ADAPTER_WEIGHTS} lacks tensor {name}: name an adapter of this network whose "
                "modules are the same in every layer."
            )
        if tensor.shape != shape:
            raise UserError(
                f"{tensor.path}: tensor {tensor.name} has shape {list(tensor.shape)}, but the network and "
                f"{ADAPTER_CONFIG} ask for {list(shape)}: name an adapter of this network."
            )
        rows.setdefault(path, []).append(np.concatenate(list(tensor.blocks())).astype(np.float32).T)
        stacked[path] = row is not None
    for tensor in tensors.values():
        raise UserError(
            f"{tensor.path}: tensor {tensor.name} belongs to no projection of this network: name an adapter "
            "of this network."
        )
    adapter = {path: np.stack(parts) if stacked[path] else parts[0] for path, parts in rows.items()}
    return traverse_util.unflatten_dict(adapter)


def _tensors(
    config: TransformerConfig, lora: LoraConfig
) -> Iterator[tuple[str, tuple[str, ...], int | None, tuple[int, int]]]:
    """(name, path in the tree, row of its leading axis or None, shape in the file) of every tensor."""
    for layer in range(config.layers):
        place, row = layer_place(config, layer)
        for module in lora.modules:
            fan_out, fan_in = projection_shape(config, module)
            shapes = {"a": (lora.rank, fan_in), "b": (fan_out, lora.rank)}
            for part, shape in shapes.items():
                name = f"{_ROOT}model.layers.{layer}.{PROJECTIONS[module]}.{_PARTS[part]}.weight"
                yield name, (*place, module, part), row, shape
