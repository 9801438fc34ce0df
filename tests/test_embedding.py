"""The embedding's gradient is summed in float32, whatever the table is in."""

import jax
import jax.numpy as jnp
import numpy as np

from streamsynth.policy.embedding import embed


def test_the_gradient_of_a_frequent_token_is_not_lost_in_low_precision():
    rng = np.random.default_rng(0)
    tokens = np.minimum(rng.zipf(1.3, size=(64, 128)) - 1, 49).astype(np.int32)
    weights = rng.normal(size=(64, 128, 8)).astype(np.float32) + 1.0
    table = rng.normal(size=(50, 8)).astype(np.float32)

    def gradient(table, take):
        return jax.grad(lambda t: (take(t, tokens).astype(jnp.float32) * weights).sum())(table)

    exact = np.zeros((50, 8))
    rounded = np.asarray(jnp.asarray(weights, jnp.bfloat16), np.float64)
    np.add.at(exact, tokens, rounded)
    low = jnp.asarray(table, jnp.bfloat16)
    found = gradient(low, embed)
    assert found.dtype == jnp.bfloat16
    error = np.abs(np.asarray(found, np.float64) - exact) / np.abs(exact).max(1, keepdims=True)
    assert error.max() < 2**-8
    # What is mended: the plain gather adds up in bfloat16.
    plain = np.asarray(gradient(low, lambda t, i: jnp.take(t, i, axis=0)), np.float64)
    assert np.abs(plain - exact).max() > 20 * np.abs(np.asarray(found, np.float64) - exact).max()


def test_in_float32_it_is_the_plain_gather():
    tokens = np.array([[3, 1, 3], [0, 3, 2]], np.int32)
    table = np.random.default_rng(0).normal(size=(5, 4)).astype(np.float32)
    np.testing.assert_array_equal(embed(table, tokens), table[tokens])
    ours, plain = (
        jax.grad(lambda t, take=take: (jnp.sin(take(t, tokens)) ** 2).sum())(table)
        for take in (embed, lambda t, i: jnp.take(t, i, axis=0))
    )
    np.testing.assert_allclose(ours, plain, rtol=1e-6)
