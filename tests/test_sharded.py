"""The device part of a step on a mesh gives what it gives on one device, and gathers no activations."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import textwrap
from pathlib import Path

import numpy as np
import pytest
from draws import EDGE, unexplained

_SCRIPT = """
    import dataclasses, functools, json, re, sys
    import jax, jax.numpy as jnp, numpy as np
    import draws, tiny
    from streamsynth.costs import hlo
    from streamsynth.feedback import diversity
    from streamsynth.feedback.judge import label_loglikelihood
    from streamsynth.keys import sample_keys
    from streamsynth.learner.objective import Fresh, ObjectiveConfig, Replayed, gradients
    from streamsynth.learner.supervised import SupervisedBatch, supervised_loss
    from streamsynth.policy.logprobs import group_logprobs, read_group
    from streamsynth.policy.rollout import rollout
    from streamsynth.policy.sampling import uniforms
    from streamsynth.policy.transformer import (
        Transformer, TransformerConfig, init_params, logical_axes, param_shapes,
    )
    from streamsynth.runtime import mesh as mesh_lib

    B, G, P, T, D, K, M = 16, 2, 4, 5, 6, 2, 9
    N = B * G
    TEMPERATURE = np.float32(0.8)
    config = TransformerConfig(vocab_size=40, **{**tiny.SHAPE, "heads": 8, "kv_heads": 8})
    model = Transformer(config)
    gathering = Transformer(dataclasses.replace(config, gather_to_sample=True))
    rng = np.random.default_rng(0)
    # Half the entropy of even chances. Of sharper ones an ulp of a logit is not far below the bound.
    params = jax.tree.map(lambda x: 1.4 * x, init_params(config, jax.random.key(0)))
    params = {"params": jax.device_get(params)}
    objective = lambda parts: ObjectiveConfig(kl_weight=0.1, cloning_weight=0.3, chunk=7, microbatches=parts)
    keys = sample_keys(jax.random.key(1), B, G)
    compiled = lambda function, *arguments: jax.jit(function).lower(*arguments).compile(
        {"xla_backend_optimization_level": 0}
    )

    def write(params, prompts, keys, model=model):
        return rollout(model, params, prompts, keys, TEMPERATURE, samples=G, length=T, stops=(2,))

    def learn(parts):
        def learned(params, fresh, replayed):
            forced = group_logprobs(model, params, fresh.prompts, fresh.tokens, fresh.mask, TEMPERATURE, 7)
            # Among the metrics are all parts of the losses.
            grads, metrics = gradients(model, params, {}, fresh, replayed, TEMPERATURE, objective(parts))
            return {"logprobs": forced.logprobs, "entropy": forced.entropy, "gradients": grads, **metrics}
        return learned

    # Labels and texts of numbers that no mesh divides, in parts.
    def judge(params, prompts, tokens, mask):
        return {"judged": label_loglikelihood(model, params, prompts, tokens, mask, chunk=7, at_a_time=4)}

    def credit(archive, e, label):
        own, baseline = diversity.credit(archive, e, label)
        marginal = diversity.marginal(archive, e, label, (np.arange(N) % 2 == 0).astype(np.float32))
        return {"credit": own, "baseline": baseline, "marginal": marginal}

    # Recorded once, on one device.
    prompts = tiny.prompts(rng, B, P)
    drawn = jax.device_get(compiled(write, params, prompts, keys)(params, prompts, keys))
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
    read = (tiny.prompts(rng, 3, P), tokens, mask)
    features = rng.normal(size=(N, D)).astype(np.float32)
    e = features / np.linalg.norm(features, axis=1, keepdims=True) * rng.random((N, 1)).astype(np.float32)
    label = rng.integers(K, size=N).astype(np.int32)
    archive = jax.device_get(diversity.absorb(diversity.empty(K, D), e[::-1], label, np.arange(N) % 2 == 0))
    logits = np.asarray(jax.jit(lambda params: model.apply(
        params, read_group(model, params, prompts, drawn.tokens).before, method="logits"
    ))(params)) / TEMPERATURE
    numbers = np.asarray(uniforms(keys, T))

    expected = jax.device_get({
        **compiled(learn(1), params, fresh, replayed)(params, fresh, replayed),
        **compiled(credit, archive, e, label)(archive, e, label),
        **compiled(judge, params, *read)(params, *read),
    })
    assert {"loss/policy", "loss/kl", "replay/loss", "replay/cloning"} <= expected.keys()
    def distance(found, wanted):
        found, wanted = tiny.flat(found), tiny.flat(wanted)
        return float((np.abs(found - wanted) / np.maximum(1, np.abs(wanted))).max())

    out = {
        "recorded": distance(np.where(drawn.mask, expected["logprobs"], 0), drawn.logprobs),
        "size": float(np.linalg.norm(tiny.flat(expected["gradients"]))),
        "ends": int(drawn.finished.sum()),
    }

    # Parameters, whole along `fsdp` or in their part of `tensor`, may be gathered; activations may not.
    def gathered(text, mesh):
        allowed = set()
        for leaf in jax.tree.leaves(params):
            for axis in range(leaf.ndim):
                for split in {1, mesh.shape["tensor"]}:
                    shape = list(leaf.shape)
                    shape[axis] //= split
                    allowed.add(tuple(shape))
        found = re.findall(r"= \\(?f32\\[([0-9,]*)\\]\\S* all-gather\\(", text)
        shapes = [tuple(map(int, shape.split(","))) for shape in found]
        return [shape for shape in shapes if tuple(size for size in shape if size > 1) not in allowed]

    # Of layers that are not scanned XLA itself gathers before the loop over the tokens.
    SCANNED = {
        name: dataclasses.replace(config, scan_layers=True, layers=2, gather_to_sample=once)
        for name, once in {"once": True, "each": False}.items()
    }

    def sampling_gathers(scanned, mesh, asked):
        shapes = {"params": param_shapes(scanned)}
        lies = mesh_lib.param_shardings(shapes, {"params": logical_axes(scanned)}, mesh)
        shapes = jax.tree.map(
            lambda leaf, where: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=where), shapes, lies
        )
        text = compiled(functools.partial(write, model=Transformer(scanned)), shapes, *asked).as_text()
        found = hlo.collectives(text, mesh.size).collectives
        return sum(one.size for one in found if one.kind == "all-gather")

    for shape, parts in json.loads(sys.argv[1]):
        shape = dict(zip(mesh_lib.AXES, shape))
        mesh = mesh_lib.make_mesh(shape, jax.devices()[: np.prod(list(shape.values()))])
        shardings = mesh_lib.param_shardings(params, {"params": logical_axes(config)}, mesh)
        rows, whole = mesh_lib.batch_sharding(mesh), mesh_lib.replicated(mesh)
        with mesh_lib.use(mesh):
            placed = jax.device_put(params, shardings)
            batch = *jax.device_put((fresh,), rows), jax.device_put(replayed, whole)
            asked = jax.device_put((prompts, keys), rows)
            learner = compiled(learn(parts), placed, *batch)
            one = (jax.device_put(archive, whole), *jax.device_put((e, label), rows))
            got = {**learner(placed, *batch), **compiled(credit, *one)(*one)}
            again = jax.device_get(compiled(write, placed, *asked)(placed, *asked))
            more = {}
            if mesh.size == 8 and max(shape.values()) in (2, 8):  # along one axis, and along all three
                texts = jax.device_put(read, whole)
                got |= compiled(judge, placed, *texts)(placed, *texts)
                once = compiled(functools.partial(write, model=gathering), placed, *asked)
                own = jax.device_get(once(placed, *asked)).tokens
                more = {
                    "once": draws.unexplained(drawn.tokens, own, drawn.mask, logits, numbers),
                    "sent": {name: sampling_gathers(one, mesh, asked) for name, one in SCANNED.items()},
                }
        kernel, gradient = (
            tree["params"]["layers_0"]["query"]["kernel"] for tree in (placed, got["gradients"])
        )
        same = (again.tokens == drawn.tokens).all(axis=1)
        out["-".join(map(str, shape.values()))] = {
            "kernel": kernel.addressable_shards[0].data.size / kernel.size,
            "gradient": gradient.sharding.is_equivalent_to(kernel.sharding, 2),
            "rows": batch[0].tokens.addressable_shards[0].data.shape[0],
            "gathered": gathered(learner.as_text(), mesh),
            "tokens": draws.unexplained(drawn.tokens, again.tokens, drawn.mask, logits, numbers),
            "same": int(same.sum()),
            "more": more,
            "drawn": distance(again.logprobs[same], drawn.logprobs[same]),
            "distances": {name: distance(got[name], expected[name]) for name in got},
        }
    print(json.dumps(out))
