"""Adapters: they start as no change, learn beside a frozen network, and merge into it."""

from __future__ import annotations

import dataclasses
import functools
import json
import os
import subprocess
import sys
import textwrap
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from flax import traverse_util

from streamsynth.defaults import default_config
from streamsynth.defaults import optimizer as optimizer_keys
from streamsynth.errors import UserError
from streamsynth.keys import sample_keys
from streamsynth.learner.optimizer import make_optimizer
from streamsynth.learner.supervised import SupervisedBatch, supervised_step
from streamsynth.policy import lora
from streamsynth.policy.families import FAMILIES, own_config
from streamsynth.policy.logprobs import group_logprobs
from streamsynth.policy.lora import MODULES, LoraConfig, init_adapter, merge
from streamsynth.policy.rollout import rollout
from streamsynth.policy.transformer import Transformer, TransformerConfig, param_shapes

pytestmark = pytest.mark.usefixtures("quick_xla")

B, G, P, T = 2, 2, 6, 5
LORA = LoraConfig(rank=2, alpha=6.0)
SHAPE = {**tiny.SHAPE, "layers": 3}
# With a window in the first layer of a period: scanned, the third layer stands by itself.
GEMMA = dict(FAMILIES["gemma3"], windows=(3, 0))
NETWORKS = [
    TransformerConfig(vocab_size=tiny.VOCAB, lora=LORA, scan_layers=scan, **SHAPE, **flags)
    for flags in ({}, GEMMA)
    for scan in (False, True)
]
each_network = pytest.mark.parametrize(
    "config", NETWORKS, ids=["llama", "llama-scan", "gemma3", "gemma3-scan"]
)


@functools.cache
def base_of(config):
    """Its parameters."""
    return tiny.fresh_params(config)


def moved(adapter, seed=0):
    """The adapter after some learning: with `b` other than zero."""
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda leaf: leaf + 0.1 * rng.normal(size=leaf.shape).astype(np.float32), adapter)


@functools.cache
def texts():
    rng = np.random.default_rng(0)
    return SupervisedBatch(tiny.prompts(rng, B, P), *tiny.completions(rng, B * G, T))


def test_products_are_started_in_the_order_of_the_tree(monkeypatch):
    """Several processes must start the same programs in the same order; that of a set of strings differs."""
    config, asked = NETWORKS[0], []
    adapter = moved(init_adapter(LORA, base_of(config), jax.random.key(0)))
    product = lora._product
    monkeypatch.setattr(lora, "_product", lambda a, *rest: asked.append(id(a)) or product(a, *rest))
    merge(LORA, base_of(config), adapter)
    parts = traverse_util.flatten_dict(adapter)
    assert asked == [id(leaf) for path, leaf in parts.items() if path[-1] == "a"]


@functools.partial(tiny.quick_jit, static_argnums=0)
def logprobs(config, variables, tokens=None, mask=None):
    """Of completions after the prompts of `texts`: of these, or of its own."""
    batch = texts()
    tokens, mask = (batch.tokens, batch.mask) if tokens is None else (tokens, mask)
    return group_logprobs(Transformer(config), variables, batch.prompts, tokens, mask).logprobs


@each_network
def test_beside_the_network_or_in_its_kernels_is_the_same(config):
    """A fresh adapter changes nothing; one that has learned does, as much in the kernels as beside them."""
    base = base_of(config)
    fresh = init_adapter(LORA, base, jax.random.key(1))
    plain = logprobs(config, {"params": base})
    np.testing.assert_array_equal(logprobs(config, {"params": base, "lora": fresh}), plain)
    np.testing.assert_array_equal(logprobs(dataclasses.replace(config, lora=None), {"params": base}), plain)
    adapter = moved(fresh)
    beside = logprobs(config, {"params": base, "lora": adapter})
    np.testing.assert_allclose(logprobs(config, {"params": merge(LORA, base, adapter)}), beside, atol=1e-5)
    assert np.abs(beside - plain).max() > 0.05
    # Each module's adapter counts: without any one of them the result is another.
    flat = traverse_util.flatten_dict(adapter)
    for name in MODULES:
        rest = {path: leaf * (path[-2] != name or path[-1] != "b") for path, leaf in flat.items()}
        rest = traverse_util.unflatten_dict(rest)
        assert np.abs(logprobs(config, {"params": base, "lora": rest}) - beside).max() > 1e-4, name


def test_sampling_goes_by_the_adapter():
    config = NETWORKS[3]
    base = base_of(config)
    adapter = moved(init_adapter(LORA, base, jax.random.key(1)))
    variables, keys = {"params": base, "lora": adapter}, sample_keys(jax.random.key(2), B, G)
    prompts = texts().prompts
    drawn = rollout(Transformer(config), variables, prompts, keys, 1.0, samples=G, length=T, stops=(2,))
    forced = logprobs(config, {"params": merge(LORA, base, adapter)}, drawn.tokens, drawn.mask)
    np.testing.assert_allclose(drawn.logprobs, forced, atol=1e-4)


