"""Checkpoints of several processes, and those restored onto other devices than they were saved on."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import textwrap
from pathlib import Path

import jax
import numpy as np

from streamsynth.runtime.checkpoint import Checkpoints

ROOT = Path(__file__).resolve().parent.parent


def start(script: str, *arguments: str, devices: int) -> subprocess.Popen:
    """A Python process with so many simulated devices."""
    path = os.pathsep.join([str(ROOT / "tests"), str(ROOT), os.environ.get("PYTHONPATH", "")])
    env = {
        **os.environ,
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": f"--xla_force_host_platform_device_count={devices}",
        "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",  # nearly all of it is compilation
        "PYTHONPATH": path,
    }
    return subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(script), *arguments],
        env=env,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def finish(process: subprocess.Popen) -> str:
    out, err = process.communicate(timeout=600)
    assert process.returncode == 0, err[-4000:]
    return out


# ------------------------------------------------------------------------------------------ two processes

_TWO_PROCESSES = """
    import os, pathlib, sys
    import jax, numpy as np
    folder, port, rank = sys.argv[1], sys.argv[2], int(sys.argv[3])
    jax.distributed.initialize(f"localhost:{port}", 2, rank)
    from jax.experimental import multihost_utils
    from jax.sharding import NamedSharding, PartitionSpec as P
    from streamsynth.runtime import mesh as mesh_lib
    from streamsynth.runtime.checkpoint import Checkpoints
    assert (jax.process_count(), jax.local_device_count(), jax.device_count()) == (2, 2, 4)

    mesh = mesh_lib.make_mesh(dict(data=1, fsdp=2, tensor=2))

    def split(values, *axes):
        return jax.make_array_from_callback(values.shape, NamedSharding(mesh, P(*axes)), lambda i: values[i])

    def tree(step):
        values = np.random.default_rng(step).normal(size=(8, 6)).astype(np.float32)
        return {
            "both": split(values, "fsdp", "tensor"),
            "one": split(values[:, 0], "fsdp"),
            "everywhere": split(values, None),
            "empty": np.zeros((0, 3), np.float32),
            "own": {"numpy": values + 100 * rank, "device": jax.numpy.asarray(values + 100 * rank)},
        }

    def check(found, step):
        values = np.random.default_rng(step).normal(size=(8, 6)).astype(np.float32)
        for name, whole in (("both", values), ("one", values[:, 0]), ("everywhere", values)):
            for shard in found[name].addressable_shards:
                np.testing.assert_array_equal(shard.data, whole[shard.index])
        for leaf in found["own"].values():  # as process 0 had them
            np.testing.assert_array_equal(leaf, values)
        assert isinstance(found["own"]["device"], jax.Array) and found["empty"].shape == (0, 3)

    checkpoints = Checkpoints(folder, asynchronous=True)
    assert checkpoints.last_whole() is None
    for step in (1, 2, 3):
        checkpoints.save(step, tree(step), {"step": step, "rank": rank})
    checkpoints.close()
    again = Checkpoints(folder, asynchronous=True)
    assert again.last_whole() == 3 and again.meta(3) == {"step": 3, "rank": 0}
    check(again.restore(3, tree(0)), 3)

    # One process sees the damage, both go back.
    if rank == 0:
        [*_, largest] = sorted(
            (path for path in pathlib.Path(folder, "3").rglob("*") if path.is_file()),
            key=lambda path: path.stat().st_size)
        os.truncate(largest, 10)
    multihost_utils.sync_global_devices("damaged")
    again = Checkpoints(folder, asynchronous=True)
    assert again.last_whole() == 2
    check(again.restore(2, tree(0)), 2)
    again.save(3, tree(3), {})
    again.close()
