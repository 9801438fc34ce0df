"""What the config.json of published models says of their networks, so that one can be planned with unfetched.

A folder of weights is named as its model is on the Hugging Face hub, with or without the organisation, and
the instruction-tuned model has the network of the plain one.
"""

from __future__ import annotations

import pathlib
from typing import Any

from streamsynth.policy.huggingface.architectures import ARCHITECTURES, config_from
from streamsynth.policy.huggingface.fields import CONFIG_FILE, Fields
from streamsynth.policy.transformer import TransformerConfig

_GEMMA2 = {
    "architectures": ["Gemma2ForCausalLM"],
    "vocab_size": 256_000,
    "head_dim": 256,
    "query_pre_attn_scalar": 256,
    "sliding_window": 4096,
    "max_position_embeddings": 8192,
}

# By name on the hub, without "-it" or "-Instruct".
PUBLISHED: dict[str, dict[str, Any]] = {
    "gemma-2-2b": _GEMMA2
    | {
        "hidden_size": 2304,
        "num_hidden_layers": 26,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "intermediate_size": 9216,
    },
    "gemma-2-9b": _GEMMA2
    | {
        "hidden_size": 3584,
        "num_hidden_layers": 42,
        "num_attention_heads": 16,
        "num_key_value_heads": 8,
        "intermediate_size": 14_336,
    },
    "gemma-2-27b": _GEMMA2
    | {
        "hidden_size": 4608,
        "num_hidden_layers": 46,
        "num_attention_heads": 32,
        "num_key_value_heads": 16,
        "intermediate_size": 36_864,
        "head_dim": 128,
        "query_pre_attn_scalar": 144,
    },
    "gemma-3-270m": {
        "architectures": ["Gemma3ForCausalLM"],
        "vocab_size": 262_144,
        "hidden_size": 640,
        "num_hidden_layers": 18,
        "num_attention_heads": 4,
        "num_key_value_heads": 1,
        "intermediate_size": 2048,
        "head_dim": 256,
        "query_pre_attn_scalar": 256,
        "sliding_window": 512,
        "max_position_embeddings": 32_768,
    },
    "Llama-3.1-8B": {
        "architectures": ["LlamaForCausalLM"],
        "vocab_size": 128_256,
        "hidden_size": 4096,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "intermediate_size": 14_336,
        "rms_norm_eps": 1e-5,
        "rope_theta": 500_000.0,
        "rope_scaling": {
            "rope_type": "llama3",
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 8192,
        },
        "max_position_embeddings": 131_072,
    },
    "Qwen2.5-7B": {
        "architectures": ["Qwen2ForCausalLM"],
        "vocab_size": 152_064,
        "hidden_size": 3584,
        "num_hidden_layers": 28,
        "num_attention_heads": 28,
        "num_key_value_heads": 4,
        "intermediate_size": 18_944,
        "rope_theta": 1_000_000.0,
        "max_position_embeddings": 32_768,
    },
    "Qwen3-4B": {
        "architectures": ["Qwen3ForCausalLM"],
        "vocab_size": 151_936,
        "hidden_size": 2560,
        "num_hidden_layers": 36,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "intermediate_size": 9728,
        "head_dim": 128,
        "rope_theta": 1_000_000.0,
        "tie_word_embeddings": True,
        "max_position_embeddings": 40_960,
    },
}


def model_name(folder: str) -> str | None:
    """The row of `PUBLISHED` that a folder of weights is named after, or None."""
    name = pathlib.PurePath(folder).name
    for suffix in ("-it", "-Instruct"):
        name = name.removesuffix(suffix)
    by_lower = {row.lower(): row for row in PUBLISHED}
    return by_lower.get(name.lower())


def published_config(name: str, **runtime: Any) -> TransformerConfig:
    """The network of a row of `PUBLISHED`; `runtime` as for `architectures.read_config`."""
    fields = PUBLISHED[name]
    architecture = ARCHITECTURES[fields["architectures"][0]]
    whole = Fields(pathlib.Path(name) / CONFIG_FILE, {**architecture.defaults, **fields})
    return config_from(whole, architecture, **runtime)
