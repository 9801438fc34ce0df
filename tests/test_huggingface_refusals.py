"""What of a Hugging Face folder is refused, and that the refusal names it."""

from __future__ import annotations

import json
import shutil

import golden_files
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from streamsynth.errors import UserError
from streamsynth.policy.huggingface.adapters import load_adapter
from streamsynth.policy.huggingface.architectures import read_config
from streamsynth.policy.huggingface.reading import content_hash, load_params
from streamsynth.policy.tokenizer_files import read_settings

LAYER = "model.layers.1."


@pytest.fixture
def folder(tmp_path):
    """A copy of the golden Qwen 3 model."""
    for name in ("config.json", "model.safetensors"):
        shutil.copyfile(golden_files.FOLDER / "qwen3" / name, tmp_path / name)
    return tmp_path


def change_config(folder, **change):
    fields = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**fields, **change}))


def change_tensors(folder, change):
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors")


def load(folder):
    config = read_config(folder)
    return load_params(folder, config, golden_files.on_one_device(config))


@pytest.mark.parametrize(
    "change, message",
    [
        (dict(architectures=["Qwen3MoeForCausalLM"]), "Qwen3MoeForCausalLM.*LlamaForCausalLM, Qwen2"),
        (dict(architectures=None, model_type="mamba"), "mamba.*LlamaForCausalLM"),
        (dict(rope_parameters=None, rope_scaling={"type": "yarn", "factor": 4.0}), "yarn.*default, linear"),
        (dict(rope_parameters={"rope_type": "linear"}), "no field factor"),
        (dict(rope_parameters={"full_attention": {"rope_type": "default"}}), "rope_parameters.*only Gemma 3"),
        (dict(partial_rotary_factor=0.5), "partial_rotary_factor"),
        (dict(quantization_config={"quant_method": "gptq"}), r"quantization_config \(gptq\).*quantized"),
        (dict(attention_bias=True), "attention_bias = true"),
        (dict(mlp_bias=True), "mlp_bias = true"),
        (dict(use_bidirectional_attention=True), "use_bidirectional_attention = true"),
        (dict(hidden_act="relu"), 'hidden_act = "relu".*silu'),
        (dict(hidden_size=None), "no field hidden_size"),
        (dict(hidden_size="24"), 'hidden_size = "24" must be a positive whole number'),
        (dict(num_hidden_layers=0), "num_hidden_layers = 0 must be"),
        (dict(num_key_value_heads=True), "num_key_value_heads = true must be"),
        (dict(rms_norm_eps=-1.0), "rms_norm_eps = -1.0 must be a positive number"),
        (dict(layer_types=["full_attention"]), "layer_types.*num_hidden_layers = 2"),
        (dict(layer_types=["full_attention", "linear_attention"]), "linear_attention"),
        (dict(layer_types=["full_attention", "sliding_attention"]), "sliding_window"),
        (dict(use_sliding_window=True, layer_types=None, max_window_layers=None), "max_window_layers"),
    ],
)
def test_fields_of_config_json(folder, change, message):
    change_config(folder, **change)
    with pytest.raises(UserError, match=message) as refusal:
        read_config(folder)
    assert str(folder / "config.json") in str(refusal.value)


@pytest.mark.parametrize(
    "change, message",
    [
        (dict(attn_logit_softcapping=50.0), "attn_logit_softcapping"),
        (
            dict(rope_parameters={"sliding_attention": {"rope_type": "linear", "factor": 2.0}}),
            "sliding_attention must have rope_type default",
        ),
    ],
)
def test_fields_of_gemma3(tmp_path, change, message):
    shutil.copyfile(golden_files.FOLDER / "gemma3" / "config.json", tmp_path / "config.json")
    change_config(tmp_path, **change)
    with pytest.raises(UserError, match=message):
        read_config(tmp_path)


@pytest.mark.parametrize("content", [None, "{", "[]", "\x00"])
def test_no_readable_config_json(folder, content):
    (folder / "config.json").unlink()
    if content is not None:
        (folder / "config.json").write_text(content)
    with pytest.raises(UserError, match="config.json is not a description of a model"):
        read_config(folder)


def test_a_model_that_also_sees_needs_its_text_config(folder):
    change_config(folder, architectures=["Gemma3ForConditionalGeneration"])
    with pytest.raises(UserError, match="no field text_config"):
        read_config(folder)


def test_odd_special_ids(folder):
    change_config(folder, eos_token_id="</s>")
    with pytest.raises(UserError, match="eos_token_id = "):
        read_settings(folder)


def test_a_missing_tensor(folder):
    change_tensors(folder, lambda tensors: tensors.pop(LAYER + "mlp.up_proj.weight"))
    with pytest.raises(UserError, match=f"lacks tensor {LAYER}mlp.up_proj.weight"):
        load(folder)


def test_a_missing_head(folder):
    change_config(folder, tie_word_embeddings=False)
    with pytest.raises(UserError, match=r"lacks tensor lm_head.weight"):
        load(folder)


