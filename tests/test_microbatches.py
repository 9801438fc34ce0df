"""A batch in microbatches: the same gradient and figures for all objectives, and less memory."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from streamsynth.defaults import optimizer as optimizer_keys
from streamsynth.learner import objective
from streamsynth.learner.choices import OBJECTIVES
from streamsynth.learner.objective import Fresh, ObjectiveConfig, Replayed
from streamsynth.learner.optimizer import make_optimizer
from streamsynth.learner.supervised import SupervisedBatch, supervised_step
from streamsynth.policy.logprobs import TokenStatistics, sequence_logprobs
from streamsynth.policy.microbatches import filled, join, split

B, G, P, T, M = 4, 2, 4, 5, 7
N = B * G
TEMPERATURE = np.float32(0.8)
WEIGHTS = dict(kl_weight=0.2, entropy_weight=0.1, cloning_weight=0.3, chunk=8)


@pytest.fixture(scope="module")
def batch():
    rng = np.random.default_rng(0)
    tokens, mask = tiny.completions(rng, N, T)
    mask[3] = False  # a dead group's
    near = [np.where(mask, -3 + rng.normal(size=(N, T)), 0).astype(np.float32) for _ in range(2)]
    fresh = Fresh(tiny.prompts(rng, B, P), tokens, mask, *near, rng.normal(size=N).astype(np.float32))
    tokens, mask = tiny.completions(rng, M, T)
    behaviour = np.where(mask, -3 + rng.normal(size=(M, T)), 0).astype(np.float32)
    advantage, elite = rng.normal(size=M).astype(np.float32), rng.random(M) < 0.5
    valid = np.arange(M) < M - 1
    return fresh, Replayed(tiny.prompts(rng, M, P), tokens, mask, behaviour, advantage, elite, valid)


@pytest.fixture
def table(monkeypatch):
    """In place of a network, which takes long to compile: a row of logits for each prompt and place."""

    def logprobs(model, variables, prompts, tokens, mask, temperature, chunk):
        rows = jnp.repeat(prompts.tokens[:, 0] % 5, tokens.shape[0] // prompts.tokens.shape[0])
        logits = variables["params"][rows].astype(jnp.float32) / temperature
        logprobs = jax.nn.log_softmax(logits, axis=-1)
        entropy = -(jnp.exp(logprobs) * logprobs).sum(-1)
        chosen = jnp.take_along_axis(logprobs, tokens[..., None], axis=-1)[..., 0]
        return TokenStatistics(jnp.where(mask, chosen, 0.0), jnp.where(mask, entropy, 0.0))

    monkeypatch.setattr(objective, "group_logprobs", logprobs)
    return {"params": np.random.default_rng(1).normal(size=(5, T, tiny.VOCAB)).astype(np.float32)}


def _gradients(config, params, fresh, replayed):
    compute = tiny.quick_jit(objective.gradients, static_argnums=(0, 6))
    return compute(tiny.MODEL, params, {}, fresh, replayed, TEMPERATURE, config)


def test_a_prompt_stays_with_its_samples_and_every_part_is_spread_over_the_rows():
    rows, samples = np.arange(B), np.repeat(np.arange(B), G)
    parts = split((rows, samples), B, 2)
    assert np.asarray(parts[0]).tolist() == [[0, 2], [1, 3]]
    assert np.asarray(parts[1]).tolist() == [[0, 0, 2, 2], [1, 1, 3, 3]]
    again = join(parts, B)
    np.testing.assert_array_equal(again[0], rows)
    np.testing.assert_array_equal(again[1], samples)
    assert filled(np.ones((7, 2)), 4).shape == (8, 2) and filled(np.ones((8, 2)), 4).shape == (8, 2)


@pytest.mark.parametrize("count", [2, 4])
@pytest.mark.parametrize("name", OBJECTIVES)
def test_gradients_and_figures_are_those_of_the_whole_batch(batch, table, name, count):
    whole, parts = (
        _gradients(ObjectiveConfig(choices=OBJECTIVES[name], microbatches=n, **WEIGHTS), table, *batch)
        for n in (1, count)
    )
    assert np.linalg.norm(tiny.flat(whole[0])) > 0.01
    np.testing.assert_allclose(tiny.flat(parts[0]), tiny.flat(whole[0]), atol=1e-6)
    assert parts[1].keys() == whole[1].keys() and "replay/effective_samples" in whole[1]
    for figure, value in whole[1].items():
        np.testing.assert_allclose(parts[1][figure], value, rtol=1e-5, atol=1e-6, err_msg=figure)


def test_low_precision_adds_up_in_float32(batch, table):
    """Thirty-two times the same prompt: in bfloat16 the sum would move by more than a part in a thousand."""
    low = {"params": table["params"].astype(jnp.bfloat16)}
    fresh = jax.tree.map(lambda leaf: jnp.repeat(leaf[:1], 32, axis=0), batch[0])
    one = jax.tree.map(lambda leaf: leaf[:1], batch[0])
    total, _ = _gradients(ObjectiveConfig(microbatches=32, **WEIGHTS), low, fresh, None)
    single, _ = _gradients(ObjectiveConfig(microbatches=1, **WEIGHTS), low, one, None)
    assert total["params"].dtype == jnp.float32 and single["params"].dtype == jnp.bfloat16
    size = np.abs(tiny.flat(single)).max()
    np.testing.assert_allclose(tiny.flat(total), tiny.flat(single), atol=1e-3 * size)


def test_reference_logprobs_are_the_same(batch):
    fresh = batch[0]
    arguments = (tiny.MODEL, tiny.params(), fresh.prompts, fresh.tokens, fresh.mask, TEMPERATURE)
    whole, parts = (sequence_logprobs(*arguments, chunk=8, microbatches=count) for count in (1, 2))
    np.testing.assert_allclose(parts, whole, atol=2e-6)


@pytest.mark.slow
def test_a_supervised_step_is_the_same(batch):
    data = SupervisedBatch(batch[0].prompts, batch[0].tokens, batch[0].mask)
    optimizer = make_optimizer(optimizer_keys(name="sgd", b1=0.0, learning_rate=1.0, warmup=0), 5)
    found = []
    for count in (1, 2):
        params = jax.tree.map(jnp.array, tiny.params())
        params, _, metrics = supervised_step(
            tiny.MODEL, optimizer, params, {}, optimizer.init(params), data, TEMPERATURE,
            prompt_weight=0.5, chunk=8, microbatches=count,
        )  # fmt: skip
        found.append((tiny.flat(params), metrics))
    assert np.abs(found[0][0] - tiny.flat(tiny.params())).max() > 1e-2
    np.testing.assert_allclose(found[1][0], found[0][0], atol=2e-6)
    for name, value in found[0][1].items():
        np.testing.assert_allclose(found[1][1][name], value, rtol=1e-5)


def test_memory_is_that_of_a_part(batch):
    """And with the network: of a batch that repeats another one the gradient is the other one's."""
    fresh, params = batch[0], tiny.initial_params()
    repeated = jax.tree.map(lambda leaf: jnp.tile(leaf, (16, *[1] * (leaf.ndim - 1))), fresh)

    def compiled(fresh, count):
        config = ObjectiveConfig(microbatches=count, **WEIGHTS)

        def compute(params, fresh):
            return objective.gradients(tiny.MODEL, params, {}, fresh, None, TEMPERATURE, config)[0]

        return jax.jit(compute).lower(params, fresh).compile({"xla_backend_optimization_level": 0})

    whole, parts = compiled(repeated, 1), compiled(repeated, 16)
    memory = [program.memory_analysis().temp_size_in_bytes for program in (whole, parts)]
    assert memory[1] < 0.3 * memory[0]
    expected = compiled(fresh, 1)(params, fresh)
    assert tiny.away(parts(params, repeated), expected) < 2e-6
    assert tiny.away(whole(params, repeated), expected) < 1e-5  # its sums are longer
