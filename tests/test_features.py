"""Features: sample-only, comparable across processes, and faithful to n-gram cosines."""

import collections

import jax
import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from streamsynth.feedback import features

GOLDEN = "-+++++++-++++++++---++++----++--++----++-+-++++--++----+-+-----+"
TEXTS = [
    "the soup came with fresh bread on monday",
    "the soup came with warm rice on monday",
    "please show me the balance of my savings account",
    "the the the",
    "Bread, fresh -- with SOUP!",
    "",
    "it snows",
]


def ngram_counts(text):
    spoken = features.words(text)
    return collections.Counter(spoken) + collections.Counter(zip(spoken, spoken[1:], strict=False))


def cosine(a, b):
    def norm(counts):
        return sum(count**2 for count in counts.values()) ** 0.5

    return sum(count * b[gram] for gram, count in a.items()) / (norm(a) * norm(b))


def test_inner_products_are_ngram_cosines():
    width = 2048  # noise 1 / sqrt(2048), about 0.022
    texts = [text for text in TEXTS if text]
    counts = [ngram_counts(text) for text in texts]
    expected = [[cosine(a, b) for b in counts] for a in counts]
    vectors = features.ngram_features(texts, width)
    np.testing.assert_allclose(vectors @ vectors.T, expected, atol=0.09)


def test_noise_of_the_default_width():
    """Texts without a common word are orthogonal up to 1 / sqrt(D)."""
    vectors = features.ngram_features([f"a{i} b{i} c{i} d{i} e{i}" for i in range(200)])
    off = (vectors @ vectors.T)[np.triu_indices(200, 1)]
    assert abs(off.mean()) < 0.005
    assert 0.8 / np.sqrt(features.DEFAULT_WIDTH) < off.std() < 1.2 / np.sqrt(features.DEFAULT_WIDTH)


@settings(max_examples=50, deadline=None)
@given(st.lists(st.text(max_size=40), min_size=1, max_size=8), st.data())
def test_a_vector_depends_on_its_own_text_alone(texts, data):
    together = features.ngram_features(texts, 32)
    index = data.draw(st.integers(0, len(texts) - 1))
    np.testing.assert_array_equal(together[index], features.ngram_features([texts[index]], 32)[0])
    spoken = np.array([bool(features.words(text)) for text in texts])
    np.testing.assert_allclose(np.linalg.norm(together, axis=1), spoken, atol=1e-5)


def test_word_order_counts_and_case_and_punctuation_do_not():
    a, b, c = features.ngram_features(["dogs chase cats", "cats chase dogs", "Dogs  chase, CATS."])
    assert a @ b < 0.9
    np.testing.assert_array_equal(a, c)


def test_words():
    assert features.words("The cat's HERE, ﬁne!") == ["the", "cat's", "here", "fine"]
    assert features.words(" -- ") == []


def test_vectors_are_the_same_in_every_process_and_version():
    """Stored features of an old checkpoint must stay comparable: these numbers may never change."""
    signs = np.sign(features.ngram_features(["it snows in june"], 64)[0])
    bits = "".join("-" if sign < 0 else "+" if sign > 0 else "0" for sign in signs)
    assert bits == GOLDEN
    other = features.ngram_features(["it snows in june"], 64, seed=1)[0]
    assert (np.sign(other) != signs).any()


def test_project_hidden():
    key = jax.random.key(3)
    rng = np.random.default_rng(0)
    hidden = rng.normal(size=(6, 48)).astype(np.float32)
    hidden[5] = 0.0
    vectors = np.asarray(features.project_hidden(hidden, 4096, key))
    assert vectors.dtype == np.float32
    np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), [1, 1, 1, 1, 1, 0], atol=1e-5)
    directions = hidden[:5] / np.linalg.norm(hidden[:5], axis=1, keepdims=True)
    np.testing.assert_allclose(vectors[:5] @ vectors[:5].T, directions @ directions.T, atol=0.08)
    np.testing.assert_allclose(
        features.project_hidden(hidden[2:3] * 7.0, 4096, key)[0], vectors[2], atol=1e-5
    )
