"""What the gradient estimates are on average, by exact enumeration: every batch that a tiny policy can write.

Six samples of two prompts (and labels), three texts each, one of them gated; a softmax policy for each label.
All 729 batches are scored by the project's own functions in float64, so an estimate that is unbiased equals
the gradient to rounding, and one that is not is away from it by what is asserted.
"""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from streamsynth.feedback import diversity
from streamsynth.learner import advantages, objective
from streamsynth.learner.balance import Balance
from streamsynth.learner.update import FLOORS, PARTS, assess
from streamsynth.policy.logprobs import group_logprobs
from streamsynth.policy.transformer import Transformer, TransformerConfig
from streamsynth.pytrees import Prompts, Scores
from streamsynth.stream import replay

pytestmark = pytest.mark.usefixtures("quick_xla")

GROUP = 3
LABEL = np.repeat([0, 1], GROUP)
QUALITY = np.array([[1.0, 0.4, 0.0], [0.3, 0.9, 0.7]])
BATCHES = np.array(list(itertools.product(range(3), repeat=len(LABEL))))
RNG = np.random.default_rng(14)
VECTORS = RNG.normal(size=(2, 3, 4))
VECTORS /= np.linalg.norm(VECTORS, axis=-1, keepdims=True)
KEPT = RNG.normal(size=(2, 3, 4))
THETA = RNG.normal(size=(2, 3))


@pytest.fixture
def x64():
    with jax.enable_x64(True):
        yield


def archive():
    matrix = 0.1 * np.eye(4) + np.einsum("kmd,kmf->kdf", KEPT, KEPT) / 10
    return diversity.Archive(jnp.asarray(matrix), jnp.full(2, 3.0), jnp.float64(0.1))


def weighted(chosen):
    return diversity.weighted(jnp.asarray(VECTORS)[LABEL, chosen], jnp.asarray(QUALITY)[LABEL, chosen])


def log_prob(theta, chosen):
    return jax.nn.log_softmax(theta)[LABEL, chosen]


def score_table():
    """p(Y) grad log pi(y_i) of every batch and sample, [729, 6, 2, 3]: one-hot less probability, by label."""
    policy = np.exp(THETA) / np.exp(THETA).sum(axis=1, keepdims=True)
    chosen = np.eye(3)[BATCHES] - policy[LABEL]
    probability = policy[LABEL, BATCHES].prod(axis=1)
    return np.einsum("y,yim,ik->yikm", probability, chosen, np.eye(2)[LABEL])


def expected(advantage, table=score_table()):  # noqa: B008
    """E[sum_i A_i grad log pi(y_i)], [2, 3], of advantages [729, 6]."""
    return np.einsum("yi,yikm->km", advantage, table)


def over_batches(function):
    """`function` of every batch, one after the other."""
    return jax.jit(lambda: jax.lax.map(function, jnp.asarray(BATCHES)))()


@functools.cache
def credits():
    """credit and closed-form baseline of every sample in every batch, [729, 6] each."""
    return over_batches(lambda chosen: diversity.credit(archive(), weighted(chosen), LABEL))


@jax.jit
@jax.grad
def gradient_at(theta, value):
    return jnp.exp(jax.vmap(lambda chosen: log_prob(theta, chosen).sum())(BATCHES)) @ value


def gradient(value):
    """grad of E[value(Y)], [2, 3], of values [729]: by automatic differentiation of all probabilities."""
    return np.asarray(gradient_at(THETA, value))


@functools.cache
def diversity_gradient():
    return gradient(over_batches(lambda chosen: diversity.value(archive(), weighted(chosen), LABEL).sum()))


def grouped(part):
    return part.reshape(*part.shape[:-1], -1, GROUP)


def misdirection(estimate, truth):
    """How much of an estimate, of length 1, points elsewhere than the truth, whatever its scale."""
    unit = estimate / np.linalg.norm(estimate)
    direction = truth / np.linalg.norm(truth)
    return np.linalg.norm(unit - np.sum(unit * direction) * direction)


def test_credit_is_unbiased_alone_and_with_the_closed_form_baseline(x64):
    credit, baseline = credits()
    truth = diversity_gradient()
    assert np.abs(truth).max() > 0.1
    np.testing.assert_allclose(expected(credit), truth, atol=1e-12)
    np.testing.assert_allclose(expected(baseline), 0.0, atol=1e-12)
    np.testing.assert_allclose(expected(credit - baseline), truth, atol=1e-12)


def test_credit_is_unbiased_with_a_lagged_mean_and_not_with_one_that_has_seen_the_batch(x64):
    """Whatever batch came before: so also on average over all that could have."""
    credit = np.asarray(credits()[0])
    truth = diversity_gradient()
    lagged = credit.mean(axis=1)
    for earlier in lagged:
        np.testing.assert_allclose(expected(credit - earlier), truth, atol=1e-12)
    running = 0.9 * lagged[0] + 0.1 * lagged[:, None]
    assert np.abs(expected(credit - running) - truth).max() > 0.003


