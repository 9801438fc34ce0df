"""Utility: what each sample does to the validation loss of a student that is trained on the whole set.

The student is a linear softmax model on feature vectors, trained from zeros by full-batch gradient descent
with momentum on

    L(W; w) = 1/n sum_i w_i * cross_entropy(W^T phi_i, label_i) + ridge/2 |W|^2,

where n counts the rows and not their weights, so that a sample's weight scales its own pull and no other's.
Utility is the metagradient (Dataset Policy Gradient: Thrush et al. 2026, arXiv 2604.08423; the wish to teach
a student well: Montessori-Instruct, Li et al. 2024, arXiv 2410.14208)

    u_i = -d L_val(W_T(w)) / d w_i

at w_i = 1 where sample i passed and 0 elsewhere, through all T steps. Everything that is differentiated is
smooth: plain momentum has no root as Adam has, whose derivative is infinite where a gradient is exactly 0.

Each step adds to W a sum of w_i * phi_i times something, so the student can be written by its samples:

    W_t = 1/n sum_i w_i * phi_i a_i(t)^T,

and the coefficients a_i, [K] for each sample, are what is trained here. In this form w acts on W_T in two
ways: by itself, and through the coefficients, which answer to what the samples have taught so far. The
first-order influence follows the first way alone. It is TracIn's sum over the steps (Pruthi et al. 2020,
arXiv 2002.08484) with the effect of momentum and ridge counted in, and with the validation gradient of the
trained student. At one step, where nothing has been taught yet, it is exact.
"""

from __future__ import annotations

import dataclasses
import functools

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
    return _metagradient(
        (features, label, passed),
        (val_features, val_label),
        (context_features, context_label),
        num_labels,
        config,
        follow_training=True,
    )


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
    """The first-order form of `utility`, by one training and no way back through it. Exact at one step.

    Args and returns are those of `utility`.
    """
    return _metagradient(
        (features, label, passed),
        (val_features, val_label),
        (context_features, context_label),
        num_labels,
        config,
        follow_training=False,
    )


UTILITIES = {"exact": utility, "first_order": influence}


def _metagradient(
    samples: tuple[Array, Array, Array],
    validation: tuple[Array, Array],
    context: tuple[Array | None, Array | None],
    num_labels: int,
    config: UtilityConfig,
    follow_training: bool,
) -> jax.Array:
    """-d L_val / d w [N] in reverse mode; through the coefficients only with `follow_training`."""
    features, label, passed = samples
    dtype = jnp.promote_types(features.dtype, jnp.float32)
    rows, weight = features.astype(dtype), passed.astype(dtype)
    context_features, context_label = context
    if context_features is not None:
        rows = jnp.concatenate([rows, context_features.astype(dtype)])
        label = jnp.concatenate([label, context_label])
        weight = jnp.concatenate([weight, jnp.ones(len(context_label), dtype)])

    val_rows = validation[0].astype(dtype)
    val_target = jax.nn.one_hot(validation[1], num_labels, dtype=dtype)  # zeros for padding
    exists = val_target.sum(0) > 0  # [K]
    target = jnp.where(exists, jax.nn.one_hot(label, num_labels, dtype=dtype), 0.0)
    real = target.sum(-1)
    weight = weight * real
    scale = 1.0 / jnp.maximum(real.sum(), 1.0)

    def student(weight: jax.Array, coefficients: jax.Array) -> jax.Array:
        """W [D, K]."""
        return _matmul(rows.T, scale * weight[:, None] * coefficients)

    def logits(rows: jax.Array, weights: jax.Array) -> jax.Array:
        return jnp.where(exists, _matmul(rows, weights), _IMPOSSIBLE)

    def coefficients(weight: jax.Array) -> jax.Array:
        """a [N, K] after T steps from zeros."""

        # Without the checkpoint every step would keep its logits and their softmax for the way back.
        @jax.checkpoint
        def step(carry: tuple[jax.Array, jax.Array], _: None) -> tuple[tuple[jax.Array, jax.Array], None]:
            current, velocity = carry
            # The gradient of sample i's cross-entropy in W is phi_i (softmax - target)_i^T.
            residual = jax.nn.softmax(logits(rows, student(weight, current))) - target
            velocity = config.momentum * velocity + residual + config.ridge * current
            return (current - config.learning_rate * velocity, velocity), None

        zeros = jnp.zeros_like(target)
        (trained, _), _ = jax.lax.scan(step, (zeros, zeros), length=config.steps)
        return trained

    def validation_loss(weight: jax.Array) -> jax.Array:
        trained = coefficients(weight)
        if not follow_training:
            trained = jax.lax.stop_gradient(trained)
        log_probs = jax.nn.log_softmax(logits(val_rows, student(weight, trained)))
        return -jnp.sum(val_target * log_probs) / jnp.maximum(val_target.sum(), 1.0)

    gradient = jax.grad(validation_loss)(weight)
    return jnp.where(weight > 0.0, -gradient, 0.0)[: len(features)]
