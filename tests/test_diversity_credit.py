"""Diversity credit against brute force in float64 and on a mesh; enumerated: test_enumeration.py."""

import itertools
import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from streamsynth.errors import UserError
from streamsynth.feedback import diversity

K, D, N = 3, 8, 12
credit = jax.jit(diversity.credit)
marginal = jax.jit(diversity.marginal)
value = jax.jit(diversity.value)
absorb = jax.jit(diversity.absorb)
statistic = jax.jit(diversity.statistic, static_argnames="num_labels")


def unit(rng, count, width=D):
    vectors = rng.normal(size=(count, width))
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


def batch(seed, count=N, width=D, gated=()):
    """Weighted features and labels; every label occurs."""
    rng = np.random.default_rng(seed)
    weight = rng.random(count)
    weight[list(gated)] = 0.0
    label = rng.permutation(np.arange(count) % K)
    return np.sqrt(weight)[:, None] * unit(rng, count, width), label


def filled(seed, count=20, ridge=0.1, width=D):
    kept, label = batch(seed, count, width)
    return absorb(diversity.empty(K, width, ridge), kept.astype(np.float32), label, np.ones(count, bool))


def brute_value(matrix, e, label):
    """f(Y | S) = sum_k logdet(I + E_k S_k^-1 E_k^T), straight from the definition."""
    total = 0.0
    for k in range(len(matrix)):
        rows = e[label == k]
        total += np.linalg.slogdet(np.eye(len(rows)) + rows @ np.linalg.solve(matrix[k], rows.T))[1]
    return total


def brute_credit(matrix, e, label):
    """Every leave-one-out difference, and the mean of the others' differences in the batch without i."""
    everyone = np.arange(len(e))

    def value(members):
        return brute_value(matrix, e[members], label[members])

    credits, baselines = [], []
    for i in everyone:
        rest = everyone[everyone != i]
        value_rest = value(rest)
        credits.append(value(everyone) - value_rest)
        others = [value_rest - value(rest[rest != j]) for j in rest if label[j] == label[i]]
        baselines.append(np.mean(others) if others else 0.0)
    return np.array(credits), np.array(baselines)


@pytest.mark.parametrize("ridge", [0.01, 0.1, 1.0])
def test_credit_and_baseline_equal_brute_force(ridge):
    archive = filled(1, ridge=ridge)
    e, label = batch(2)
    e[3] = e[4]  # a duplicate
    label[3] = label[4]
    expected = brute_credit(np.asarray(archive.matrix, np.float64), e, label)
    actual = credit(archive, e.astype(np.float32), label)
    np.testing.assert_allclose(actual[0], expected[0], atol=2e-5)
    np.testing.assert_allclose(actual[1], expected[1], atol=2e-5)
    worth = value(archive, e.astype(np.float32), label).sum()
    np.testing.assert_allclose(
        worth, brute_value(np.asarray(archive.matrix, np.float64), e, label), atol=1e-4
    )


def test_neutral_credit_equals_brute_force_and_pays_nothing_for_weight_alone():
    archive = filled(1)
    e, label = batch(2, gated=(5,))
    e[3] = e[4]  # a duplicate
    matrix = np.asarray(archive.matrix, np.float64)
    own, _ = brute_credit(matrix, e, label)
    weight = (e**2).sum(1)
    expected = np.zeros(N)
    for i in range(N):
        rest = np.arange(N) != i
        credit_rest, _ = brute_credit(matrix, e[rest], label[rest])
        others = label[rest] == label[i]
        expected[i] = own[i] - weight[i] * credit_rest[others].sum() / weight[rest][others].sum()
    credited, found = jax.jit(diversity.neutral_credit)(archive, e.astype(np.float32), label)
    np.testing.assert_allclose(credited, own, atol=2e-5)
    np.testing.assert_allclose(found, expected, atol=2e-5)
    assert found[5] == 0.0
    # Equal texts are worth less than the going rate, whatever their weight.
    one = np.zeros((4, D), np.float32)
    one[:3, 0], one[3, 1] = 0.9, 0.9
    _, alike = diversity.neutral_credit(diversity.empty(1, D), one, np.zeros(4, np.int32))
    assert (np.asarray(alike[:3]) < 0).all() and alike[3] > 0


def test_neutral_credit_of_a_sample_alone_in_its_label_is_zero():
    e = np.eye(2, D, dtype=np.float32)
    _, found = diversity.neutral_credit(diversity.empty(2, D), e, np.array([0, 1]))
    np.testing.assert_array_equal(found, 0.0)


def test_identities_hold_to_double_precision():
    """The formulas are exact, not approximate: in float64 nothing but rounding is left."""
    with jax.enable_x64(True):
        e, label = batch(3)
        archive = filled(4)
        archive = archive.replace(matrix=jnp.asarray(archive.matrix, jnp.float64))
        expected = brute_credit(np.asarray(archive.matrix), e, label)
        actual = credit(archive, e, label)
        np.testing.assert_allclose(actual[0], expected[0], rtol=1e-9)
        np.testing.assert_allclose(actual[1], expected[1], rtol=1e-9)