def test_centring_within_the_group_is_right_for_quality_and_biased_for_credit(x64):
    quality = QUALITY[LABEL, BATCHES]
    own = advantages.leave_one_out(grouped(quality)).reshape(quality.shape)
    np.testing.assert_allclose(expected(own), gradient(quality.sum(axis=1)), atol=1e-12)

    credit = credits()[0]
    truth = diversity_gradient()
    others = advantages.leave_one_out(grouped(credit)).reshape(credit.shape)
    mean = (grouped(credit) - grouped(credit).mean(axis=-1, keepdims=True)).reshape(credit.shape)
    for centred in (others, mean):
        assert np.abs(expected(centred) - truth).max() > 0.02
        assert misdirection(expected(centred), truth) > 0.2


def test_dividing_by_the_groups_deviation_changes_the_direction(x64):
    """Of quality too, where centring alone does not."""
    quality, credit = QUALITY[LABEL, BATCHES], np.asarray(credits()[0])
    for part, truth in ((quality, gradient(quality.sum(axis=1))), (credit, diversity_gradient())):
        centred = grouped(part) - grouped(part).mean(axis=-1, keepdims=True)
        divided = (centred / (centred.std(axis=-1, keepdims=True) + 1e-4)).reshape(part.shape)
        assert misdirection(expected(divided), truth) > 0.1


def test_neutral_credit_is_the_gradient_of_diversity_less_quality_at_its_going_rate(x64):
    """Not that of E[f], and of no function: the rate m_i is not differentiated.

    With m_i (see `diversity.neutral_credit`) from its definition, f without i, the estimate is on average
    sum_i E over the others of grad E[f(Y) - m_i r(y_i)], and nothing where no other sample has weight.
    """
    novelty = over_batches(lambda chosen: diversity.neutral_credit(archive(), weighted(chosen), LABEL)[1])
    truth = diversity_gradient()
    assert np.abs(expected(novelty) - truth).max() > 0.1
    assert misdirection(expected(novelty), truth) > 0.2

    @jax.jit
    def value(members):
        def of_batch(chosen):
            e = jnp.where(members[:, None], weighted(chosen), 0.0)
            return diversity.value(archive(), e, LABEL).sum()

        return jax.lax.map(of_batch, jnp.asarray(BATCHES))

    @jax.jit
    @jax.grad
    def gradient_of_one(theta, mine, paid):
        """The others are drawn from a policy that stands still."""
        logprobs = jax.vmap(lambda chosen: log_prob(theta, chosen))(BATCHES)
        still = jax.lax.stop_gradient(logprobs)
        return jnp.exp(jnp.where(mine, logprobs, still).sum(axis=1)) @ paid

    one = np.eye(len(LABEL), dtype=bool)
    weight, whole, total = QUALITY[LABEL, BATCHES], value(~one[0] | one[0]), np.zeros((2, 3))
    for i in range(len(LABEL)):
        rest = value(~one[i])
        mates = np.flatnonzero(LABEL[i] == LABEL)
        mates = mates[mates != i]
        added = sum(rest - value(~(one[i] | one[j])) for j in mates)
        mass = weight[:, mates].sum(axis=1)
        paid = np.where(mass > 0, whole - rest - weight[:, i] * added / np.where(mass > 0, mass, 1.0), 0.0)
        total += gradient_of_one(THETA, one[i], paid)
    np.testing.assert_allclose(expected(novelty), total, atol=1e-12)


@pytest.mark.parametrize("alpha", [0.0, 1.5])
def test_the_learners_advantages_are_an_unbiased_gradient_of_quality_and_diversity(x64, alpha):
    """`assess` as a step of training calls it: every part over its lagged sigma, by its weight."""
    mean_square = {name: jnp.float64(0.3 if name in PARTS else 0.0) for name in PARTS}
    balance = Balance(jnp.float64(alpha), jnp.float64(0.0))

    def advantage(chosen):
        quality = jnp.asarray(QUALITY)[LABEL, chosen]
        features, everyone = jnp.asarray(VECTORS)[LABEL, chosen], jnp.ones(len(LABEL), bool)
        scores = Scores((quality > 0).astype(float), quality, features, {}, everyone)
        return assess(
            archive(), scores, LABEL, advantages.Spread(mean_square), balance, samples=GROUP, floor=0.0,
            power=1.0, eta=0.0, alpha_max=8.0, weighted=False, neutral=False, remembered=1.0,
        ).advantage  # fmt: skip

    quality = gradient(QUALITY[LABEL, BATCHES].sum(axis=1))
    sigma = np.maximum(np.sqrt(0.3), FLOORS["quality"])
    truth = (quality + alpha * diversity_gradient()) / ((1 + alpha) * sigma)
    np.testing.assert_allclose(expected(over_batches(advantage)), truth, atol=1e-12)


SEQUENCES = np.array(list(itertools.product(range(3), repeat=2)))
REWARD = RNG.normal(size=len(SEQUENCES))
MU, PI = RNG.normal(size=(2, 4, 3))


