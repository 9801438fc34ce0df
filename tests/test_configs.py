"""Every config under configs/ resolves, whole and tiny, and can be computed with."""

from __future__ import annotations

import shlex
import subprocess
import sys

import named
import pytest
import runs
from runs import ROOT

from streamsynth import api, assemble, config, validate
from streamsynth import main as main_lib
from streamsynth import weights as weights_lib
from streamsynth.compile import planned_network
from streamsynth.costs.chips import parse_topology
from streamsynth.errors import UserError
from streamsynth.policy.families import choices
from streamsynth.policy.huggingface.architectures import read_config

# Of pretrained policies: by name the family, and whether an adapter is trained.
PRETRAINED = {
    "gemma3_270m": ("gemma3", False),
    "gemma2_2b": ("gemma2", True),
    "gemma2_9b": ("gemma2", True),
    "gemma2_27b": ("gemma2", True),
    "llama31_8b": ("llama", True),
    "qwen25_7b": ("qwen2", True),
    "qwen3_4b": ("qwen3", True),
}
SCRIPTS = {"paper_folders"}  # makes folders, no config
CONFIGS = [path for path in sorted((ROOT / "configs").rglob("*.py")) if path.stem not in SCRIPTS]
BASELINES = {path.stem: path for path in CONFIGS if path.parent.name == "baselines"}
SWEEPS = [path for path in CONFIGS if path.name.startswith("sweep_")]


@pytest.fixture(scope="session")
def weights(tmp_path_factory):
    """By family, the folder of a random network; and the folder of the stream's data."""
    folder = tmp_path_factory.mktemp("weights")
    made = {family: named.weights(folder / family, family) for family in dict(PRETRAINED.values())}
    return {**made, "data": named.data(folder / "data")}


def flag(path, arg, weights):
    """`FILE:arg`, with the weights and data that a config of pretrained policies needs unless it is tiny."""
    if path.stem in PRETRAINED and "tiny" not in arg:
        named_folders = f"weights={weights[PRETRAINED[path.stem][0]]},data={weights['data']}"
        arg = f"{arg},{named_folders}" if arg else named_folders
    return f"{path}:{arg}"


@pytest.mark.parametrize("arg", ["", "seed=3", "tiny", "tiny,seed=3"])
@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_a_config_resolves_and_is_valid(path, arg, weights):
    resolved = config.load(flag(path, arg, weights))
    assemble.check(resolved)
    assert resolved.seed == (3 if "seed" in arg else 0)
    assert config.from_json(config.to_json(resolved)) == resolved


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_tiny_is_smaller(path, weights):
    whole, tiny = (config.load(flag(path, arg, weights)) for arg in ("", "tiny"))
    assert len(tiny.stream.tasks) <= 2
    assert tiny.pretrain.steps * tiny.policy.width < whole.pretrain.steps * whole.policy.width / 10
    assert tiny.learner.steps < whole.learner.steps


def test_every_config_of_a_pretrained_policy_is_known_here():
    assert PRETRAINED.keys() == {path.stem for path in CONFIGS if "pretrained(" in path.read_text()}


@pytest.mark.parametrize("name", PRETRAINED)
def test_a_pretrained_policy_runs_in_low_precision_with_scanned_layers(name, weights):
    """What the config asks of the network of its weights; without weights it says what is missing."""
    path = ROOT / "configs" / f"{name}.py"
    family, adapts = PRETRAINED[name]
    resolved = config.load(flag(path, "", weights))
    network = read_config(weights_lib.weights_folder(resolved), **choices(resolved.policy))
    assert (network.family, network.compute_dtype, network.scan_layers) == (family, "bfloat16", True)
    assert (network.lora is not None) == adapts
    assert network.param_dtype == ("bfloat16" if adapts else "float32")
    assert len(resolved.stream.tasks) == 4
    with pytest.raises(UserError, match="there is no folder .* such as :weights=DIR,data=DIR"):
        assemble.check(config.load(str(path)))


