"""Every family through the two-segment cache: rollout, teacher forcing and one plain sequence agree."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from hypothesis import given, settings
from hypothesis import strategies as st

from streamsynth.errors import UserError
from streamsynth.keys import sample_keys
from streamsynth.policy.attention import RopeScaling, rope_frequencies, visible
from streamsynth.policy.families import FAMILIES, LOCAL_LAYERS, family_config
from streamsynth.policy.logprobs import group_logprobs, read_group
from streamsynth.policy.rollout import prefill, rollout
from streamsynth.policy.transformer import (
    Transformer,
    empty_cache,
    layer_place,
    logical_axes,
    param_shapes,
)

pytestmark = pytest.mark.usefixtures("quick_xla")

PROMPT, LENGTH, WINDOW, EOS = 11, 9, 4, 2
TEMPERATURE = np.float32(1.3)
SHAPE = dict(vocab_size=tiny.VOCAB, width=16, heads=4, kv_heads=2, head_width=4, mlp_width=24)
# More than a period and not a whole number of them, so that scanning leaves layers over.
LAYERS = {"gemma2": 3, "gemma3": 7}
VARIANTS = {
    **{family: {} for family in FAMILIES},
    "llama, untied, stretched": dict(
        family="llama",
        tied_embeddings=False,
        rope_scaling=RopeScaling("llama3", 8.0, 1.0, 4.0, original_length=16),
    ),
    "gemma3, stretched": dict(family="gemma3", rope_scaling=RopeScaling("linear", 8.0)),
}
LONGER = ("gemma3, stretched", "llama, untied, stretched")  # to compile


@functools.cache
def network(name, scan=False):
    changes = dict(VARIANTS[name])
    family = changes.pop("family", name)
    window = WINDOW if family in LOCAL_LAYERS else 0
    config = family_config(family, window=window, layers=LAYERS.get(family, 2), **SHAPE)
    return Transformer(dataclasses.replace(config, scan_layers=scan, **changes))


@functools.cache
def variables(name):
    """Parameters, biases and gains too, far enough from where they start that each of them matters."""
    rng = np.random.default_rng(1)
    params = tiny.fresh_params(network(name).config)

    def moved(p):
        return 1.5 * p + 0.2 * rng.normal(size=p.shape).astype(p.dtype)

    return {"params": jax.tree.map(moved, params)}


quick_rollout = tiny.quick_jit(rollout.__wrapped__, static_argnames=("model", "samples", "length", "stops"))
quick_logprobs = tiny.quick_jit(
    lambda *arguments: group_logprobs(*arguments, TEMPERATURE, chunk=7).logprobs, static_argnums=0
)
quick_hidden = tiny.quick_jit(lambda *arguments: read_group(*arguments).before, static_argnums=0)


@functools.partial(tiny.quick_jit, static_argnames="model")
def plain(model, variables, tokens, positions):
    hidden, _ = model.apply(variables, tokens, positions)
    logits = model.apply(variables, hidden, method="logits")
    return jax.nn.log_softmax(logits / TEMPERATURE, axis=-1)


def plain_logprobs(model, variables, prompts, tokens, mask):
    """Each prompt and completion as one sequence without padding between them, no cache."""
    group = len(tokens) // len(prompts.tokens)
    rows, starts = np.zeros((len(tokens), PROMPT + LENGTH), np.int32), []
    for n, completion in enumerate(tokens):
        prompt = prompts.tokens[n // group][prompts.mask[n // group]]
        rows[n, : len(prompt) + len(completion)] = [*prompt, *completion]
        starts.append(len(prompt))
    everywhere = np.broadcast_to(np.arange(rows.shape[1]), rows.shape)
    found = np.asarray(plain(model, variables, rows, everywhere))
    before = np.array(starts)[:, None] - 1 + np.arange(LENGTH)
    chosen = found[np.arange(len(tokens))[:, None], before, tokens]
    return np.where(mask, chosen, 0.0)


def sampled(model, variables, prompts, seed):
    keys = sample_keys(jax.random.key(seed), len(prompts.tokens), 3)
    drawn = quick_rollout(
        model, variables, prompts, keys, TEMPERATURE, samples=3, length=LENGTH, stops=(EOS, EOS + 1)
    )
    return jax.tree.map(np.asarray, drawn)


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.slow if name in LONGER else ()) for name in VARIANTS]
)
@settings(max_examples=5, deadline=None)
@given(seed=st.integers(0, 2**30))
def test_rollout_teacher_forcing_and_a_plain_sequence_agree(name, seed):
    """Prompts of every length from 1 on, in one padded batch, and completions longer than the window."""
    model, weights = network(name), variables(name)
    prompts = tiny.prompts(np.random.default_rng(seed), 4, PROMPT)
    drawn = sampled(model, weights, prompts, seed)
    forced = quick_logprobs(model, weights, prompts, drawn.tokens, drawn.mask)
    expected = plain_logprobs(model, weights, prompts, drawn.tokens, drawn.mask)
    np.testing.assert_allclose(drawn.logprobs, forced, atol=1e-4)
    np.testing.assert_allclose(forced, expected, atol=1e-4)
    ends = np.isin(drawn.tokens, (EOS, EOS + 1))
    assert (drawn.finished == ends.any(1)).all()
    lengths = np.where(drawn.finished, ends.argmax(1) + 1, LENGTH)
    np.testing.assert_array_equal(drawn.mask, np.arange(LENGTH) < lengths[:, None])
    assert (drawn.tokens[~drawn.mask] == EOS).all()


@pytest.mark.parametrize("name", ["llama", pytest.param("gemma3", marks=pytest.mark.slow)])
def test_scanned_periods_write_and_learn_what_unrolled_layers_do(name):
    scanned, model = network(name, scan=True), network(name)
    stacked = {"params": tiny.stack_layers(variables(name)["params"], scanned.config)}
    prompts = tiny.prompts(np.random.default_rng(0), 4, PROMPT)
    axes = jax.tree.structure(logical_axes(scanned.config), is_leaf=lambda leaf: isinstance(leaf, tuple))
    assert axes == jax.tree.structure(stacked["params"])
    one, two = sampled(model, variables(name), prompts, 0), sampled(scanned, stacked, prompts, 0)
    np.testing.assert_array_equal(one.tokens, two.tokens)
    np.testing.assert_allclose(one.logprobs, two.logprobs, atol=1e-5)

    def gradient(model, weights):
        def loss(w):
            return group_logprobs(model, w, prompts, one.tokens, one.mask).logprobs.sum()

        return tiny.quick_jit(jax.grad(loss))(weights)["params"]

    rematted = Transformer(dataclasses.replace(scanned.config, remat=True))
    expected = tiny.stack_layers(gradient(model, variables(name)), scanned.config)
    found = gradient(rematted, stacked)
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    np.testing.assert_allclose(tiny.flat(found), tiny.flat(expected), rtol=1e-3, atol=1e-3)
    for layer in range(model.config.layers):
        path, row = layer_place(scanned.config, layer)
        there = functools.reduce(lambda tree, key: tree[key], path, stacked["params"])
        kernel = there["query"]["kernel"] if row is None else there["query"]["kernel"][row]
        np.testing.assert_array_equal(kernel, variables(name)["params"][f"layers_{layer}"]["query"]["kernel"])


@pytest.mark.parametrize("name", ["gemma2", "gemma3"])
@pytest.mark.parametrize("scan", [False, True])
def test_the_cache_of_a_local_layer_holds_only_its_window(name, scan):
    model = network(name, scan)
    config, windows = model.config, model.config.windows
    weights = variables(name)["params"]
    weights = {"params": tiny.stack_layers(weights, config) if scan else weights}
    prompts = tiny.prompts(np.random.default_rng(0), 4, PROMPT)
    shared = jax.eval_shape(lambda: prefill(model, weights, prompts))[-1]
    own = empty_cache(config, 12, LENGTH)
    for (periods, rest), widest, whole in ((shared, WINDOW - 1, PROMPT), (own, WINDOW, LENGTH)):
        first = len(periods) * config.periods
        layers = [*zip(periods, windows, strict=False)]
        layers += [(segment, windows[(first + i) % len(windows)]) for i, segment in enumerate(rest)]
        assert len(layers) == (len(windows) * scan + config.layers - first)
        for segment, window in layers:
            size = widest if window else whole
            assert segment.keys.shape[-2] == segment.values.shape[-2] == segment.positions.shape[-1] == size


def test_padding_changes_nothing():
    """Longer padding of prompts, other tokens in it, and other rows beside: the same hidden states."""
    rng = np.random.default_rng(0)
    model, weights = network("gemma3"), variables("gemma3")
    prompts = tiny.prompts(rng, 4, PROMPT)
    tokens, _ = tiny.completions(rng, 12, LENGTH)
    noise = rng.integers(3, tiny.VOCAB, size=(4, PROMPT + 5)).astype(np.int32)
    padded = dataclasses.replace(
        prompts,
        tokens=np.where(
            np.pad(prompts.mask, ((0, 0), (0, 5))), np.pad(prompts.tokens, ((0, 0), (0, 5))), noise
        ),
        mask=np.pad(prompts.mask, ((0, 0), (0, 5))),
    )
    one, two = (quick_hidden(model, weights, p, tokens) for p in (prompts, padded))
    np.testing.assert_allclose(one, two, atol=1e-5)
    alone = jax.tree.map(lambda leaf: leaf[2:3], prompts)
    np.testing.assert_allclose(quick_hidden(model, weights, alone, tokens[6:9]), one[6:9], atol=1e-5)


def test_low_precision_computes_norms_and_softmax_in_float32(dtype="bfloat16"):
    """Parameters and activations are of the named dtype; the log-probabilities stay near float32's."""
    config = dataclasses.replace(network("gemma3").config, param_dtype=dtype, compute_dtype=dtype)
    low = jax.tree.map(lambda p: p.astype(dtype), variables("gemma3"))
    assert {leaf.dtype for leaf in jax.tree.leaves(param_shapes(config))} == {jnp.dtype(dtype)}
    prompts = tiny.prompts(np.random.default_rng(1), 4, PROMPT)
    tokens, mask = tiny.completions(np.random.default_rng(2), 12, LENGTH)
    wide = jax.tree.map(lambda p: p.astype(jnp.float32), low)
    expected = quick_logprobs(network("gemma3"), wide, prompts, tokens, mask)
    found = quick_logprobs(Transformer(config), low, prompts, tokens, mask)
    assert found.dtype == jnp.float32
    np.testing.assert_allclose(found, expected, atol=0.5)
    assert np.abs(np.asarray(found - expected)).mean() < 0.05
    coarse = Transformer(dataclasses.replace(config, logit_dtype="bfloat16"))
    hidden = jnp.ones((1, config.width), dtype)
    assert coarse.apply(low, hidden, method="logits").dtype == jnp.bfloat16
    assert Transformer(config).apply(low, hidden, method="logits").dtype == jnp.float32


