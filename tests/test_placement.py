"""Where arrays lie on 8 simulated devices: by the table, made there, kept there, and never whole for long."""

from __future__ import annotations

import pytest
from test_sharded import on_eight

from streamsynth.errors import UserError
from streamsynth.policy.placement import check_network
from streamsynth.policy.transformer import TransformerConfig
from streamsynth.runtime import mesh as mesh_lib

_SCRIPT = """
    import json
    import jax, jax.numpy as jnp, numpy as np
    from jax.sharding import PartitionSpec
    import tiny
    from streamsynth.defaults import optimizer as optimizer_keys
    from streamsynth.learner.objective import Fresh, ObjectiveConfig
    from streamsynth.learner.optimizer import init_state, make_optimizer
    from streamsynth.learner.update import update
    from streamsynth.policy.chunks import statistics
    from streamsynth.policy.embedding import embed
    from streamsynth.policy.placement import variable_shardings
    from streamsynth.policy.transformer import Transformer, TransformerConfig, init_params, param_shapes
    from streamsynth.runtime import mesh as mesh_lib

    out = {}
    rng = np.random.default_rng(0)
    mesh = mesh_lib.make_mesh({"data": 2, "fsdp": 2, "tensor": 2})
    config = TransformerConfig(vocab_size=32, **tiny.SHAPE)
    model, one = Transformer(config), jax.device_get(init_params(config, jax.random.key(3)))
    shardings = variable_shardings(config, {"params": param_shapes(config)}, mesh)
    params = {"params": init_params(config, jax.random.key(3), shardings["params"])}
    placed = lambda tree, like: bool(jax.tree.all(
        jax.tree.map(lambda a, s: a.sharding.is_equivalent_to(s, a.ndim), tree, like)
    ))
    out["made"] = placed(params, shardings)
    out["same"] = float(np.abs(tiny.flat(params["params"]) - tiny.flat(one)).max())

    # --- Two updates: one program, whose results lie as their arguments did, in the arguments' buffers ---
    B, G, P, T = 8, 2, 4, 3
    optimizer = make_optimizer(optimizer_keys(warmup=0), 5)
    opt_state = init_state(optimizer, config, params, mesh)
    of_optimizer = jax.tree.map(lambda leaf: leaf.sharding, opt_state)
    tokens, mask = tiny.completions(rng, B * G, T)
    near = np.where(mask, -3, 0).astype(np.float32)
    fresh = Fresh(tiny.prompts(rng, B, P), tokens, mask, near, near, np.ones(B * G, np.float32))
    fresh = jax.device_put(fresh, mesh_lib.batch_sharding(mesh))
    with mesh_lib.use(mesh):
        for _ in range(2):
            before, programs = params, update._cache_size()
            params, opt_state, _ = update(
                model, optimizer, ObjectiveConfig(), params, {}, opt_state, fresh, None, np.float32(1)
            )
        out["programs"] = update._cache_size() - programs
        out["given"] = all(leaf.is_deleted() for leaf in jax.tree.leaves(before))
    out["kept"] = placed(params, shardings) and placed(opt_state, of_optimizer)
    out["moments"] = sum(not leaf.is_fully_replicated for leaf in jax.tree.leaves(opt_state))
    out["parameters"] = sum(not leaf.is_fully_replicated for leaf in jax.tree.leaves(params))

    # --- Memory on each of eight devices, with and without the vocabulary split ---
    V, W, N, T, CHUNK = 4096, 64, 64, 128, 16
    def temporary(function, *arguments):
        program = jax.jit(function).lower(*arguments).compile()
        return program.memory_analysis().temp_size_in_bytes
    for name, shape in {"fsdp": (1, 8, 1), "mixed": (2, 2, 2)}.items():
        mesh = mesh_lib.make_mesh(dict(zip(mesh_lib.AXES, shape)))
        rows = mesh_lib.batch_sharding(mesh)
        array = lambda shape, dtype, place: jax.ShapeDtypeStruct(shape, dtype, sharding=place)
        table = array((V, W), jnp.float32, mesh_lib.named(("vocab", "embed"), (V, W), mesh))
        tokens, hidden = array((N, T), jnp.int32, rows), array((N, T, W), jnp.float32, rows)
        with mesh_lib.use(mesh):
            few = array((N, T // 4), jnp.int32, rows)
            out["embed " + name] = temporary(jax.grad(lambda table, t: embed(table, t).sum()), table, few)
            out["logprobs " + name] = temporary(
                jax.grad(lambda table, h, t: sum(x.sum() for x in statistics(
                    config, CHUNK, table, h, t, jnp.float32(1)
                )), (0, 1)), table, hidden, tokens,
            )
        out["tensor " + name] = shape[2]
    print(json.dumps(out))
"""
V, W, N, T, CHUNK = 4096, 64, 64, 128, 16


