"""The objective against float64 numbers: its values, and its gradients as sums of grad log pi."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from streamsynth.learner import objective
from streamsynth.learner.objective import Fresh, ObjectiveConfig, Replayed
from streamsynth.policy.logprobs import group_logprobs, read_group
from streamsynth.stream.replay import effective_sample_size

pytestmark = pytest.mark.usefixtures("quick_xla")

N, P, T = 8, 4, 5
TEMPERATURE = np.float32(0.9)
LOW, HIGH = ObjectiveConfig().choices.clip_low, ObjectiveConfig().choices.clip_high


# Configs enter as traced numbers, so that each loss compiles once.
def with_weights(weights):
    return ObjectiveConfig(chunk=16, **weights)


@tiny.quick_jit
def _fresh(params, batch, weights):
    def loss(p):
        return objective.fresh_loss(tiny.MODEL, p, batch, TEMPERATURE, with_weights(weights))

    return jax.value_and_grad(loss, has_aux=True)(params)


@tiny.quick_jit
def _replayed(params, batch, weights):
    def loss(p):
        return objective.replayed_loss(tiny.MODEL, p, batch, TEMPERATURE, with_weights(weights))

    return jax.value_and_grad(loss, has_aux=True)(params)


def fresh_value_and_grad(batch, kl_weight=0.0, entropy_weight=0.0):
    return _fresh(tiny.params(), batch, dict(kl_weight=kl_weight, entropy_weight=entropy_weight))


def replayed_value_and_grad(batch, replay_weight=1.0, cloning_weight=0.0):
    return _replayed(tiny.params(), batch, dict(replay_weight=replay_weight, cloning_weight=cloning_weight))


@tiny.quick_jit
def _scores(params, prompts, tokens, mask, coefficients):
    def logprobs(p):
        return group_logprobs(tiny.MODEL, p, prompts, tokens, mask, TEMPERATURE).logprobs

    value, pullback = jax.vjp(logprobs, params)
    return value, pullback(coefficients)[0]


def score_of(batch, coefficients):
    """sum of coefficients * grad log pi, token by token: the only derivative that the tests need."""
    coefficients = np.asarray(coefficients, np.float32)
    return tiny.flat(_scores(tiny.params(), batch.prompts, batch.tokens, batch.mask, coefficients)[1])


def token_logprobs(batch):
    zeros = np.zeros((N, T), np.float32)
    return np.asarray(_scores(tiny.params(), batch.prompts, batch.tokens, batch.mask, zeros)[0])


def logprobs64(batch):
    return np.asarray(token_logprobs(batch), np.float64)


@pytest.fixture(scope="module")
def fresh():
    """Behaviour and reference so far from the policy that both sides of the clipping are met."""
    rng = np.random.default_rng(0)
    tokens, mask = tiny.completions(rng, N, T)
    batch = Fresh(
        tiny.prompts(rng, N, P), tokens, mask, np.zeros((N, T)), np.zeros((N, T)), rng.normal(size=N)
    )
    logprobs = logprobs64(batch)
    behaviour, reference = (
        np.where(mask, logprobs + scale * rng.normal(size=(N, T)), 0) for scale in (0.4, 0.5)
    )
    return jax.tree.map(
        lambda x: x.astype(np.float32) if x.dtype == np.float64 else x,
        batch.replace(behaviour=behaviour, reference=reference),
    )


@pytest.fixture(scope="module")
def replayed():
    """One row for each case: kept as it is, truncated, drifted with A < 0 and A > 0, elite, filler."""
    rng = np.random.default_rng(1)
    tokens, mask = tiny.completions(rng, N, T)
    valid = np.array([1, 1, 1, 1, 1, 1, 0, 0], bool)
    advantage = np.array([0.7, 1.3, -0.8, 0.9, -1.1, 0.4, 5.0, -5.0], np.float32)
    log_ratio = np.array([-0.3, 1.5, -2.5, -2.5, -1.5, 0.1, 0.2, 0.3])
    elite = np.array([1, 0, 0, 1, 0, 0, 1, 0], bool)
    batch = Replayed(tiny.prompts(rng, N, P), tokens, mask, np.zeros((N, T)), advantage, elite, valid)
    shift = np.where(mask, (log_ratio / mask.sum(-1))[:, None], 0)
    behaviour = np.where(mask, logprobs64(batch) - shift, 0).astype(np.float32)
    return batch.replace(behaviour=behaviour), log_ratio


def clipped_by_hand(batch):
    """The surrogate [N, T] and where its gradient is cut off, from PPO's definition case by case."""
    ratio = np.exp(np.where(batch.mask, logprobs64(batch) - batch.behaviour, 0))
    surrogate, flat = np.zeros((N, T)), np.zeros((N, T), bool)
    for n in range(N):
        for t in range(T):
            a, r = float(batch.advantage[n]), ratio[n, t]
            if a > 0 and r > 1 + HIGH:
                surrogate[n, t], flat[n, t] = (1 + HIGH) * a, True
            elif a < 0 and r < 1 - LOW:
                surrogate[n, t], flat[n, t] = (1 - LOW) * a, True
            else:
                surrogate[n, t] = r * a
    return ratio, surrogate, flat & batch.mask


