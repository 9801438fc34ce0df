"""A policy on disk comes back bit for bit, or is refused in one sentence."""

import dataclasses
import json

import jax
import numpy as np
import pytest
import tiny
from safetensors.numpy import load_file, save_file

from streamsynth.errors import UserError
from streamsynth.policy.attention import RopeScaling
from streamsynth.policy.families import family_config
from streamsynth.policy.lora import LoraConfig
from streamsynth.policy.store import has_policy, load_policy, named_weights, save_policy
from streamsynth.policy.tokenizer import train_tokenizer
from streamsynth.policy.transformer import Transformer
from streamsynth.stream.patterns import STRATEGIES
from streamsynth.tasks import worlds


@pytest.fixture
def saved(tmp_path):
    save_policy(tmp_path / "policy", tiny.policy())
    return tmp_path / "policy"


def same(one, two):
    assert (one.hash, one.model, one.tokenizer.model) == (two.hash, two.model, two.tokenizer.model)
    assert jax.tree.structure(one.params) == jax.tree.structure(two.params)
    for a, b in zip(jax.tree.leaves(one.params), jax.tree.leaves(two.params), strict=True):
        assert a.dtype == b.dtype
        np.testing.assert_array_equal(a, b)


def test_what_was_saved_comes_back_exactly(saved):
    assert has_policy(saved) and not has_policy(saved.parent)
    loaded = load_policy(saved)
    same(loaded, tiny.policy())
    text = worlds.corpus(3, 1)[0]
    assert loaded.tokenizer.encode(text) == tiny.tokenizer().encode(text)


def test_scanned_layers_and_a_second_save_into_the_same_folder(saved):
    policy = tiny.policy()
    model = Transformer(dataclasses.replace(policy.model.config, scan_layers=True))
    scanned = dataclasses.replace(
        policy, model=model, params=tiny.stack_layers(policy.params, model.config), hash="other"
    )
    save_policy(saved, scanned)
    same(load_policy(saved), scanned)
    assert sorted(p.name for p in saved.iterdir()) == ["params.safetensors", "policy.json", "tokenizer.model"]


def edited(path, change):
    shape = json.loads(path.read_text())
    change(shape)
    path.write_text(json.dumps(shape))


def other_params(path, change):
    params = load_file(path)
    change(params)
    save_file(params, path)


DAMAGES = {
    "no policy.json": lambda d: (d / "policy.json").unlink(),
    "no params": lambda d: (d / "params.safetensors").unlink(),
    "no tokenizer": lambda d: (d / "tokenizer.model").unlink(),
    "half a policy.json": lambda d: (d / "policy.json").write_text('{"hash": "t'),
    "a list": lambda d: (d / "policy.json").write_text("[]"),
    "no hash": lambda d: edited(d / "policy.json", lambda s: s.pop("hash")),
    "no shape": lambda d: edited(d / "policy.json", lambda s: s.pop("transformer")),
    "unknown key": lambda d: edited(d / "policy.json", lambda s: s["transformer"].update(window=3)),
    "impossible shape": lambda d: edited(d / "policy.json", lambda s: s["transformer"].update(heads=3)),
    "other width": lambda d: edited(d / "policy.json", lambda s: s["transformer"].update(width=32)),
    "more layers": lambda d: edited(d / "policy.json", lambda s: s["transformer"].update(layers=2)),
    "half the params": lambda d: (d / "params.safetensors").write_bytes(
        (d / "params.safetensors").read_bytes()[:-100]
    ),
    "empty params": lambda d: (d / "params.safetensors").write_bytes(b""),
    "a missing array": lambda d: other_params(d / "params.safetensors", lambda p: p.pop("embedding")),
    "half a tokenizer": lambda d: (d / "tokenizer.model").write_bytes(
        (d / "tokenizer.model").read_bytes()[:1000]
    ),
    "empty tokenizer": lambda d: (d / "tokenizer.model").write_bytes(b""),
    "another vocabulary": lambda d: (d / "tokenizer.model").write_bytes(
        train_tokenizer(worlds.corpus(1, 100), 350, STRATEGIES).model
    ),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_policy_is_refused(saved, damage):
    DAMAGES[damage](saved)
    with pytest.raises(UserError, match="holds no readable policy.*remove the folder") as error:
        load_policy(saved)
    assert str(saved) in str(error.value)


def test_all_that_a_network_may_be_comes_back(tmp_path):
    """Windows, stretched positions, an adapter's place, low precision: bit for bit, and equal as a config."""
    config = family_config(
        "gemma3",
        window=4,
        vocab_size=tiny.tokenizer().vocab_size,
        rope_scaling=RopeScaling("linear", 8.0),
        lora=LoraConfig(2, 4.0, ("query", "down")),
        param_dtype="bfloat16",
        tied_embeddings=False,
        **tiny.SHAPE,
    )
    policy = dataclasses.replace(tiny.policy(), model=Transformer(config), params=tiny.fresh_params(config))
    save_policy(tmp_path / "policy", policy)
    same(load_policy(tmp_path / "policy"), policy)


def test_of_named_weights_only_the_name_is_saved(saved):
    assert named_weights(saved) is None
    save_policy(saved.parent / "other", dataclasses.replace(tiny.policy(), origin="somewhere"))
    assert [path.name for path in (saved.parent / "other").iterdir()] == ["policy.json"]
    assert named_weights(saved.parent / "other") == tiny.policy().hash
