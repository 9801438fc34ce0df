"""What a batch that an older policy wrote teaches, by enumeration: all texts that a tiny policy can write."""

from __future__ import annotations

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from streamsynth.learner import objective
from streamsynth.learner.choices import OBJECTIVES, Choices
from streamsynth.learner.objective import Fresh, ObjectiveConfig
from streamsynth.policy.logprobs import group_logprobs
from streamsynth.policy.transformer import Transformer, TransformerConfig, init_params

TEMPERATURE = np.float32(0.9)
V, P = 7, 3
CONFIG = TransformerConfig(vocab_size=V, **tiny.SHAPE)
MODEL = Transformer(CONFIG)
UNBOUNDED = Choices("others", "lagged", "constant", clip_low=1.0, clip_high=np.inf)
OURS = OBJECTIVES["streamsynth"]
ROUNDING = 2e-6  # of a gradient's length: 16 times float32's


@pytest.fixture(scope="module")
def policies():
    """The one that wrote, and the one that it has become: an update, larger than a run's."""
    base = init_params(CONFIG, jax.random.key(0))
    noise = init_params(CONFIG, jax.random.key(1))
    older = {"params": jax.tree.map(lambda leaf: 2.0 * leaf, base)}
    newer = {"params": jax.tree.map(lambda leaf, other: 2.0 * leaf + 0.3 * other, base, noise)}
    return older, newer


def every_text(length):
    """All V ** length texts of one prompt as a group, and an arbitrary worth of each, [N]."""
    tokens = np.array(list(itertools.product(range(V), repeat=length)), np.int32)
    prompts = jax.tree.map(lambda leaf: leaf[:1] % V, tiny.prompts(np.random.default_rng(0), 1, P))
    prompts = prompts.replace(mask=np.ones_like(prompts.mask))
    worth = np.random.default_rng(1).normal(size=len(tokens)).astype(np.float32)
    return prompts, tokens, np.ones(tokens.shape, bool), worth


@tiny.quick_jit
def logprobs(params, prompts, tokens, mask):
    return group_logprobs(MODEL, params, prompts, tokens, mask, TEMPERATURE).logprobs


@tiny.quick_jit
def truth(params, prompts, tokens, mask, worth):
    """grad of E[worth] over the texts that the policy itself writes, by differentiating their chances."""

    def expected(p):
        own = group_logprobs(MODEL, p, prompts, tokens, mask, TEMPERATURE).logprobs
        return jnp.exp(own.sum(axis=1)) @ worth

    return jax.grad(expected)(params)


@functools.partial(tiny.quick_jit, static_argnames="choices")
def loss_gradient(params, batch, choices):
    config = ObjectiveConfig(choices=choices, kl_weight=0.0, chunk=64, lagged=True)

    def loss(p):
        return objective.fresh_loss(MODEL, p, batch, TEMPERATURE, config)

    return jax.grad(loss, has_aux=True)(params)


def learned(newer, older, texts, choices, weighed=True):
    """The ascent direction of the objective, on average over what the older policy writes; its figures.

    Each text stands once in the batch, and its advantage carries how often it is written: N * T * mu(y).
    """
    prompts, tokens, mask, worth = texts
    behaviour = np.asarray(logprobs(older, prompts, tokens, mask))
    chance = np.exp(behaviour.astype(np.float64).sum(axis=1))
    assert chance.sum() == pytest.approx(1, abs=1e-5)
    own = np.asarray(logprobs(newer, prompts, tokens, mask))
    advantage = (mask.size * chance * worth).astype(np.float32)
    batch = Fresh(prompts, tokens, mask, behaviour if weighed else own, own, advantage)
    gradient, figures = loss_gradient(newer, batch, choices)
    return -tiny.flat(gradient), figures, np.exp(own - behaviour)


def test_of_single_tokens_the_older_policys_batch_gives_the_newer_ones_gradient(policies):
    older, newer = policies
    texts = every_text(1)
    wanted = tiny.flat(truth(newer, *texts))
    found, figures, ratio = learned(newer, older, texts, UNBOUNDED)
    assert ratio.max() > 1.28 and ratio.min() < 0.8  # the weights have something to do
    assert tiny.away(found, wanted) < ROUNDING
    unweighed, *_ = learned(newer, older, texts, UNBOUNDED, weighed=False)
    assert tiny.away(unweighed, wanted) > 0.1
    # Effective sample size and mean of the tokens' ratios, here each token once.
    assert figures["ratio/mean"] == pytest.approx(ratio.mean(), rel=1e-5)
    size = ratio.sum() ** 2 / (ratio**2).sum() / ratio.size
    assert figures["ratio/effective_share"] == pytest.approx(size, rel=1e-5)


@pytest.mark.slow
def test_of_longer_texts_each_token_is_weighed_by_its_own_ratio(policies):
    """What stands before a token is still drawn as the older policy draws: see `objective.fresh_loss`."""
    older, newer = policies
    texts = every_text(3)
    prompts, tokens, mask, worth = texts
    wanted = tiny.flat(truth(newer, *texts))
    found, _, ratio = learned(newer, older, texts, UNBOUNDED)
    unweighed, *_ = learned(newer, older, texts, UNBOUNDED, weighed=False)
    chance = np.exp(np.asarray(logprobs(older, prompts, tokens, mask)).sum(axis=1))

    @tiny.quick_jit
    def scores(params, coefficients):
        def own(p):
            return group_logprobs(MODEL, p, prompts, tokens, mask, TEMPERATURE).logprobs

        return jax.vjp(own, params)[1](coefficients)[0]

    by_token = tiny.flat(scores(newer, ((chance * worth)[:, None] * ratio).astype(np.float32)))
    assert tiny.away(found, by_token) < ROUNDING
    # With the product of a text's ratios it would be the newer policy's own; without any it is further off.
    whole = ((chance * worth) * ratio.prod(axis=1))[:, None] * np.ones_like(ratio)
    of_whole = tiny.flat(scores(newer, whole.astype(np.float32)))
    assert tiny.away(of_whole, wanted) < ROUNDING
    assert tiny.away(found, wanted) < 0.9 * tiny.away(unweighed, wanted)


def test_clipping_bounds_what_a_token_may_weigh(policies):
    """A token likelier by more than 1 + high moves nothing if it is good: as PPO has it."""
    older, newer = policies
    prompts, tokens, mask, _ = every_text(1)
    texts = (prompts, tokens, mask, np.ones(V, np.float32))
    _, figures, ratio = learned(newer, older, texts, OURS)
    chance = np.exp(np.asarray(logprobs(older, prompts, tokens, mask)))[:, 0]
    clipped = ratio[:, 0] > 1 + OURS.clip_high
    assert 0 < clipped.sum() < V
    assert figures["clip_share"] == pytest.approx(clipped.mean())
    surrogate = chance * np.minimum(ratio[:, 0], 1 + OURS.clip_high)
    assert figures["loss/policy"] == pytest.approx(-surrogate.sum(), rel=1e-5)

    def found(worth):
        return learned(newer, older, (prompts, tokens, mask, worth), OURS)[0]

    for v in range(V):
        good = np.eye(V, dtype=np.float32)[v]
        moved = np.linalg.norm(found(good))
        assert (moved == 0) == clipped[v]
        assert (np.linalg.norm(found(-good)) == 0) == (ratio[v, 0] < 1 - OURS.clip_low)
