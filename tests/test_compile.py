"""Ahead of time: published networks, slices of chips, what does not fit and what to change, and the verb."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import os
import subprocess
import sys
import textwrap
from pathlib import Path

import jax
import pytest

from streamsynth import compile as compile_lib
from streamsynth import config as config_lib
from streamsynth import main as main_lib
from streamsynth.costs import chips, fit, gpus, report
from streamsynth.costs.chips import GIB, parse_topology
from streamsynth.costs.fit import Keys, Load, Memory
from streamsynth.errors import UserError
from streamsynth.policy.huggingface import published
from streamsynth.policy.transformer import param_shapes
from streamsynth.programs import declared, make_kept
from streamsynth.runtime import mesh as mesh_lib

ROOT = Path(__file__).resolve().parent.parent
QUICKSTART = ROOT / "configs" / "quickstart.py"
V5E = chips.CHIPS["v5e"]


@pytest.mark.parametrize(
    "name, parameters",
    [  # as the models' pages on the hub count them
        ("gemma-2-2b", 2_614_341_888),
        ("gemma-2-9b", 9_241_705_984),
        ("gemma-2-27b", 27_227_128_320),
        ("gemma-3-270m", 268_098_176),
        ("Llama-3.1-8B", 8_030_261_248),
        ("Qwen2.5-7B", 7_615_616_512),
        ("Qwen3-4B", 4_022_468_096),
    ],
)
def test_a_published_network_has_the_parameters_it_is_known_to_have(name, parameters):
    network = published.published_config(name, scan_layers=True)
    assert sum(leaf.size for leaf in jax.tree.leaves(param_shapes(network))) == parameters


def test_a_folder_is_known_by_its_name():
    assert published.model_name("google/gemma-2-9b-it") == "gemma-2-9b"
    assert published.model_name("/some/where/Llama-3.1-8B-Instruct/") == "Llama-3.1-8B"
    assert published.model_name("qwen3-4b") == "Qwen3-4B"
    assert published.model_name("gemma-2-9b-mine") is None


@pytest.mark.parametrize("kind", chips.CHIPS)
def test_rates_of_chips_are_in_one_unit(kind):
    """A slip of a factor of a thousand, or of bits for bytes, would leave these ranges."""
    chip = chips.CHIPS[kind]
    assert 14 * GIB < chip.usable <= chip.memory < 144 * GIB
    assert 100e12 < chip.flops < 1e15 and 500e9 < chip.memory_rate < 5e12
    assert 100e9 < chip.link_rate < chip.memory_rate


def test_topologies():
    slice_ = parse_topology("v5p:4x4x4")
    assert (slice_.kind, slice_.grid, slice_.count, str(slice_)) == ("v5p", (4, 4, 4), 64, "v5p:4x4x4")
    for text, said in (
        ("v9:4x4", "the chip 'v9' is not known: choose one of v4, v5e, v5p, v6e, a100, h100, h200"),
        ("cuda:h100", "the chip 'cuda' is not known: .*as in v5e:4x4 or h100:8"),
        ("h100:2x8", "1 dimensions, as in h100:4"),
        ("h100:16", "the GPUs of one host, at most 8"),
        ("v5e", "a slice of v5e has 2 dimensions, as in v5e:4x4"),
        ("v5e:4x4x4", "2 dimensions"),
        ("v5p:4x4", "3 dimensions"),
        ("v5e:4x0", "2 dimensions"),
        ("v5e:4xfour", "2 dimensions"),
    ):
        with pytest.raises(UserError, match=f"^--topology={text}: .*{said}"):
            parse_topology(text)


def load(name, *, temporary=0.0, beside=0.0, arguments=1.0, **kwargs):
    """A load in GiB."""
    memory = Memory(int(arguments * GIB), 0, 0, int(temporary * GIB), 0, 0)
    return Load(name, memory, int(beside * GIB), **kwargs)


KEYS = Keys(
    data=1, fsdp=4, tensor=1, prompts=64, samples=8, microbatches=2, remat=False, rank=0, chunk=256,
    early_stop=False,
)  # fmt: skip


def test_the_larger_of_two_counts_is_needed():
    memory = Memory(arguments=10, outputs=8, aliased=7, temporary=5, code=2, peak=17)
    assert memory.needed == 18
    assert dataclasses.replace(memory, peak=30).needed == 30


def test_what_a_run_keeps_beside_a_program_counts():
    """A program that fits alone does not where the optimizer's state lies beside it."""
    assert load("rollout", temporary=8, beside=6).fits(V5E)
    assert not load("rollout", temporary=8, beside=7).fits(V5E)
    assert not Load("rollout", None, 0).fits(V5E)


def test_nothing_to_change_where_all_fits():
    assert fit.advice([load("update", temporary=10)], {"trained": GIB}, KEYS, V5E) == []