"""
N = 32


def on_eight(script: str, *arguments: str) -> dict:
    root = Path(__file__).resolve().parent
    env = {
        **os.environ,
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": "--xla_force_host_platform_device_count=8",
        "PYTHONPATH": os.pathsep.join([str(root), str(root.parent), os.environ.get("PYTHONPATH", "")]),
    }
    command = [sys.executable, "-c", textwrap.dedent(script), *arguments]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=1200)
    assert done.returncode == 0, done.stderr[-5000:]
    return json.loads(done.stdout.splitlines()[-1])


# Devices along data, fsdp and tensor, and microbatches.
QUICK = (((2, 2, 2), 2),)
REST = (
    ((1, 1, 1), 4),
    *(((n, 1, 1), 2) for n in (2, 4, 8)),
    *(((1, n, 1), 2) for n in (2, 4, 8)),
    *(((1, 1, n), n // 2) for n in (2, 4, 8)),
    *((shape, 1) for shape in ((2, 2, 1), (2, 1, 2), (1, 2, 2), (4, 2, 1), (2, 1, 4), (1, 2, 4), (2, 2, 2))),
)


@pytest.mark.parametrize(
    "shapes", [pytest.param(QUICK, id="quick"), pytest.param(REST, id="rest", marks=pytest.mark.slow)]
)
def test_a_step_on_a_mesh_is_that_on_one_device(shapes):
    out = on_eight(_SCRIPT, json.dumps(shapes))
    assert out["recorded"] < 1e-5 and out["size"] > 1e-2 and out["ends"] > 0
    for (data, fsdp, tensor), _ in shapes:
        found = out[f"{data}-{fsdp}-{tensor}"]
        assert found["kernel"] == 1 / (fsdp * tensor) and found["rows"] == N / (data * fsdp)
        assert found["gradient"] and found["gathered"] == []
        assert found["tokens"] == [] and found["same"] > 0.9 * N and found["drawn"] < 1e-5
        if more := found["more"]:
            assert more["once"] == []
            # Bytes; a rollout has T - 1 further tokens.
            assert fsdp == 1 or 0 < more["sent"]["once"] < more["sent"]["each"] / 2
        assert max(found["distances"].values()) < 1e-5, found["distances"]
    assert any(found["more"] for found in out.values() if isinstance(found, dict))


def test_only_a_draw_on_an_edge_explains_another_token():
    logits = np.log(np.array([[[0.2, 0.3, 0.5]] * 2]))
    tokens, mask = np.array([[1, 2]]), np.ones((1, 2), bool)
    on_edge, inside = np.array([[0.5 - EDGE / 2, 0.7]]), np.array([[0.4, 0.7]])
    other = np.array([[2, 0]])
    assert unexplained(tokens, other, mask, logits, on_edge) == []
    assert unexplained(tokens, other, mask, logits, inside) == [(0, 0)]
    assert unexplained(tokens, np.array([[1, 0]]), mask, logits, on_edge) == [(0, 1)]
    assert unexplained(tokens, tokens, mask, logits, inside) == []
