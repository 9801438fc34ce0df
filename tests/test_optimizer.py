"""Steps of every optimizer under every schedule, and float32 copies of parameters of low precision."""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import tiny
from hypothesis import given, settings
from hypothesis import strategies as st

from streamsynth.defaults import optimizer as optimizer_keys
from streamsynth.errors import UserError
from streamsynth.learner.optimizer import OPTIMIZERS, SCHEDULES, make_optimizer
from streamsynth.learner.supervised import SupervisedBatch, supervised_step
from streamsynth.policy.transformer import Transformer, init_params

pytestmark = pytest.mark.usefixtures("quick_xla")


def small_params(dtype=jnp.float32):
    """The names that matter: kernels, an embedding, gains, biases; in layers as scanning stacks them."""
    layers = {
        "query": {"kernel": jnp.ones((2, 3, 3), dtype), "bias": jnp.ones((2, 3), dtype)},
        "norm": {"scale": jnp.ones((2, 3), dtype)},
    }
    final_norm = {"scale": jnp.ones(3, dtype)}
    return {"params": {"embedding": jnp.ones((4, 3), dtype), "layers": layers, "final_norm": final_norm}}


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_every_optimizer_steps_under_every_schedule(name, schedule):
    optimizer = make_optimizer(optimizer_keys(warmup=0, name=name, schedule=schedule, learning_rate=0.01), 4)
    params = small_params()
    target = jax.tree.map(lambda leaf: leaf - jnp.arange(leaf.size).reshape(leaf.shape) / 10, params)

    def loss(p):
        return sum(jnp.sum((a - b) ** 2) for a, b in zip(*map(jax.tree.leaves, (p, target)), strict=True))

    @tiny.quick_jit
    def run_steps(params):
        state = optimizer.init(params)
        for _ in range(2):
            updates, state = optimizer.update(jax.grad(loss)(params), state, params)
            params = optax.apply_updates(params, updates)
        return params

    after = run_steps(params)
    assert loss(after) < loss(params)
    changed = jax.tree.map(lambda a, b: bool(jnp.any(a != b)), after, params)
    assert all(jax.tree.leaves(changed))


@pytest.mark.parametrize("master", [False, True])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_decay_is_scaled_by_the_rate_and_spares_gains_and_biases(name, master):
    """Without gradients, what moves is the decay: rate * weight_decay * parameter."""
    keys = optimizer_keys(warmup=0, name=name, learning_rate=0.1, weight_decay=0.5)
    optimizer = make_optimizer(keys, 4, master=master)
    params = small_params(jnp.bfloat16 if master else jnp.float32)
    zeros = jax.tree.map(jnp.zeros_like, params)
    updates, _ = optimizer.update(zeros, optimizer.init(params), params)
    layers = updates["params"]["layers"]
    np.testing.assert_allclose(layers["query"]["kernel"], -0.05, rtol=1e-5)
    spared = (layers["norm"]["scale"], layers["query"]["bias"], updates["params"]["final_norm"]["scale"])
    assert all((leaf == 0).all() for leaf in spared)


def test_schedules_by_hand():
    for name, expected in (
        ("constant", [0, 0.5, 1, 1, 1, 1]),
        ("linear", [0, 0.5, 1, 0.75, 0.5, 0.25]),
        ("cosine", [0, 0.5, 1, 0.05 + 0.95 * (1 + np.cos(np.pi / 4)) / 2, 0.525, None]),
    ):
        schedule = SCHEDULES[name](1.0, 6, 2)
        for step, value in enumerate(expected):
            if value is not None:
                assert float(schedule(step)) == pytest.approx(value, abs=1e-6), (name, step)
        assert float(SCHEDULES[name](1.0, 6, 0)(0)) == 1.0


@pytest.mark.parametrize("key", ["name", "schedule"])
def test_an_unknown_name_is_refused(key):
    with pytest.raises(UserError, match=f"optimizer.{key} = 'sgdm'.*choose one of"):
        make_optimizer(optimizer_keys(warmup=0, **{key: "sgdm"}), 4)


# --- Parameters of low precision ---


def rounded(tree, dtype=jnp.bfloat16):
    return jax.tree.map(lambda leaf: np.asarray(leaf).astype(dtype), tree)


def equal(one, two):
    jax.tree.map(lambda a, b: np.testing.assert_array_equal(np.asarray(a), np.asarray(b)), one, two)