def test_single_sample_by_hand():
    """One unit vector on an empty archive is worth log(1 + 1 / ridge), without others to compare."""
    archive = diversity.empty(2, 4, ridge=0.25)
    gained, baseline = credit(archive, np.eye(4)[:1], np.array([1]))
    np.testing.assert_allclose(gained, np.log(5.0), rtol=1e-5)
    assert baseline[0] == 0.0
    np.testing.assert_allclose(value(archive, np.eye(4)[:1], np.array([1])), [0.0, np.log(5.0)], rtol=1e-5)


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 2**31), st.permutations(range(N)))
def test_permutation_equivariance(seed, order):
    e, label = batch(seed)
    e, order = e.astype(np.float32), np.array(order)
    archive = filled(5)
    straight, permuted = credit(archive, e, label), credit(archive, e[order], label[order])
    for a, b in zip(straight, permuted, strict=True):
        np.testing.assert_allclose(a[order], b, atol=1e-5)


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 2**31))
def test_credit_is_at_least_zero_and_at_most_what_the_sample_is_worth_alone(seed):
    """f is monotone and submodular, so a sample adds less to a batch than to the archive on its own."""
    e, label = batch(seed)
    archive, e = filled(6), e.astype(np.float32)
    gained, _ = credit(archive, e, label)
    alone = marginal(archive, e, label, np.zeros(N, np.float32))
    assert (gained >= 0).all()
    assert (gained <= alone + 1e-5).all()


def test_gated_samples_get_nothing_and_change_nothing():
    gated = [0, 5]
    e, label = batch(7, gated=gated)
    archive, e = filled(8), e.astype(np.float32)
    gained, _ = credit(archive, e, label)
    assert (gained[np.array(gated)] == 0.0).all()
    rest = np.setdiff1d(np.arange(N), gated)
    gained_without, _ = credit(archive, e[rest], label[rest])
    np.testing.assert_allclose(gained[rest], gained_without, atol=1e-6)
    np.testing.assert_allclose(value(archive, e, label), value(archive, e[rest], label[rest]), atol=1e-6)


def test_labels_do_not_see_each_other():
    e, label = batch(9)
    archive, e = filled(10), e.astype(np.float32)
    other = e.copy()
    other[label == 2] = unit(np.random.default_rng(11), (label == 2).sum())
    for a, b in zip(credit(archive, e, label), credit(archive, other, label), strict=True):
        np.testing.assert_array_equal(a[label != 2], b[label != 2])


def test_full_archive_and_duplicates_stay_accurate():
    """5000 kept samples a label at the smallest ridge, and a batch of one text over and over."""
    archive = filled(12, count=15_000, ridge=0.01, width=32)
    e = np.repeat(unit(np.random.default_rng(13), 1, 32), 24, axis=0)
    label = np.arange(24) % K
    expected = brute_credit(np.asarray(archive.matrix, np.float64), e, label)
    actual = credit(archive, e.astype(np.float32), label)
    np.testing.assert_allclose(actual[0], expected[0], rtol=1e-3)
    np.testing.assert_allclose(actual[1], expected[1], rtol=1e-3)


def test_absorb_adds_the_kept_and_only_them():
    e, label = batch(15)
    keep = np.arange(N) % 2 == 0
    archive = absorb(diversity.empty(K, D, 0.1), e.astype(np.float32), label, keep)
    for k in range(K):
        rows = e[(label == k) & keep]
        np.testing.assert_allclose(archive.matrix[k], 0.1 * np.eye(D) + rows.T @ rows, atol=1e-6)
        assert archive.count[k] == len(rows)


def test_keeping_a_batch_is_worth_its_value():
    """f(Y and Z | S) = f(Y | S) + f(Z | S with Y kept): the chain rule that makes the archive exact."""
    (e, label), (more, more_label) = batch(16), batch(17)
    e, more = e.astype(np.float32), more.astype(np.float32)
    archive = filled(18)
    both = value(archive, np.concatenate([e, more]), np.concatenate([label, more_label]))
    kept = absorb(archive, e, label, np.ones(N, bool))
    steps = value(archive, e, label) + value(kept, more, more_label)
    np.testing.assert_allclose(both, steps, atol=1e-4)


def test_marginal_takes_a_counted_sample_out_first():
    e, label = batch(19)
    e = e.astype(np.float32)
    before = filled(20)
    first = np.arange(N) == 0
    after = absorb(before, e, label, first)
    expected = marginal(before, e, label, np.zeros(N, np.float32))[0]
    np.testing.assert_allclose(marginal(after, e, label, first.astype(np.float32))[0], expected, rtol=1e-4)
    # Once everything has decayed, the sample is counted with the decay's weight.
    expected = marginal(diversity.decay(before, 0.5), e, label, np.zeros(N, np.float32))[0]
    actual = marginal(diversity.decay(after, 0.5), e, label, 0.5 * first.astype(np.float32))[0]
    np.testing.assert_allclose(actual, expected, rtol=1e-4)


