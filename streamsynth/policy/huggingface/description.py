"""`TransformerConfig` -> config.json of a Hugging Face folder."""

from __future__ import annotations

import pathlib
from typing import Any

from streamsynth.errors import UserError
from streamsynth.policy.attention import RopeScaling
from streamsynth.policy.huggingface.architectures import (
    ARCHITECTURES,
    BY_FAMILY,
    Architecture,
    config_from,
    shortest_period,
)
from streamsynth.policy.huggingface.fields import CONFIG_FILE, Fields
from streamsynth.policy.transformer import TransformerConfig

_ACTIVATION_NAMES = {"silu": "silu", "gelu_tanh": "gelu_pytorch_tanh"}
# How a network is run, which its description does not say.
_RUNTIME = ("param_dtype", "compute_dtype", "logit_dtype", "scan_layers", "remat", "gather_to_sample", "lora")


def config_fields(config: TransformerConfig, *, dtype: str, context: int) -> dict[str, Any]:
    """The fields of a config.json that transformers, releases 4.5x and 5, read as this network.

    Rotary positions are spelled the older way, which both releases understand.

    Args:
      config: the network.
      dtype: of the stored parameters, such as "bfloat16".
      context: the longest text the model is for, in tokens.

    Raises:
      UserError: the network does something that its family's config.json has no field for.
    """
    name = BY_FAMILY[config.family]
    architecture = ARCHITECTURES[name]
    fields = _fields(config, name, architecture, dtype, context)
    meant, said = (
        _essence(config),
        _essence(
            config_from(Fields(pathlib.Path(CONFIG_FILE), {**architecture.defaults, **fields}), architecture)
        ),
    )
    for field, value in meant.items():
        if said[field] != value:
            raise UserError(
                f"policy.{field} = {value!r} cannot be exported: in {CONFIG_FILE} of {name} it is "
                f"{said[field]!r}; make it that or choose another policy.family."
            )
    return fields


def _essence(config: TransformerConfig) -> dict[str, Any]:
    """What a network computes, in one spelling only."""
    essence = {k: v for k, v in vars(config).items() if k not in _RUNTIME}
    essence["windows"] = windows = shortest_period(_layer_windows(config))
    essence["attention_scale"] = config.attention_scale or config.head_width**-0.5
    if not any(windows):
        essence["local_rope_theta"] = None
    elif config.local_rope_theta is None and config.rope_scaling is None:
        essence["local_rope_theta"] = config.rope_theta
    return essence


def _fields(
    config: TransformerConfig, name: str, architecture: Architecture, dtype: str, context: int
) -> dict[str, Any]:
    scaling = config.rope_scaling
    fields: dict[str, Any] = {
        "architectures": [name],
        "model_type": architecture.model_type,
        "vocab_size": config.vocab_size,
        "hidden_size": config.width,
        "intermediate_size": config.mlp_width,
        "num_hidden_layers": config.layers,
        "num_attention_heads": config.heads,
        "num_key_value_heads": config.kv_heads,
        "head_dim": config.head_width,
        architecture.activation_field: _ACTIVATION_NAMES[config.activation],
        "rms_norm_eps": config.norm_epsilon,
        "max_position_embeddings": context,
        "tie_word_embeddings": config.tied_embeddings,
        "attention_dropout": 0.0,
        "rope_theta": config.rope_theta,
        "rope_scaling": None if scaling is None else _scaling_fields(scaling),
        "torch_dtype": dtype,
        "use_cache": True,
    }
    if config.family != "qwen2":  # its biases go without saying
        fields["attention_bias"] = False
    if config.family == "llama":
        return fields | {"mlp_bias": False}
    windows = _layer_windows(config)
    sizes = sorted({window for window in windows if window})
    if len(sizes) > 1:
        raise UserError(
            f"policy.windows = {config.windows}: config.json knows one size of window; use one to export."
        )
    fields["layer_types"] = ["sliding_attention" if window else "full_attention" for window in windows]
    if config.family in ("qwen2", "qwen3"):
        full = next((i for i, window in enumerate(windows) if window), config.layers)
        fields |= {"use_sliding_window": bool(sizes), "max_window_layers": full}
        return fields | {"sliding_window": sizes[0] if sizes else None}
    scale = config.head_width**-0.5 if config.attention_scale is None else config.attention_scale
    fields |= {
        # With no local layer its value changes nothing, but transformers wants one.
        "sliding_window": sizes[0] if sizes else 4096,
        "query_pre_attn_scalar": round(scale**-2),
        "attn_logit_softcapping": config.attention_softcap,
        "final_logit_softcapping": config.logit_softcap,
    }
    if config.family == "gemma3":
        local = config.local_rope_theta
        fields["rope_local_base_freq"] = config.rope_theta if local is None else local
    return fields


def _layer_windows(config: TransformerConfig) -> list[int]:
    """The window of every layer, 0 where it sees everything."""
    return [config.windows[i % len(config.windows)] for i in range(config.layers)]


def _scaling_fields(scaling: RopeScaling) -> dict[str, Any]:
    if scaling.kind == "linear":
        return {"rope_type": "linear", "factor": scaling.factor}
    return {
        "rope_type": "llama3",
        "factor": scaling.factor,
        "low_freq_factor": scaling.low_frequency_factor,
        "high_freq_factor": scaling.high_frequency_factor,
        "original_max_position_embeddings": scaling.original_length,
    }