@pytest.fixture(scope="module")
def out() -> dict:
    return on_eight(_SCRIPT)


def test_parameters_are_made_where_they_lie(out):
    assert out["made"] and out["same"] < 1e-6


def test_updates_give_everything_back_where_it_lay_and_compile_once(out):
    assert out["kept"] and out["given"] and out["programs"] == 0
    assert out["moments"] == 2 * out["parameters"] > 0  # Adam's two of each that is split


@pytest.mark.parametrize("name", ["fsdp", "mixed"])
def test_an_embedding_takes_the_memory_of_its_rows_and_of_its_share_of_the_table(out, name):
    activations, share = N * T // 4 * W * 4 / 8, V * W * 4 / 8
    assert out[f"embed {name}"] < 2 * share + 8 * activations < V * W * 4


@pytest.mark.parametrize("name", ["fsdp", "mixed"])
def test_logprobs_take_the_memory_of_one_chunk_of_logits(out, name):
    """Beside the head and its gradient, of the device's part of the vocabulary, and the hidden states."""
    tensor, samples = out[f"tensor {name}"], 8 / out[f"tensor {name}"]
    head, logits = V * W * 4 / tensor, CHUNK * V * 4 / tensor
    hidden, all_logits = N * T * W * 4 / samples, N * T * V * 4 / samples / tensor
    bound = 4 * head + 6 * logits + 4 * hidden
    assert out[f"logprobs {name}"] < bound < 0.8 * all_logits


def test_the_table_knows_every_axis_it_names():
    known = {name for name, _ in mesh_lib.LOGICAL_AXIS_RULES} | {None}
    assert {name for names in mesh_lib.ARRAYS.values() for name in names} <= known


SHAPE = dict(vocab_size=64, width=32, heads=8, kv_heads=4, head_width=4, mlp_width=96)


class _Sizes:
    """As much of a mesh as is asked for its sizes."""

    def __init__(self, **shape):
        self.shape = {"data": 1, "fsdp": 1, "tensor": 1, **shape}


@pytest.mark.parametrize(
    "shape, mesh, sentence",
    [
        ({}, dict(tensor=8), "mesh.tensor = 8 does not divide the policy's kv_heads = 4:"),
        (dict(heads=6, kv_heads=6), dict(tensor=4), "mesh.tensor = 4 .* heads = 6, kv_heads = 6:"),
        (dict(mlp_width=90), dict(tensor=4), "mesh.tensor = 4 does not divide the policy's mlp_width = 90:"),
        (
            dict(vocab_size=63),
            dict(tensor=2),
            "mesh.tensor = 2 does not divide the policy's vocab_size = 63:",
        ),
        ({}, dict(fsdp=3), "mesh.fsdp = 3 does not divide the policy's width = 32: choose a mesh that does"),
        (
            dict(mlp_width=90),
            dict(fsdp=3, tensor=4),
            "mlp_width = 90 and mesh.fsdp = 3 does not divide the policy's width = 32:",
        ),
    ],
)
def test_a_mesh_that_does_not_divide_the_network_is_refused(shape, mesh, sentence):
    with pytest.raises(UserError, match=sentence):
        check_network(TransformerConfig(**{**SHAPE, **shape}), _Sizes(**mesh))


def test_the_vocabulary_of_a_policy_of_our_own_is_not_known_yet():
    config = TransformerConfig(**{**SHAPE, "vocab_size": 63})
    check_network(config, _Sizes(tensor=2), vocabulary=False)
    check_network(TransformerConfig(**SHAPE), _Sizes(data=3, fsdp=4, tensor=4))
