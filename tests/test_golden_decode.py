"""The two-segment cache against transformers: prompts once, then token by token, beyond the window."""

from __future__ import annotations

import golden_files
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from streamsynth.keys import sample_keys
from streamsynth.policy.rollout import prefill, rollout
from streamsynth.policy.transformer import Transformer, empty_cache
from streamsynth.pytrees import Prompts

pytestmark = pytest.mark.usefixtures("quick_xla")


def as_prompts(tokens, lengths):
    mask = np.arange(tokens.shape[1]) < lengths[:, None]
    none = np.zeros(len(tokens), np.int32)
    return Prompts(np.where(mask, tokens, 0).astype(np.int32), mask, none, none)


@pytest.mark.parametrize("scan_layers", [False, True])
@pytest.mark.parametrize("family", golden_files.FAMILIES)
def test_decoding_step_by_step_gives_the_logits_of_transformers(family, scan_layers):
    golden = golden_files.load(family, scan_layers=scan_layers)
    model, variables = Transformer(golden.config), {"params": golden.params}
    count = len(golden.tokens)
    cuts = 1 + np.arange(count, dtype=np.int32) * 3 % (golden.lengths.min() - 1)
    steps = int((golden.lengths - cuts).max())
    prompts = as_prompts(golden.tokens[:, : cuts.max() + 2], cuts)
    places = np.minimum(cuts[:, None] + np.arange(steps), golden.tokens.shape[1] - 1)
    completions = np.take_along_axis(golden.tokens, places, axis=1)

    @tiny.quick_jit
    def decode():
        _, last, lengths, shared = prefill(model, variables, prompts)

        def step(cache, given):
            t, token = given
            hidden, cache = model.apply(variables, token[:, None], (lengths + t)[:, None], shared, cache, t)
            return cache, model.apply(variables, hidden[:, 0], method="logits")

        first = model.apply(variables, last, method="logits")
        _, rest = jax.lax.scan(
            step, empty_cache(golden.config, count, steps), (jnp.arange(steps), completions.T)
        )
        return first, rest.swapaxes(0, 1)

    first, rest = map(np.asarray, decode())
    everyone = np.arange(count)
    np.testing.assert_allclose(first, golden.logits[everyone, cuts - 1], atol=1e-4)
    real = cuts[:, None] + np.arange(steps) < golden.lengths[:, None]
    assert real.sum(1).max() > max(golden.config.windows)
    np.testing.assert_allclose(rest[real], golden.logits[everyone[:, None], places][real], atol=1e-4)


@pytest.mark.parametrize("family", golden_files.FAMILIES)
def test_near_temperature_zero_the_sampler_writes_what_transformers_does_greedily(family):
    golden = golden_files.load(family)
    length = golden.greedy.shape[1]
    drawn = rollout(
        Transformer(golden.config),
        {"params": golden.params},
        as_prompts(golden.tokens, golden.lengths),
        sample_keys(jax.random.key(0), len(golden.tokens), 2),
        np.float32(1e-5),
        samples=2,
        length=length,
        stops=(golden.config.vocab_size,),  # one that never comes
    )
    np.testing.assert_array_equal(drawn.tokens, np.repeat(golden.greedy, 2, axis=0))