@functools.partial(jax.jit, static_argnums=0, donate_argnums=(1, 2))
def donated_step(optimizer, params, state, grads):
    updates, state = optimizer.update(grads, state, params)
    return optax.apply_updates(params, updates), state


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_steps_far_smaller_than_the_spacing_add_up_as_in_float32(name):
    """200 steps of about 1e-4 from 1.0, where neighbouring bfloat16 numbers lie 2^-8 to 2^-7 apart."""
    keys = optimizer_keys(warmup=0, name=name, learning_rate=1e-4, clip_norm=1e9, b1=0.0)
    start, rng = {"kernel": jnp.ones((3, 3), jnp.bfloat16)}, np.random.default_rng(0)
    grads = [
        jax.tree.map(lambda leaf: jnp.asarray(1 + rng.random(leaf.shape), leaf.dtype), start)
        for _ in range(10)
    ]

    def run(dtype, master):
        optimizer = make_optimizer(keys, 200, master=master)
        params = jax.tree.map(lambda leaf: leaf.astype(dtype) + 0, start)
        state = optimizer.init(params)
        for i in range(200):
            now = jax.tree.map(lambda leaf: leaf.astype(dtype), grads[i % 10])
            params, state = donated_step(optimizer, params, state, now)
        return params, state

    exact, _ = run(jnp.float32, False)
    params, state = run(jnp.bfloat16, True)
    lost, _ = run(jnp.bfloat16, False)
    assert np.abs(np.asarray(exact["kernel"]) - 1).max() > 2**-8
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), state.inner_state.weights, exact)
    equal(params, rounded(state.inner_state.weights))
    equal(lost, start)


PLAIN = make_optimizer(
    optimizer_keys(name="sgd", learning_rate=1.0, warmup=0, b1=0.0, clip_norm=1e9), 2, master=True
)
MAGNITUDE = st.floats(1e-3, 1e2) | st.just(0.0)


@settings(max_examples=60)
@given(
    seed=st.integers(0, 999),
    factors=st.tuples(*[MAGNITUDE | MAGNITUDE.map(lambda x: -x)] * 2),
    dtype=st.sampled_from(["bfloat16", "float16"]),
)
def test_parameters_are_the_rounded_copies_however_far_a_step_goes(seed, factors, dtype):
    """Each step multiplies all parameters by about the same, which may be nothing or less."""
    rng = np.random.default_rng(seed)
    params = {"kernel": jnp.asarray(rng.normal(size=4096), dtype)}
    state = PLAIN.init(params)
    for factor in factors:
        weights = np.asarray(state.inner_state.weights["kernel"])
        by = factor * rng.uniform(0.9, 1.1, size=weights.shape)
        grads = {"kernel": jnp.asarray(weights * (1 - by), jnp.float32)}
        params, state = donated_step(PLAIN, params, state, grads)
        assert params["kernel"].dtype == dtype
        equal(params, rounded(state.inner_state.weights, dtype))


def test_a_step_that_is_not_finite_leaves_parameters_and_copies():
    optimizer = make_optimizer(optimizer_keys(warmup=0), 4, master=True)
    start = small_params(jnp.bfloat16)
    state = optimizer.init(start)
    params, state = donated_step(optimizer, jax.tree.map(jnp.array, start), state, start)
    before = jax.device_get((params, state.inner_state))
    for count, bad in enumerate((np.nan, np.inf), start=1):
        grads = jax.tree.map(lambda leaf, bad=bad: leaf.at[0].set(bad), start)
        params, state = donated_step(optimizer, params, state, grads)
        assert state.total_notfinite == count
        equal((params, state.inner_state), before)
    params, state = donated_step(optimizer, params, state, start)
    assert state.total_notfinite == 2 and state.last_finite
    assert (
        np.asarray(state.inner_state.weights["params"]["embedding"])
        < before[1].weights["params"]["embedding"]
    ).all()


def test_a_network_in_bfloat16_learns_and_stays_in_bfloat16():
    config = dataclasses.replace(tiny.CONFIG, param_dtype="bfloat16", compute_dtype="bfloat16")
    optimizer = make_optimizer(optimizer_keys(warmup=0, learning_rate=1e-2), 20, master=True)
    params = {"params": init_params(config, jax.random.key(0))}
    state, rng, found = optimizer.init(params), np.random.default_rng(0), []
    batch = SupervisedBatch(tiny.prompts(rng, 3, 6), *tiny.completions(rng, 6, 5))
    for _ in range(20):
        params, state, metrics = supervised_step(Transformer(config), optimizer, params, {}, state, batch)
        found.append(float(metrics["nll/completion"]))
    assert found[-1] < 0.7 * found[0]
    assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {jnp.dtype(jnp.bfloat16)}
    equal(params, rounded(state.inner_state.weights))