def token_logprobs(theta):
    """[9, 2]: a table of first tokens, and one of second tokens after each first."""
    table = jax.nn.log_softmax(theta)
    first, second = SEQUENCES.T
    return jnp.stack([table[0, first], table[1 + first, second]], axis=1)


def replayed_gradient(cap, baseline):
    """What replayed samples of mu give on average: E_mu[min(cap, pi / mu) (R - b) grad log pi]."""
    new, old = token_logprobs(PI), token_logprobs(MU)
    weight = replay.sequence_weight(new, old, np.ones(SEQUENCES.shape, bool), cap)
    score = jax.jacobian(lambda theta: token_logprobs(theta).sum(axis=1))(jnp.asarray(PI))
    return np.einsum("y,y,ykm->km", np.exp(old.sum(axis=1)), weight * (REWARD - baseline), score)


@pytest.mark.parametrize("baseline", [0.0, 0.7])
def test_replay_is_unbiased_without_truncation_and_biased_by_what_truncation_takes(x64, baseline, capsys):
    """The baseline is a number from before, such as a lagged mean."""
    pi = jnp.exp(token_logprobs(PI).sum(axis=1))
    mu = jnp.exp(token_logprobs(MU).sum(axis=1))
    truth = jax.grad(lambda theta: jnp.exp(token_logprobs(theta).sum(axis=1)) @ REWARD)(jnp.asarray(PI))
    # The weights are float32.
    np.testing.assert_allclose(replayed_gradient(np.inf, baseline), truth, atol=1e-6)
    score = jax.jacobian(lambda theta: token_logprobs(theta).sum(axis=1))(jnp.asarray(PI))
    lines = []
    for cap in (1.0, 2.0, 4.0):
        cut = np.maximum(pi - cap * mu, 0.0) * (REWARD - baseline)
        estimate = replayed_gradient(cap, baseline)
        np.testing.assert_allclose(estimate, truth - np.einsum("y,ykm->km", cut, score), atol=1e-6)
        share = np.linalg.norm(estimate - truth) / np.linalg.norm(truth)
        lines.append(
            f"cap {cap:.0f}: {share:.2f} of the gradient, direction {misdirection(estimate, truth):.2f}"
        )
        if cap == 2.0:
            assert share > 0.05
    with capsys.disabled():
        print(f"\nbias of truncated replay, baseline {baseline}: " + "; ".join(lines))


def test_the_replayed_loss_is_unbiased_without_truncation(capsys):
    """The same of a real network and the whole objective: all sequences of two tokens, weighed by mu."""
    model = Transformer(
        TransformerConfig(vocab_size=4, width=8, layers=1, heads=2, kv_heads=1, head_width=4, mlp_width=8)
    )
    pi, mu = (
        {"params": jax.tree.map(lambda leaf: 2.0 * leaf, tiny.fresh_params(model.config, seed))}
        for seed in (1, 2)
    )
    tokens = np.array(list(itertools.product(range(4), repeat=2)), np.int32)
    mask = np.ones(tokens.shape, bool)
    rows = len(tokens)
    prompts = Prompts(np.ones((rows, 3), np.int32), np.ones((rows, 3), bool), *np.zeros((2, rows), np.int32))
    reward = np.random.default_rng(3).normal(size=rows).astype(np.float32)

    @tiny.quick_jit
    def read(variables):
        """Log-probabilities of the tokens, and the gradient of the mean reward."""

        def probability(v):
            logprobs = group_logprobs(model, v, prompts, tokens, mask, 1.0).logprobs
            return jnp.exp(logprobs.sum(axis=1)), logprobs

        _, pullback, logprobs = jax.vjp(probability, variables, has_aux=True)
        return logprobs, pullback(reward)[0]

    behaviour, _ = read(mu)
    today, truth = read(pi)
    truth = tiny.flat(truth)
    probability = jnp.exp(behaviour.sum(axis=1))
    assert probability.sum() == pytest.approx(1.0, abs=1e-5)
    assert jnp.exp(today - behaviour).prod(axis=1).max() > 3.0

    def loss(variables, cap):
        batch = objective.Replayed(
            prompts, tokens, mask, behaviour, probability * (reward - 0.4), np.zeros(rows, bool), mask[:, 0]
        )
        config = objective.ObjectiveConfig(replay_cap=cap, drift_limit=np.inf)
        return objective.replayed_loss(model, variables, batch, np.float32(1.0), config)[0]

    gradient_of_loss = tiny.quick_jit(jax.grad(loss))
    estimates = {cap: -mask.size * tiny.flat(gradient_of_loss(pi, cap)) for cap in (np.inf, 2.0)}
    np.testing.assert_allclose(estimates[np.inf], truth, atol=1e-4 * np.abs(truth).max())
    bias = np.linalg.norm(estimates[2.0] - truth) / np.linalg.norm(truth)
    with capsys.disabled():
        print(f"\nbias of the replayed loss at cap 2: {bias:.2f} of the gradient")
    assert bias > 0.05