PODS = {
    "gemma2_2b": ["v5e:4x4"],
    "gemma2_9b": ["v5e:16x16", "v5p:4x4x4"],
    "gemma2_27b": ["v5p:4x4x4"],
    "llama31_8b": ["v5p:4x4x4"],
    "qwen3_4b": ["v6e:4x4"],
}


@pytest.mark.parametrize("name, pod", [(name, pod) for name, pods in PODS.items() for pod in pods])
def test_a_pod(name, pod, weights):
    """512 samples a step, long prompts, the mesh all of the pod's chips; tiny stays what it is."""
    path = ROOT / "configs" / f"{name}.py"
    resolved = config.load(f"{path}:pod={pod}")
    validate.check(resolved)
    r, p = resolved.rollout, resolved.policy
    assert r.prompts * r.samples >= 512 and r.prompt_length >= 1024 and r.completion_length >= 256
    assert (p.param_dtype, p.compute_dtype, p.scan_layers, p.remat) == ("bfloat16", "bfloat16", True, True)
    assert (p.lora.rank > 0) == (name == "gemma2_27b")
    devices, mesh = parse_topology(pod).count, resolved.mesh
    rows = devices // mesh.tensor
    assert (mesh.data, mesh.fsdp) == (1, -1) and devices % mesh.tensor == 0
    assert r.prompts % (rows * resolved.learner.microbatches) == 0
    network = planned_network(resolved)
    assert network.kv_heads % mesh.tensor == network.vocab_size % mesh.tensor == network.width % rows == 0
    tiny = config.load(f"{path}:pod={pod},tiny")
    assemble.check(tiny)
    assert tiny.policy.width == 32 and tiny.rollout.prompts == 4


def test_an_unknown_pod():
    with pytest.raises(UserError, match="pod=v5e:8x8 is not known: choose one of v5e:16x16, v5p:4x4x4"):
        config.load(f"{ROOT / 'configs' / 'gemma2_9b.py'}:pod=v5e:8x8")


# They take long and go one path but for their family's layers: the others are slow tests.
@pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=[] if name == "qwen3_4b" else pytest.mark.slow) for name in PRETRAINED],
)
def test_the_tiny_run_of_a_pretrained_policy(name, tmp_path, tmp_path_factory, quick_xla):
    """A small policy of the family, from nothing to the report."""
    cache = tmp_path_factory.getbasetemp() / "tiny-policies"
    tiny = config.load(f"{ROOT / 'configs' / name}.py:tiny", {"cache_dir": str(cache)})
    results = api.train(tiny, tmp_path / "run")
    assert results["tasks"] == ["market_1", "restaurant_1"] and results["turns"] == 2
    assert all(value is not None for row in results["transfer_matrix"] for value in row)
    state = set(runs.state(tmp_path / "run"))
    collection = "lora" if PRETRAINED[name][1] else "params"
    assert {path.split("/")[1] for path in state if path.startswith("params/")} == {collection}
    assert (tmp_path / "run" / "report" / "index.html").is_file()


# What tiny runs of baselines leave out is compiled for the quickstart's, elsewhere.
ONE_STEP = {
    "pretrain.steps": "0",
    "pretrain.corpus_sentences": "1000",
    "supervised.rounds": "1",
    "learner.steps": "1",
    "replay.share": "0.0",
    "evaluation.batches": "1",
    "evaluation.best_of": "1",
    "evaluation.student.steps": "5",
    "evaluation.student.width": "256",
}


def test_every_baseline_is_here():
    assert BASELINES.keys() == {
        *("isolated", "sequential_no_replay", "prompts_only", "best_of_n", "supervised_only", "quality_only"),
        *("shared_set_reward", "darling", "dqo", "mmr_grpo", "public_release"),
    }


