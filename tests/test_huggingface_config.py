"""config.json of the known architectures, as transformers understands it, and back."""

from __future__ import annotations

import dataclasses
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from streamsynth.errors import UserError
from streamsynth.policy.attention import RopeScaling
from streamsynth.policy.families import FAMILIES
from streamsynth.policy.huggingface.architectures import (
    check_whole,
    read_config,
    read_context,
    shortest_period,
)
from streamsynth.policy.huggingface.description import config_fields
from streamsynth.policy.tokenizer_files import read_settings
from streamsynth.policy.transformer import TransformerConfig

# What the published files of these models say, without what does not matter here.
LLAMA_31_8B = {
    "architectures": ["LlamaForCausalLM"],
    "attention_bias": False,
    "eos_token_id": [128001, 128008, 128009],
    "hidden_act": "silu",
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "max_position_embeddings": 131072,
    "mlp_bias": False,
    "model_type": "llama",
    "num_attention_heads": 32,
    "num_hidden_layers": 32,
    "num_key_value_heads": 8,
    "rms_norm_eps": 1e-05,
    "rope_scaling": {
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
        "rope_type": "llama3",
    },
    "rope_theta": 500000.0,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "vocab_size": 128256,
}
QWEN25_7B = {
    "architectures": ["Qwen2ForCausalLM"],
    "hidden_act": "silu",
    "hidden_size": 3584,
    "intermediate_size": 18944,
    "max_position_embeddings": 32768,
    "max_window_layers": 28,
    "model_type": "qwen2",
    "num_attention_heads": 28,
    "num_hidden_layers": 28,
    "num_key_value_heads": 4,
    "rms_norm_eps": 1e-06,
    "rope_theta": 1000000.0,
    "sliding_window": 131072,
    "tie_word_embeddings": False,
    "use_sliding_window": False,
    "vocab_size": 152064,
}
GEMMA2_2B = {
    "architectures": ["Gemma2ForCausalLM"],
    "attn_logit_softcapping": 50.0,
    "final_logit_softcapping": 30.0,
    "head_dim": 256,
    "hidden_act": "gelu_pytorch_tanh",
    "hidden_activation": "gelu_pytorch_tanh",
    "hidden_size": 2304,
    "intermediate_size": 9216,
    "max_position_embeddings": 8192,
    "model_type": "gemma2",
    "num_attention_heads": 8,
    "num_hidden_layers": 26,
    "num_key_value_heads": 4,
    "query_pre_attn_scalar": 256,
    "rms_norm_eps": 1e-06,
    "rope_theta": 10000.0,
    "sliding_window": 4096,
    "vocab_size": 256000,
}
# Leaves out whatever is transformers' default.
GEMMA3_4B = {
    "architectures": ["Gemma3ForConditionalGeneration"],
    "eos_token_id": [1, 106],
    "model_type": "gemma3",
    "text_config": {
        "hidden_size": 2560,
        "intermediate_size": 10240,
        "model_type": "gemma3_text",
        "num_hidden_layers": 34,
        "rope_scaling": {"factor": 8.0, "rope_type": "linear"},
        "sliding_window": 1024,
    },
    "vision_config": {"hidden_size": 1152},
}


def read(folder, fields, **runtime):
    (folder / "config.json").write_text(json.dumps(fields))
    return read_config(folder, **runtime)


def test_llama(tmp_path):
    assert read(tmp_path, LLAMA_31_8B, param_dtype="bfloat16") == TransformerConfig(
        vocab_size=128256,
        width=4096,
        layers=32,
        heads=32,
        kv_heads=8,
        head_width=128,
        mlp_width=14336,
        rope_theta=500000.0,
        norm_epsilon=1e-5,
        tied_embeddings=False,
        rope_scaling=RopeScaling("llama3", 8.0, 1.0, 4.0, 8192),
        param_dtype="bfloat16",
    )
    assert read_context(tmp_path) == 131072


def test_qwen2(tmp_path):
    config = read(tmp_path, QWEN25_7B)
    assert (config.family, config.attention_bias, config.tied_embeddings) == ("qwen2", True, False)
    assert (config.head_width, config.windows, config.rope_theta) == (128, (0,), 1e6)
    windowed = read(tmp_path, {**QWEN25_7B, "use_sliding_window": True, "max_window_layers": 26})
    assert windowed.windows == (0,) * 26 + (131072,) * 2


def test_gemma2(tmp_path):
    config = read(tmp_path, GEMMA2_2B)
    assert (config.family, config.activation, config.tied_embeddings) == ("gemma2", "gelu_tanh", True)
    assert (config.windows, config.attention_scale) == ((4096, 0), None)
    assert (config.attention_softcap, config.logit_softcap) == (50.0, 30.0)
    larger = read(tmp_path, {**GEMMA2_2B, "head_dim": 128, "query_pre_attn_scalar": 144})
    assert larger.attention_scale == 144**-0.5
    assert read(tmp_path, {**GEMMA2_2B, "attn_logit_softcapping": None}).attention_softcap is None


