"""Diversity of a set of texts, by metrics that nothing was trained on.

The learner is paid for word n-gram or hidden-state features; these metrics look at words, characters
and bytes instead. All of them depend on the size of the set (the Vendi score and distinct-n most of
all), so a set is always measured at a fixed number of texts n, and not at all if it has fewer.

Two of them, coverage and NovelSum, need to know where real texts lie. They take as many reference texts:
real ones that nothing learns from (`measure.reference` says which).
"""

from __future__ import annotations

import collections
import math
import zlib
from collections.abc import Sequence

import numpy as np

from streamsynth.keys import numpy_rng

METRICS = (
    "distinct_1",
    "distinct_2",
    "self_bleu",
    "self_repetition",
    "vendi",
    "mean_distance",
    "novel_sum",
    "coverage",
    "compression_ratio",
    "exact_duplicates",
    "near_duplicates",
)
HIGHER_IS_MORE_DIVERSE = ("distinct_1", "distinct_2", "vendi", "mean_distance", "novel_sum", "coverage")

_BLEU_ORDER = 4
_REPETITION_ORDER = 4
_CHARACTER_ORDERS = (3, 4, 5)
_CHARACTER_WIDTH = 1 << 14
_NEAR = 0.9  # cosine of character n-grams: about one short word changed in a sentence of twelve
_COVERAGE_NEIGHBOURS = 5  # Naeem et al.'s own
_DENSITY_NEIGHBOURS = 10  # these two are the NovelSum paper's choice
_DENSITY_POWER = 0.5
_TIE = 1e-9  # cosines this close are equal: which of two equal ones is larger is rounding


def measure(
    texts: Sequence[str], n: int, seed: int, reference: Sequence[str] = ()
) -> dict[str, float | None]:
    """All metrics of a random choice of n texts.

    Which n are chosen depends on the texts and the seed, not on the order of the texts; and which n of
    the reference texts, on these and the seed alone, so that all sets of a run meet the same ones.

    Args:
      texts: the set; case and spacing are ignored.
      n: how many texts are measured, at least 2.
      seed: of the choice.
      reference: real texts, for `coverage` and `novel_sum`; repeated ones count once.

    Returns:
      {metric: value} over METRICS. Every value is None if there are fewer than n texts, for a number
      at another n could not be compared; coverage and novel_sum also if there are fewer than n different
      reference texts, or too few for the neighbours these two look for.
    """
    if n < 2:
        raise ValueError(f"diversity needs at least 2 texts, not n={n}")
    if len(texts) < n:
        return dict.fromkeys(METRICS)
    rng = np.random.default_rng(seed)
    chosen = [str(text) for text in rng.choice(sorted(map(_normalised, texts)), n, replace=False)]
    words = [text.split() for text in chosen]
    features = character_features(chosen)
    similarity = cosine(features)
    others = similarity - np.eye(n)
    measured = {
        "distinct_1": distinct(words, 1),
        "distinct_2": distinct(words, 2),
        "self_bleu": self_bleu(words),
        "self_repetition": self_repetition(words),
        "vendi": vendi(similarity),
        "mean_distance": 1.0 - float(others.sum()) / (n * (n - 1)),
        "novel_sum": None,
        "coverage": None,
        "compression_ratio": compression_ratio(chosen),
        "exact_duplicates": 1.0 - len(set(chosen)) / n,
        "near_duplicates": float((others.max(axis=1) >= _NEAR).mean()),
    }
    real = sorted(set(map(_normalised, reference)))
    if len(real) >= n:
        places = numpy_rng(seed, "diversity/reference").choice(len(real), n, replace=False)
        real_features = character_features([real[place] for place in places])
        to_real = features @ real_features.T
        if n > _COVERAGE_NEIGHBOURS:
            measured["coverage"] = coverage(cosine(real_features), to_real.T, _COVERAGE_NEIGHBOURS)
        if n >= _DENSITY_NEIGHBOURS:
            density = local_density(to_real, _DENSITY_NEIGHBOURS)
            measured["novel_sum"] = novel_sum(1.0 - similarity, density**_DENSITY_POWER)
    return measured


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


