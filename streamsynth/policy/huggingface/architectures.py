"""The known architectures, and config.json of a Hugging Face folder -> `TransformerConfig`.

The rotary positions come in two spellings: `rope_theta` and `rope_scaling` up to release 4 of transformers,
`rope_parameters` from release 5 on. Both are read.
"""

from __future__ import annotations

import dataclasses
import json
import os
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

from streamsynth.errors import UserError
from streamsynth.policy.attention import RopeScaling
from streamsynth.policy.families import FAMILIES
from streamsynth.policy.huggingface.fields import CONFIG_FILE, Fields, read_json
from streamsynth.policy.transformer import TransformerConfig

ACTIVATIONS = {"silu": "silu", "swish": "silu", "gelu_pytorch_tanh": "gelu_tanh"}

_COMMON = {
    "rms_norm_eps": 1e-6,
    "rope_theta": 10_000.0,
    "tie_word_embeddings": False,
    "max_position_embeddings": 2048,
    "num_key_value_heads": None,
    "head_dim": None,
}
_QWEN = _COMMON | {
    "max_position_embeddings": 32768,
    "use_sliding_window": False,
    "sliding_window": 4096,
    "max_window_layers": 28,
}
_GEMMA = _COMMON | {
    "hidden_size": 2304,
    "num_hidden_layers": 26,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "intermediate_size": 9216,
    "head_dim": 256,
    "tie_word_embeddings": True,
    "query_pre_attn_scalar": 256,
    "sliding_window": 4096,
}


@dataclasses.dataclass(frozen=True)
class Architecture:
    """One row of the table of architectures.

    model_type: its name in `config.json`.   family: its row in `families.FAMILIES`.
    defaults: what a field means that `config.json` leaves out, as transformers has it.
    activation_field, activation: the field that names the activation, and what it is when left out.
    """

    model_type: str
    family: str
    defaults: Mapping[str, Any]
    activation_field: str = "hidden_act"
    activation: str = "silu"


ARCHITECTURES = {
    "LlamaForCausalLM": Architecture("llama", "llama", _COMMON),
    "Qwen2ForCausalLM": Architecture("qwen2", "qwen2", _QWEN),
    "Qwen3ForCausalLM": Architecture("qwen3", "qwen3", _QWEN | {"head_dim": 128}),
    "Gemma2ForCausalLM": Architecture(
        "gemma2",
        "gemma2",
        _GEMMA
        | {
            "vocab_size": 256_000,
            "max_position_embeddings": 8192,
            "attn_logit_softcapping": 50.0,
            "final_logit_softcapping": 30.0,
            "sliding_window_pattern": 2,
        },
        "hidden_activation",
        "gelu_pytorch_tanh",
    ),
    "Gemma3ForCausalLM": Architecture(
        "gemma3_text",
        "gemma3",
        _GEMMA
        | {
            "vocab_size": 262_208,
            "max_position_embeddings": 131_072,
            "rope_theta": 1_000_000.0,
            "rope_local_base_freq": 10_000.0,
            "sliding_window_pattern": 6,
        },
        "hidden_activation",
        "gelu_pytorch_tanh",
    ),
}
# Its language model alone: the field of its config.json that describes it is read in its stead.
VISION_LANGUAGE = "Gemma3ForConditionalGeneration"
BY_FAMILY = {row.family: name for name, row in ARCHITECTURES.items()}


def read_config(directory: str | os.PathLike[str], **runtime: Any) -> TransformerConfig:
    """The network that a folder's config.json describes.

    Args:
      directory: the folder.
      runtime: fields of `TransformerConfig` that no config.json knows (dtypes, scan_layers, remat, lora).

    Raises:
      UserError: it is missing, names an architecture or a field's value that is not supported, or lacks
        a field.
    """
    fields, architecture = _language_model(pathlib.Path(directory) / CONFIG_FILE)
    return config_from(fields, architecture, **runtime)


