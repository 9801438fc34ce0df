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
import pytest

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

    config = TransformerConfig(vocab_size=32, **tiny.SHAPE)
    model = Transformer(config)
    optimizer = make_optimizer(optimizer_keys(learning_rate=1e-2, warmup=0), 20)
    network = init_params(config, jax.random.key(0))
    checkpoints = Checkpoints(sys.argv[1], asynchronous=True)

    def flat(params, opt_state):
        return tiny.flat(jax.device_get((params, opt_state))).tolist()

    def train(fsdp, tensor, last, saved_at=None, continues=False):
        mesh = mesh_lib.make_mesh(
            dict(data=1, fsdp=fsdp, tensor=tensor), jax.devices()[: fsdp * tensor])
        params = {"params": jax.device_put(
            network, mesh_lib.param_shardings(network, logical_axes(config), mesh))}
        whole = mesh_lib.replicated(mesh)
        opt_state = jax.tree.map(
            lambda x: x if isinstance(x.sharding, NamedSharding) else jax.device_put(x, whole),
            optimizer.init(params))
        first, out = 0, {"losses": []}
        if continues:
            first, template = checkpoints.last_whole(), {"params": params, "opt_state": opt_state}
            tree = checkpoints.restore(first, serialization.to_state_dict(template))
            params, opt_state = serialization.from_state_dict(template, tree).values()
        out["begins"] = flat(params, opt_state)
        kernel = params["params"]["layers_0"]["query"]["kernel"]
        out["shard"] = kernel.addressable_shards[0].data.size / kernel.size
        for step in range(first, last):
            rng = np.random.default_rng(step)
            batch = SupervisedBatch(tiny.prompts(rng, 8, 6), *tiny.completions(rng, 16, 5))
            with mesh_lib.use(mesh):
                params, opt_state, metrics = supervised_step(
                    model, optimizer, params, {}, opt_state,
                    jax.device_put(batch, mesh_lib.batch_sharding(mesh)), np.float32(0.65))
            out["losses"].append(float(metrics["nll/completion"]))
            if step + 1 == saved_at:
                out["saved"] = flat(params, opt_state)
                tree = serialization.to_state_dict({"params": params, "opt_state": opt_state})
                checkpoints.save(saved_at, tree, {})  # what it holds is donated in the next step
        checkpoints.wait()
        return out

    print(json.dumps([
        train(4, 2, 6, saved_at=3), train(2, 2, 6, continues=True), train(1, 1, 6, continues=True)]))
"""


@pytest.mark.slow
def test_training_goes_on_on_fewer_devices_than_it_was_saved_on(tmp_path):
    out = finish(start(_TRAINS, str(tmp_path / "checkpoints"), devices=8))
    whole, *continued = json.loads(out.splitlines()[-1])
    assert (whole["shard"], len(whole["losses"])) == (1 / 8, 6)
    assert whole["losses"][5] < whole["losses"][0] - 0.1
    for devices, found in zip((4, 1), continued, strict=True):
        assert found["shard"] == 1 / devices
        assert found["begins"] == whole["saved"]
        np.testing.assert_allclose(found["losses"], whole["losses"][3:], rtol=1e-5)
