"""Student utility: the metagradient against finite differences of the whole training, and its cheap form."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from streamsynth.feedback.features import ngram_features
from streamsynth.feedback.utility import UTILITIES, UtilityConfig, influence, utility
from streamsynth.tasks import worlds

pytestmark = pytest.mark.usefixtures("quick_xla")

SHORT = UtilityConfig(steps=12, learning_rate=1.5, momentum=0.8, ridge=0.02)
BOTH = pytest.mark.parametrize("form", UTILITIES.values(), ids=UTILITIES)


def problem(seed, samples=10, validation=9, width=6, labels=3):
    """Rows with an all-zero feature column, one all-zero row each, and two samples that did not pass."""
    rng = np.random.default_rng(seed)

    def rows(count):
        x = rng.normal(size=(count, width))
        x[:, 2] = 0.0
        x /= np.linalg.norm(x, axis=1, keepdims=True)
        x[-1] = 0.0
        return x

    passed = np.ones(samples)
    passed[1:3] = 0.0
    return {
        "features": rows(samples),
        "label": rng.integers(0, labels, samples),
        "passed": passed,
        "val_features": rows(validation),
        "val_label": np.arange(validation) % labels,
        "num_labels": labels,
    }


def log_softmax(logits):
    top = logits.max(-1, keepdims=True)
    return logits - top - np.log(np.exp(logits - top).sum(-1, keepdims=True))


def trained(features, label, weight, num_labels, config):
    """The student [D, K] after T steps, in NumPy's float64."""
    target = np.eye(num_labels)[label]
    student = velocity = np.zeros((features.shape[1], num_labels))
    for _ in range(config.steps):
        residual = np.exp(log_softmax(features @ student)) - target
        gradient = features.T @ (weight[:, None] * residual) / len(label) + config.ridge * student
        velocity = config.momentum * velocity + gradient
        student = student - config.learning_rate * velocity
    return student


def loss_of(student, rows, label):
    return -log_softmax(rows @ student)[np.arange(len(label)), label].mean()


def finite_differences(problem, config, context=None, h=1e-5):
    """-dL_val/dw of what passed, by retraining the student twice for every sample."""
    features, label, weight = problem["features"], problem["label"], problem["passed"]
    if context:
        features = np.concatenate([features, context["context_features"]])
        label = np.concatenate([label, context["context_label"]])
        weight = np.concatenate([weight, np.ones(len(context["context_label"]))])
    found = np.zeros(len(problem["label"]))
    for i in np.flatnonzero(problem["passed"]):
        losses = []
        for sign in (1.0, -1.0):
            moved = weight + sign * h * (np.arange(len(weight)) == i)
            student = trained(features, label, moved, problem["num_labels"], config)
            losses.append(loss_of(student, problem["val_features"], problem["val_label"]))
        found[i] = -(losses[0] - losses[1]) / (2 * h)
    return found


def world_problem(name, samples, seed=0, budget=8):
    """Sentences of a world, a quarter of them with another label, judged by the task's examples."""
    task = worlds.load_task(name, examples_per_label=budget, train_per_label=60, test_per_label=2)
    rng = np.random.default_rng(seed)
    chosen = [task.train[i] for i in rng.permutation(len(task.train))[:samples]]
    label = np.array([task.labels.index(example.label) for example in chosen])
    wrong = rng.random(samples) < 0.25
    label[wrong] = (label[wrong] + rng.integers(1, len(task.labels), wrong.sum())) % len(task.labels)
    return {
        "features": ngram_features([example.text for example in chosen]),
        "label": label,
        "passed": np.ones(samples, np.float32),
        "val_features": ngram_features([example.text for example in task.examples]),
        "val_label": np.array([task.labels.index(example.label) for example in task.examples]),
        "num_labels": len(task.labels),
    }, wrong


@pytest.mark.parametrize("config", [UtilityConfig(), SHORT, UtilityConfig(steps=1)], ids=["30", "12", "1"])
def test_utility_is_the_derivative_of_the_whole_training(config):
    """With an all-zero feature column and an all-zero row in the set, where Adam's root would give NaN."""
    case = problem(0)
    expected = finite_differences(case, config)
    with jax.enable_x64(True):
        actual = np.asarray(utility(**case, config=config))
    error = np.abs(actual - expected).max() / np.abs(expected).max()
    print(f"{config.steps} steps, relative error against finite differences: {error:.1e}")
    assert actual.dtype == np.float64
    assert error < 1e-6
    assert (actual[-1], *actual[1:3]) == (0.0, 0.0, 0.0)  # the zero row, and what did not pass


def test_utility_on_texts_of_a_world():
    case, _ = world_problem("tuning_film", 24)
    expected = finite_differences(
        {**case, "features": np.asarray(case["features"], np.float64)}, UtilityConfig()
    )
    with jax.enable_x64(True):
        wide = {key: np.asarray(case[key], np.float64) for key in ("features", "passed", "val_features")}
        exact = np.asarray(utility(**{**case, **wide}, config=UtilityConfig()))
    single = np.asarray(utility(**case, config=UtilityConfig()))
    scale = np.abs(expected).max()
    print(
        f"relative error: float64 {np.abs(exact - expected).max() / scale:.1e}, "
        f"float32 {np.abs(single - expected).max() / scale:.1e}"
    )
    assert single.dtype == np.float32
    np.testing.assert_allclose(exact, expected, atol=1e-6 * scale)
    np.testing.assert_allclose(single, expected, atol=1e-3 * scale)
    np.testing.assert_allclose(single, exact, atol=1e-4 * scale)


