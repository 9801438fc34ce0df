"""The network, its log-probabilities and its sampler."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from hypothesis import given, settings
from hypothesis import strategies as st

from streamsynth.errors import UserError
from streamsynth.keys import purpose_key, sample_keys
from streamsynth.policy.logprobs import group_logprobs
from streamsynth.policy.rollout import rollout
from streamsynth.policy.sampling import inverse_cdf
from streamsynth.policy.transformer import (
    RMSNorm,
    Transformer,
    TransformerConfig,
    init_params,
    logical_axes,
    param_shapes,
)
from streamsynth.pytrees import Prompts

pytestmark = pytest.mark.usefixtures("quick_xla")

CONFIG = TransformerConfig(vocab_size=61, width=32, layers=2, heads=4, kv_heads=2, head_width=8, mlp_width=48)
EOS = 2


@pytest.fixture(scope="module")
def params():
    return {"params": tiny.fresh_params(CONFIG)}


def make_prompts(rng, batch, length, vocab=61):
    sizes = rng.integers(1, length + 1, size=batch)
    mask = np.arange(length) < sizes[:, None]
    tokens = np.where(mask, rng.integers(3, vocab, size=(batch, length)), 0).astype(np.int32)
    return Prompts(tokens, mask, np.zeros(batch, np.int32), np.zeros(batch, np.int32))


def test_shared_prompt_equals_repeated_prompt_in_values_and_gradients(params):
    rng = np.random.default_rng(0)
    prompts = make_prompts(rng, 3, 8)
    repeated = jax.tree.map(lambda x: np.repeat(x, 4, axis=0), prompts)
    tokens = rng.integers(3, 61, size=(12, 6)).astype(np.int32)
    mask = np.arange(6) < rng.integers(1, 7, size=(12, 1))
    weight = rng.normal(size=(12, 6)).astype(np.float32)
    model = Transformer(CONFIG)

    def loss(p, prompts):
        return (group_logprobs(model, p, prompts, tokens, mask, 0.8, chunk=16).logprobs * weight).sum()

    shared_value, shared_grad = tiny.quick_jit(jax.value_and_grad(loss))(params, prompts)
    repeated_value, repeated_grad = tiny.quick_jit(jax.value_and_grad(loss))(params, repeated)
    np.testing.assert_allclose(shared_value, repeated_value, rtol=1e-5)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, atol=2e-4, rtol=1e-4), shared_grad, repeated_grad
    )


def test_networks_of_tests_are_drawn_as_the_network_draws_its_own():
    config = tiny.CONFIG
    own, drawn = init_params(config, jax.random.key(0)), tiny.fresh_params(config)
    assert jax.tree.structure(own) == jax.tree.structure(drawn)
    for (path, a), b in zip(jax.tree_util.tree_leaves_with_path(own), jax.tree.leaves(drawn), strict=True):
        assert (a.shape, a.dtype) == (b.shape, b.dtype), path
        assert float(b.std()) == pytest.approx(float(a.std()), rel=5 / a.size**0.5), path
        assert float(b.mean()) == pytest.approx(float(a.mean()), abs=5 * float(a.std()) / a.size**0.5), path


def test_every_parameter_has_logical_axes():
    axes = logical_axes(CONFIG)
    shapes = param_shapes(CONFIG)
    flat = jax.tree.leaves(axes, is_leaf=lambda x: isinstance(x, jax.sharding.PartitionSpec))
    assert [len(spec) for spec in flat] == [leaf.ndim for leaf in jax.tree.leaves(shapes)]
    assert all(name is not None for spec in flat for name in spec)


def test_prompt_is_kept_once_not_once_a_sample(params):
    """The compiled sampler's buffers grow with B * P, not with B * G * P."""
    model = Transformer(CONFIG)

    def temporary_bytes(samples):
        prompts = make_prompts(np.random.default_rng(0), 2, 512)
        keys = sample_keys(jax.random.key(0), 2, samples)
        compiled = rollout.lower(
            model, params, prompts, keys, 1.0, samples=samples, length=2, stops=(EOS,)
        ).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    growth = temporary_bytes(64) - temporary_bytes(32)
    copies_of_the_prompt_cache = 2 * 32 * CONFIG.layers * 2 * CONFIG.kv_heads * 512 * CONFIG.head_width * 4
    assert growth < 0.5 * copies_of_the_prompt_cache