def self_repetition(words: Sequence[Sequence[str]], order: int = _REPETITION_ORDER) -> float:
    """Self-repetition (Salkar et al. 2022), as arXiv 2403.00553 has it; lower is more diverse.

    The mean over texts of log(1 + N_i), where N_i counts, for each different word n-gram of text i, the other
    texts that have it, too. [a b c], [b c d] and [e] share one bigram: (log 2 + log 2 + log 1) / 3.

    Args:
      words: the words of each text, at least one.
      order: n of the n-grams.

    Returns:
      0 or more; a text of fewer than `order` words repeats nothing.
    """
    grams = [set(_ngrams(text, order)) for text in words]
    texts_with = collections.Counter(gram for of_text in grams for gram in of_text)
    elsewhere = [sum(texts_with[gram] - 1 for gram in of_text) for of_text in grams]
    return float(np.mean(np.log1p(elsewhere)))


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


def character_features(texts: Sequence[str]) -> np.ndarray:
    """Hashed character 3- to 5-grams.

    Args:
      texts: n texts. A text is padded with one space at either end, so that word ends count and a
        text of one character has features, too.

    Returns:
      [n, 16384] float64 of counts, each row divided by its length.
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
    return features


def cosine(features: np.ndarray) -> np.ndarray:
    """Cosines of unit vectors [n, D]: [n, n], symmetric, at most 1 and exactly that on the diagonal."""
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


def coverage(real: np.ndarray, to_written: np.ndarray, neighbours: int) -> float:
    """Coverage (Naeem et al. 2020, arXiv 2002.09797): the share of real texts that a written text comes near.

    A real text is covered if some written text is nearer to it than its k-th nearest other real text. On
    the unit sphere nearer means a larger cosine. Texts drawn like the real ones, as many as those, cover
    1 - (n-1)...(n-k) / ((2n-1)...(2n-k)) of them, about 1 - 2^-k; k copies of one real text cover little
    more than its own neighbourhood.

    Args:
      real: [m, m] cosines among the real texts, which are all different.
      to_written: [m, n] cosines of the real texts with the written ones.
      neighbours: k, below m.

    Returns:
      In [0, 1].
    """
    others = real - 3.0 * np.eye(len(real))  # a text is no neighbour of its own
    radius = np.sort(others, axis=1)[:, -neighbours]
    return float((to_written.max(axis=1) > radius + _TIE).mean())


def local_density(to_real: np.ndarray, neighbours: int) -> np.ndarray:
    """How close together real texts lie around each written one: the inverse mean squared distance.

    Args:
      to_real: [n, m] cosines of written texts with real ones, none of which is the written text itself.
      neighbours: K, of the real texts nearest to each; at most m.

    Returns:
      [n] float64, 1 / (mean over the K nearest of |x - r|^2 + 1e-9), with unit vectors x and r.
    """
    nearest = np.sort(to_real, axis=1)[:, -neighbours:]
    return 1.0 / (2.0 * (1.0 - nearest).mean(axis=1) + 1e-9)


def novel_sum(distance: np.ndarray, density: np.ndarray) -> float:
    """NovelSum (Yang et al. 2025, arXiv 2502.17184), as its authors compute it; higher is more diverse.

    The novelty of a text is the mean of its distances to the others, the r-th nearest with weight 1 / r,
    times the density around it: where real texts lie close, a small distance says much. The mean over texts
    is taken. This is what the authors' code does since it leaves out a text's distance to itself; the
    density is that at the text whose novelty is asked for.

    Args:
      distance: [n, n] float64, such as 1 - cosine; n at least 2.
      density: [n] float64 above 0, already raised to its power (the paper's beta, 0.5).
    """
    n = len(distance)
    others = distance[~np.eye(n, dtype=bool)].reshape(n, n - 1)
    weights = 1.0 / np.arange(1, n)
    novelty = density * (np.sort(others, axis=1) @ weights) / weights.sum()
    return float(novelty.mean())


def compression_ratio(texts: Sequence[str]) -> float:
    """Bytes over zlib-compressed bytes of the texts, one a line (arXiv 2403.00553); lower is more diverse."""
    raw = "\n".join(texts).encode()
    return len(raw) / len(zlib.compress(raw, 9))


def _ngrams(words: Sequence[str], order: int) -> list[tuple[str, ...]]:
    return list(zip(*(words[start:] for start in range(order)), strict=False))
