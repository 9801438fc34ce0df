"""Feature vectors of samples, for diversity.

A feature vector depends on its own sample alone. There is no inverse document frequency and no whitening
over the batch: either would let one sample move the vectors of the others and make the diversity credit
biased.
"""

from __future__ import annotations

import functools
import hashlib
import re
import unicodedata
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from streamsynth.pytrees import Array

DEFAULT_WIDTH = 128
# Words of letters, digits and inner apostrophes; punctuation is no feature.
_WORD = re.compile(r"\w+(?:['’]\w+)*")
# Hashed n-grams fall into this many buckets, each with a random sign vector of its own.
_BUCKETS = 2**15


def words(text: str) -> list[str]:
    """The words of a text, compatibility-normalised and case-folded, without punctuation.

    `words("The cat's HERE!") == ["the", "cat's", "here"]`. A run of a script without spaces is one word.
    """
    return _WORD.findall(unicodedata.normalize("NFKC", text).casefold())


def ngram_features(texts: Sequence[str], width: int = DEFAULT_WIDTH, seed: int = 0) -> np.ndarray:
    """Counts of hashed words and word pairs, projected at random, as unit vectors.

    The inner product of two vectors is the cosine of the two texts' n-gram counts up to noise of standard
    deviation at most about 1 / sqrt(width) (Johnson-Lindenstrauss with random signs: Achlioptas 2003).

    Args:
      texts: N strings.
      width: D.
      seed: of the projection. Vectors of unlike seeds or widths cannot be compared; those of one seed are
        the same in every process and on every machine.

    Returns:
      [N, D] float32 unit vectors; the zero vector for a text without a word.
    """
    split = [words(text) for text in texts]
    lengths = np.array([len(text) for text in split], np.int64)
    hashes = {word: _word_hash(word) for word in {word for text in split for word in text}}
    unigrams = np.array([hashes[word] for text in split for word in text], np.uint64)
    owner = np.repeat(np.arange(len(texts)), lengths)
    inside = owner[:-1] == owner[1:]  # a pair of neighbours must not span two texts
    bigrams = _mix(_mix(unigrams[:-1]) + unigrams[1:])[inside]

    grams = np.concatenate([unigrams, bigrams])
    owners = np.concatenate([owner, owner[:-1][inside]])
    order = np.argsort(owners, kind="stable")
    grams, owners = grams[order], owners[order]

    bucket = (grams % np.uint64(_BUCKETS)).astype(np.int64)
    # The sign makes n-grams that share a bucket cancel on average, where they would otherwise look alike.
    sign = np.where(grams >> np.uint64(63), np.float32(-1.0), np.float32(1.0))
    rows = _sign_table(width, seed)[bucket] * sign[:, None]
    features = np.zeros((len(texts), width), np.float32)
    present, starts = np.unique(owners, return_index=True)
    if present.size:
        features[present] = np.add.reduceat(rows, starts, axis=0)
    norm = np.linalg.norm(features, axis=1, keepdims=True)
    return features / np.maximum(norm, 1e-12)


@functools.partial(jax.jit, static_argnames="width")
def project_hidden(hidden: Array, width: int, key: jax.Array) -> jax.Array:
    """A fixed Gaussian projection of mean-pooled hidden states, as unit vectors.

    Hidden states of language models crowd around a common direction; a caller who subtracts a centre must
    take one from before the batch.

    Args:
      hidden: [N, H], one pooled vector a sample.
      width: D.
      key: of the projection; the same key for as long as vectors are to be compared.

    Returns:
      [N, D] float32 unit vectors; the zero vector for a zero vector.
    """
    hidden = jnp.asarray(hidden, jnp.float32)
    projection = jax.random.normal(key, (hidden.shape[-1], width), jnp.float32)
    projected = jnp.matmul(hidden, projection, precision=jax.lax.Precision.HIGHEST)
    norm = jnp.linalg.norm(projected, axis=-1, keepdims=True)
    return projected / jnp.maximum(norm, 1e-12)


def _word_hash(word: str) -> int:
    """64 bits that are the same in every process, unlike those of `hash`."""
    return int.from_bytes(hashlib.blake2b(word.encode(), digest_size=8).digest(), "little")


def _mix(x: np.ndarray) -> np.ndarray:
    """SplitMix64 (Steele, Lea and Flood 2014) on uint64: each bit in moves all bits out."""
    x = x + np.uint64(0x9E3779B97F4A7C15)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


@functools.lru_cache(maxsize=4)
def _sign_table(width: int, seed: int) -> np.ndarray:
    """[buckets, D] of -1 and 1, int8; from raw generator bits, whose stream NumPy promises to keep."""
    raw = np.random.PCG64(seed).random_raw(_BUCKETS * width // 64).astype("<u8")
    bits = np.unpackbits(raw.view(np.uint8)).reshape(_BUCKETS, width)
    table = bits.astype(np.int8) * np.int8(2) - np.int8(1)
    table.setflags(write=False)
    return table