def test_training_never_makes_all_logits():
    config = TransformerConfig(
        vocab_size=4096, width=16, layers=1, heads=2, kv_heads=1, head_width=8, mlp_width=16
    )
    params = {"params": tiny.fresh_params(config)}
    prompts = make_prompts(np.random.default_rng(0), 8, 4, 4096)
    tokens, mask = np.ones((64, 32), np.int32), np.ones((64, 32), bool)

    def loss(p):
        return group_logprobs(Transformer(config), p, prompts, tokens, mask, 1.0, chunk=64).logprobs.sum()

    compiled = jax.jit(jax.grad(loss)).lower(params).compile()
    assert compiled.memory_analysis().temp_size_in_bytes < 64 * 32 * 4096 * 4 / 2


@settings(max_examples=12, deadline=None)
@given(vocab=st.integers(2, 40), seed=st.integers(0, 10_000))
def test_inverse_cdf_covers_each_token_by_its_probability(vocab, seed):
    """Over an even grid of uniforms each token's share is its probability; its log-probability is right."""
    rng = np.random.default_rng(seed)
    logits = rng.normal(size=vocab).astype(np.float32) * 3
    logits[rng.integers(vocab)] = -np.inf
    grid = (np.arange(4000) + 0.5).astype(np.float32) / 4000
    tokens, logprobs = inverse_cdf(jnp.broadcast_to(logits, (4000, vocab)), grid)
    expected = np.exp(logits.astype(np.float64) - np.logaddexp.reduce(logits.astype(np.float64)))
    share = np.bincount(tokens, minlength=vocab) / 4000
    np.testing.assert_allclose(share, expected, atol=2 / 4000 + 1e-4)
    np.testing.assert_allclose(np.exp(logprobs), expected[np.asarray(tokens)], rtol=1e-4)


@pytest.mark.parametrize("uniform", [0.0, 1 - 2**-24])
def test_inverse_cdf_never_draws_the_impossible(uniform):
    logits = jnp.array([[-jnp.inf, -jnp.inf, 0.0, 1.0, 0.5, -jnp.inf, -jnp.inf]])
    token, _ = inverse_cdf(logits, jnp.array([uniform], jnp.float32))
    assert int(token[0]) in (2, 3, 4)


def test_no_two_samples_of_a_run_share_their_randomness():
    """Uniform logits, 5 steps x 8 prompts x 16 samples: repeats are as rare as chance allows."""
    config = TransformerConfig(
        vocab_size=64, width=8, layers=1, heads=1, kv_heads=1, head_width=8, mlp_width=8
    )
    params = {"params": jax.tree.map(jnp.zeros_like, tiny.fresh_params(config))}
    prompts = make_prompts(np.random.default_rng(0), 8, 3, 64)
    seen = []
    for step in range(5):
        keys = sample_keys(purpose_key(0, "rollout", step), 8, 16)
        drawn = rollout(Transformer(config), params, prompts, keys, 1.0, samples=16, length=4, stops=(-1,))
        seen += [tuple(row) for row in np.asarray(drawn.tokens)]
    # 640 draws from 64^4 equally likely texts: 0.012 repeats are expected; three have chance 3e-7.
    assert len(seen) - len(set(seen)) < 3


def test_completions_end_at_the_end_of_text(params):
    prompts = make_prompts(np.random.default_rng(0), 4, 5)
    keys = sample_keys(jax.random.key(3), 4, 32)
    drawn = jax.device_get(
        rollout(Transformer(CONFIG), params, prompts, keys, 3.0, samples=32, length=30, stops=(EOS,))
    )
    assert 0 < drawn.finished.sum() < len(drawn.finished)
    for tokens, mask, logprobs, finished in zip(
        drawn.tokens, drawn.mask, drawn.logprobs, drawn.finished, strict=True
    ):
        size = mask.sum()
        assert mask[:size].all() and (logprobs[size:] == 0).all() and (tokens[size:] == EOS).all()
        assert finished == (tokens[size - 1] == EOS) and EOS not in tokens[: size - 1]


@pytest.mark.parametrize("change", [{"heads": 3, "kv_heads": 2}, {"head_width": 7}])
def test_impossible_shapes_are_refused(change):
    with pytest.raises(UserError, match="policy"):
        TransformerConfig(**{"vocab_size": 8, **change})


def test_norm_is_float32_exact():
    x = np.random.default_rng(0).normal(size=(3, 16)).astype(np.float32) * 100
    norm = RMSNorm(CONFIG)
    got = norm.apply(nn.meta.unbox(norm.init(jax.random.key(0), x)), x)
    x64 = x.astype(np.float64)
    np.testing.assert_allclose(got, x64 / np.sqrt((x64**2).mean(-1, keepdims=True) + 1e-6), rtol=1e-5)
