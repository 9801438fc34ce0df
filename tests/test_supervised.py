"""Maximum likelihood: the loss against log-softmax by hand, and that a step lowers it."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from streamsynth.defaults import optimizer as optimizer_keys
from streamsynth.learner.optimizer import make_optimizer
from streamsynth.learner.supervised import SupervisedBatch, supervised_loss, supervised_step
from streamsynth.policy.logprobs import read_group

pytestmark = pytest.mark.usefixtures("quick_xla")

B, G, P, T = 3, 2, 6, 5
# Op by op each of them would compile for seconds.
quick_loss = tiny.quick_jit(supervised_loss, static_argnums=(0, 4, 5))
quick_hidden = tiny.quick_jit(read_group, static_argnums=0)


def batch():
    rng = np.random.default_rng(0)
    return SupervisedBatch(tiny.prompts(rng, B, P), *tiny.completions(rng, B * G, T))


def by_hand(hidden, tokens, mask, temperature):
    """Mean negative log-likelihood in float64 of `tokens`, each foretold from its row of `hidden`."""
    logits = tiny.MODEL.apply(tiny.params(), hidden, method="logits")
    logits = np.asarray(logits, np.float64) / temperature
    top = logits.max(-1, keepdims=True)
    log_normaliser = top[..., 0] + np.log(np.exp(logits - top).sum(-1))
    found = np.take_along_axis(logits, np.asarray(tokens)[..., None], -1)[..., 0] - log_normaliser
    return -(found * mask).sum() / mask.sum()


@pytest.mark.parametrize("temperature", [1.0, 0.65])
def test_the_loss_is_that_of_the_policy_as_it_samples(temperature):
    data = batch()
    loss, metrics = quick_loss(tiny.MODEL, tiny.params(), data, np.float32(temperature), 0.5, 4)
    hidden = quick_hidden(tiny.MODEL, tiny.params(), data.prompts, data.tokens)
    completion = by_hand(hidden.before, data.tokens, data.mask, temperature)
    prompts = data.prompts
    prompt = by_hand(hidden.prompt[:, :-1], prompts.tokens[:, 1:], prompts.mask[:, 1:], temperature)
    np.testing.assert_allclose(metrics["nll/completion"], completion, rtol=1e-5)
    np.testing.assert_allclose(metrics["nll/prompt"], prompt, rtol=1e-5)
    np.testing.assert_allclose(loss, completion + 0.5 * prompt, rtol=1e-5)


def test_padding_says_nothing():
    data = batch()
    other = data.replace(tokens=np.where(data.mask, data.tokens, 7).astype(np.int32))
    losses = [quick_loss(tiny.MODEL, tiny.params(), d, 1.0, 1.0, 4)[0] for d in (data, other)]
    np.testing.assert_allclose(losses[0], losses[1], rtol=1e-6)


def test_steps_lower_the_loss():
    optimizer = make_optimizer(optimizer_keys(learning_rate=1e-2, warmup=0), 20)
    params = jax.tree.map(jnp.array, tiny.params())
    opt_state, data, found = optimizer.init(params), batch(), []
    for _ in range(10):
        params, opt_state, metrics = supervised_step(
            tiny.MODEL, optimizer, params, {}, opt_state, data, np.float32(0.65), prompt_weight=0.0
        )
        found.append(float(metrics["nll/completion"]))
    assert found[-1] < 0.7 * found[0]