def test_clipped_surrogate_on_both_sides_with_a_fixed_normaliser(fresh):
    ratio, surrogate, flat = clipped_by_hand(fresh)
    positive = np.broadcast_to(fresh.advantage[:, None] > 0, flat.shape)
    assert (flat & positive).any() and (flat & ~positive).any() and (~flat & fresh.mask).any()
    (loss, metrics), grads = fresh_value_and_grad(fresh)
    # The constant N * T, not the number of tokens.
    np.testing.assert_allclose(loss, -(surrogate * fresh.mask).sum() / (N * T), rtol=2e-5)
    np.testing.assert_allclose(metrics["clip_share"], flat.sum() / fresh.mask.sum(), rtol=1e-6)
    coefficients = -np.where(flat, 0, ratio * fresh.advantage[:, None]) * fresh.mask / (N * T)
    np.testing.assert_allclose(tiny.flat(grads), score_of(fresh, coefficients), atol=2e-6)


def test_on_policy_gradient_is_advantage_times_score(fresh):
    on_policy = fresh.replace(behaviour=token_logprobs(fresh))
    (_, metrics), grads = fresh_value_and_grad(on_policy)
    assert metrics["clip_share"] == 0
    expected = score_of(fresh, -fresh.advantage[:, None] * fresh.mask / (N * T))
    np.testing.assert_allclose(tiny.flat(grads), expected, atol=2e-6)


def test_kl_is_logged_as_k3_and_differentiated_as_k2(fresh):
    """k3 = r - 1 - log r and k2 = (log r)^2 / 2 with r = ref / pi; they differ, and so do their gradients."""
    still = fresh.replace(advantage=np.zeros(N, np.float32))
    (loss, metrics), grads = fresh_value_and_grad(still, kl_weight=0.3)
    log_r = np.where(fresh.mask, fresh.reference - logprobs64(fresh), 0)
    np.testing.assert_allclose(
        metrics["kl"], (np.exp(log_r) - 1 - log_r)[fresh.mask].mean(), rtol=1e-5, atol=1e-7
    )
    k2 = 0.5 * log_r**2
    np.testing.assert_allclose(loss, 0.3 * k2.sum() / (N * T), rtol=1e-5)
    np.testing.assert_allclose(metrics["loss/kl"], loss, rtol=1e-6)
    of_k2 = score_of(fresh, 0.3 * -log_r / (N * T))
    of_k3 = score_of(fresh, 0.3 * np.where(fresh.mask, 1 - np.exp(log_r), 0) / (N * T))
    np.testing.assert_allclose(tiny.flat(grads), of_k2, atol=2e-6)
    assert np.abs(of_k2 - of_k3).max() > 1e-3


def test_kl_to_itself_is_zero(fresh):
    same = fresh.replace(reference=token_logprobs(fresh))
    (_, metrics), _ = fresh_value_and_grad(same, kl_weight=0.3)
    assert abs(metrics["kl"]) < 1e-6 and abs(metrics["loss/kl"]) < 1e-6


def test_entropy_is_that_of_the_tempered_distributions(fresh):
    @tiny.quick_jit
    def all_logits(params):
        hidden = read_group(tiny.MODEL, params, fresh.prompts, fresh.tokens).before
        return tiny.MODEL.apply(params, hidden, method="logits")

    logits = np.asarray(all_logits(tiny.params()), np.float64) / 0.9
    logprobs = logits - np.logaddexp.reduce(logits, axis=-1, keepdims=True)
    entropy = -(np.exp(logprobs) * logprobs).sum(-1)
    (loss, metrics), _ = fresh_value_and_grad(fresh, entropy_weight=0.2)
    np.testing.assert_allclose(metrics["entropy"], entropy[fresh.mask].mean(), rtol=1e-5)
    expected = metrics["loss/policy"] - 0.2 * entropy[fresh.mask].sum() / (N * T)
    np.testing.assert_allclose(loss, expected, rtol=1e-5)


