"""A fresh optimizer's moments lie on a mesh as their parameters do, whatever the optimizer."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import textwrap

import pytest
from runs import ROOT

_ON_EIGHT = """
    import json
    import jax, jax.numpy as jnp
    from streamsynth.defaults import optimizer as keys
    from streamsynth.learner.optimizer import OPTIMIZERS, init_state, make_optimizer
    from streamsynth.policy.lora import LoraConfig, adapter_axes, init_adapter
    from streamsynth.policy.transformer import TransformerConfig, init_params, logical_axes
    from streamsynth.runtime import mesh as mesh_lib

    mesh = mesh_lib.make_mesh(dict(data=1, fsdp=4, tensor=2))
    config = TransformerConfig(
        vocab_size=32, width=16, layers=2, heads=4, kv_heads=2, head_width=4, mlp_width=24,
        param_dtype="bfloat16", scan_layers=True, lora=LoraConfig(2, 4.0),
    )
    axes, lora = logical_axes(config), config.lora
    params = init_params(config, jax.random.key(0))
    adapter = init_adapter(lora, params, jax.random.key(1))
    params = {"params": jax.device_put(params, mesh_lib.param_shardings(params, axes, mesh))}
    adapter = jax.device_put(adapter, mesh_lib.param_shardings(adapter, adapter_axes(lora, axes), mesh))
    found = {}
    for name in OPTIMIZERS:
        for trained, master in ((params, True), ({"lora": adapter}, False)):
            optimizer = make_optimizer(keys(name=name, warmup=0), 10, master=master)
            state = init_state(optimizer, config, trained, mesh)
            step = jax.jit(optimizer.update)
            grads = jax.tree.map(jnp.ones_like, trained)
            updates, after = step(grads, state, trained)
            _, last = step(grads, after, trained)
            placed = lambda tree: [str(leaf.sharding.spec) for leaf in jax.tree.leaves(tree)]
            split = {str(leaf.sharding.spec) for leaf in jax.tree.leaves(trained)} - {"PartitionSpec()"}
            found[f"{name} {master}"] = {
                "split": len(split) > 1 and split <= set(placed(state)),
                "programs": step._cache_size(),
            }
    print(json.dumps(found))
"""


@pytest.mark.slow
def test_moments_are_split_as_parameters_are_and_one_program_serves_all_steps():
    env = {**os.environ, "PYTHONPATH": str(ROOT), "XLA_FLAGS": "--xla_force_host_platform_device_count=8"}
    command = [sys.executable, "-c", textwrap.dedent(_ON_EIGHT)]
    done = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout.splitlines()[-1])
    assert len(found) == 8
    for name, of_optimizer in found.items():
        # Adafactor keeps sums over rows and columns; only what has a parameter's shape lies as it does.
        assert of_optimizer["split"] or name.startswith("adafactor"), name
        assert of_optimizer["programs"] == 1, name
