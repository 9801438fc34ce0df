"""A real small Llama: greedy text, and a stream of two tasks that trains it by LoRA, end to end."""

from __future__ import annotations

import json

import golden_files
import jax
import numpy as np
import pytest
import runs
import tiny

from streamsynth import api, defaults
from streamsynth.keys import sample_keys
from streamsynth.policy.huggingface.architectures import read_config
from streamsynth.policy.huggingface.reading import content_hash, load_params
from streamsynth.policy.rollout import rollout
from streamsynth.policy.transformer import Transformer
from streamsynth.pytrees import Prompts


@pytest.fixture(scope="module")
def folder(shared):
    return shared / "weights" / "stories260K"


def load(folder):
    config = read_config(folder)
    return Transformer(config), {"params": load_params(folder, config, golden_files.on_one_device(config))}


def test_its_greedy_text(folder):
    """Read from its folder, 200 tokens as `transformers` writes them."""
    model, variables = load(folder)
    expected = json.loads((folder / "greedy.json").read_text())["greedy"]
    one, none = np.ones((1, 1), np.int32), np.zeros(1, np.int32)
    drawn = rollout(
        model,
        variables,
        Prompts(one, one > 0, none, none),
        sample_keys(jax.random.key(0), 1, 1),
        np.float32(1e-5),  # near temperature 0 the sampler is greedy
        samples=1,
        length=200,
        stops=(-1,),  # one that never comes
    )
    assert drawn.tokens[0].tolist() == expected[-200:]


def stream(folder):
    config = defaults.default_config()
    config.policy.init = f"hf:{folder}"
    config.policy.lora.update(rank=4, alpha=8.0)
    config.stream.tasks = ("worlds:market_1", "worlds:restaurant_1")
    config.stream.test_limit = 100
    config.rollout.update(prompts=6, samples=4, prompt_length=256, completion_length=48, temperature=0.8)
    config.feedback.judges.update(verifier=0.0, posterior=1.0)
    config.feedback.update(accept=0.2, width=32)
    config.learner.steps = 3
    config.optimizer.learning_rate = 2e-3
    config.evaluation.update(prompts=6, samples=4, rows_per_label=8, diversity_texts=16, best_of=2)
    config.evaluation.student.update(width=2048, steps=50)
    config.balance.batches = 1
    config.supervised.update(batches=1, rounds=2, rows=8, steps=10, held_out=2)
    config.replay.capacity = 64
    return config


@pytest.fixture(scope="module")
def trained(folder, tmp_path_factory):
    """A finished run of that stream, its exported policy, and the hash of the base's folder before it."""
    root, before = tmp_path_factory.mktemp("stories"), content_hash(folder)
    api.train(stream(folder), root / "run")
    api.export(root / "run", root / "merged")
    return root, before


@pytest.fixture(scope="module")
def beside(trained):
    """Token ids, and their logits by the policy as it was trained: the frozen base beside the adapter."""
    root, _ = trained
    tokens = np.random.default_rng(0).integers(3, 512, (2, 60))
    setting, run_state, _ = api._finished(root / "run")
    return tokens, logits(setting.model, setting.variables(run_state.params), tokens)


def logits(model, variables, tokens):
    positions = np.broadcast_to(np.arange(tokens.shape[1]), tokens.shape)

    @tiny.quick_jit
    def whole(variables):
        hidden, _ = model.apply(variables, tokens, positions)
        return model.apply(variables, hidden, method="logits")

    return np.asarray(whole(variables))


@pytest.mark.slow
def test_a_stream_of_two_tasks_trains_it_by_lora(folder, trained):
    root, before = trained
    # The base is bit-identical on disk, and no copy of it is in the run.
    assert content_hash(folder) == before
    assert [path.name for path in (root / "run" / "policy").iterdir()] == ["policy.json"]
    state = runs.state(root / "run")
    adapter = {path: leaf for path, leaf in state.items() if path.startswith("params/")}
    assert {path.split("/")[1] for path in adapter} == {"lora"}
    assert all(np.abs(leaf).max() > 0 for path, leaf in adapter.items() if path.endswith("/b"))
    size = sum(leaf.size for leaf in jax.tree.leaves(load(folder)[1]))
    assert sum(leaf.size for leaf in adapter.values()) < 0.2 * size

    # Each turn's tuning made examples likelier that it was not tuned to.
    rows = [r for r in runs.read_jsonl(root / "run" / "metrics.jsonl") if "supervised/held_out" in r]
    assert [row["task"] for row in rows] == ["market_1", "restaurant_1"]
    for row in rows:
        assert row["supervised/held_out"] < row["supervised/held_out_before"] - 0.3


@pytest.mark.slow
def test_its_export_is_the_base_with_the_adapter(folder, trained, beside):
    tokens, expected = beside
    ours = logits(*load(trained[0] / "merged"), tokens)
    assert np.abs(ours - logits(*load(folder), tokens)).max() > 0.1
    np.testing.assert_allclose(ours, expected, atol=1e-4)


@pytest.mark.slow
def test_its_export_in_transformers(trained, beside):
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    tokens, expected = beside
    theirs = transformers.AutoModelForCausalLM.from_pretrained(trained[0] / "merged")
    with torch.no_grad():
        np.testing.assert_allclose(theirs(torch.tensor(tokens)).logits.numpy(), expected, atol=1e-4)
