"""Diversity metrics against sacrebleu and vendi_score, and what must hold of any of them."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from streamsynth.evaluation import diversity

_WORDS = ("the", "bank", "sent", "a", "card", "to", "my", "old", "home", "late")


def _sentences(count: int, seed: int, shortest: int = 1, longest: int = 14) -> list[str]:
    rng = np.random.default_rng(seed)
    return [" ".join(rng.choice(_WORDS, rng.integers(shortest, longest))) for _ in range(count)]


def test_self_bleu_equals_sacrebleu():
    sacrebleu = pytest.importorskip("sacrebleu")
    texts = _sentences(40, seed=0)
    texts += ["late late late late late", "unheard of words", "bank", "the bank sent a card", *texts[:2]]
    expected = [
        sacrebleu.sentence_bleu(text, texts[:i] + texts[i + 1 :], tokenize="none").score / 100
        for i, text in enumerate(texts)
    ]
    assert diversity.self_bleu([text.split() for text in texts]) == pytest.approx(np.mean(expected), abs=1e-9)


def test_vendi_equals_vendi_score():
    vendi_score = pytest.importorskip("vendi_score.vendi")
    similarity = diversity.cosine(diversity.character_features(_sentences(50, seed=1)))
    assert diversity.vendi(similarity) == pytest.approx(vendi_score.score_K(similarity), rel=1e-9)


def test_vendi_counts_groups_of_equal_texts():
    groups = np.kron(np.eye(5), np.ones((4, 4)))
    assert diversity.vendi(groups) == pytest.approx(5.0)


def test_character_similarity_by_hand():
    # " ab " has " ab" and "ab " once and, being shorter than five, itself twice. " abc " has six grams
    # (three, two and one of each order), of which only " ab" is shared.
    similarity = diversity.cosine(diversity.character_features(["ab", "abc"]))
    expected = 1 / (math.sqrt(1 + 1 + 4) * math.sqrt(6))
    np.testing.assert_allclose(similarity, [[1.0, expected], [expected, 1.0]])


def test_distinct_by_hand():
    words = [["a", "b", "a", "b"], ["b", "a"]]
    assert diversity.distinct(words, 1) == pytest.approx(2 / 6)
    assert diversity.distinct(words, 2) == pytest.approx(2 / 4)
    assert diversity.distinct([["a"]], 2) == 0.0


def test_duplicates_are_found():
    text, other = "the bank sent a new card to my old home on friday", "rain fell on the hills before noon"
    measured = diversity.measure([text, text.upper(), f"{text}s", other], n=4, seed=0)
    assert measured["exact_duplicates"] == pytest.approx(0.25)
    assert measured["near_duplicates"] == pytest.approx(0.75)
    assert diversity.measure([text, other], n=2, seed=0)["near_duplicates"] == 0.0


def test_every_metric_prefers_the_varied_set():
    varied = _sentences(60, seed=2, shortest=6)
    dull = _sentences(6, seed=2, shortest=6) * 10
    real = _sentences(90, seed=5, shortest=6)
    more, less = (diversity.measure(texts, 60, 0, real) for texts in (varied, dull))
    for metric in diversity.METRICS:
        if metric in diversity.HIGHER_IS_MORE_DIVERSE:
            assert more[metric] > less[metric], metric
        else:
            assert more[metric] < less[metric], metric


def test_too_few_texts_give_no_number():
    assert diversity.measure(["a b", "c d"], n=3, seed=0) == dict.fromkeys(diversity.METRICS)
    with pytest.raises(ValueError, match="n=1"):
        diversity.measure(["a b", "c d"], n=1, seed=0)


@settings(max_examples=40)
@given(
    texts=st.lists(st.text(alphabet="ab c", max_size=12), min_size=3, max_size=8),
    random=st.randoms(use_true_random=False),
)
def test_order_does_not_matter_and_ranges_hold(texts, random):
    n = 3
    measured = diversity.measure(texts, n, seed=7)
    shuffled = list(texts)
    random.shuffle(shuffled)
    assert diversity.measure(shuffled, n, seed=7) == measured
    assert 1.0 - 1e-9 <= measured["vendi"] <= n + 1e-9
    assert measured["self_repetition"] >= 0.0
    unbounded = {"vendi", "compression_ratio", "self_repetition"}
    for metric in set(diversity.METRICS) - unbounded - {"coverage", "novel_sum"}:
        assert -1e-9 <= measured[metric] <= 1.0 + 1e-9, metric


def test_the_choice_follows_the_seed():
    texts = _sentences(200, seed=3, shortest=4)
    assert diversity.measure(texts, 20, seed=0) == diversity.measure(texts, 20, seed=0)
    assert diversity.measure(texts, 20, seed=0) != diversity.measure(texts, 20, seed=1)
