"""Diversity of a set of texts, by metrics that nothing was trained on.

The learner is paid for word n-gram or hidden-state features; these metrics look at words, characters
and bytes instead. All of them depend on the size of the set (the Vendi score and distinct-n most of
all), so a set is always measured at a fixed number of texts n, and not at all if it has fewer.
"""

from __future__ import annotations

import collections
import math
import zlib
from collections.abc import Sequence

import numpy as np

METRICS = (
    "distinct_1",
    "distinct_2",
    "self_bleu",
    "vendi",
    "mean_distance",
    "compression_ratio",
    "exact_duplicates",
    "near_duplicates",
)
HIGHER_IS_MORE_DIVERSE = ("distinct_1", "distinct_2", "vendi", "mean_distance")

_BLEU_ORDER = 4
_CHARACTER_ORDERS = (3, 4, 5)
_CHARACTER_WIDTH = 1 << 14
_NEAR = 0.9  # cosine of character n-grams: about one short word changed in a sentence of twelve


def measure(texts: Sequence[str], n: int, seed: int) -> dict[str, float | None]:
    """All metrics of a random choice of n texts.

    Which n are chosen depends on the texts and the seed, not on the order of the texts.

    Args:
      texts: the set; case and spacing are ignored.
      n: how many texts are measured, at least 2.
      seed: of the choice.

    Returns:
      {metric: value} over METRICS. Every value is None if there are fewer than n texts, for a number
      at another n could not be compared.
    """
    if n < 2:
        raise ValueError(f"diversity needs at least 2 texts, not n={n}")
    if len(texts) < n:
        return dict.fromkeys(METRICS)
    rng = np.random.default_rng(seed)
    chosen = [str(text) for text in rng.choice(sorted(map(_normalised, texts)), n, replace=False)]
    words = [text.split() for text in chosen]
    similarity = character_similarity(chosen)
    others = similarity - np.eye(n)
    return {
        "distinct_1": distinct(words, 1),
        "distinct_2": distinct(words, 2),
        "self_bleu": self_bleu(words),
        "vendi": vendi(similarity),
        "mean_distance": 1.0 - float(others.sum()) / (n * (n - 1)),
        "compression_ratio": compression_ratio(chosen),
        "exact_duplicates": 1.0 - len(set(chosen)) / n,
        "near_duplicates": float((others.max(axis=1) >= _NEAR).mean()),
    }


def _normalised(text: str) -> str:
    return " ".join(text.lower().split())


def distinct(words: Sequence[Sequence[str]], order: int) -> float:
    """Distinct-n: different word n-grams over all word n-grams (Li et al. 2016, arXiv 1510.03055).

    Args:
      words: the words of each text.
      order: n of the n-grams.

    Returns:
      In (0, 1], higher is more diverse; 0 if no text has `order` words.
    """
    grams = [gram for text in words for gram in _ngrams(text, order)]
    return len(set(grams)) / len(grams) if grams else 0.0


def self_bleu(words: Sequence[Sequence[str]]) -> float:
    """Self-BLEU-4 (Zhu et al. 2018, arXiv 1802.01886), in [0, 1]; lower is more diverse.

    The mean over texts of the sentence BLEU of a text against all others. Sentence BLEU is
    sacrebleu's: the k-th order without a match counts as 1 / (2^k total), orders longer than the text
    are left out, and a text that shares no word has 0. An n-gram's clip for text i is its largest count
    in any *other* text, which follows from the two largest counts overall, so the cost is linear in the
    number of n-grams.

    Args:
      words: the words of at least two texts.
    """
    orders = range(1, _BLEU_ORDER + 1)
    counts = [[collections.Counter(_ngrams(text, order)) for text in words] for order in orders]
    clips = [_two_largest(of_order) for of_order in counts]
    lengths = collections.Counter(len(text) for text in words)
    return float(np.mean([_bleu(i, len(text), counts, clips, lengths) for i, text in enumerate(words)]))


def _two_largest(counts: Sequence[collections.Counter]) -> dict:
    """n-gram -> (text with the largest count, that count, the largest count in any other text)."""
    largest: dict = {}
    for index, of_text in enumerate(counts):
        for gram, count in of_text.items():
            owner, first, second = largest.get(gram, (index, 0, 0))
            if count > first:
                largest[gram] = (index, count, first)
            else:
                largest[gram] = (owner, first, max(second, count))
    return largest


def _bleu(index: int, length: int, counts, clips, lengths: collections.Counter) -> float:
    log_precisions = []
    unmatched_orders = 0
    for of_order, clip in zip(counts, clips, strict=True):
        total = of_order[index].total()
        if not total:
            break
        matches = 0
        for gram, count in of_order[index].items():
            owner, first, second = clip[gram]
            matches += min(count, second if owner == index else first)
        if not matches:
            if not log_precisions:
                return 0.0
            unmatched_orders += 1
            matches = 0.5**unmatched_orders
        log_precisions.append(math.log(matches / total))
    if not log_precisions:
        return 0.0
    other_lengths = (other for other in lengths if other != length or lengths[other] > 1)
    closest = min(other_lengths, key=lambda other: (abs(other - length), other))
    brevity = min(0.0, 1.0 - closest / length)
    return math.exp(brevity + sum(log_precisions) / len(log_precisions))


def character_similarity(texts: Sequence[str]) -> np.ndarray:
    """Cosine similarity of hashed character 3- to 5-grams.

    Args:
      texts: n texts. A text is padded with one space at either end, so that word ends count and a
        text of one character has features, too.

    Returns:
      [n, n] float64, symmetric, 1 on the diagonal, in [0, 1].
    """
    features = np.zeros((len(texts), _CHARACTER_WIDTH))
    columns: dict[str, int] = {}
    for row, text in zip(features, texts, strict=True):
        padded = f" {text} "
        for order in _CHARACTER_ORDERS:
            for start in range(max(1, len(padded) - order + 1)):
                gram = padded[start : start + order]
                if gram not in columns:
                    columns[gram] = zlib.crc32(gram.encode()) % _CHARACTER_WIDTH
                row[columns[gram]] += 1.0
    features /= np.linalg.norm(features, axis=1, keepdims=True)
    similarity = np.minimum(features @ features.T, 1.0)
    np.fill_diagonal(similarity, 1.0)
    return similarity


def vendi(similarity: np.ndarray) -> float:
    """Vendi score (Friedman and Dieng 2023, arXiv 2210.02410): the effective number of different texts.

    exp(-sum_i l_i log l_i) with l the eigenvalues of similarity / n.

    Args:
      similarity: [n, n] float64, positive semidefinite with ones on the diagonal.

    Returns:
      In [1, n]; 1 if all texts are alike, n if no two share anything.
    """
    eigenvalues = np.linalg.eigvalsh(similarity / len(similarity))
    positive = eigenvalues[eigenvalues > 0.0]
    return float(np.exp(-np.sum(positive * np.log(positive))))


def compression_ratio(texts: Sequence[str]) -> float:
    """Bytes over zlib-compressed bytes of the texts, one a line (arXiv 2403.00553); lower is more diverse."""
    raw = "\n".join(texts).encode()
    return len(raw) / len(zlib.compress(raw, 9))


def _ngrams(words: Sequence[str], order: int) -> list[tuple[str, ...]]:
    return list(zip(*(words[start:] for start in range(order)), strict=False))
