"""Named weights through the whole loop: LoRA beside a frozen base, checkpoints, resume, export."""

from __future__ import annotations

import json
import shutil

import golden_files
import named
import numpy as np
import pytest
import runs
import tiny
from flax import traverse_util
from runs import ROOT
from safetensors.numpy import load_file

from streamsynth import api, assemble, step
from streamsynth.errors import UserError
from streamsynth.learner import collect
from streamsynth.policy.huggingface.adapters import load_adapter
from streamsynth.policy.huggingface.architectures import read_config
from streamsynth.policy.huggingface.reading import content_hash, load_params
from streamsynth.policy.lora import merge
from streamsynth.policy.transformer import Transformer
from streamsynth.tuning import split_examples


def logits(config, params, tokens):
    network = Transformer(config)

    @tiny.quick_jit
    def compute(params, tokens):
        hidden, _ = network.apply({"params": params}, tokens, np.arange(tokens.shape[1])[None])
        return network.apply({"params": params}, hidden, method="logits")

    return np.asarray(compute(params, tokens))


def load(folder):
    config = read_config(folder)
    return config, load_params(folder, config, golden_files.on_one_device(config))


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    folder = tmp_path_factory.mktemp("named")
    return named.weights(folder / "weights", "gemma2"), named.data(folder / "data")


def config_of(folders, **overrides):
    weights, data = folders
    # Texts fit into a completion, and few steps are seen.
    keys = {"rollout.completion_length": "48", "optimizer.learning_rate": "0.01", "optimizer.warmup": "0"}
    dotted = keys | {key.replace("__", "."): value for key, value in overrides.items()}
    return api.load(f"{ROOT / 'configs' / 'gemma2_2b.py'}:tiny,weights={weights},data={data}", dotted)


# (purpose, task, the ids of the examples shown) of every batch that turns wrote.
SHOWN = []


def spied(form, task, arrived, what):
    written = collect.read(form, task, arrived, what)
    SHOWN.append((what.split()[0], task.name, {example for shown in written.shown for example in shown}))
    return written


@pytest.fixture(scope="module")
def run(folders, tmp_path_factory, quick_xla):
    workdir = tmp_path_factory.mktemp("run") / "run"
    before = content_hash(folders[0])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(step, "read", spied)
        results = api.train(config_of(folders), workdir)
    return workdir, before, results


@pytest.mark.slow
def test_the_adapter_is_trained_and_the_base_is_not(run, folders):
    workdir, before, results = run
    assert content_hash(folders[0]) == before
    card = json.loads((workdir / "policy" / "policy.json").read_text())
    assert (card["origin"], card["context"], len(card["hash"])) == (str(folders[0]), 4096, 16)
    assert [path.name for path in (workdir / "policy").iterdir()] == ["policy.json"]
    state = runs.state(workdir)
    held = {path for path in state if path.startswith(("params/", "reference/", "opt_state/"))}
    assert held and not [path for path in held if "/kernel" in path or "embedding" in path]
    moved = [state[path] for path in held if path.startswith("params/lora/") and path.endswith("/b")]
    assert len(moved) == 7 * 2 and all(np.abs(b).max() > 0 for b in moved)
    assert results["tasks"] == ["yelp5", "amazon5"]


@pytest.mark.slow
def test_the_tuning_is_measured_on_examples_that_are_held_out(run):
    rows = [row for row in runs.read_jsonl(run[0] / "metrics.jsonl") if "supervised/held_out" in row]
    assert [row["task"] for row in rows] == ["yelp5", "amazon5"]
    assert all(row["supervised/held_out"] < row["supervised/held_out_before"] for row in rows)


@pytest.mark.slow
def test_what_is_tuned_to_comes_of_prompts_without_the_held_out_examples(run, folders):
    config = config_of(folders)
    for task in assemble.load_tasks(config):
        tuned, held = split_examples(task, config.supervised.held_out)
        assert len(held) == 5 * config.supervised.held_out and set(tuned) | set(held) == set(task.examples)
        tuned = {example.id for example in tuned}
        for purpose in ("measure", "explore"):
            shown = set().union(*(ids for *of, ids in SHOWN if of == [purpose, task.name]))
            assert shown and shown <= tuned


@pytest.mark.slow
def test_exports_are_the_trained_policy(run, folders, tmp_path):
    workdir = run[0]
    api.export(workdir, tmp_path / "merged")
    api.export(workdir, tmp_path / "adapter", adapter=True)
    base_config, base = load(folders[0])
    lora, adapter = load_adapter(tmp_path / "adapter", base_config)
    state = runs.state(workdir)
    for path, leaf in traverse_util.flatten_dict(adapter, sep="/").items():
        np.testing.assert_array_equal(leaf, state[f"params/lora/{path}"])
    tokens = np.random.default_rng(0).integers(0, base_config.vocab_size, (2, 40))
    config, params = load(tmp_path / "merged")
    assert config == base_config
    found = logits(config, params, tokens)
    np.testing.assert_allclose(found, logits(config, merge(lora, base, adapter), tokens), atol=1e-5)
    assert np.abs(found - logits(config, base, tokens)).max() > 1e-3
    tokenizer_files = {path.name for path in folders[0].iterdir()} - {"config.json", "model.safetensors"}
    assert "tokenizer.json" in tokenizer_files
    for name in tokenizer_files:
        assert (tmp_path / "merged" / name).read_bytes() == (folders[0] / name).read_bytes()
    with pytest.raises(UserError, match="already holds a model"):
        api.export(workdir, tmp_path / "merged")