def test_what_is_kept_already_is_taught_with_weight_one():
    case, kept = problem(1), problem(2, samples=7)
    context = {"context_features": kept["features"], "context_label": kept["label"]}
    expected = finite_differences(case, SHORT, context)
    with jax.enable_x64(True):
        actual = np.asarray(utility(**case, config=SHORT, **context))
    np.testing.assert_allclose(actual, expected, atol=1e-6 * np.abs(expected).max())
    assert np.abs(actual - finite_differences(case, SHORT)).max() > 0.05 * np.abs(expected).max()


@settings(max_examples=15)
@given(st.integers(0, 2**31))
def test_influence_is_exact_at_one_step(seed):
    case = problem(seed)
    for wide, rtol in ((True, 1e-12), (False, 1e-5)):
        with jax.enable_x64(wide):
            exact = utility(**case, config=dataclasses.replace(SHORT, steps=1))
            cheap = influence(**case, config=SHORT)
        np.testing.assert_allclose(cheap, exact, rtol=rtol, atol=rtol * np.abs(exact).max())


@BOTH
def test_a_sample_that_did_not_pass_is_worth_nothing_and_moves_nothing(form):
    case, other = problem(4), problem(4)
    other["features"][1:3] = problem(5)["features"][1:3]
    other["label"][1:3] = (other["label"][1:3] + 1) % 3
    first, second = (np.asarray(form(**some, config=SHORT)) for some in (case, other))
    assert (first[1:3] == 0.0).all() and (first[3:-1] != 0.0).all()
    np.testing.assert_array_equal(first, second)
    nothing = form(**{**case, "passed": np.zeros(10)}, config=SHORT)
    np.testing.assert_array_equal(nothing, np.zeros(10))


@BOTH
def test_padding_is_harmless(form):
    case = problem(6)
    junk = problem(7)
    padded = {
        "features": np.concatenate([case["features"], junk["features"]]),
        "label": np.concatenate([case["label"], np.full(10, -1)]),
        "passed": np.concatenate([case["passed"], np.ones(10)]),
        "val_features": np.concatenate([case["val_features"], junk["val_features"]]),
        "val_label": np.concatenate([case["val_label"], np.full(9, -1)]),
        "num_labels": 8,
    }
    context = {"context_features": junk["features"], "context_label": np.full(10, -1)}
    expected = np.asarray(form(**case, config=SHORT))
    actual = np.asarray(form(**padded, config=SHORT, **context))
    np.testing.assert_allclose(actual[:10], expected, atol=1e-7)
    np.testing.assert_array_equal(actual[10:], np.zeros(10))


@BOTH
def test_without_validation_examples_nothing_can_be_said(form):
    case = problem(8) | {"val_label": np.full(9, -1)}
    np.testing.assert_array_equal(form(**case, config=SHORT), np.zeros(10))


@BOTH
def test_signs(form):
    """Two labels on two axes: right samples help, a mislabelled one harms."""
    axes = np.eye(2, dtype=np.float32)
    label = np.array([0, 0, 0, 1, 1, 1])
    features = axes[label]
    features[2] = axes[1]  # the third text is one of label 1
    found = form(features, label, np.ones(6), axes, np.arange(2), 2, UtilityConfig())
    assert found[2] < 0.0
    assert (np.delete(found, 2) > 0.0).all()


@settings(max_examples=20)
@given(st.integers(0, 2**31), st.permutations(range(10)), st.permutations(range(9)))
def test_the_order_of_samples_does_not_matter(seed, order, val_order):
    case, order, val_order = problem(seed), np.array(order), np.array(val_order)
    moved = {key: case[key][order] for key in ("features", "label", "passed")}
    moved |= {key: case[key][val_order] for key in ("val_features", "val_label")}
    for form in UTILITIES.values():
        expected = np.asarray(form(**case, config=SHORT))[order]
        np.testing.assert_allclose(form(**{**case, **moved}, config=SHORT), expected, atol=2e-6)


def test_batched_and_in_half_precision():
    cases = [problem(seed) for seed in (9, 10)]
    arrays = ("features", "label", "passed", "val_features", "val_label")
    together = jax.vmap(lambda *case: utility(*case, 3, SHORT))(
        *(jnp.asarray(np.stack([case[key] for case in cases])) for key in arrays)
    )
    for found, case in zip(together, cases, strict=True):
        np.testing.assert_allclose(found, utility(**case, config=SHORT), atol=1e-6)
    half = {key: jnp.asarray(cases[0][key], jnp.bfloat16) for key in ("features", "passed", "val_features")}
    assert utility(**{**cases[0], **half}, config=SHORT).dtype == jnp.float32


def test_mislabelled_texts_of_the_worlds_and_the_rank_correlation():
    """Over worlds: `benchmarks/utility.py` has the numbers at more samples."""
    correlations, gaps = [], []
    for name in worlds.TUNING_WORLDS[:3]:
        case, wrong = world_problem(name, 96, budget=16)
        exact, cheap = (np.asarray(form(**case, config=UtilityConfig())) for form in (utility, influence))
        correlations.append(stats.spearmanr(exact, cheap).statistic)
        gaps.append((exact[~wrong].mean() - exact[wrong].mean()) / exact.std())
    print(
        f"rank correlation {np.round(correlations, 2)}; right above wrong by {np.round(gaps, 2)} deviations"
    )
    assert min(correlations) > 0.6
    assert min(gaps) > 0.0