def test_what_stands_behind_the_end_counts_for_nothing(fresh):
    weights = dict(kl_weight=0.3, entropy_weight=0.2)
    junk = fresh.replace(
        tokens=np.where(fresh.mask, fresh.tokens, 7),
        behaviour=np.where(fresh.mask, fresh.behaviour, np.nan),
        reference=np.where(fresh.mask, fresh.reference, np.inf),
    )
    (loss, _), grads = fresh_value_and_grad(fresh, **weights)
    (junk_loss, _), junk_grads = fresh_value_and_grad(junk, **weights)
    np.testing.assert_allclose(junk_loss, loss, rtol=1e-6)
    np.testing.assert_allclose(tiny.flat(junk_grads), tiny.flat(grads), atol=1e-7)


def test_replayed_rows_are_truncated_dropped_and_cloned(replayed):
    batch, log_ratio = replayed
    (loss, metrics), grads = replayed_value_and_grad(batch, 0.6, 0.5)
    kept = np.array([1, 1, 0, 1, 1, 1, 0, 0], bool)  # the third: A < 0 and 2.5 nats away
    weight = np.where(kept, np.minimum(2.0, np.exp(log_ratio)), 0)
    assert weight[1] == 2.0
    sequence = logprobs64(batch).sum(-1)
    cloned = np.array([1, 0, 0, 1, 0, 0, 0, 0])
    policy = -0.6 * (weight * batch.advantage * sequence).sum() / (N * T)
    cloning = -0.5 * (cloned * sequence).sum() / (N * T)
    np.testing.assert_allclose(loss, policy + cloning, rtol=2e-5)
    np.testing.assert_allclose(metrics["replay/loss"], policy, rtol=2e-5)
    np.testing.assert_allclose(metrics["replay/cloning"], cloning, rtol=2e-5)
    assert metrics["replay/samples"] == 6 and metrics["replay/dropped"] == 1
    np.testing.assert_allclose(
        metrics["replay/effective_samples"], weight.sum() ** 2 / (weight**2).sum(), rtol=1e-5
    )
    # The weights carry no gradient of their own.
    coefficients = -(0.6 * weight * batch.advantage + 0.5 * cloned)[:, None] * batch.mask / (N * T)
    np.testing.assert_allclose(tiny.flat(grads), score_of(batch, coefficients), atol=2e-6)


@pytest.mark.parametrize("filler", ["zeros", "junk"])
def test_rows_that_are_not_valid_contribute_nothing(replayed, filler):
    batch, _ = replayed
    empty = ~batch.valid

    def fill(leaf, junk):
        rows = empty.reshape(-1, *[1] * (leaf.ndim - 1))
        return np.where(rows, np.zeros_like(leaf) if filler == "zeros" else junk, leaf).astype(leaf.dtype)

    other = batch.replace(
        prompts=jax.tree.map(lambda leaf: fill(leaf, 5), batch.prompts),
        tokens=fill(batch.tokens, 9),
        mask=fill(batch.mask, True),
        behaviour=fill(batch.behaviour, np.nan),
        advantage=fill(batch.advantage, 1e6),
        elite=fill(batch.elite, True),
    )
    (loss, metrics), grads = replayed_value_and_grad(batch, 1.0, 0.5)
    (other_loss, other_metrics), other_grads = replayed_value_and_grad(other, 1.0, 0.5)
    np.testing.assert_allclose(other_loss, loss, rtol=1e-6)
    np.testing.assert_allclose(tiny.flat(other_grads), tiny.flat(grads), atol=1e-7)
    for name, value in metrics.items():
        np.testing.assert_allclose(other_metrics[name], value, rtol=1e-6)


def test_gradients_are_the_sum_and_tell_replays_share(fresh, replayed):
    batch, _ = replayed
    config = ObjectiveConfig(kl_weight=0.0, replay_weight=0.6, chunk=16)

    @tiny.quick_jit
    def both(params):
        return objective.gradients(tiny.MODEL, params, {}, fresh, batch, TEMPERATURE, config)

    grads, metrics = both(tiny.params())
    of_fresh = tiny.flat(fresh_value_and_grad(fresh)[1])
    of_replay = tiny.flat(replayed_value_and_grad(batch, 0.6)[1])
    np.testing.assert_allclose(tiny.flat(grads), of_fresh + of_replay, atol=1e-6)
    sizes = np.linalg.norm(of_fresh), np.linalg.norm(of_replay)
    np.testing.assert_allclose(metrics["gradient/fresh"], sizes[0], rtol=1e-5)
    np.testing.assert_allclose(metrics["replay/gradient_share"], sizes[1] / sum(sizes), rtol=1e-5)


def test_a_batch_without_a_kept_row_has_no_gradient(replayed):
    batch, _ = replayed
    nothing = batch.replace(valid=np.zeros(N, bool))
    (loss, metrics), grads = replayed_value_and_grad(nothing)
    assert loss == 0 and (tiny.flat(grads) == 0).all() and metrics["replay/effective_samples"] == 0
    assert effective_sample_size(jnp.zeros(N), nothing.valid) == 0
