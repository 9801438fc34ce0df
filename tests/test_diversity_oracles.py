"""Self-repetition, NovelSum, coverage and compression against what others wrote.

Where an oracle brings torch, its numbers stand here with the version that gave them.
"""

from __future__ import annotations

import gzip
import math

import numpy as np
import pytest

from streamsynth.evaluation import diversity, measure
from streamsynth.tasks import worlds

TEXTS = (
    "the bank sent a new card to my old home",
    "the bank sent a new card on friday",
    "i was told that the tea was cold",
    "i was told that the soup was cold on friday",
    "rain fell on the hills before noon",
    "the bank sent a new card to my old home",
    "late again",
)
WORDS = [text.split() for text in TEXTS]


def _unit(rng: np.random.Generator, count: int, width: int) -> np.ndarray:
    vectors = rng.normal(size=(count, width))
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


# --- Words ---


# diversity.self_repetition_score(TEXTS, n) of the package `diversity` 0.3.1 (with nltk 3.10.4).
@pytest.mark.parametrize(
    ("order", "expected"),
    [(1, 2.293185381481127), (2, 1.6626680957536841), (3, 1.4428160020712963), (4, 1.2769893245697534)],
)
def test_self_repetition_equals_its_package(order, expected):
    assert diversity.self_repetition(WORDS, order) == pytest.approx(expected, rel=1e-12)


def test_self_repetition_by_hand():
    # "b c" stands in both of the first two; "x x x" repeats itself, and has it once.
    words = [["a", "b", "c"], ["b", "c", "d"], ["e"], ["x", "x", "x"]]
    assert diversity.self_repetition(words, 2) == pytest.approx(2 * math.log(2) / 4)


def test_distinct_equals_its_package():
    # diversity.ngram_diversity_score(TEXTS) of `diversity` 0.3.1, rounded there to 0.001: the sum of
    # distinct-1 to distinct-4 of all texts as one.
    one = [[word for text in WORDS for word in text]]
    assert sum(diversity.distinct(one, order) for order in (1, 2, 3, 4)) == pytest.approx(2.589, abs=5e-4)


def test_compression_is_that_of_gzip():
    # The same deflated bytes stand between 18 bytes of gzip's frame, or 6 of zlib's.
    raw = "\n".join(TEXTS * 20).encode()
    compressed = len(raw) / diversity.compression_ratio(TEXTS * 20)
    assert compressed + 12 == pytest.approx(len(gzip.compress(raw, 9)))


# --- Characters ---


def test_character_features_equal_scikit_learns(monkeypatch):
    monkeypatch.setattr(diversity, "_CHARACTER_WIDTH", 1 << 20)  # so many that no two of the n-grams collide
    vectorizer = pytest.importorskip("sklearn.feature_extraction.text").CountVectorizer
    counts = vectorizer(analyzer="char", ngram_range=(3, 5), lowercase=False)
    counts = counts.fit_transform([f" {text} " for text in TEXTS]).toarray()
    distance = pytest.importorskip("scipy.spatial.distance")
    expected = 1.0 - distance.cdist(counts, counts, "cosine")
    np.testing.assert_allclose(diversity.cosine(diversity.character_features(TEXTS)), expected, atol=1e-12)


# --- Neighbours ---


@pytest.mark.parametrize("neighbours", [1, 5])
@pytest.mark.parametrize("shift", [0.0, 0.8])
def test_coverage_equals_prdc(neighbours, shift):
    prdc = pytest.importorskip("prdc")
    rng = np.random.default_rng(neighbours)
    real, written = _unit(rng, 60, 8), _unit(rng, 45, 8) + shift * np.eye(8)[0]
    written /= np.linalg.norm(written, axis=1, keepdims=True)
    expected = prdc.compute_prdc(real, written, neighbours)["coverage"]
    assert 0.0 < expected < 1.0
    found = diversity.coverage(diversity.cosine(real), real @ written.T, neighbours)
    assert found == pytest.approx(expected, abs=1e-12)


def test_coverage_by_nearest_neighbour_trees():
    spatial = pytest.importorskip("scipy.spatial")
    rng = np.random.default_rng(3)
    texts = list(dict.fromkeys(" ".join(rng.choice(WORDS[3], 5)) for _ in range(80)))
    real, written = (diversity.character_features(part) for part in (texts[:40], texts[40:70]))
    radius = spatial.KDTree(real).query(real, k=6)[0][:, -1]  # itself and five others
    nearest = spatial.KDTree(written).query(real)[0]
    expected = np.mean(nearest < radius - 1e-9)
    assert expected > 0.0
    assert diversity.coverage(diversity.cosine(real), real @ written.T, 5) == pytest.approx(expected)


