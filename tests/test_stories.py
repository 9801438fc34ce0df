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


@pytest.mark.slow
def test_a_stream_of_two_tasks_trains_it_by_lora(folder, tmp_path):
    before, base = content_hash(folder), load(folder)[1]
    api.train(stream(folder), tmp_path / "run")

    # The base is bit-identical on disk, and no copy of it is in the run.
    assert content_hash(folder) == before
    assert [path.name for path in (tmp_path / "run" / "policy").iterdir()] == ["policy.json"]
    jax.tree.map(np.testing.assert_array_equal, load(folder)[1], base)
    state = runs.state(tmp_path / "run")
    trained = {path: leaf for path, leaf in state.items() if path.startswith("params/")}
    assert {path.split("/")[1] for path in trained} == {"lora"}
    assert all(np.abs(leaf).max() > 0 for path, leaf in trained.items() if path.endswith("/b"))
    assert sum(leaf.size for leaf in trained.values()) < 0.2 * sum(p.size for p in jax.tree.leaves(base))

    # Each turn's tuning made examples likelier that it was not tuned to.
    rows = [r for r in runs.read_jsonl(tmp_path / "run" / "metrics.jsonl") if "supervised/held_out" in r]
    assert [row["task"] for row in rows] == ["market_1", "restaurant_1"]
    for row in rows:
        assert row["supervised/held_out"] < row["supervised/held_out_before"] - 0.3

    api.export(tmp_path / "run", tmp_path / "merged")
    model, merged = load(tmp_path / "merged")
    tokens = np.random.default_rng(0).integers(3, 512, (2, 60))
    positions = np.broadcast_to(np.arange(60), tokens.shape)

    @tiny.quick_jit
    def logits(variables):
        hidden, _ = model.apply(variables, tokens, positions)
        return model.apply(variables, hidden, method="logits")

    ours = np.asarray(logits(merged))
    assert np.abs(ours - np.asarray(logits(base))).max() > 0.1
    # The policy as it was trained: the frozen base with the adapter beside it.
    setting, run_state, _ = api._finished(tmp_path / "run")
    with_adapter = setting.variables(run_state.params)
    hidden, _ = setting.model.apply(with_adapter, tokens, positions)
    beside = np.asarray(setting.model.apply(with_adapter, hidden, method="logits"))
    np.testing.assert_allclose(ours, beside, atol=1e-4)

    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    with torch.no_grad():
        np.testing.assert_allclose(theirs(torch.tensor(tokens)).logits.numpy(), beside, atol=1e-4)