@pytest.mark.parametrize(
    "full, kept, changes, said",
    [
        (load("update", temporary=20), 1, {}, ["policy.remat", "microbatches (now 2)", "objective.chunk"]),
        (load("update", temporary=20), 1, {"remat": True}, ["microbatches", "rollout.samples (now 8)"]),
        (load("supervised", temporary=20), 1, {}, ["learner.microbatches", "supervised.samples"]),
        (load("reference", temporary=20), 1, {}, ["reference does not fit (21.00 GiB of 15.75 GiB)"]),
        (load("rollout", temporary=20), 1, {}, ["rollout.prompts (now 64)", "mesh.tensor (now 1)"]),
        (load("evaluation", temporary=20), 1, {}, ["evaluation.prompts"]),
        (load("judge", temporary=20), 1, {}, ["mesh.fsdp (now 4)"]),
        (load("update", temporary=20), 9, {}, ["9.00 GiB of 15.75", "raise mesh.fsdp", "policy.lora.rank"]),
        (load("update", temporary=20), 9, {"data": 4}, ["mesh.data = 4 holds as many copies"]),
        (load("update", temporary=20), 9, {"early_stop": True}, ["supervised.early_stop"]),
    ],
)  # fmt: skip
def test_advice(full, kept, changes, said):
    fine = load("rollout", temporary=1)
    others = [] if full.name == "rollout" else [fine]
    told = fit.advice([*others, full], {"trained": kept * GIB}, dataclasses.replace(KEYS, **changes), V5E)
    assert all(part in " ".join(told) for part in said)
    assert not any(line.startswith("rollout does not fit") for line in told) or full.name == "rollout"


def test_advice_names_only_what_can_still_be_changed():
    """With one prompt on each device there is nothing left to split; remat is on, an adapter is trained."""
    keys = dataclasses.replace(KEYS, fsdp=64, microbatches=1, remat=True, rank=8)
    told = " ".join(fit.advice([load("update", temporary=20)], {"trained": 9 * GIB}, keys, V5E))
    assert "microbatches" not in told and "remat" not in told and "lora" not in told


def test_what_a_program_asked_for():
    asked = compile_lib.asked_for
    message = (
        "Ran out of memory on HBM, the total memory required for HLO temporaries (1.28T) exceeds available"
    )
    assert asked(f"RESOURCE_EXHAUSTED: {message} HBM (15.75G).") == int(1.28 * 2**40)
    assert asked("Ran out of memory in memory space hbm. Used 20.50G of 15.75G hbm.") == int(20.5 * GIB)
    assert asked("nothing of the kind") == 0


def test_the_floor_of_each_rate():
    from streamsynth.costs.counts import Costs
    from streamsynth.costs.hlo import Collective, Found

    found = Found((Collective("all-gather", 4, 1, 1, 0, int(400e9)),), 0)
    costs = Costs(flops=4 * 197e12, weight_bytes=2 * 819e9)
    seconds = report.floors(V5E, dict(data=1, fsdp=2, tensor=2), costs, found)
    assert seconds == {"compute": 1.0, "memory": 1.0, "links": 2.0}
    assert "links" not in report.floors(V5E, dict(data=1, fsdp=2, tensor=2), costs, None)


def compiled(*argv, **env):
    command = [sys.executable, "-m", "streamsynth.main", "compile", *argv]
    path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    env = {**os.environ, "PYTHONPATH": path, **env}
    return subprocess.run(command, capture_output=True, text=True, env=env, cwd=ROOT, check=False)


def test_mistakes_end_in_one_sentence(capsys):
    def said(*argv):
        assert main_lib.main(["compile", *argv]) == 2
        out, err = capsys.readouterr()
        assert out == "" and err.count("\n") == 1
        return err

    tiny = f"--config={QUICKSTART}:tiny"
    assert "--topology" in said(tiny)
    assert "the chip 'gpu' is not known" in said(tiny, "--topology=gpu:1")
    assert "nearest are: rollout.prompts" in said(tiny, "--topology=v5e:2x2", "--config.rollout.prompt=4")