@settings(max_examples=50)
@given(st.integers(0, 6), st.integers(0, 2**30))
def test_visibility_is_causal_and_within_the_window(window, seed):
    rng = np.random.default_rng(seed)
    query, key = rng.integers(-1, 12, 5), rng.integers(-1, 12, 7)
    found = np.asarray(visible(query, key, window))
    for i, q in enumerate(query):
        for j, k in enumerate(key):
            assert found[i, j] == (0 <= k <= q and (not window or q - k < window))


def test_scaled_frequencies_of_llama_3():
    """Fast pairs stay, slow ones are divided by the factor, and between them it passes smoothly."""
    plain = rope_frequencies(64, 500_000.0).astype(np.float64)
    scaled = rope_frequencies(64, 500_000.0, RopeScaling("llama3", 8.0, 1.0, 4.0, 8192)).astype(np.float64)
    wavelength = 2 * np.pi / plain
    ratio = scaled / plain
    np.testing.assert_allclose(ratio[wavelength < 8192 / 4], 1.0, rtol=1e-6)
    np.testing.assert_allclose(ratio[wavelength > 8192 / 1], 1 / 8, rtol=1e-6)
    assert (np.diff(ratio) <= 1e-6).all() and ((ratio > 0.13) & (ratio < 0.99)).any()
    linear = rope_frequencies(64, 10_000.0, RopeScaling("linear", 8.0))
    np.testing.assert_allclose(8 * linear, rope_frequencies(64, 10_000.0), rtol=1e-6)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (dict(family="gpt2"), "policy.family = 'gpt2'.*llama, qwen2"),
        (dict(family="llama", window=8), "policy.window = 8.*llama"),
        (dict(family="llama", heads=3), "policy.heads = 3"),
        (dict(family="qwen3", head_width=5), "policy.head_width = 5"),
        (dict(family="gemma2", param_dtype="int8"), "policy.param_dtype = 'int8'"),
    ],
)
def test_networks_that_do_not_exist_are_refused(change, words):
    with pytest.raises(UserError, match=words):
        family_config(change.pop("family"), **{**SHAPE, "layers": 2, **change})
    with pytest.raises(UserError, match="yarn"):
        RopeScaling("yarn", 2.0)