def config_from(fields: Fields, architecture: Architecture, **runtime: Any) -> TransformerConfig:
    """The network that the fields of a config.json describe, see `read_config`."""
    number, get = fields.number, fields.get
    _refuse(fields, architecture)
    activation = get(architecture.activation_field) or architecture.activation
    if activation not in ACTIVATIONS:
        raise fields.wrong(architecture.activation_field, f"known are {', '.join(ACTIVATIONS)}.")
    width, heads = number("hidden_size"), number("num_attention_heads")
    head_width = width // heads if get("head_dim") is None else number("head_dim")
    scalar = get("query_pre_attn_scalar")
    rope_theta, local_rope_theta, rope_scaling = _rope(fields, architecture)
    read = dict(
        vocab_size=number("vocab_size"),
        width=width,
        layers=number("num_hidden_layers"),
        heads=heads,
        kv_heads=heads if get("num_key_value_heads") is None else number("num_key_value_heads"),
        head_width=head_width,
        mlp_width=number("intermediate_size"),
        norm_epsilon=number("rms_norm_eps", float),
        activation=ACTIVATIONS[activation],
        tied_embeddings=bool(get("tie_word_embeddings")),
        attention_scale=None
        if scalar in (None, head_width)
        else number("query_pre_attn_scalar", float) ** -0.5,
        attention_softcap=_optional(fields, "attn_logit_softcapping"),
        logit_softcap=_optional(fields, "final_logit_softcapping"),
        windows=shortest_period(_layer_windows(fields, architecture)),
        rope_theta=rope_theta,
        local_rope_theta=local_rope_theta,
        rope_scaling=rope_scaling,
    )
    family = architecture.family
    return TransformerConfig(**{**FAMILIES[family], **read, "family": family, **runtime})


def read_context(directory: str | os.PathLike[str]) -> int:
    """The longest text, in tokens, that a folder's model was made for (`max_position_embeddings`)."""
    fields, _ = _language_model(pathlib.Path(directory) / CONFIG_FILE)
    return fields.number("max_position_embeddings")


def check_whole(directory: str | os.PathLike[str]) -> None:
    """Raises UserError where the folder's model is more than the language model that is read from it.

    An adapter's tensors would bear other names there, and PEFT would pass over them with a warning.
    """
    path = pathlib.Path(directory) / CONFIG_FILE
    if VISION_LANGUAGE in (read_json(path, "a description of a model").get("architectures") or ()):
        raise UserError(
            f"{directory} holds a model that sees images, and an adapter of its language model would not "
            "load on it: export the whole language model, without --adapter."
        )


def shortest_period(pattern: Sequence[int]) -> tuple[int, ...]:
    """The shortest tuple whose repetition, cut to its length, is `pattern`."""
    for length in range(1, len(pattern)):
        if all(pattern[i] == pattern[i % length] for i in range(length, len(pattern))):
            return tuple(pattern[:length])
    return tuple(pattern)


def _language_model(path: pathlib.Path) -> tuple[Fields, Architecture]:
    """The fields that describe the language model, completed with the defaults, and its architecture."""
    fields = read_json(path, "a description of a model")
    named = fields.get("architectures") or [
        name for name, row in ARCHITECTURES.items() if row.model_type == fields.get("model_type")
    ]
    name = named[0] if isinstance(named, list) and named else None
    quantized = fields.get("quantization_config")
    if name == VISION_LANGUAGE:
        text = fields.get("text_config")
        if not isinstance(text, dict):
            raise UserError(f"{path} has no field text_config: take the file that came with the weights.")
        # What the outer level says of the embeddings holds for both parts.
        shared = {key: fields[key] for key in ("tie_word_embeddings",) if fields.get(key) is not None}
        fields, name = {**shared, **text}, "Gemma3ForCausalLM"
    if name not in ARCHITECTURES:
        known = ", ".join([*ARCHITECTURES, VISION_LANGUAGE])
        what = json.dumps(fields.get("architectures") or fields.get("model_type"))
        raise UserError(f"{path}: architecture {what} is not supported: name a folder of one of {known}.")
    architecture = ARCHITECTURES[name]
    quantized = quantized or fields.get("quantization_config")
    return Fields(path, {**architecture.defaults, **fields, "quantization_config": quantized}), architecture


def _refuse(fields: Fields, architecture: Architecture) -> None:
    """Raises UserError where a field asks for mathematics that the network does not have."""
    if fields.get("quantization_config"):
        method = fields.get("quantization_config")
        method = method.get("quant_method") if isinstance(method, dict) else method
        raise UserError(
            f"{fields.path}: quantization_config ({method}) means quantized weights: name a folder with the "
            "weights in bfloat16, float16 or float32."
        )
    for name in ("attention_bias", "mlp_bias", "use_bidirectional_attention"):
        if fields.get(name):
            raise fields.wrong(name, "only false is; name a folder of a model without it.")
    if architecture.family == "gemma3" and fields.get("attn_logit_softcapping") is not None:
        raise fields.wrong("attn_logit_softcapping", "Gemma 3 has none, set it to null.")


