"""The mesh and the placement of parameters, on 8 simulated devices."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import textwrap

import jax
import pytest

from streamsynth.errors import UserError
from streamsynth.runtime import mesh as mesh_lib


@pytest.mark.parametrize(
    "shape, sentence",
    [
        ({"data": -1, "fsdp": -1, "tensor": 1}, "mesh.data and mesh.fsdp are both -1"),
        ({"data": 3, "fsdp": 1, "tensor": -1}, "mesh.data = 3.* do not fit 1 device:"),
        ({"data": 2, "fsdp": 1, "tensor": 1}, "mesh.data = 2.* do not fit 1 device:"),
        ({"data": 0, "fsdp": 1, "tensor": 1}, "mesh.data = 0"),
        ({"data": 1, "fsdp": 1}, "mesh.tensor"),
        ({"data": 1, "fsdp": 1, "tensor": 1, "pipe": 1}, "mesh.pipe"),
    ],
)
def test_impossible_meshes_are_refused_by_key(shape, sentence):
    with pytest.raises(UserError, match=sentence):
        mesh_lib.make_mesh(shape, devices=jax.devices()[:1])


_ON_EIGHT = """
    import json, re
    import flax.linen as nn
    import jax, jax.numpy as jnp, numpy as np
    import optax
    from jax.sharding import PartitionSpec as P
    from streamsynth.errors import UserError
    from streamsynth.runtime import mesh as mesh_lib

    out = {}
    mesh = mesh_lib.make_mesh({"data": -1, "fsdp": 2, "tensor": 2})
    out["shape"] = dict(mesh.shape)
    for shape in ({"data": 3, "fsdp": 1, "tensor": -1}, {"data": 2, "fsdp": 2, "tensor": 1}):
        try:
            mesh_lib.make_mesh(shape)
        except UserError as error:
            out.setdefault("refused", []).append(str(error))

    class Net(nn.Module):
        width: int = 8

        @nn.compact
        def __call__(self, x):
            init = nn.initializers.lecun_normal()
            up = self.param("up", nn.with_logical_partitioning(init, ("embed", "mlp")), (4, self.width))
            down = self.param("down", nn.with_logical_partitioning(init, ("mlp", "embed")), (self.width, 4))
            h = nn.with_logical_constraint(jnp.tanh(x @ up), ("batch", "mlp"))
            return nn.with_logical_constraint(h @ down, ("batch", "embed_act"))

    x = np.random.default_rng(0).normal(size=(8, 4)).astype(np.float32)

    def place(net, mesh):
        variables = jax.eval_shape(net.init, jax.random.key(0), x)
        axes = nn.get_partition_spec(variables)["params"]
        shapes = nn.meta.unbox(variables)["params"]
        return mesh_lib.param_shardings(shapes, axes, mesh)

    out["specs"] = {name: list(sharding.spec) for name, sharding in place(Net(), mesh).items()}
    try:
        place(Net(width=9), mesh)
    except UserError as error:
        out["odd"] = str(error)
    try:
        mesh_lib.param_shardings(jnp.ones(4), P("embbed"), mesh)
    except ValueError as error:
        out["unknown"] = str(error)

    def steps(mesh):
        net = Net()
        init = jax.jit(lambda: nn.meta.unbox(net.init(jax.random.key(0), x)["params"]),
                       out_shardings=place(net, mesh))
        grad = jax.jit(jax.value_and_grad(lambda params, x: jnp.mean(net.apply({"params": params}, x) ** 2)))
        with mesh_lib.use(mesh):
            params = init()
            batch = jax.device_put(x, mesh_lib.batch_sharding(mesh))
            losses = []
            for _ in range(3):
                loss, gradient = grad(params, batch)
                params = optax.apply_updates(params, jax.tree.map(lambda g: -g, gradient))
                losses.append(float(loss))
            if mesh.size == 8:
                out["batch_shard"] = list(batch.addressable_shards[0].data.shape)
                out["up_shard"] = list(params["up"].addressable_shards[0].data.shape)
                whole = jax.device_put(x, mesh_lib.replicated(mesh))
                out["replica"] = list(whole.addressable_shards[0].data.shape)
                hlo = grad.lower(params, whole).compile().as_text()
                out["tanh"] = re.findall(r"f32\\[([0-9,]+)\\]\\S* tanh", hlo)
        return losses

    one = mesh_lib.make_mesh({"data": 1, "fsdp": 1, "tensor": 1}, devices=jax.devices()[:1])
    out["losses"] = [steps(one), steps(mesh)]
    try:
        mesh_lib.check_batch(6, "rollout.prompts", mesh)
    except UserError as error:
        out["batch"] = str(error)
    mesh_lib.check_batch(8, "rollout.prompts", mesh)
    print(json.dumps(out))
"""


@pytest.fixture(scope="module")
def on_eight() -> dict:
    env = {**os.environ, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": "--xla_force_host_platform_device_count=8"}
    command = [sys.executable, "-c", textwrap.dedent(_ON_EIGHT)]
    done = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_minus_one_takes_what_is_left(on_eight):
    assert on_eight["shape"] == {"data": 2, "fsdp": 2, "tensor": 2}
    assert all("8 devices" in sentence for sentence in on_eight["refused"]) and len(on_eight["refused"]) == 2


def test_parameters_lie_by_the_rules(on_eight):
    assert on_eight["specs"] == {
        "up": ["fsdp", "tensor"],
        "down": ["tensor", "fsdp"],
    }
    assert on_eight["up_shard"] == [2, 4]
    assert on_eight["batch_shard"] == [2, 4]
    assert on_eight["replica"] == [8, 4]
    assert "mesh.tensor = 2 does not divide the mlp axis of parameter" in on_eight["odd"]
    assert "no rule for logical axis 'embbed'" in on_eight["unknown"]
    assert on_eight["batch"].startswith("rollout.prompts = 6 is not a multiple of mesh.data x mesh.fsdp = 4")


def test_training_on_eight_devices_equals_one(on_eight):
    one, eight = on_eight["losses"]
    assert one == pytest.approx(eight, rel=1e-5)
    assert one[2] < one[0]


def test_logical_constraints_split_activations_even_of_a_replicated_input(on_eight):
    assert on_eight["tanh"] == ["2,4"]  # [batch 8 over data x fsdp, mlp 8 over tensor]