def test_merging_by_hand():
    """W + alpha / rank * a @ b in float64, row by row where layers are scanned; nothing else changes."""
    config = NETWORKS[3]
    base = base_of(config)
    adapter = moved(init_adapter(LORA, base, jax.random.key(1)))
    merged = traverse_util.flatten_dict(merge(LORA, base, adapter))
    parts = traverse_util.flatten_dict(adapter)
    for path, leaf in traverse_util.flatten_dict(base).items():
        expected = np.asarray(leaf, np.float64)
        if path[-1] == "kernel":
            a, b = (np.asarray(parts[*path[:-1], name], np.float64) for name in "ab")
            expected = expected + 3.0 * np.einsum("...ir,...ro->...io", a, b)
        np.testing.assert_allclose(merged[path], expected, rtol=1e-5, atol=1e-6)
        assert path[-1] == "kernel" or merged[path] is leaf


@each_network
def test_only_named_projections_have_an_adapter(config):
    named = LoraConfig(rank=3, alpha=1.0, modules=("query", "down"))
    shapes = param_shapes(config)
    adapter = traverse_util.flatten_dict(init_adapter(named, shapes, jax.random.key(1)))
    flat = traverse_util.flatten_dict(shapes).items()
    kernels = {path: leaf.shape for path, leaf in flat if {"query", "down"} & {*path}}
    assert {path[:-1] for path in adapter} == {path[:-1] for path in kernels if path[-1] == "kernel"}
    values = []
    for (*path, name), leaf in adapter.items():
        *lead, fan_in, fan_out = kernels[*path, "kernel"]
        assert leaf.shape == (*lead, fan_in, 3) if name == "a" else (*lead, 3, fan_out)
        assert leaf.dtype == jnp.float32
        if name == "b":
            assert not leaf.any()
        else:
            assert 0.5 < np.abs(leaf).max() * fan_in**0.5 <= 1.0
            values.append(np.asarray(leaf).ravel())
    # Each projection, scanned ones by row, draws numbers of its own.
    values = np.concatenate(values)
    assert len(np.unique(values)) > 0.99 * len(values)


def test_an_adapter_follows_from_its_key():
    base = base_of(NETWORKS[0])
    one, two, other = (init_adapter(LORA, base, jax.random.key(seed)) for seed in (1, 1, 2))
    np.testing.assert_array_equal(tiny.flat(one), tiny.flat(two))
    assert (tiny.flat(one) != tiny.flat(other)).any()


@pytest.mark.parametrize("dtype", ["float32", pytest.param("bfloat16", marks=pytest.mark.slow)])
def test_learning_moves_the_adapter_alone(dtype):
    config = dataclasses.replace(NETWORKS[1], param_dtype=dtype, compute_dtype=dtype)
    frozen = {"params": tiny.fresh_params(config)}
    before = jax.device_get(frozen)
    params = {"lora": init_adapter(LORA, frozen["params"], jax.random.key(1))}
    start = jax.device_get(params)
    optimizer = make_optimizer(optimizer_keys(learning_rate=2e-2, warmup=0), 20)
    state, found = optimizer.init(params), []
    assert sum(leaf.size for leaf in jax.tree.leaves(state)) < 3 * sum(map(np.size, jax.tree.leaves(params)))
    for _ in range(20):
        params, state, metrics = supervised_step(
            Transformer(config), optimizer, params, frozen, state, texts(), np.float32(1.0)
        )
        found.append(float(metrics["nll/completion"]))
    assert found[-1] < 0.7 * found[0]
    assert {leaf.dtype for leaf in jax.tree.leaves(frozen)} == {jnp.dtype(dtype)}
    jax.tree.map(lambda a, b: np.testing.assert_array_equal(np.asarray(a), b), frozen, before)
    assert jax.tree.structure(params) == jax.tree.structure(start)
    for leaf, was in zip(*map(jax.tree.leaves, (params, start)), strict=True):
        assert leaf.dtype == jnp.float32 and (np.asarray(leaf) != was).mean() > 0.9


def test_a_base_of_low_precision_keeps_its_dtype_when_it_takes_the_adapter_in():
    """The sum is made in float32 and rounded once: a part below the kernel's spacing is not lost before."""
    config = dataclasses.replace(NETWORKS[2], param_dtype="bfloat16")
    base = tiny.fresh_params(config)
    adapter = jax.tree.map(lambda leaf: 0.05 * leaf, moved(init_adapter(LORA, base, jax.random.key(1))))
    wide = merge(LORA, jax.tree.map(lambda leaf: leaf.astype(jnp.float32), base), adapter)
    merged = merge(LORA, base, adapter)
    assert {leaf.dtype for leaf in jax.tree.leaves(merged)} == {jnp.dtype(jnp.bfloat16)}
    for got, exact in zip(*map(jax.tree.leaves, (merged, wide)), strict=True):
        np.testing.assert_array_equal(np.asarray(got), np.asarray(exact.astype(jnp.bfloat16)))


