"""The device part of a step on 8 simulated devices gives what it gives on one."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import textwrap
from pathlib import Path

_SCRIPT = """
    import json
    import jax, jax.numpy as jnp, numpy as np
    import tiny
    from streamsynth.feedback import diversity
    from streamsynth.keys import sample_keys
    from streamsynth.learner.objective import Fresh, ObjectiveConfig, Replayed, gradients
    from streamsynth.policy.logprobs import group_logprobs
    from streamsynth.policy.rollout import rollout
    from streamsynth.policy.transformer import TransformerConfig, Transformer, init_params, logical_axes
    from streamsynth.runtime import mesh as mesh_lib

    B, G, P, T, D, K, M = 8, 2, 4, 5, 6, 2, 8
    TEMPERATURE = np.float32(0.8)
    config = TransformerConfig(vocab_size=32, **tiny.SHAPE)
    model = Transformer(config)
    objective = ObjectiveConfig(kl_weight=0.1, cloning_weight=0.3, chunk=32)
    rng = np.random.default_rng(0)
    params = jax.tree.map(lambda x: 2 * x, init_params(config, jax.random.key(0)))
    params = {"params": jax.device_get(params)}

    # Recorded once, on one device.
    prompts = tiny.prompts(rng, B, P)
    drawn = jax.device_get(rollout(
        model, params, prompts, sample_keys(jax.random.key(1), B, G), TEMPERATURE,
        samples=G, length=T, stops=(2,),
    ))
    N = B * G
    noise = lambda n, scale: (scale * rng.normal(size=(n, T))).astype(np.float32)
    fresh = Fresh(
        prompts, drawn.tokens, drawn.mask,
        np.where(drawn.mask, drawn.logprobs + noise(N, 0.3), 0),
        np.where(drawn.mask, drawn.logprobs + noise(N, 0.3), 0),
        rng.normal(size=N).astype(np.float32),
    )
    tokens, mask = tiny.completions(rng, M, T)
    replayed = Replayed(
        tiny.prompts(rng, M, P), tokens, mask, np.where(mask, -3 + noise(M, 0.5), 0),
        rng.normal(size=M).astype(np.float32), rng.random(M) < 0.5, np.arange(M) < M - 1,
    )
    features = rng.normal(size=(N, D)).astype(np.float32)
    e = features / np.linalg.norm(features, axis=1, keepdims=True) * rng.random((N, 1)).astype(np.float32)
    label = rng.integers(K, size=N).astype(np.int32)
    archive = jax.device_get(diversity.absorb(diversity.empty(K, D), e[::-1], label, np.arange(N) % 2 == 0))

    def everything(params, fresh, replayed, archive, e, label):
        forced = group_logprobs(
            model, params, fresh.prompts, fresh.tokens, fresh.mask, TEMPERATURE, objective.chunk
        )
        # Among the metrics are all parts of the losses.
        grads, metrics = gradients(model, params, {}, fresh, replayed, TEMPERATURE, objective)
        credit, baseline = diversity.credit(archive, e, label)
        marginal = diversity.marginal(archive, e, label, (np.arange(N) % 2 == 0).astype(np.float32))
        return {
            "logprobs": forced.logprobs, "entropy": forced.entropy, "gradients": grads, "metrics": metrics,
            "credit": credit, "baseline": baseline, "marginal": marginal,
        }

    expected = jax.device_get(tiny.quick_jit(everything)(params, fresh, replayed, archive, e, label))
    assert {"loss/policy", "loss/kl", "replay/loss", "replay/cloning"} <= expected["metrics"].keys()
    out = {"recorded": float(np.abs(np.where(
        drawn.mask, expected["logprobs"] - drawn.logprobs, 0)).max()),
        "size": float(np.linalg.norm(tiny.flat(expected["gradients"]))),
        "devices": jax.device_count()}
    for shape in (dict(data=4, fsdp=2, tensor=1), dict(data=2, fsdp=2, tensor=2)):
        mesh = mesh_lib.make_mesh(shape)
        shardings = mesh_lib.param_shardings(params, {"params": logical_axes(config)}, mesh)
        rows, whole = mesh_lib.batch_sharding(mesh), mesh_lib.replicated(mesh)
        with mesh_lib.use(mesh):
            placed = jax.device_put(params, shardings)
            batch = jax.device_put((fresh, replayed), rows)
            got = tiny.quick_jit(everything)(
                placed, *batch, jax.device_put(archive, whole), *jax.device_put((e, label), rows)
            )
        kernel = placed["params"]["layers_0"]["query"]["kernel"]
        out["-".join(map(str, shape.values()))] = {
            "kernel_shard": kernel.addressable_shards[0].data.size / kernel.size,
            "batch_shard": batch[0].tokens.addressable_shards[0].data.shape[0],
            **{name: float(np.abs(tiny.flat(got[name]) - tiny.flat(expected[name])).max())
               for name in expected},
        }
    print(json.dumps(out))
"""


def test_a_step_is_the_same_on_eight_devices_as_on_one():
    root = Path(__file__).resolve().parent
    path = os.pathsep.join([str(root), str(root.parent), os.environ.get("PYTHONPATH", "")])
    env = {
        **os.environ,
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": "--xla_force_host_platform_device_count=8",
        "PYTHONPATH": path,
    }
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(_SCRIPT)], env=env, capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 0, done.stderr
    out = json.loads(done.stdout.splitlines()[-1])
    assert out["devices"] == 8 and out["recorded"] < 1e-5 and out["size"] > 1e-2
    for shape, kernel_shard, batch_shard in (("4-2-1", 1 / 2, 2), ("2-2-2", 1 / 4, 4)):
        found = out[shape]
        assert found.pop("kernel_shard") == kernel_shard and found.pop("batch_shard") == batch_shard
        assert max(found.values()) < 1e-5, (shape, found)