@pytest.mark.slow
def test_the_exported_policy_in_transformers(run, folders, tmp_path):
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    peft = pytest.importorskip("peft")
    workdir = run[0]
    api.export(workdir, tmp_path / "merged")
    api.export(workdir, tmp_path / "adapter", adapter=True)
    config, params = load(tmp_path / "merged")
    tokens = np.random.default_rng(0).integers(0, config.vocab_size, (2, 40))
    expected = logits(config, params, tokens)
    model = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "merged", attn_implementation="eager"
    )
    base = transformers.AutoModelForCausalLM.from_pretrained(folders[0], attn_implementation="eager")
    adapted = peft.PeftModel.from_pretrained(base, str(tmp_path / "adapter"))
    for theirs in (model, adapted):
        with torch.no_grad():
            found = theirs(torch.tensor(tokens)).logits.numpy()
        np.testing.assert_allclose(found, expected, atol=1e-4)


@pytest.mark.slow
def test_a_run_goes_on_where_its_weights_have_moved_and_stops_where_they_have_changed(run, folders, tmp_path):
    workdir = shutil.copytree(run[0], tmp_path / "run")
    moved = shutil.copytree(folders[0], tmp_path / "moved")
    longer = dict(
        stream__tasks=",".join([*config_of(folders).stream.tasks, f"files:{folders[1]}/yelp5?name=x"])
    )
    weights = load_file(moved / "model.safetensors")
    changed = tmp_path / "changed"
    named.weights(changed, "gemma2", seed=1)
    assert load_file(changed / "model.safetensors").keys() == weights.keys()
    with pytest.raises(UserError, match="other weights .* than those this run began with"):
        api.train(config_of((changed, folders[1]), **longer), workdir)
    results = api.train(config_of((moved, folders[1]), **longer), workdir)
    assert results["tasks"] == ["yelp5", "amazon5", "x"]
    # Another chat template is another policy, too.
    about = json.loads((moved / "tokenizer_config.json").read_text())
    about["chat_template"] = about["chat_template"].replace("model", "assistant")
    (moved / "tokenizer_config.json").write_text(json.dumps(about))
    with pytest.raises(UserError, match="other weights"):
        api.train(config_of((moved, folders[1]), **longer), workdir)


@pytest.mark.slow
def test_a_new_stream_starts_from_the_merged_policy(run, folders, tmp_path):
    config = config_of(folders, stream__tasks=f"files:{folders[1]}/amazon5", learner__steps="0")
    api.train(config, tmp_path / "next", init_from=run[0])
    saved = load_file(tmp_path / "next" / "policy" / "params.safetensors")
    lora = config.policy.lora
    _, base = load(folders[0])
    state = runs.state(run[0])
    a, b = (state[f"params/lora/layers_0/query/{name}"] for name in "ab")
    kernel = np.asarray(base["layers_0"]["query"]["kernel"])
    np.testing.assert_allclose(
        saved["layers_0/query/kernel"], kernel + lora.alpha / lora.rank * a @ b, atol=1e-6
    )
    api.train(config, tmp_path / "next", init_from=run[0])  # finished: nothing is left to do


@pytest.mark.parametrize(
    ("key", "value", "words"),
    [
        ("policy__init", "gs:bucket", "policy.init = 'gs:bucket' names no weights: give hf:DIR"),
        ("policy__init", "hf:", "names no weights"),
        ("policy__init", "hf:nowhere", "there is no folder nowhere; name that of the weights"),
        ("policy__format", "markers", 'policy.format = "markers" needs a policy trained here'),
        ("policy__lora__modules", "query,q_proj", "policy.lora.modules has 'q_proj'"),
        ("policy__param_dtype", "int4", "policy.param_dtype = 'int4'"),
        ("supervised__held_out", "8", "supervised.held_out = 8 leaves none"),
        ("rollout__prompt_length", "4090", "4138 is more than the 4096 tokens"),
        ("rollout__prompt_length", "20", "rollout.prompt_length = 20 is too short.*takes"),
    ],
)
def test_what_cannot_be_run_is_said_in_one_sentence(folders, tmp_path, key, value, words):
    with pytest.raises(UserError, match=words):
        api.train(config_of(folders, **{key: value}), tmp_path / "run")


def test_a_tokenizer_of_another_model_is_refused(folders, tmp_path):
    other = shutil.copytree(folders[0], tmp_path / "other")
    fields = json.loads((other / "config.json").read_text())
    (other / "config.json").write_text(json.dumps({**fields, "vocab_size": 100}))
    with pytest.raises(UserError, match="uses the id .*100 embeddings"):
        api.train(config_of((other, folders[1])), tmp_path / "run")


def test_an_own_policy_takes_no_format_in_words(tmp_path):
    config = api.load(f"{ROOT / 'configs' / 'gemma2_2b.py'}:tiny", {"policy.format": "chat"})
    with pytest.raises(UserError, match='policy.format = "chat" is for named weights'):
        api.train(config, tmp_path / "run")