# --- Mistakes ---


@pytest.mark.parametrize(
    ("modules", "sentence"),
    [
        (("query", "q_proj"), "policy.lora.modules has 'q_proj'.*choose among query, key, value"),
        ((), "policy.lora.modules must name at least one"),
        (("query", "query"), "policy.lora.modules must name at least one projection, and each once"),
    ],
)
def test_impossible_modules_are_refused_by_key(modules, sentence):
    group = default_config().policy.to_dict()
    assert own_config(group, 40).lora is None
    group["lora"] |= {"rank": 4, "modules": modules}
    with pytest.raises(UserError, match=sentence):
        own_config(group, 40)
    group["lora"]["modules"] = ("query", "out")
    assert own_config(group, 40).lora == LoraConfig(4, 16.0, ("query", "out"))


# --- On a mesh ---

_ON_EIGHT = """
    import functools, json
    import jax, numpy as np
    import tiny, test_lora
    from streamsynth.learner.supervised import supervised_loss
    from streamsynth.policy.lora import adapter_axes, init_adapter
    from streamsynth.policy.transformer import Transformer, logical_axes
    from streamsynth.runtime import mesh as mesh_lib

    config = test_lora.NETWORKS[3]
    config = config.__class__(**{**config.__dict__, "vocab_size": 32})
    base, batch = test_lora.base_of(config), test_lora.texts()
    batch = jax.tree.map(lambda x: np.repeat(x, 4, axis=0), batch)  # 8 prompts
    adapter = test_lora.moved(init_adapter(config.lora, base, jax.random.key(1)))

    def loss(adapter, base, batch):
        variables = {"params": base, "lora": adapter}
        return supervised_loss(Transformer(config), variables, batch, 1.0, 0.5, 64)[0]

    step = tiny.quick_jit(jax.value_and_grad(loss))
    expected = jax.device_get(step(adapter, base, batch))
    mesh = mesh_lib.make_mesh({"data": 2, "fsdp": 2, "tensor": 2})
    axes = logical_axes(config)
    with mesh_lib.use(mesh):
        place = lambda tree, axes: jax.device_put(tree, mesh_lib.param_shardings(tree, axes, mesh))
        placed = place(adapter, adapter_axes(config.lora, axes))
        found = step(placed, place(base, axes), jax.device_put(batch, mesh_lib.batch_sharding(mesh)))
    layer = placed["periods"]["layer_0"]
    specs = {f"{module}/{part}": list(layer[module][part].sharding.spec)
             for module in ("query", "out", "down") for part in "ab"}
    print(json.dumps({
        "structure": jax.tree.structure(placed) == jax.tree.structure(adapter),
        "specs": specs,
        "rest": list(placed["layers_2"]["query"]["b"].sharding.spec),
        "shard": layer["query"]["a"].addressable_shards[0].data.shape,
        "loss": abs(float(found[0]) - float(expected[0])),
        "gradients": float(np.abs(tiny.flat(found[1]) - tiny.flat(expected[1])).max()),
        "size": float(np.abs(tiny.flat(expected[1])).max()),
    }))
"""


@pytest.mark.slow
def test_an_adapter_lies_on_the_mesh_as_its_network_does():
    root = Path(__file__).resolve().parent
    env = {
        **os.environ,
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": "--xla_force_host_platform_device_count=8",
        "PYTHONPATH": os.pathsep.join([str(root), str(root.parent), os.environ.get("PYTHONPATH", "")]),
    }
    command = [sys.executable, "-c", textwrap.dedent(_ON_EIGHT)]
    done = subprocess.run(command, env=env, capture_output=True, text=True, check=False, timeout=600)
    assert done.returncode == 0, done.stderr
    out = json.loads(done.stdout.splitlines()[-1])
    assert out["structure"]
    # The rank is whole everywhere; the other axis lies as the kernel's does.
    assert out["specs"] == {
        "query/a": [None, "fsdp"],
        "query/b": [None, None, "tensor"],
        "out/a": [None, "tensor"],
        "out/b": [None, None, "fsdp"],
        "down/a": [None, "tensor"],
        "down/b": [None, None, "fsdp"],
    }
    assert out["rest"] == [None, "tensor"]
    assert out["shard"] == [1, 8, 2]
    assert out["size"] > 1e-2 and out["loss"] < 1e-5 and out["gradients"] < 1e-5