def test_decay_forgets_the_samples_and_keeps_the_ridge():
    archive = filled(21)
    half = diversity.decay(archive, 0.5)
    ridge = 0.1 * np.eye(D)
    np.testing.assert_allclose(half.matrix - ridge, 0.5 * (archive.matrix - ridge), atol=1e-6)
    np.testing.assert_allclose(half.count, 0.5 * archive.count)
    np.testing.assert_allclose(
        diversity.decay(archive, 0.0).matrix, diversity.empty(K, D, 0.1).matrix, atol=1e-7
    )


def brute_statistic(features, weight, label):
    values = []
    for k in np.unique(label):
        pairs = [(i, j) for i, j in itertools.permutations(np.flatnonzero(label == k), 2)]
        total = sum(weight[i] * weight[j] for i, j in pairs)
        if total > 1e-8:
            squares = sum(weight[i] * weight[j] * (features[i] @ features[j]) ** 2 for i, j in pairs)
            values.append(-np.log(squares / total))
    return np.mean(values)


def test_statistic_equals_double_loop():
    rng = np.random.default_rng(22)
    features, weight, label = unit(rng, N), rng.random(N), np.arange(N) % K
    weight[label == 1] = 0.0
    weight[1] = 0.7  # label 1 keeps a single sample and drops out
    d, valid = statistic(features.astype(np.float32), weight.astype(np.float32), label, num_labels=K)
    assert valid
    np.testing.assert_allclose(d, brute_statistic(features, weight, label), rtol=1e-5)


def test_statistic_has_the_same_mean_at_every_size():
    """exp(-d) of one label, averaged over all subsets of a population, is that of the whole population."""
    population = unit(np.random.default_rng(23), 7).astype(np.float32)

    def mean_over_subsets(size):
        subsets = np.array(list(itertools.combinations(range(7), size)))
        same, all_of_it = np.zeros(size, int), np.ones(size, np.float32)
        return np.mean([np.exp(-statistic(population[s], all_of_it, same, num_labels=1)[0]) for s in subsets])

    for size in (2, 3, 5):
        np.testing.assert_allclose(mean_over_subsets(size), mean_over_subsets(7), rtol=1e-5)


def test_statistic_at_its_ends():
    same = np.tile(unit(np.random.default_rng(24), 1), (4, 1)).astype(np.float32)
    d, valid = statistic(same, np.ones(4, np.float32), np.zeros(4, int), num_labels=2)
    assert valid
    assert d == pytest.approx(0.0, abs=1e-5)
    d, valid = statistic(np.eye(4, dtype=np.float32), np.ones(4, np.float32), np.zeros(4, int), num_labels=2)
    assert valid
    assert np.isfinite(d)
    assert d > 13
    for weight, label in (
        (np.zeros(4), np.zeros(4, int)),
        (np.ones(4), np.arange(4)),
    ):  # gated; alone in their labels
        d, valid = statistic(same, weight.astype(np.float32), label, num_labels=4)
        assert not valid
        assert d == 0.0


def test_reward_weight():
    quality = np.array([0.0, 0.2, 0.6, 1.0], np.float32)
    np.testing.assert_allclose(diversity.reward_weight(quality), quality)
    np.testing.assert_allclose(
        diversity.reward_weight(quality, floor=0.2, power=2.0), [0.0, 0.0, 0.25, 1.0], atol=1e-6
    )
    with pytest.raises(UserError, match="floor"):
        diversity.reward_weight(quality, floor=1.0)
    with pytest.raises(UserError, match="power"):
        diversity.reward_weight(quality, power=0.0)
    with pytest.raises(UserError, match="ridge"):
        diversity.empty(2, 4, ridge=1e-4)


SHARDED = """
import jax, numpy as np
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P
from streamsynth.feedback import diversity

assert len(jax.devices()) == 8
rng = np.random.default_rng(0)
features = rng.normal(size=(64, 32)).astype(np.float32)
features /= np.linalg.norm(features, axis=1, keepdims=True)
weight, label, keep = rng.random(64).astype(np.float32), rng.integers(0, 4, 64), rng.random(64) < 0.5
archive = diversity.empty(4, 32, 0.1)

def everything(archive, features, weight, label, keep):
    e = diversity.weighted(features, weight)
    return (diversity.credit(archive, e, label), diversity.value(archive, e, label),
            diversity.absorb(archive, e, label, keep).matrix, diversity.statistic(features, weight, label, 4))

single = jax.jit(everything)(archive, features, weight, label, keep)
mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
split = jax.device_put((features, weight, label, keep), NamedSharding(mesh, P("data")))
whole = jax.device_put(archive, NamedSharding(mesh, P()))
sharded = jax.jit(everything)(whole, *split)
assert len(sharded[0][0].sharding.device_set) == 8
for a, b in zip(jax.tree.leaves(single), jax.tree.leaves(sharded), strict=True):
    np.testing.assert_allclose(np.asarray(a), np.asarray(b), atol=1e-5)
"""


def test_eight_devices_equal_one():
    environment = os.environ | {
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": "--xla_force_host_platform_device_count=8",
    }
    done = subprocess.run(
        [sys.executable, "-c", SHARDED], env=environment, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
