"""The student: a small text classifier that measures what a data set is worth.

It is trained on synthetic rows, or on real ones for an anchor, for a fixed number of gradient steps and
is then scored on a real test set. Nothing of it takes part in learning: no judge and no reward shares
its features. A word linear model is chosen on purpose: it is sound with a few rows a label as well as
with thousands, takes a fraction of a second, and shows what is in the rows rather than what a
pretrained encoder already knew.

Dimensions: n rows, F feature width, M non-zero features a row, K labels, H hidden units.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import re
import zlib
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from streamsynth.errors import UserError
from streamsynth.runtime import arrays
from streamsynth.tasks.task import FIELD_SEPARATOR

Params = dict[str, jax.Array]

_TOKEN = re.compile(r"\w+|[^\w\s]")
# Sizes are padded to the smallest of these times a power of 4, so that a run compiles the training program
# once per padded size and not once per data set.
_SMALLEST_ROWS = 256
_SMALLEST_ENTRIES = 32
_SMALLEST_LABELS = 8
_IMPOSSIBLE = -1e9  # logit of a padded label


@dataclasses.dataclass(frozen=True)
class StudentConfig:
    """How a student is built and trained.

    The defaults were chosen on the validation splits of seven public sets at 8, 50 and 500 rows a label,
    never on a test split. There the rate and the decay hardly mattered over a factor of ten; the width did:
    in 4096 columns too many features collide.

    Attributes:
      width: number of hashed features F.
      hidden: units of the one hidden layer; 0 means a linear softmax model.
      steps: gradient steps, the same whatever the number of rows.
      batch_size: rows a step, drawn uniformly with replacement.
      learning_rate: peak of Adam's cosine schedule, which ends at 0.
      weight_decay: decoupled (AdamW), per unit of learning rate.
    """

    width: int = 16384
    hidden: int = 0
    steps: int = 300
    batch_size: int = 128
    learning_rate: float = 0.03
    weight_decay: float = 0.1


class Features(NamedTuple):
    """Sparse rows of a feature matrix [n, F]; M is the most non-zero entries a row has, padded.

    columns: [n, M] int32, below F.   values: [n, M] float32, 0 where padded.
    """

    columns: np.ndarray
    values: np.ndarray


def featurize(texts: Sequence[str], width: int) -> Features:
    """Hashed words and word pairs of each text as a sparse unit vector.

    A feature's value is its count (half of it for a pair, which on the validation splits beat both equal
    weights and words alone) with a hashed sign (so collisions cancel on average; Weinberger et al. 2009,
    arXiv 0902.2206), after which the row is scaled to length 1. Words are compared in lower
    case; punctuation marks are words. In a two-field text the same word in another field is another
    feature. No statistic of the set enters, so a row's features depend on its text alone.

    Args:
      texts: n texts.
      width: F.

    Returns:
      n rows; a text without a word gives a row of zeros.
    """
    places: dict[str, tuple[int, float]] = {}
    rows = []
    for text in texts:
        row: dict[int, float] = {}
        for gram, weight in _grams(text):
            if gram not in places:
                code = zlib.crc32(gram.encode())
                # The lowest bit gives the sign and the others the column, so that the two are independent.
                places[gram] = (code >> 1) % width, 1.0 if code & 1 else -1.0
            column, sign = places[gram]
            row[column] = row.get(column, 0.0) + sign * weight
        rows.append(row)
    entries = _padded(max(map(len, rows), default=0), _SMALLEST_ENTRIES)
    columns = np.zeros((len(rows), entries), np.int32)
    values = np.zeros((len(rows), entries), np.float32)
    for index, row in enumerate(rows):
        columns[index, : len(row)] = list(row.keys())
        values[index, : len(row)] = list(row.values())
    lengths = np.linalg.norm(values, axis=1, keepdims=True)
    return Features(columns, values / np.maximum(lengths, np.finfo(np.float32).tiny))


def _grams(text: str) -> list[tuple[str, float]]:
    """Words and word pairs, marked with their field, and what each counts."""
    grams = []
    for index, field in enumerate(text.lower().split(FIELD_SEPARATOR)):
        words = _TOKEN.findall(field)
        grams += [(f"{index}|{word}", 1.0) for word in words]
        grams += [(f"{index}|{first} {second}", 0.5) for first, second in itertools.pairwise(words)]
    return grams


def train(
    features: Features,
    labels: np.ndarray,
    num_labels: int,
    key: jax.Array,
    config: StudentConfig = StudentConfig(),
) -> Params:
    """Trains a student with AdamW for exactly `config.steps` steps, in one jitted scan.

    Args:
      features: n rows, from `featurize` at width `config.width`.
      labels: [n] int, label indices below `num_labels`.
      num_labels: K.
      key: random key; decides the order of rows and the start of a hidden layer.
      config: how.

    Returns:
      Parameters for `logits`, of K padded to a declared size (a padded label is never predicted).

    Raises:
      UserError: there is no row to train on.
    """
    if not len(labels):
        raise UserError("a student cannot be trained on 0 rows: give the data set at least one row")
    padded, padded_labels = _pad_rows(features), _padded(num_labels, _SMALLEST_LABELS)
    targets = np.zeros(len(padded.values), np.int32)
    targets[: len(labels)] = labels
    return _train(padded, targets, len(labels), num_labels, key, padded_labels, config)


def _pad_rows(features: Features) -> Features:
    padding = _padded(len(features.values), _SMALLEST_ROWS) - len(features.values)
    return Features(*(np.pad(part, ((0, padding), (0, 0))) for part in features))


def _padded(count: int, smallest: int) -> int:
    size = smallest
    while size < count:
        size *= 4
    return size


@functools.partial(jax.jit, static_argnames=("padded_labels", "config"))
def _train(features, labels, num_rows, num_labels, key, padded_labels, config):
    start_key, batch_key = jax.random.split(key)
    params = _start(start_key, config.width, padded_labels, config.hidden)
    # A padded label starts out impossible; it is never a target, so its gradient only keeps it there.
    params["bias"] = jnp.where(jnp.arange(padded_labels) < num_labels, 0.0, _IMPOSSIBLE)
    schedule = optax.cosine_decay_schedule(config.learning_rate, config.steps)
    optimizer = optax.adamw(schedule, weight_decay=config.weight_decay, mask=_decayed)

    def loss(params, rows):
        drawn = Features(features.columns[rows], features.values[rows])
        return optax.softmax_cross_entropy_with_integer_labels(logits(params, drawn), labels[rows]).mean()

    def step(carry, step_key):
        params, state = carry
        # Only the first num_rows rows are real: padding is never drawn.
        rows = jax.random.randint(step_key, (config.batch_size,), 0, num_rows)
        updates, state = optimizer.update(jax.grad(loss)(params, rows), state, params)
        return (optax.apply_updates(params, updates), state), None

    keys = jax.random.split(batch_key, config.steps)
    (params, _), _ = jax.lax.scan(step, (params, optimizer.init(params)), keys)
    return params


def _start(key: jax.Array, width: int, num_labels: int, hidden: int) -> Params:
    if not hidden:
        return {"kernel": jnp.zeros((width, num_labels))}
    # Feature rows have length 1, so entries of variance 1 give hidden units of variance 1.
    return {
        "hidden_kernel": jax.random.normal(key, (width, hidden)),
        "hidden_bias": jnp.zeros(hidden),
        "kernel": jnp.zeros((hidden, num_labels)),
    }


def _decayed(params: Params) -> dict[str, bool]:
    return {name: name.endswith("kernel") for name in params}


def logits(params: Params, features: Features) -> jax.Array:
    """Unnormalised log-probabilities of the labels of n rows: [n, K padded] float32."""
    if "hidden_kernel" not in params:
        return _times(features, params["kernel"]) + params["bias"]
    hidden = jax.nn.relu(_times(features, params["hidden_kernel"]) + params["hidden_bias"])
    # Accelerators would round the inputs by default, and the same rows would score differently there.
    return jnp.matmul(hidden, params["kernel"], precision=jax.lax.Precision.HIGHEST) + params["bias"]


def _times(features: Features, kernel: jax.Array) -> jax.Array:
    """Sparse [n, F] times dense [F, H]. Gathering M kernel rows is far cheaper than a dense product."""
    return jnp.sum(kernel[features.columns] * features.values[..., None], axis=1)


def predict(params: Params, features: Features) -> np.ndarray:
    """The most probable label of each of n rows: [n] int32."""
    return arrays.fetch(_predict(params, _pad_rows(features)))[: len(features.values)]


@jax.jit
def _predict(params, features):
    return logits(params, features).argmax(axis=-1)


def accuracy(params: Params, features: Features, labels: np.ndarray) -> float:
    """Share of rows whose most probable label is the given one; NaN for no rows."""
    return float(np.mean(predict(params, features) == labels)) if len(labels) else float("nan")


def macro_f1(predicted: np.ndarray, labels: np.ndarray) -> float:
    """Mean over labels of F1 = 2 TP / (2 TP + FP + FN).

    A label counts if a row has it or is predicted to have it. NaN for no rows.

    Args:
      predicted: [n] int.
      labels: [n] int.
    """
    scores = []
    for label in np.union1d(predicted, labels):
        hits = np.sum((predicted == label) & (labels == label))
        scores.append(2 * hits / (np.sum(predicted == label) + np.sum(labels == label)))
    return float(np.mean(scores)) if scores else float("nan")


def score(
    train_texts: Sequence[str],
    train_labels: Sequence[int],
    test_texts: Sequence[str],
    test_labels: Sequence[int],
    num_labels: int,
    key: jax.Array,
    config: StudentConfig = StudentConfig(),
) -> dict[str, float]:
    """Trains a student on one set of texts and scores it on another.

    Args:
      train_texts: n texts; train_labels: their label indices.
      test_texts: m texts; test_labels: their label indices.
      num_labels: K.
      key: random key.
      config: how the student is built and trained.

    Returns:
      {"accuracy": share right, "macro_f1": mean F1 over labels}, both on the test texts.

    Raises:
      UserError: there are no training texts.
    """
    params = train(featurize(train_texts, config.width), np.asarray(train_labels), num_labels, key, config)
    predicted = predict(params, featurize(test_texts, config.width))
    labels = np.asarray(test_labels)
    return {"accuracy": float(np.mean(predicted == labels)), "macro_f1": macro_f1(predicted, labels)}
