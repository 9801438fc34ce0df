"""What transformers and PEFT themselves compute, where they are installed; see tests/golden for the rest."""

from __future__ import annotations

import dataclasses
import json

import golden_files
import huggingface_models
import jax
import numpy as np
import pytest
from flax import traverse_util
from tiny import quick_jit

from streamsynth.policy.huggingface.adapters import load_adapter, save_adapter
from streamsynth.policy.huggingface.architectures import read_config
from streamsynth.policy.huggingface.reading import load_params
from streamsynth.policy.huggingface.writing import save_model
from streamsynth.policy.lora import MODULES, LoraConfig, init_adapter, merge
from streamsynth.policy.transformer import Transformer

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

IDS = dict(bos=1, eos=(2, 5), pad=0)
TOKENS = np.random.default_rng(0).integers(3, 61, (2, 17)).astype(np.int32)
LENGTHS = np.array([17, 9])
REAL = np.arange(17) < LENGTHS[:, None]


def imported(folder, **runtime):
    config = read_config(folder, **runtime)
    return config, load_params(folder, config, golden_files.on_one_device(config))


def logits(config, variables) -> np.ndarray:
    """Of the real positions of TOKENS."""
    network = Transformer(config)

    @quick_jit
    def compute(variables):
        hidden, _ = network.apply(variables, TOKENS, golden_files.positions(TOKENS, LENGTHS))
        return network.apply(variables, hidden, method="logits")

    return np.asarray(compute(variables))[REAL]


def theirs(network) -> np.ndarray:
    return huggingface_models.logits(network, TOKENS, LENGTHS)[REAL]


def loaded(folder, dtype="float32"):
    network = transformers.AutoModelForCausalLM.from_pretrained(
        folder, dtype=dtype, attn_implementation="eager"
    )
    return network.eval()


@pytest.mark.parametrize("case", huggingface_models.CASES)
def test_logits_agree_in_and_out(case, tmp_path):
    network = huggingface_models.build(case)
    network.save_pretrained(tmp_path / "theirs", max_shard_size="30KB")
    config, params = imported(tmp_path / "theirs", scan_layers=case != "gemma3")
    expected = theirs(network)
    assert np.abs(expected).max() > 1
    np.testing.assert_allclose(logits(config, {"params": params}), expected, atol=1e-4)
    save_model(tmp_path / "ours", config, params, files={}, context=64, **IDS)
    back = loaded(tmp_path / "ours")
    assert type(back) is type(network)
    np.testing.assert_allclose(theirs(back), expected, atol=1e-6)
    assert back.generation_config.eos_token_id == back.config.eos_token_id == [2, 5]
    for name, tensor in network.state_dict().items():
        assert torch.equal(tensor, back.state_dict()[name]), name


def test_bfloat16_goes_out_and_in(tmp_path):
    network = huggingface_models.build("gemma3").to(torch.bfloat16)
    network.save_pretrained(tmp_path / "theirs")
    config, params = imported(tmp_path / "theirs", param_dtype="bfloat16", scan_layers=True)
    save_model(tmp_path / "ours", config, params, files={}, context=64, **IDS)
    back = loaded(tmp_path / "ours", dtype="auto")
    assert back.dtype == torch.bfloat16
    for name, tensor in network.state_dict().items():
        assert torch.equal(tensor, back.state_dict()[name]), name


@pytest.mark.parametrize("case, scan_layers", [("qwen2", False), ("gemma3", True)])
def test_an_adapter_works_in_peft(case, scan_layers, tmp_path):
    peft = pytest.importorskip("peft")
    network = huggingface_models.build(case)
    network.save_pretrained(tmp_path / "base")
    config, params = imported(tmp_path / "base", scan_layers=scan_layers)
    lora = LoraConfig(rank=2, alpha=3.0, modules=MODULES)
    config = dataclasses.replace(config, lora=lora)
    rng = np.random.default_rng(0)
    shapes = jax.eval_shape(lambda: init_adapter(lora, params, jax.random.key(0)))
    adapter = jax.tree.map(lambda leaf: 0.2 * rng.normal(size=leaf.shape).astype(np.float32), shapes)
    save_adapter(tmp_path / "adapter", config, adapter, base=str(tmp_path / "base"))

    ours = logits(config, {"params": params, "lora": adapter})
    assert np.abs(ours - logits(config, {"params": params})).max() > 0.1
    adapted = peft.PeftModel.from_pretrained(network, tmp_path / "adapter")
    np.testing.assert_allclose(theirs(adapted), ours, atol=1e-4)
    merged = dataclasses.replace(config, lora=None)
    save_model(tmp_path / "merged", merged, merge(lora, params, adapter), files={}, **IDS)
    np.testing.assert_allclose(theirs(loaded(tmp_path / "merged")), ours, atol=1e-4)


def test_an_adapter_of_peft_is_read(tmp_path):
    peft = pytest.importorskip("peft")
    network = huggingface_models.build("llama")
    network.save_pretrained(tmp_path / "base")
    config, params = imported(tmp_path / "base")
    made = peft.get_peft_model(
        network,
        peft.LoraConfig(
            r=4, lora_alpha=2, target_modules=["q_proj", "up_proj"], init_lora_weights=False, lora_dropout=0.1
        ),
    ).eval()
    made.save_pretrained(tmp_path / "adapter")
    lora, adapter = load_adapter(tmp_path / "adapter", config)
    assert lora == LoraConfig(rank=4, alpha=2.0, modules=("query", "up"))
    ours = logits(dataclasses.replace(config, lora=lora), {"params": params, "lora": adapter})
    np.testing.assert_allclose(ours, theirs(made), atol=1e-4)


def test_a_model_that_also_sees_is_read_as_transformers_writes_it(tmp_path):
    text = huggingface_models.build("gemma3")
    vision = dict(
        hidden_size=8,
        intermediate_size=8,
        num_hidden_layers=1,
        num_attention_heads=2,
        image_size=4,
        patch_size=2,
    )
    whole = transformers.Gemma3ForConditionalGeneration(
        transformers.Gemma3Config(
            text_config=text.config.to_dict(), vision_config=vision, mm_tokens_per_image=4
        )
    )
    whole.model.language_model.load_state_dict(text.model.state_dict())
    whole.tie_weights()
    whole.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["architectures"] == [type(whole).__name__]
    config, params = imported(tmp_path)
    assert set(traverse_util.flatten_dict(params)) >= {("embedding",), ("layers_4", "down", "kernel")}
    np.testing.assert_allclose(logits(config, {"params": params}), theirs(text), atol=1e-4)