"""


def test_two_processes_save_and_restore_and_one_with_one_device_does(tmp_path):
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    folder = tmp_path / "checkpoints"
    processes = [start(_TWO_PROCESSES, str(folder), str(port), str(rank), devices=2) for rank in (0, 1)]
    for process in processes:
        finish(process)
    assert sorted(os.listdir(folder)) == ["2", "3", "3.damaged"]
    checkpoints = Checkpoints(folder)
    assert checkpoints.last_whole() == 3
    template = checkpoints.shapes(3)
    device = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    template["both"] = jax.ShapeDtypeStruct((8, 6), np.float32, sharding=device)
    restored = checkpoints.restore(3, template)
    values = np.random.default_rng(3).normal(size=(8, 6)).astype(np.float32)
    assert isinstance(restored["both"], jax.Array)
    for found, expected in (
        (restored["both"], values),
        (restored["one"], values[:, 0]),
        (restored["everywhere"], values),
        (restored["own"]["numpy"], values),
        (restored["own"]["device"], values),
    ):
        np.testing.assert_array_equal(found, expected)


# ------------------------------------------------------------------------------------------- another mesh

_TRAINS = """
    import json, sys
    import jax, numpy as np, tiny
    from flax import serialization
    from jax.sharding import NamedSharding
    from streamsynth.defaults import optimizer as optimizer_keys
    from streamsynth.learner.optimizer import make_optimizer
    from streamsynth.learner.supervised import SupervisedBatch, supervised_step
    from streamsynth.policy.transformer import Transformer, TransformerConfig, init_params, logical_axes
    from streamsynth.runtime import mesh as mesh_lib
    from streamsynth.runtime.checkpoint import Checkpoints

    folder, fsdp, tensor, saves = sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), sys.argv[4] == "saves"
    mesh = mesh_lib.make_mesh(dict(data=1, fsdp=fsdp, tensor=tensor))
    config = TransformerConfig(vocab_size=32, **tiny.SHAPE)
    shardings = mesh_lib.param_shardings(
        jax.eval_shape(lambda: init_params(config, jax.random.key(0))), logical_axes(config), mesh)
    params = {"params": jax.device_put(init_params(config, jax.random.key(0)), shardings)}
    optimizer = make_optimizer(optimizer_keys(learning_rate=1e-2, warmup=0), 20)
    whole = mesh_lib.replicated(mesh)
    opt_state = jax.tree.map(
        lambda x: x if isinstance(x.sharding, NamedSharding) else jax.device_put(x, whole),
        jax.jit(optimizer.init)(params))
    checkpoints = Checkpoints(folder, asynchronous=True)

    def tree():
        return serialization.to_state_dict({"params": params, "opt_state": opt_state})

    first = 0
    if not saves:
        first = checkpoints.last_whole()
        template = {"params": params, "opt_state": opt_state}
        state = serialization.from_state_dict(template, checkpoints.restore(first, tree()))
        params, opt_state = state["params"], state["opt_state"]
    restored = tiny.flat(jax.device_get(tree())).tolist()
    out = {"devices": jax.device_count(), "restored": restored, "losses": []}
    kernel = params["params"]["layers_0"]["query"]["kernel"]
    out["shard"] = kernel.addressable_shards[0].data.size / kernel.size
    with mesh_lib.use(mesh):
        for step in range(first, 6):
            rng = np.random.default_rng(step)
            batch = SupervisedBatch(tiny.prompts(rng, 8, 6), *tiny.completions(rng, 16, 5))
            params, opt_state, metrics = supervised_step(
                tiny.Transformer(config), optimizer, params, {}, opt_state,
                jax.device_put(batch, mesh_lib.batch_sharding(mesh)), np.float32(0.65))
            out["losses"].append(float(metrics["nll/completion"]))
            if saves and step == 2:
                out["saved"] = tiny.flat(jax.device_get(tree())).tolist()
                checkpoints.save(3, tree(), {})  # what it holds is donated in the next step
    checkpoints.close()
    print(json.dumps(out))
"""


def test_training_goes_on_on_fewer_devices_than_it_was_saved_on(tmp_path):
    folder = str(tmp_path / "checkpoints")
    whole = json.loads(finish(start(_TRAINS, folder, "4", "2", "saves", devices=8)).splitlines()[-1])
    assert (whole["devices"], whole["shard"], len(whole["losses"])) == (8, 1 / 8, 6)
    assert whole["losses"][5] < whole["losses"][0] - 0.1
    for fsdp, tensor in ((2, 2), (1, 1)):
        process = start(_TRAINS, folder, str(fsdp), str(tensor), "continues", devices=fsdp * tensor)
        found = json.loads(finish(process).splitlines()[-1])
        assert (found["devices"], found["shard"]) == (fsdp * tensor, 1 / (fsdp * tensor))
        assert found["restored"] == whole["saved"]
        np.testing.assert_allclose(found["losses"], whole["losses"][3:], rtol=1e-5)
