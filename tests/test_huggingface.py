"""Models in Hugging Face's folder format: in, out, and in again."""

from __future__ import annotations

import dataclasses
import json

import golden_files
import jax
import numpy as np
import pytest
import tiny
from flax import traverse_util
from safetensors.numpy import load_file, save_file
from tiny import quick_jit

from streamsynth.errors import UserError
from streamsynth.policy.families import FAMILIES, family_config
from streamsynth.policy.huggingface.adapters import load_adapter, save_adapter
from streamsynth.policy.huggingface.architectures import read_config, read_context
from streamsynth.policy.huggingface.names import sources
from streamsynth.policy.huggingface.reading import content_hash, load_params
from streamsynth.policy.huggingface.writing import save_model
from streamsynth.policy.lora import LoraConfig, init_adapter
from streamsynth.policy.tokenizer_files import read_settings
from streamsynth.policy.transformer import Transformer, param_shapes

IDS = dict(bos=1, eos=(2, 5), pad=0)


def logits(golden: golden_files.Golden) -> np.ndarray:
    network = Transformer(golden.config)

    @quick_jit
    def compute(params):
        hidden, _ = network.apply({"params": params}, golden.tokens, golden.positions)
        return network.apply({"params": params}, hidden, method="logits")

    return np.asarray(compute(golden.params))


def load(folder, **runtime):
    config = read_config(folder, **runtime)
    return config, load_params(folder, config, golden_files.on_one_device(config))


def assert_same(ours, theirs) -> None:
    ours, theirs = traverse_util.flatten_dict(ours, sep="/"), traverse_util.flatten_dict(theirs, sep="/")
    assert ours.keys() == theirs.keys()
    for name, leaf in ours.items():
        assert leaf.dtype == theirs[name].dtype, name
        np.testing.assert_array_equal(np.asarray(leaf), np.asarray(theirs[name]), err_msg=name)


@pytest.mark.parametrize("scan_layers", [False, True])
@pytest.mark.parametrize("family", golden_files.FAMILIES)
def test_logits_are_those_of_transformers(family, scan_layers):
    golden = golden_files.load(family, scan_layers=scan_layers)
    assert all(window < golden.lengths.max() for window in golden.config.windows)
    real = golden.positions >= 0
    np.testing.assert_allclose(logits(golden)[real], golden.logits[real], atol=1e-4)


@pytest.mark.parametrize("family", golden_files.FAMILIES)
def test_scanned_layers_are_the_unrolled_ones_stacked(family):
    unrolled = golden_files.load(family)
    scanned = golden_files.load(family, scan_layers=True)
    assert_same(scanned.params, tiny.stack_layers(unrolled.params, scanned.config))


@pytest.mark.parametrize("tied_embeddings, scan_layers", [(False, False), (True, True)])
@pytest.mark.parametrize("family", FAMILIES)
def test_every_parameter_has_its_tensors(family, tied_embeddings, scan_layers):
    config = family_config(
        family,
        window=3 if family.startswith("gemma") else 0,
        vocab_size=11,
        layers=7,
        head_width=6,
        tied_embeddings=tied_embeddings,
        scan_layers=scan_layers,
    )
    shapes = {path: leaf.shape for path, leaf in traverse_util.flatten_dict(param_shapes(config)).items()}
    assert {path: source.param_shape for path, source in sources(config).items()} == shapes