def test_coverage_of_texts_drawn_like_the_real_ones():
    # Naeem et al. 2020, lemma 2: 1 - (n-1)...(n-k) / ((2n-1)...(2n-k)), whatever the distribution.
    n, k, draws = 40, 2, 200
    expected = 1 - (n - 1) * (n - 2) / ((2 * n - 1) * (2 * n - 2))
    rng = np.random.default_rng(0)
    found = []
    for _ in range(draws):
        real, written = _unit(rng, n, 5), _unit(rng, n, 5)
        found.append(diversity.coverage(diversity.cosine(real), real @ written.T, k))
    assert np.mean(found) == pytest.approx(expected, abs=4 * np.std(found) / math.sqrt(draws))


def test_coverage_by_hand():
    # Angles on a circle. The nearest other of 0, 10, 30 and 90 degrees is 10, 10, 20 and 60 away, the nearest
    # written one 29, 19, 1 and 1: the last two are covered.
    real, written = (np.deg2rad(angles) for angles in ([0.0, 10.0, 30.0, 90.0], [29.0, 91.0]))
    real, written = (np.stack([np.cos(a), np.sin(a)], axis=1) for a in (real, written))
    assert diversity.coverage(diversity.cosine(real), real @ written.T, 1) == 0.5


# novelsum.py of the paper's authors (github.com/UmeanNever/NovelSum at 73da271; faiss 1.15.1, torch 2.13.0,
# in float32) of the first 12 of these 30 vectors, with all 30 as the reference and distance power 1.
@pytest.mark.parametrize(
    ("power", "neighbours", "expected"),
    [
        (0.0, 5, 0.6830429773044585),
        (0.25, 5, 0.7217607710115006),
        (0.5, 5, 0.7656664405341872),
        (0.25, 10, 0.6720422060046972),
        (0.5, 10, 0.6622845988632261),
    ],
)
def test_novel_sum_equals_its_authors(power, neighbours, expected):
    vectors = np.sin(np.outer(np.arange(1, 31), np.arange(1, 7)) ** 1.5)
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    # Theirs finds each vector in the reference and leaves it out; here it is not in there.
    to_others = np.stack([np.delete(vectors, i, axis=0) @ vectors[i] for i in range(12)])
    density = diversity.local_density(to_others, neighbours)
    found = diversity.novel_sum(1.0 - diversity.cosine(vectors[:12]), density**power)
    assert found == pytest.approx(expected, rel=1e-6)


def test_novel_sum_by_hand():
    # Novelty: 2 (1 + 3/2) / (3/2), 1 (1 + 2/2) / (3/2) and 1 (2 + 3/2) / (3/2).
    distance = np.array([[0.0, 1.0, 3.0], [1.0, 0.0, 2.0], [3.0, 2.0, 0.0]])
    density = np.array([2.0, 1.0, 1.0])
    assert diversity.novel_sum(distance, density) == pytest.approx((5 + 2 + 3.5) / 1.5 / 3)
    # Real vectors at 60 and 90 degrees: squared distances 1 and 2.
    to_real = np.array([[0.5, 0.0, -1.0]])
    np.testing.assert_allclose(diversity.local_density(to_real, 2), [1 / 1.5])


# --- Of a set of texts ---


def test_real_texts_cover_real_texts_and_one_text_does_not():
    task = worlds.load_task("market_1", examples_per_label=4)
    real = measure.reference(task)
    assert len(real) > 200 and not {example.text for example in task.examples} & set(real)
    found = diversity.measure(real[1::2], 64, 0, real[::2])
    alike = diversity.measure([real[1]] * 64, 64, 0, real[::2])
    assert found["coverage"] > 0.85
    assert alike["coverage"] < 0.2 and alike["novel_sum"] == pytest.approx(0.0, abs=1e-6)


def test_too_few_reference_texts_leave_the_rest():
    found = diversity.measure(TEXTS * 3, 12, 0, TEXTS * 3)  # only six of them differ
    assert found["coverage"] is None and found["novel_sum"] is None
    assert found["distinct_1"] == diversity.measure(TEXTS * 3, 12, 0)["distinct_1"]


def test_all_sets_of_a_run_meet_the_same_reference():
    rng = np.random.default_rng(1)
    pool = [" ".join(rng.choice(WORDS[3], 6)) for _ in range(60)]
    # However many texts there are to choose from: of equal ones the choice is always the same.
    found = {diversity.measure([pool[0]] * many, 12, 0, pool)["coverage"] for many in range(12, 18)}
    assert len(found) == 1
    # And the seed chooses among the real ones.
    assert len({diversity.measure(pool[:12], 12, seed, pool)["novel_sum"] for seed in range(4)}) > 1