@pytest.mark.parametrize("name", BASELINES)
def test_a_baseline_changes_what_it_says_and_nothing_else(name):
    """No two differ from the quickstart in the same way, and all learn from the same stream."""
    of = {key: config.flatten(config.load(str(path))) for key, path in BASELINES.items()}
    quickstart = config.flatten(config.load(str(runs.QUICKSTART)))
    changed = {key: {k: v for k, v in of[key].items() if v != quickstart[k]} for key in of}
    assert changed[name] and all(changed[name] != other for key, other in changed.items() if key != name)
    groups = {key.split(".")[0] for key in changed[name]}
    others = {"replay", "phases", "learner", "patterns", "dataset", "objective", "supervised"}
    assert groups <= {"stream", *others}
    # Some ask for attributes of the same tasks.
    assert tuple(spec.partition("?")[0] for spec in of[name]["stream.tasks"]) == quickstart["stream.tasks"]


@pytest.mark.parametrize("name", BASELINES)
def test_the_tiny_run_of_a_baseline(name, tmp_path, tmp_path_factory, quick_xla):
    """From nothing to the report, in the fewest steps; `isolated` needs a second task to forget the first."""
    cache = tmp_path_factory.getbasetemp() / "tiny-policies"
    whole = config.load(f"{BASELINES[name]}:tiny").stream.tasks
    tasks = whole if name == "isolated" else whole[:1]
    overrides = {**ONE_STEP, "stream.tasks": ",".join(tasks), "cache_dir": str(cache)}
    tiny = config.load(f"{BASELINES[name]}:tiny", overrides)
    results = api.train(tiny, tmp_path / "run")
    assert all(value is not None for row in results["transfer_matrix"] for value in row)
    learned = [
        row for row in runs.read_jsonl(tmp_path / "run" / "metrics.jsonl") if "advantage/dead_groups" in row
    ]
    assert len(learned) == tiny.learner.steps * len(tiny.stream.tasks)
    assert all(("gradient/norm" in row) == tiny.phases.reward for row in learned)
    assert all(
        "paid/quality" in row for row in learned if tiny.learner.reward in ("darling", "dqo", "release")
    )
    assert (tmp_path / "run" / "report" / "index.html").is_file()


@pytest.mark.slow
@pytest.mark.parametrize("name", PRETRAINED)
def test_the_tiny_run_with_weights(name, tmp_path, weights, quick_xla):
    """Named weights of the family in its chat format, on two folders of the stream."""
    family = PRETRAINED[name][0]
    tiny = f"{ROOT / 'configs' / name}.py:tiny,weights={weights[family]},data={weights['data']}"
    results = api.train(config.load(tiny), tmp_path / "run")
    assert results["tasks"] == ["yelp5", "amazon5"] and results["turns"] == 2
    api.export(tmp_path / "run", tmp_path / "model")
    assert read_config(tmp_path / "model").family == family


@pytest.mark.parametrize("path", SWEEPS, ids=lambda path: path.stem)
def test_a_sweep_prints_commands_that_resolve(path):
    command = [sys.executable, str(path), "tiny"]
    run = subprocess.run(command, capture_output=True, text=True, check=True, env={"PYTHONPATH": str(ROOT)})
    lines = run.stdout.splitlines()
    parsed = []
    for line in lines:
        program, *argv = shlex.split(line)
        rest, overrides = main_lib._split_overrides(argv)
        assert (program, rest[0], rest[2].split("=")[0]) == ("streamsynth", "train", "--workdir")
        resolved = config.load(rest[1].removeprefix("--config="), overrides)
        assemble.check(resolved)
        parsed.append((rest[2], config.content_hash(resolved)))
    workdirs, hashes = zip(*parsed, strict=True)
    assert len(set(workdirs)) == len(lines) >= 5
    # A run may be the config as it is; no two runs are otherwise the same.
    assert len(set(hashes)) >= len(lines) - 1


def test_sweep_covers_the_keys_of_the_balance():
    changed = set()
    spec = config._import_file(str(ROOT / "configs" / "sweep_balance.py"))
    spec.sweep(lambda name, overrides: changed.update(overrides))
    assert changed == {"balance.alpha", "balance.eta", "balance.factor", "objective.kl_weight"}
