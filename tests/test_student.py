"""The student that measures data sets: features, training in one program, and soundness on real sets."""

from __future__ import annotations

import dataclasses
import gzip
import json
import os
import subprocess
import sys

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from streamsynth.errors import UserError
from streamsynth.evaluation import student

_SMALL = student.StudentConfig(width=256, steps=60, batch_size=32)


def _texts_and_labels(rows: int, seed: int) -> tuple[list[str], np.ndarray]:
    """Label = topic x time; every single word belongs to two of the four labels."""
    rng = np.random.default_rng(seed)
    topics = (("soup", "bread", "rice"), ("tea", "milk", "juice"))
    times = (("morning", "dawn"), ("night", "evening"))
    labels = rng.integers(0, 4, rows)
    words = [(rng.choice(topics[label // 2]), rng.choice(times[label % 2])) for label in labels]
    return [f"the {topic} came in the {time} again" for topic, time in words], labels


def _dense(features: student.Features, width: int) -> np.ndarray:
    dense = np.zeros((len(features.values), width), np.float32)
    np.add.at(dense, (np.arange(len(dense))[:, None], features.columns), features.values)
    return dense


def test_features_are_unit_vectors_that_depend_on_the_text_alone():
    texts = ["The bank sent a card.", "rain", "", "<field>"]
    features = student.featurize(texts, 512)
    assert features.columns.dtype == np.int32 and features.values.dtype == np.float32
    dense = _dense(features, 512)
    np.testing.assert_allclose(np.linalg.norm(dense, axis=1), [1, 1, 0, 0], atol=1e-6)
    np.testing.assert_array_equal(dense[1:2], _dense(student.featurize(["RAIN"], 512), 512))


def test_word_order_and_fields_matter():
    texts = ["dog bites man", "man bites dog", "a <field> b", "b <field> a"]
    features = _dense(student.featurize(texts, 4096), 4096)
    assert not np.array_equal(features[0], features[1])
    assert not np.array_equal(features[2], features[3])


@settings(max_examples=50)
@given(st.text(max_size=40), st.text(max_size=400))
def test_a_text_has_the_same_features_in_any_company(text, other):
    alone = _dense(student.featurize([text], 128), 128)
    among = _dense(student.featurize([other, text], 128), 128)
    np.testing.assert_allclose(alone[0], among[1], atol=1e-6)


def test_features_are_the_same_in_another_process():
    code = (
        "from streamsynth.evaluation import student; print(student.featurize(['a dog runs'], 64).columns[0])"
    )
    env = os.environ | {"PYTHONHASHSEED": "7"}
    run = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, check=True)
    assert run.stdout.strip() == str(student.featurize(["a dog runs"], 64).columns[0])


@pytest.mark.parametrize("hidden", [0, 16])
def test_learns_labels_that_only_a_combination_of_words_decides(hidden):
    config = dataclasses.replace(_SMALL, hidden=hidden)
    train, test = _texts_and_labels(64, seed=0), _texts_and_labels(100, seed=1)
    scores = student.score(*train, *test, num_labels=4, key=jax.random.key(0), config=config)
    assert scores["accuracy"] > 0.97 and scores["macro_f1"] > 0.97


def test_random_labels_score_at_chance():
    texts, _ = _texts_and_labels(400, seed=0)
    labels = np.random.default_rng(2).integers(0, 4, 400)
    scores = student.score(texts[:200], labels[:200], texts[200:], labels[200:], 4, jax.random.key(0), _SMALL)
    assert 0.13 < scores["accuracy"] < 0.37


def test_gradient_descent_is_adamw_on_the_drawn_rows():
    """One step from zero, in float64 numpy: Adam's first step is the gradient's sign times the rate."""
    texts, labels = _texts_and_labels(20, seed=0)
    config = student.StudentConfig(width=64, steps=1, batch_size=8, learning_rate=0.1)
    key = jax.random.key(3)
    features = student.featurize(texts, 64)
    params = student.train(features, labels, 4, key, config)
    _, batch_key = jax.random.split(key)
    rows = np.asarray(jax.random.randint(jax.random.split(batch_key, 1)[0], (8,), 0, 20))
    drawn = _dense(features, 64)[rows].astype(np.float64)
    error = np.full((8, 4), 0.25) - np.eye(4)[labels[rows]]
    gradient = drawn.T @ error / 8
    expected = -0.1 * gradient / (np.abs(gradient) + 1e-8)
    np.testing.assert_allclose(np.asarray(params["kernel"])[:, :4], expected, atol=1e-5)


def test_one_program_for_all_sizes_of_a_bucket_and_padding_is_never_drawn():
    key = jax.random.key(0)
    config = dataclasses.replace(_SMALL, steps=7)
    before = student._train._cache_size()
    for rows, num_labels in ((5, 3), (40, 4), (256, 8)):
        texts, labels = _texts_and_labels(rows, seed=rows)
        student.train(student.featurize(texts, 256), labels % num_labels, num_labels, key, config)
    assert student._train._cache_size() == before + 1
    # Were a padded row (all zeros, label 0) ever drawn, the bias of label 0 would rise.
    params = student.train(student.featurize(["a"], 256), np.array([2]), 3, key, config)
    assert params["bias"][0] == params["bias"][1] < 0 < params["bias"][2]


def test_a_padded_label_is_never_predicted():
    texts, labels = _texts_and_labels(30, seed=0)
    params = student.train(student.featurize(texts, 256), labels % 3, 3, jax.random.key(0), _SMALL)
    rng = np.random.default_rng(0)
    columns = rng.integers(0, 256, (500, 32))
    noise = student.Features(columns, rng.normal(size=columns.shape).astype(np.float32) * 50)
    assert student.predict(params, noise).max() < 3


def test_same_key_same_student_and_other_key_other_student():
    texts, labels = _texts_and_labels(30, seed=0)
    features = student.featurize(texts, 256)
    keys = [jax.random.key(seed) for seed in (0, 0, 1)]
    first, again, other = (
        np.asarray(student.train(features, labels, 4, key, _SMALL)["kernel"]) for key in keys
    )
    np.testing.assert_array_equal(first, again)
    assert not np.array_equal(first, other)


@settings(max_examples=50)
@given(st.lists(st.tuples(st.integers(0, 3), st.integers(0, 3)), min_size=1, max_size=30))
def test_macro_f1_equals_scikit_learn(pairs):
    metrics = pytest.importorskip("sklearn.metrics")
    predicted, labels = np.array(pairs).T
    expected = metrics.f1_score(labels, predicted, average="macro", zero_division=0.0)
    assert student.macro_f1(predicted, labels) == pytest.approx(expected)


def test_no_rows():
    with pytest.raises(UserError, match="at least one row"):
        student.train(student.featurize([], 256), np.zeros(0, int), 2, jax.random.key(0), _SMALL)


@pytest.mark.parametrize(("name", "floor"), [("snips", 0.95), ("trec6", 0.72)])
def test_sound_on_real_text(name, floor, shared):
    """On validation splits: far above the majority, and more real rows make a better student."""
    folder = shared / "data" / name
    names = json.loads((folder / "task.json").read_text())["labels"]

    def read(split):
        with gzip.open(folder / f"{split}.jsonl.gz", "rt") as lines:
            rows = [json.loads(line) for line in lines]
        return [row["text"] for row in rows], np.array([names.index(row["label"]) for row in rows])

    texts, labels = read("train")
    few = np.concatenate([np.flatnonzero(labels == label)[:8] for label in range(len(names))])
    key = jax.random.key(0)
    from_few = student.score([texts[i] for i in few], labels[few], *read("validation"), len(names), key)
    from_all = student.score(texts, labels, *read("validation"), len(names), key)
    assert from_all["accuracy"] > max(floor, from_few["accuracy"] + 0.05)
