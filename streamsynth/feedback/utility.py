"""Utility: what each sample does to the validation loss of a student that is trained on the whole set.

The student is a linear softmax model W [D, K] on feature vectors, trained from zeros by full-batch gradient
descent with momentum on

    L(W; w) = 1/n sum_i w_i * cross_entropy(W^T phi_i, label_i) + ridge/2 |W|^2,

where n counts the rows and not their weights, so that a sample's weight scales its own pull and no other's.
Utility is the metagradient (Dataset Policy Gradient: Thrush et al. 2026, arXiv 2604.08423; the wish to teach
a student well: Montessori-Instruct, Li et al. 2024, arXiv 2410.14208)

    u_i = -d L_val(W_T(w)) / d w_i

at w_i = 1 where sample i passed and 0 elsewhere, through all T steps. Everything that is differentiated is
smooth: plain momentum has no root as Adam has, whose derivative is infinite where a gradient is exactly 0.

The first-order influence is the same for a student of one step, where it has a closed form:

    W_1 = -learning_rate/n sum_i w_i * phi_i r_i^T,    r_i = softmax(0) - onehot(label_i)
    u_i = learning_rate/n * phi_i^T [d L_val / d W at W_1] r_i

It sees what a sample teaches, but hardly what the other samples teach already.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp

from streamsynth.pytrees import Array

# Utilities are small differences: TF32 or bfloat16 passes would drown them.
_matmul = functools.partial(jnp.matmul, precision=jax.lax.Precision.HIGHEST)
_IMPOSSIBLE = -1e9  # logit of a label that the student does not have


@dataclasses.dataclass(frozen=True)
class UtilityConfig:
    """How the student is trained.

    Attributes:
      steps: T, at least 1.
      learning_rate: above 0. The mean cross-entropy of unit vectors curves by at most 1/2 in any direction,
        so that training is stable below 2 (1 + momentum) / (1/2 + ridge), whatever is in the set: below 7.4
        at the defaults.
      momentum: of the heavy ball, in [0, 1).
      ridge: weight of |W|^2 / 2, at least 0.
    """

    steps: int = 30
    learning_rate: float = 2.0
    momentum: float = 0.9
    ridge: float = 1e-2


@functools.partial(jax.jit, static_argnames=("num_labels", "config"))
def utility(
    features: Array,
    label: Array,
    passed: Array,
    val_features: Array,
    val_label: Array,
    num_labels: int,
    config: UtilityConfig,
    context_features: Array | None = None,
    context_label: Array | None = None,
) -> jax.Array:
    """The exact metagradient u_i of each sample. Above 0: more of this sample would lower the loss.

    A row whose label is -1 is padding, and counts nowhere. The student has the labels that a validation
    example has: a padded `num_labels` changes nothing, and a sample of another label is treated as padding.

    Args:
      features: [N, D], unit vectors or zeros, of the samples.
      label: [N] int, the labels asked for, in [-1, K).
      passed: [N] bool or {0, 1}, whether the primary reward passed.
      val_features: [M, D], of the validation examples: the task's label budget.
      val_label: [M] int, in [-1, K).
      num_labels: K.
      config: of the student.
      context_features: [C, D], rows that the student is taught as well, with weight 1: what is kept already.
      context_label: [C] int, in [-1, K).

    Returns:
      [N] float32 (float64 for float64 features); 0 for a sample that did not pass and for padding.
    """
    lesson, exam = _prepare(
        features, label, passed, val_features, val_label, num_labels, context_features, context_label
    )

    def loss(weight: jax.Array) -> jax.Array:
        # The checkpoint keeps W and its velocity of every step, and not the logits of all samples.
        @jax.checkpoint
        def step(carry: tuple[jax.Array, jax.Array], _: None) -> tuple[tuple[jax.Array, jax.Array], None]:
            student, velocity = carry
            pulled = _matmul(lesson.rows.T, weight[:, None] * _residual(lesson, student))
            velocity = config.momentum * velocity + lesson.scale * pulled + config.ridge * student
            return (student - config.learning_rate * velocity, velocity), None

        zeros = _untrained(lesson)
        (student, _), _ = jax.lax.scan(step, (zeros, zeros), length=config.steps)
        return _loss(exam, student)

    gradient = jax.grad(loss)(lesson.weight)
    return jnp.where(lesson.weight > 0.0, -gradient, 0.0)[: len(features)]


@functools.partial(jax.jit, static_argnames=("num_labels", "config"))
def influence(
    features: Array,
    label: Array,
    passed: Array,
    val_features: Array,
    val_label: Array,
    num_labels: int,
    config: UtilityConfig,
    context_features: Array | None = None,
    context_label: Array | None = None,
) -> jax.Array:
    """The first-order form of `utility`: that of a student of one step, exactly.

    Args and returns are those of `utility`; of `config` only the learning rate matters.
    """
    lesson, exam = _prepare(
        features, label, passed, val_features, val_label, num_labels, context_features, context_label
    )
    size = config.learning_rate * lesson.scale
    residual = _residual(lesson, _untrained(lesson))
    student = -size * _matmul(lesson.rows.T, lesson.weight[:, None] * residual)
    slope = jax.grad(_loss, argnums=1)(exam, student)
    found = size * jnp.sum(_matmul(lesson.rows, slope) * residual, axis=-1)
    return jnp.where(lesson.weight > 0.0, found, 0.0)[: len(features)]


UTILITIES = {"exact": utility, "first_order": influence}


class _Lesson(NamedTuple):
    """Rows with their labels: what is taught (samples, then context), or what is asked in the end.

    rows: [N, D].   target: [N, K], one-hot, zeros for padding.
    weight: [N], 0 for padding.   scale: [], one over the number of rows that are not padding.
    exists: [K] bool, the labels that the student has.
    """

    rows: jax.Array
    target: jax.Array
    weight: jax.Array
    scale: jax.Array
    exists: jax.Array


def _prepare(
    features: Array,
    label: Array,
    passed: Array,
    val_features: Array,
    val_label: Array,
    num_labels: int,
    context_features: Array | None,
    context_label: Array | None,
) -> tuple[_Lesson, _Lesson]:
    """What the student is taught, and what it is examined on."""
    dtype = jnp.promote_types(features.dtype, jnp.float32)
    rows, weight = features.astype(dtype), passed.astype(dtype)
    if context_features is not None:
        rows = jnp.concatenate([rows, context_features.astype(dtype)])
        label = jnp.concatenate([label, context_label])
        weight = jnp.concatenate([weight, jnp.ones(len(context_label), dtype)])
    asked = jax.nn.one_hot(val_label, num_labels, dtype=dtype)
    exists = jnp.any(asked > 0.0, axis=0)

    def lesson(rows: Array, target: jax.Array, weight: jax.Array) -> _Lesson:
        real = target.sum(-1)
        return _Lesson(rows, target, weight * real, 1.0 / jnp.maximum(real.sum(), 1.0), exists)

    taught = jnp.where(exists, jax.nn.one_hot(label, num_labels, dtype=dtype), 0.0)
    return lesson(rows, taught, weight), lesson(val_features.astype(dtype), asked, jnp.ones((), dtype))


def _untrained(lesson: _Lesson) -> jax.Array:
    return jnp.zeros((lesson.rows.shape[1], lesson.target.shape[1]), lesson.rows.dtype)


def _logits(lesson: _Lesson, student: jax.Array) -> jax.Array:
    return jnp.where(lesson.exists, _matmul(lesson.rows, student), _IMPOSSIBLE)


def _residual(lesson: _Lesson, student: jax.Array) -> jax.Array:
    """r [N, K]: the gradient of row i's cross-entropy in W is phi_i r_i^T."""
    return jax.nn.softmax(_logits(lesson, student)) - lesson.target


def _loss(lesson: _Lesson, student: jax.Array) -> jax.Array:
    """The mean cross-entropy, []."""
    return -lesson.scale * jnp.sum(lesson.target * jax.nn.log_softmax(_logits(lesson, student)))