def test_a_wrong_shape(folder):
    change_config(folder, intermediate_size=48)
    with pytest.raises(
        UserError, match=r"model.safetensors: tensor .*_proj.weight has shape \[40, 24\].*\[48, 24\]"
    ):
        load(folder)


def test_an_unknown_tensor(folder):
    change_tensors(folder, lambda tensors: tensors.update({LAYER + "mlp.router": np.zeros(2, np.float32)}))
    with pytest.raises(UserError, match=f"tensor {LAYER}mlp.router belongs to nothing"):
        load(folder)


def test_tensors_that_may_be_left_over(folder):
    def add(tensors):
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"]
        tensors[LAYER + "self_attn.rotary_emb.inv_freq"] = np.zeros(4, np.float32)

    before = load(folder)
    change_tensors(folder, add)
    assert load(folder).keys() == before.keys()


def test_a_dtype_that_is_no_plain_float(folder):
    name = LAYER + "mlp.up_proj.weight"
    change_tensors(folder, lambda tensors: tensors.update({name: tensors[name].astype(np.int8)}))
    with pytest.raises(UserError, match=f"model.safetensors: tensor {name} has dtype I8.*BF16"):
        load(folder)


@pytest.mark.parametrize("content", [b"", b"\xff" * 8, b"\x10\0\0\0\0\0\0\0{}", b"cut"])
def test_a_damaged_file(folder, content):
    (folder / "model.safetensors").write_bytes(content)
    for reader in (load, content_hash):
        with pytest.raises(UserError, match="model.safetensors is no readable safetensors file"):
            reader(folder)


def test_a_file_cut_short(folder):
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-4])
    with pytest.raises(UserError, match="model.safetensors is no readable safetensors file"):
        load(folder)


def test_no_weights(folder):
    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model.bin").write_bytes(b"")
    with pytest.raises(UserError, match="neither model.safetensors nor model.safetensors.index.json"):
        load(folder)


@pytest.mark.parametrize("fault", ["no map", "no shard", "not in its shard"])
def test_shards_and_their_index(folder, fault):
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").rename(folder / "first.safetensors")
    places = dict.fromkeys(tensors, "first.safetensors")
    if fault == "no shard":
        places["model.norm.weight"] = "second.safetensors"
    if fault == "not in its shard":
        places["model.other.weight"] = "first.safetensors"
    index = {} if fault == "no map" else {"weight_map": places}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    messages = {
        "no map": "index.json has no weight_map",
        "no shard": "second.safetensors is no readable",
        "not in its shard": "first.safetensors lacks tensor model.other.weight",
    }
    with pytest.raises(UserError, match=messages[fault]):
        load(folder)


ADAPTER = {"peft_type": "LORA", "r": 2, "lora_alpha": 4}


@pytest.fixture
def adapter(tmp_path):
    """An adapter on the queries of the golden Qwen 3 model."""
    tensors = {}
    for layer in range(2):
        prefix = f"base_model.model.model.layers.{layer}.self_attn.q_proj.lora_"
        tensors[prefix + "A.weight"] = np.ones((2, 24), np.float32)
        tensors[prefix + "B.weight"] = np.ones((32, 2), np.float32)
    save_file(tensors, tmp_path / "adapter_model.safetensors")
    (tmp_path / "adapter_config.json").write_text(json.dumps(ADAPTER))
    load_adapter(tmp_path, read_config(golden_files.FOLDER / "qwen3"))
    return tmp_path


@pytest.mark.parametrize(
    "change, message",
    [
        (dict(peft_type="IA3"), "peft_type = 'IA3'"),
        (dict(use_dora=True), "use_dora = True"),
        (dict(rank_pattern={"q_proj": 3}), "rank_pattern"),
        (dict(bias="all"), "bias = 'all'"),
        (dict(r=0), "r = 0 must be"),
        (dict(lora_alpha=None), "lora_alpha = None must be"),
        (dict(r=3), r"q_proj.lora_A.weight has shape \[2, 24\].*\[3, 24\]"),
    ],
)
def test_fields_of_adapter_config(adapter, change, message):
    (adapter / "adapter_config.json").write_text(json.dumps({**ADAPTER, **change}))
    with pytest.raises(UserError, match=message):
        load_adapter(adapter, read_config(golden_files.FOLDER / "qwen3"))


@pytest.mark.parametrize("fault", ["missing", "unknown", "nothing"])
def test_tensors_of_an_adapter(adapter, fault):
    path = adapter / "adapter_model.safetensors"
    tensors = load_file(path)
    name = "base_model.model.model.layers.1.self_attn.q_proj.lora_A.weight"
    if fault == "missing":
        del tensors[name]
    elif fault == "unknown":
        tensors[name.replace("layers.1", "layers.7")] = tensors[name]
    else:
        tensors = {"base_model.model.lm_head.lora_A.weight": tensors[name]}
    save_file(tensors, path)
    messages = {
        "missing": f"lacks tensor {name}",
        "unknown": "layers.7.self_attn.q_proj.lora_A.weight belongs to no projection",
        "nothing": "adapts no projection",
    }
    with pytest.raises(UserError, match=messages[fault]):
        load_adapter(adapter, read_config(golden_files.FOLDER / "qwen3"))