def test_without_libtpu_it_says_what_to_install(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    config = config_lib.load(f"{QUICKSTART}:tiny")
    with pytest.raises(UserError, match="takes libtpu, which needs no TPU: install the optional extra `tpu`"):
        compile_lib.compile_run(config, "v5e:2x2", "quickstart")


def test_without_the_cuda_plugin_it_says_what_to_install(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match="extra `cuda`, or `pip install --no-deps jax-cuda13-pjrt=="):
        compile_lib.topology_devices(parse_topology("h100:8"))


@pytest.mark.parametrize("kind", gpus.KINDS)
def test_a_gpu_is_described_as_the_table_of_chips_has_it(kind):
    gpu, chip = gpus.KINDS[kind], chips.CHIPS[kind]
    assert gpu.memory == pytest.approx(chip.memory, rel=1e-3)
    assert gpu.memory_rate == pytest.approx(chip.memory_rate, rel=1e-2)
    assert f"device_memory_size: {gpu.memory}" in gpus.target_config(kind)


def test_weights_that_are_neither_there_nor_known():
    config = config_lib.load(f"{ROOT / 'configs' / 'gemma2_9b.py'}:weights=mine/own-model")
    with pytest.raises(UserError, match="'hf:mine/own-model': there is no such folder, and its name is none"):
        compile_lib.planned_network(config)
    config = config_lib.load(f"{ROOT / 'configs' / 'gemma2_9b.py'}:weights=mine/gemma-2-9b")
    assert compile_lib.planned_network(config).layers == 42


def test_a_folder_that_is_there_wins(tmp_path):
    import named

    folder = named.weights(tmp_path / "gemma-2-9b", "gemma2")
    config = config_lib.load(f"{ROOT / 'configs' / 'gemma2_9b.py'}:weights={folder}")
    assert compile_lib.planned_network(config).layers == 2


def test_the_declared_programs_of_a_run_can_be_traced():
    """With what they are declared to be given; a run's own calls are typed by the same functions."""
    changes = {"replay.share": "0.5", "feedback.features": "hidden", "learner.microbatches": "2"}
    config = config_lib.load(f"{QUICKSTART}:tiny", {**changes, "rollout.prompts": "4"})
    mesh = mesh_lib.make_mesh(config.mesh.to_dict(), jax.devices()[:1])
    network = compile_lib.planned_network(config)
    programs = {one.name: one for one in declared(config, network, mesh)}
    assert list(programs) == [
        "rollout", "reference", "update", "supervised", "evaluation", "judge", "features",
    ]  # fmt: skip
    kept, _ = make_kept(config, network, mesh)
    sizes = kept.bytes_by_part()
    with mesh_lib.use(mesh):
        for one in programs.values():
            lowered = one.function.lower(*one.args, **one.kwargs)
            found = lowered.cost_analysis()["flops"]
            # Loops are seen once here, so that the count by hand is the larger one.
            assert 0 < found < 2 * one.costs.flops, one.name
    # What a program is given is not counted beside it.
    whole = sum(sizes.values())
    assert programs["update"].beside == whole - sizes["trained"] - sizes["opt_state"]
    assert programs["rollout"].beside == whole - sizes["trained"]
    # Moments of float32 parameters: twice as much as they, but for counters.
    assert 0 <= sizes["opt_state"] - 2 * sizes["trained"] < 100
    assert programs["rollout"].cache > 0 and programs["update"].cache == 0
    assert "8 replayed" in programs["update"].shapes


def test_a_batch_that_cannot_be_split_is_refused():
    config = config_lib.load(f"{QUICKSTART}:tiny", {"learner.microbatches": "3", "rollout.prompts": "4"})
    mesh = mesh_lib.make_mesh(config.mesh.to_dict(), jax.devices()[:1])
    with pytest.raises(UserError, match="learner.microbatches = 3 does not divide rollout.prompts = 4"):
        declared(config, compile_lib.planned_network(config), mesh)


needs_libtpu = pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None, reason="compiling for a TPU takes libtpu (the extra `tpu`)"
)


@pytest.mark.slow
@needs_libtpu
def test_a_tiny_run_on_four_chips():
    """The verb itself, to the end: every program compiles, fits, and says where its collectives are."""
    split = ["--config.mesh.data=1", "--config.mesh.fsdp=2", "--config.mesh.tensor=2"]
    sizes = ["--config.rollout.prompts=4", "--config.evaluation.prompts=8", "--config.replay.share=0.5"]
    heads = ["--config.policy.scan_layers=true", "--config.policy.vocab_size=700"]
    argv = [f"--config={QUICKSTART}:tiny", "--topology=v5e:2x2", *split, *sizes, *heads]
    run = compiled(*argv, "--json")
    assert run.returncode == 0, run.stderr
    found = json.loads(run.stdout)
    assert (found["devices"], found["mesh"]) == (4, {"data": 1, "fsdp": 2, "tensor": 2})
    assert found["fits"] and found["advice"] == []
    programs = {one["name"]: one for one in found["programs"]}
    assert programs.keys() == {"rollout", "reference", "update", "supervised", "evaluation", "judge"}
    for one in programs.values():
        assert one["memory"]["needed"] <= one["total"] < V5E.usable and one["error"] == ""
        assert one["flops"]["hand"] > 0 and one["flops"]["xla"] > 0 and one["unknown_loops"] == 0
        assert one["floor_seconds"].keys() == {"compute", "memory", "links"}
    # Weights lie split along fsdp and are gathered for each of the tokens.
    gathered = [one for one in programs["rollout"]["collectives"] if one["kind"] == "all-gather"]
    tokens = config_lib.load(f"{QUICKSTART}:tiny").rollout.completion_length
    assert max(one["count"] for one in gathered) >= tokens - 1
    told = report.text(found)
    assert "It fits: " in told and "XLA counts the body of a loop once" in told