@pytest.mark.parametrize("param_dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("family", golden_files.FAMILIES)
def test_import_export_import_is_exact(family, param_dtype, tmp_path):
    scanned = golden_files.load(family, scan_layers=True, param_dtype=param_dtype)
    save_model(tmp_path / "model", scanned.config, scanned.params, files={}, context=64, **IDS)
    config, params = load(tmp_path / "model", scan_layers=True, param_dtype=param_dtype)
    assert config == scanned.config
    assert_same(params, scanned.params)
    if param_dtype == "float32":
        original = load_file(golden_files.FOLDER / family / "model.safetensors")
        assert_same(load_file(tmp_path / "model" / "model.safetensors"), original)


def test_an_exported_folder_is_whole(tmp_path):
    golden = golden_files.load("qwen2")
    files = {"tokenizer.json": b"{}", "tokenizer_config.json": b'{"chat_template": "x"}'}
    save_model(tmp_path, golden.config, golden.params, files=files, context=77, **IDS)
    assert {name: (tmp_path / name).read_bytes() for name in files} == files
    named = json.loads((tmp_path / "generation_config.json").read_text())
    assert named == {"bos_token_id": 1, "eos_token_id": [2, 5], "pad_token_id": 0}
    assert read_context(tmp_path) == 77
    fields = json.loads((tmp_path / "config.json").read_text())
    assert fields["torch_dtype"] == "float32"
    assert fields["eos_token_id"] == [2, 5]
    assert not list(tmp_path.glob(".*"))


def test_shards_are_small_and_their_layout_does_not_count(tmp_path):
    golden = golden_files.load("gemma3", scan_layers=True)
    sizes = {"whole": 1 << 30, "shards": 20_000}
    for name, most in sizes.items():
        save_model(tmp_path / name, golden.config, golden.params, files={}, max_shard_bytes=most, **IDS)
    shards = sorted((tmp_path / "shards").glob("*.safetensors"))
    assert len(shards) > 3
    assert all(path.stat().st_size < 20_000 + 4_000 for path in shards)
    index = json.loads((tmp_path / "shards" / "model.safetensors.index.json").read_text())
    assert set(index["weight_map"].values()) == {path.name for path in shards}
    assert index["metadata"]["total_size"] == sum(leaf.nbytes for leaf in jax.tree.leaves(golden.params))
    assert_same(load(tmp_path / "shards")[1], golden_files.load("gemma3").params)
    assert content_hash(tmp_path / "shards") == content_hash(tmp_path / "whole")


@pytest.mark.parametrize("change", ["weight", "name", "config"])
def test_the_content_hash_sees_every_change(change, tmp_path):
    golden = golden_files.load("llama")
    save_model(tmp_path, golden.config, golden.params, files={}, **IDS)
    before = content_hash(tmp_path)
    assert len(before) == 16
    assert int(before, 16) >= 0
    path = tmp_path / "model.safetensors"
    tensors = load_file(path)
    if change == "weight":
        tensors["model.norm.weight"].view(np.uint8)[0] ^= 1
    elif change == "name":
        first, second = (f"model.layers.{layer}.input_layernorm.weight" for layer in (0, 1))
        tensors[first], tensors[second] = tensors[second], tensors[first]
    else:
        fields = json.loads((tmp_path / "config.json").read_text())
        (tmp_path / "config.json").write_text(json.dumps({**fields, "rms_norm_eps": 1e-5}))
    save_file(tensors, path)
    assert content_hash(tmp_path) != before


def test_an_export_replaces_what_was_cut_off_but_no_model(tmp_path):
    golden = golden_files.load("llama")
    (tmp_path / "model-00001-of-00009.safetensors").write_bytes(b"half")
    save_model(tmp_path, golden.config, golden.params, files={}, **IDS)
    assert [path.name for path in tmp_path.glob("*.safetensors")] == ["model.safetensors"]
    with pytest.raises(UserError, match="already holds a model"):
        save_model(tmp_path, golden.config, golden.params, files={}, **IDS)


@pytest.mark.parametrize("stored", ["float16", "bfloat16"])
def test_stored_and_wanted_dtype_may_differ(stored, tmp_path):
    golden = golden_files.load("qwen3")
    tensors = load_file(golden_files.FOLDER / "qwen3" / "model.safetensors")
    rounded = {name: tensor.astype(stored) for name, tensor in tensors.items()}
    save_file(rounded, tmp_path / "model.safetensors")
    config_json = golden_files.FOLDER / "qwen3" / "config.json"
    (tmp_path / "config.json").write_bytes(config_json.read_bytes())
    _, params = load(tmp_path)
    expected = jax.tree.map(lambda leaf: np.asarray(leaf).astype(stored).astype(np.float32), golden.params)
    assert_same(params, expected)


@pytest.mark.parametrize("layout", ["language_model.model.", "model.language_model."])
def test_of_a_model_that_also_sees_the_language_model_is_read(layout, tmp_path):
    golden = golden_files.load("gemma3")
    tensors = load_file(golden_files.FOLDER / "gemma3" / "model.safetensors")
    renamed = {name.replace("model.", layout, 1): tensor for name, tensor in tensors.items()}
    prefix = "" if layout.startswith("language") else "model."
    renamed[f"{prefix}vision_tower.vision_model.post_layernorm.bias"] = np.zeros(3, np.float32)
    renamed[f"{prefix}multi_modal_projector.mm_soft_emb_norm.weight"] = np.zeros(3, np.float32)
    save_file(renamed, tmp_path / "model.safetensors")
    text = json.loads((golden_files.FOLDER / "gemma3" / "config.json").read_text())
    text = {name: value for name, value in text.items() if name not in ("architectures", "eos_token_id")}
    fields = {
        "architectures": ["Gemma3ForConditionalGeneration"],
        "model_type": "gemma3",
        "text_config": text,
        "vision_config": {"hidden_size": 3},
        "eos_token_id": [2, 9],
    }
    (tmp_path / "config.json").write_text(json.dumps(fields))
    config, params = load(tmp_path)
    assert config == golden.config
    assert_same(params, golden.params)
    assert (read_settings(tmp_path).bos, read_settings(tmp_path).stops) == (1, (2, 9))


@pytest.mark.parametrize("scan_layers", [False, True])
def test_adapters_come_back(scan_layers, tmp_path):
    golden = golden_files.load("gemma3", scan_layers=scan_layers)
    lora = LoraConfig(rank=3, alpha=6.5, modules=("query", "out", "down"))
    config = dataclasses.replace(golden.config, lora=lora)
    adapter = jax.eval_shape(lambda: init_adapter(lora, golden.params, jax.random.key(0)))
    rng = np.random.default_rng(0)
    adapter = jax.tree.map(lambda leaf: rng.normal(size=leaf.shape).astype(np.float32), adapter)
    save_adapter(tmp_path, config, adapter, base="some/model")
    read_lora, read = load_adapter(tmp_path, golden.config)
    assert read_lora == lora
    assert_same(read, adapter)
    fields = json.loads((tmp_path / "adapter_config.json").read_text())
    assert fields["base_model_name_or_path"] == "some/model"
    assert fields["target_modules"] == ["q_proj", "o_proj", "down_proj"]


def test_a_trained_model_from_disk_says_what_it_should(shared):
    folder = shared / "weights" / "stories260K"
    config, params = load(folder)
    expected = json.loads((folder / "greedy.json").read_text())
    tokens = np.array([expected["prompt"] + expected["greedy"]], np.int32)
    lengths = np.array([tokens.shape[1]])
    text = golden_files.Golden(config, params, tokens, lengths, None, None)
    assert logits(text)[0, :-1].argmax(-1).tolist() == expected["greedy"]
    assert read_settings(folder).stops == (2,)