def _optional(fields: Fields, name: str) -> float | None:
    return None if fields.get(name) is None else fields.number(name, float)


def _layer_windows(fields: Fields, architecture: Architecture) -> list[int]:
    """The window of every layer, 0 where it sees everything."""
    layers = fields.number("num_hidden_layers")
    if architecture.family == "llama":
        return [0] * layers
    sliding = fields.get("sliding_window") if fields.get("use_sliding_window") is not False else None
    types = fields.get("layer_types")
    if types is None:
        if fields.get("sliding_window_pattern") is not None:
            pattern = fields.number("sliding_window_pattern")
            local = [(i + 1) % pattern != 0 for i in range(layers)]
        else:
            first = fields.get("max_window_layers")
            if not isinstance(first, int):
                raise fields.wrong("max_window_layers", "it must be a whole number.")
            local = [sliding is not None and i >= first for i in range(layers)]
        types = ["sliding_attention" if here else "full_attention" for here in local]
    if not isinstance(types, list) or len(types) != layers:
        raise fields.wrong("layer_types", f"it must be a list of num_hidden_layers = {layers} names.")
    if unknown := sorted(set(map(str, types)) - {"full_attention", "sliding_attention"}):
        raise fields.wrong("layer_types", f"{unknown[0]} is none of full_attention, sliding_attention.")
    if "sliding_attention" not in types:
        return [0] * layers
    if sliding is None:
        raise fields.wrong("sliding_window", "layer_types names sliding_attention, so it must be a number.")
    window = fields.number("sliding_window")
    return [window if kind == "sliding_attention" else 0 for kind in types]


def _rope(fields: Fields, architecture: Architecture) -> tuple[float, float | None, RopeScaling | None]:
    """(base, base of the local layers, scaling) of the rotary positions."""
    parameters = fields.get("rope_parameters") or {}
    nested = isinstance(parameters.get("full_attention"), dict)
    local = parameters.get("sliding_attention") or {}
    if (nested or local) and architecture.family != "gemma3":
        raise fields.wrong("rope_parameters", "only Gemma 3 may have others for each type of layer.")
    whole = parameters.get("full_attention") or {} if nested or local else parameters
    # transformers reads rope_scaling first, too, where a file has both.
    whole = {**whole, **(fields.get("rope_scaling") or {})}
    theta = fields.number("rope_theta", float, fields={**fields.values, **whole})
    scaling = _scaling(fields, whole)
    if architecture.family != "gemma3":
        return theta, None, scaling
    if _scaling(fields, local) is not None:
        raise fields.wrong("rope_parameters", "layers of type sliding_attention must have rope_type default.")
    named = {"rope_theta": fields.get("rope_local_base_freq"), **local}
    return theta, fields.number("rope_theta", float, fields=named), scaling


def _scaling(fields: Fields, rope: Mapping[str, Any]) -> RopeScaling | None:
    kind = rope.get("rope_type", rope.get("type", "default"))
    if rope.get("partial_rotary_factor", 1.0) != 1.0 or fields.get("partial_rotary_factor") not in (
        None,
        1.0,
    ):
        raise UserError(f"{fields.path}: partial_rotary_factor is not supported: only 1.0 is.")
    if kind == "default":
        return None
    if kind == "linear":
        return RopeScaling("linear", fields.number("factor", float, fields=rope))
    if kind == "llama3":
        rope = {"original_max_position_embeddings": fields.get("max_position_embeddings"), **rope}
        return RopeScaling(
            "llama3",
            factor=fields.number("factor", float, fields=rope),
            low_frequency_factor=fields.number("low_freq_factor", float, fields=rope),
            high_frequency_factor=fields.number("high_freq_factor", float, fields=rope),
            original_length=fields.number("original_max_position_embeddings", fields=rope),
        )
    raise UserError(
        f"{fields.path}: rope_type = {json.dumps(kind)} is not supported: known are default, linear, llama3."
    )