@pytest.mark.slow
@needs_libtpu
def test_what_does_not_fit_says_what_to_change():
    """A pod's rollout on four chips instead of sixteen, with as many samples again for each of them."""
    argv = ["--topology=v5e:2x2", "--config.rollout.samples=64", "--only=rollout", "--json"]
    run = compiled(f"--config={ROOT / 'configs' / 'gemma2_2b.py'}:pod=v5e:4x4", *argv)
    assert run.returncode == 0, run.stderr
    found = json.loads(run.stdout)
    [rollout] = found["programs"]
    assert not found["fits"] and not rollout["fits"] and rollout["total"] > V5E.usable
    assert "lower rollout.prompts (now 64) or rollout.samples (now 64)" in " ".join(found["advice"])
    assert "It does not fit." in report.text(found)


@pytest.mark.slow
@pytest.mark.skipif(
    importlib.util.find_spec("jax_cuda13_plugin") is None, reason="compiling for a GPU takes JAX's plugin"
)
def test_a_tiny_run_on_two_gpus():
    """The same verb: every program compiles without a GPU, and its collectives are found."""
    mesh = ["--config.mesh.data=1", "--config.mesh.fsdp=2", "--config.policy.vocab_size=700"]
    sizes = ["--config.rollout.prompts=4", "--config.evaluation.prompts=8"]
    run = compiled(f"--config={QUICKSTART}:tiny", "--topology=h100:2", *mesh, *sizes, "--json")
    assert run.returncode == 0, run.stderr
    found = json.loads(run.stdout)
    assert (found["devices"], found["fits"]) == (2, True)
    programs = {one["name"]: one for one in found["programs"]}
    assert {"rollout", "reference", "update", "supervised"} <= programs.keys()
    for one in programs.values():
        assert 0 < one["memory"]["needed"] <= one["total"] < chips.CHIPS["h100"].usable
        assert {"compute", "memory", "links"} == one["floor_seconds"].keys() and one["unknown_loops"] == 0
    assert "all-gather" in {one["kind"] for one in programs["rollout"]["collectives"]}


@pytest.mark.slow
@needs_libtpu
def test_a_slice_that_libtpu_does_not_have():
    run = compiled(f"--config={QUICKSTART}:tiny", "--topology=v5e:3x5")
    assert run.returncode == 2 and "libtpu knows no such slice" in run.stderr
    run = compiled(f"--config={QUICKSTART}:tiny", "--topology=v5e:2x2", "--config.mesh.tensor=3")
    assert run.returncode == 2 and "mesh.tensor = 3 do not fit 4 devices" in run.stderr


_UNTIED = """
    import dataclasses
    from streamsynth import compile as compile_lib, config as config_lib
    from streamsynth.costs.chips import parse_topology
    from streamsynth.programs import declared
    from streamsynth.runtime import mesh as mesh_lib

    changes = {"learner.microbatches": "2", "rollout.prompts": "4", "evaluation.prompts": "4"}
    config = config_lib.load("configs/quickstart.py:tiny", changes)
    dtypes = dict(param_dtype="bfloat16", compute_dtype="bfloat16")
    network = dataclasses.replace(
        compile_lib.planned_network(config), vocab_size=512, scan_layers=True, tied_embeddings=False, **dtypes
    )
    devices = compile_lib.topology_devices(parse_topology("v5e:2x2"))
    mesh = mesh_lib.make_mesh({"data": 1, "fsdp": 2, "tensor": 2}, devices)
    [program] = [one for one in declared(config, network, mesh) if one.name == "supervised"]
    with mesh_lib.use(mesh):
        program.function.lower(*program.args, **program.kwargs).compile()
"""


@pytest.mark.slow
@needs_libtpu
def test_a_head_that_is_not_tied_compiles_with_microbatches():
    """XLA moves sums out of loops, and has failed where a sum of float32 was rounded before it was added."""
    env = {**os.environ, "PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"}
    env |= {"TPU_SKIP_MDS_QUERY": "1", "ALLOW_MULTIPLE_LIBTPU_LOAD": "1"}
    argv = [sys.executable, "-c", textwrap.dedent(_UNTIED)]
    run = subprocess.run(argv, capture_output=True, text=True, env=env, cwd=ROOT, check=False)
    assert run.returncode == 0, run.stderr[-3000:]
