"""Tiny models of all five families, built by transformers from random weights.

Only `build` needs transformers and torch, so this imports without them.
"""

from __future__ import annotations

from typing import Any

_SHAPE = dict(vocab_size=61, hidden_size=24, intermediate_size=40, max_position_embeddings=64)
# Heads that together are wider than the network.
_GROUPED = dict(num_attention_heads=4, num_key_value_heads=2, head_dim=8)
_LLAMA3 = dict(
    rope_type="llama3",
    rope_theta=500_000.0,
    factor=8.0,
    low_freq_factor=1.0,
    high_freq_factor=4.0,
    original_max_position_embeddings=16,
)

# name -> (transformers' class of config, of model, fields). The first of a family is its golden one.
# Windows are shorter than the texts, and in "gemma2" and "gemma3" periods leave layers over.
CASES: dict[str, tuple[str, str, dict[str, Any]]] = {
    "llama": (
        "LlamaConfig",
        "LlamaForCausalLM",
        dict(num_hidden_layers=2, **_GROUPED, rope_parameters=_LLAMA3, tie_word_embeddings=True),
    ),
    "llama_untied": (
        "LlamaConfig",
        "LlamaForCausalLM",
        dict(num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=4, rms_norm_eps=1e-5),
    ),
    "llama_linear": (
        "LlamaConfig",
        "LlamaForCausalLM",
        dict(
            num_hidden_layers=1,
            num_attention_heads=4,
            num_key_value_heads=1,
            rope_parameters=dict(rope_type="linear", rope_theta=10_000.0, factor=4.0),
        ),
    ),
    "qwen2": (
        "Qwen2Config",
        "Qwen2ForCausalLM",
        dict(num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, tie_word_embeddings=False),
    ),
    "qwen2_window": (
        "Qwen2Config",
        "Qwen2ForCausalLM",
        dict(
            num_hidden_layers=3,
            num_attention_heads=2,
            num_key_value_heads=2,
            tie_word_embeddings=True,
            use_sliding_window=True,
            sliding_window=5,
            max_window_layers=1,
        ),
    ),
    "qwen3": (
        "Qwen3Config",
        "Qwen3ForCausalLM",
        dict(num_hidden_layers=2, **_GROUPED, tie_word_embeddings=True),
    ),
    "gemma2": (
        "Gemma2Config",
        "Gemma2ForCausalLM",
        dict(
            num_hidden_layers=3,
            **_GROUPED,
            sliding_window=5,
            query_pre_attn_scalar=10,
            attn_logit_softcapping=2.0,
            final_logit_softcapping=3.0,
        ),
    ),
    "gemma2_uncapped": (
        "Gemma2Config",
        "Gemma2ForCausalLM",
        dict(
            num_hidden_layers=2,
            **_GROUPED,
            sliding_window=4,
            query_pre_attn_scalar=8,
            attn_logit_softcapping=None,
            final_logit_softcapping=None,
            tie_word_embeddings=False,
        ),
    ),
    "gemma3": (
        "Gemma3TextConfig",
        "Gemma3ForCausalLM",
        dict(
            num_hidden_layers=5,
            **_GROUPED,
            sliding_window=5,
            query_pre_attn_scalar=12,
            layer_types=["sliding_attention", "full_attention"] * 2 + ["sliding_attention"],
            rope_parameters={
                "full_attention": dict(rope_type="linear", rope_theta=1_000_000.0, factor=8.0),
                "sliding_attention": dict(rope_type="default", rope_theta=10_000.0),
            },
        ),
    ),
    "gemma3_period": (
        "Gemma3TextConfig",
        "Gemma3ForCausalLM",
        dict(num_hidden_layers=8, **_GROUPED, sliding_window=4, query_pre_attn_scalar=8),
    ),
}
GOLDEN = ("llama", "qwen2", "qwen3", "gemma2", "gemma3")


def build(case: str, seed: int = 0) -> Any:
    """A model in float32 and evaluation mode, with weights that are far from what they start from."""
    import torch
    import transformers

    config, model, fields = CASES[case]
    torch.manual_seed(seed)
    config = getattr(transformers, config)(
        **_SHAPE, **fields, attn_implementation="eager", bos_token_id=1, eos_token_id=2, pad_token_id=0
    )
    network = getattr(transformers, model)(config).eval()
    with torch.no_grad():
        for name, weight in network.named_parameters():
            if "norm" in name:
                weight += 0.3 * torch.randn_like(weight)
            else:
                weight.copy_((0.5 if name.endswith("bias") else 0.25) * torch.randn_like(weight))
    return network


def logits(network: Any, tokens: Any, lengths: Any = None) -> Any:
    """[B, T, V] float32 logits of tokens [B, T], with right padding beyond `lengths` [B] masked."""
    import numpy as np
    import torch

    tokens = np.asarray(tokens)
    mask = None if lengths is None else np.arange(tokens.shape[1]) < np.asarray(lengths)[:, None]
    with torch.no_grad():
        out = network(
            torch.tensor(tokens, dtype=torch.long),
            attention_mask=None if mask is None else torch.tensor(mask, dtype=torch.long),
            use_cache=False,
        )
    return out.logits.float().numpy()