def test_gemma3_of_a_model_that_also_sees(tmp_path):
    config = read(tmp_path, GEMMA3_4B)
    assert (config.family, config.vocab_size, config.layers) == ("gemma3", 262208, 34)
    assert (config.heads, config.kv_heads, config.head_width) == (8, 4, 256)
    assert config.windows == (1024,) * 5 + (0,)
    assert (config.rope_theta, config.local_rope_theta) == (1e6, 1e4)
    assert config.rope_scaling == RopeScaling("linear", 8.0)
    assert (config.attention_softcap, config.logit_softcap, config.tied_embeddings) == (None, None, True)
    assert read_settings(tmp_path).stops == (1, 106)
    with pytest.raises(UserError, match="sees images.*without --adapter"):
        check_whole(tmp_path)


@pytest.mark.parametrize("name", ["llama", "gemma3"])
def test_both_spellings_mean_the_same(name, tmp_path):
    if name == "llama":
        old = LLAMA_31_8B
        new = {k: v for k, v in old.items() if not k.startswith("rope")}
        new["rope_parameters"] = {**old["rope_scaling"], "rope_theta": old["rope_theta"]}
    else:
        old = {**GEMMA3_4B["text_config"], "architectures": ["Gemma3ForCausalLM"], "rope_theta": 5e5}
        old["rope_local_base_freq"], old["sliding_window_pattern"] = 2e4, 3
        new = {k: v for k, v in old.items() if not k.startswith(("rope", "sliding_window_pattern"))}
        new["layer_types"] = (["sliding_attention"] * 2 + ["full_attention"]) * 11 + ["sliding_attention"]
        new["rope_parameters"] = {
            "full_attention": {**old["rope_scaling"], "rope_theta": 5e5},
            "sliding_attention": {"rope_type": "default", "rope_theta": 2e4},
        }
    assert read(tmp_path, old) == read(tmp_path, new)


def test_the_architecture_may_follow_from_the_model_type(tmp_path):
    named = {**LLAMA_31_8B, "architectures": None}
    assert read(tmp_path, named) == read(tmp_path, LLAMA_31_8B)


def test_generation_config_names_the_ends_first(tmp_path):
    (tmp_path / "config.json").write_text('{"bos_token_id": 3, "eos_token_id": 4}')
    assert (read_settings(tmp_path).bos, read_settings(tmp_path).stops) == (3, (4,))
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": [5, 4], "pad_token_id": 6}')
    assert (read_settings(tmp_path).bos, read_settings(tmp_path).stops) == (3, (5, 4))


@given(st.lists(st.integers(0, 2), min_size=1, max_size=14))
def test_shortest_period(pattern):
    period = shortest_period(pattern)
    assert [period[i % len(period)] for i in range(len(pattern))] == pattern
    for shorter in range(1, len(period)):
        assert any(pattern[i] != pattern[i % shorter] for i in range(len(pattern)))


@st.composite
def networks(draw):
    family = draw(st.sampled_from(list(FAMILIES)))
    gemma = family.startswith("gemma")
    layers = draw(st.integers(1, 9))
    local = family != "llama" and draw(st.booleans())
    windows = (0,)
    if local:
        kinds = draw(st.lists(st.booleans(), min_size=layers, max_size=layers).filter(any))
        windows = shortest_period([7 if kind else 0 for kind in kinds])
    scalings = (None, RopeScaling("linear", 2.5), RopeScaling("llama3", 8.0, 1.0, 4.0, 512))
    kv_heads = draw(st.integers(1, 3))
    head_width = 2 * draw(st.integers(1, 8))
    scalar = draw(st.integers(1, 300).filter(lambda n: n != head_width)) if gemma else None
    return TransformerConfig(
        **{
            **FAMILIES[family],
            "logit_softcap": draw(st.sampled_from([None, 30.0])) if gemma else None,
            "local_rope_theta": 2e4 if family == "gemma3" else None,
        },
        family=family,
        vocab_size=draw(st.integers(1, 1000)),
        width=draw(st.integers(1, 100)),
        layers=layers,
        heads=kv_heads * draw(st.integers(1, 4)),
        kv_heads=kv_heads,
        head_width=head_width,
        mlp_width=draw(st.integers(1, 100)),
        rope_theta=draw(st.floats(1e3, 1e7)),
        norm_epsilon=draw(st.floats(1e-8, 1e-4)),
        tied_embeddings=draw(st.booleans()),
        windows=windows,
        attention_scale=None if scalar is None else scalar**-0.5,
        rope_scaling=draw(st.sampled_from(scalings)),
    )


@given(network=networks())
def test_a_network_is_read_as_it_was_written(network, tmp_path_factory):
    folder = tmp_path_factory.mktemp("config")
    assert read(folder, config_fields(network, dtype="float32", context=64)) == network


@pytest.mark.parametrize(
    "change, field",
    [
        (dict(attention_bias=True), "attention_bias"),
        (dict(windows=(4, 0)), "windows"),
        (dict(logit_softcap=3.0), "logit_softcap"),
        (dict(attention_scale=0.3), "attention_scale"),
        (dict(family="qwen2", attention_bias=True, windows=(4, 2)), "windows"),
        (dict(family="gemma2", **FAMILIES["gemma2"], attention_scale=0.3), "attention_scale"),
    ],
)
def test_a_network_that_config_json_cannot_say_is_not_exported(change, field):
    config = dataclasses.replace(TransformerConfig(vocab_size=7), **change)
    with pytest.raises(UserError, match=f"policy.{field} = "):
        config_fields(config, dtype="float32", context=64)
