"""The Optax chain, by config."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh

from streamsynth.errors import UserError
from streamsynth.policy.placement import constrain_optimizer, constrain_variables, optimizer_shardings
from streamsynth.policy.transformer import Transformer, TransformerConfig

# Updates that are not finite are skipped for as long as they come; the count is in the metrics.
_NEVER_GIVE_UP = 2**31 - 1


def _constant(peak: float, steps: int, warmup: int) -> optax.Schedule:
    # Without a warm-up, Optax's own schedule of this name would stay at 0.
    return optax.warmup_constant_schedule(0.0, peak, warmup) if warmup else optax.constant_schedule(peak)


def _cosine(peak: float, steps: int, warmup: int) -> optax.Schedule:
    return optax.warmup_cosine_decay_schedule(0.0, peak, warmup, max(steps, warmup + 1), 0.05 * peak)


def _linear(peak: float, steps: int, warmup: int) -> optax.Schedule:
    return optax.join_schedules(
        [
            optax.linear_schedule(0.0, peak, warmup),
            optax.linear_schedule(peak, 0.0, max(steps - warmup, 1)),
        ],
        [warmup],
    )


SCHEDULES = {"constant": _constant, "cosine": _cosine, "linear": _linear}

# Matrices decay, in proportion to the learning rate; gains and biases do not.
OPTIMIZERS = {
    "adamw": lambda lr, c: optax.adamw(lr, b1=c.b1, b2=c.b2, weight_decay=c.weight_decay, mask=_matrices),
    # Optax's own `weight_decay_rate` knows no learning rate. The sign is turned before the decay is added.
    "adafactor": lambda lr, c: optax.chain(
        optax.adafactor(None),
        optax.add_decayed_weights(-c.weight_decay, _matrices),
        optax.scale_by_learning_rate(lr, flip_sign=False),
    ),
    "sgd": lambda lr, c: optax.chain(
        optax.trace(c.b1),
        optax.add_decayed_weights(c.weight_decay, _matrices),
        optax.scale_by_learning_rate(lr),
    ),
    # The root mean square of its updates is that of Adam's, so that one learning rate serves both.
    "muon": lambda lr, c: optax.contrib.muon(
        lr,
        weight_decay=c.weight_decay,
        adam_b1=c.b1,
        adam_b2=c.b2,
        consistent_rms=0.2,
        muon_weight_dimension_numbers=_hidden_matrices,
    ),
}


def _hidden_matrices(params: Any) -> Any:
    """Muon (Jordan et al. 2024) is for the matrices between hidden states: embeddings stay with Adam."""

    def numbers(path: tuple, leaf: Any) -> Any:
        if path[-1].key in ("embedding", "head", "scale", "bias"):
            return None
        return optax.contrib.MuonDimensionNumbers(leaf.ndim - 2, leaf.ndim - 1)

    return jax.tree_util.tree_map_with_path(numbers, params)


def _matrices(params: Any) -> Any:
    """All but gains and biases, which have two dimensions too where layers are scanned."""
    return jax.tree_util.tree_map_with_path(lambda path, _: path[-1].key not in ("scale", "bias"), params)


class MasterWeights(NamedTuple):
    """float32 copies of the parameters, and the state of the optimizer that moves them."""

    weights: Any
    inner: Any


def with_master_weights(optimizer: optax.GradientTransformation) -> optax.GradientTransformation:
    """The optimizer for parameters of low precision, run on float32 copies of them.

    A step is often smaller than the distance of neighbouring bfloat16 numbers and would be lost to rounding
    each time; in the copies it adds up (arXiv 1710.03740, section 3.1).
    """

    def init(params: Any) -> MasterWeights:
        return MasterWeights(_wide(params), optimizer.init(_wide(params)))

    def update(grads: Any, state: MasterWeights, params: Any) -> tuple[Any, MasterWeights]:
        updates, inner = optimizer.update(_wide(grads), state.inner, state.weights)
        weights = optax.apply_updates(state.weights, updates)
        # Added to the parameters in float32 and rounded once, the difference gives the rounded copies.
        return jax.tree.map(jnp.subtract, weights, _wide(params)), MasterWeights(weights, inner)

    return optax.GradientTransformation(init, update)


def init_state(
    optimizer: optax.GradientTransformation, config: TransformerConfig, params: Any, mesh: Mesh
) -> Any:
    """A fresh state of the optimizer, made where its shards lie.

    Its zeros follow from nothing, and by themselves would come to lie whole on every device.
    """
    shardings = optimizer_shardings(config, jax.eval_shape(optimizer.init, params), params, mesh)
    return jax.jit(optimizer.init, out_shardings=shardings)(params)


def step(
    model: Transformer, optimizer: optax.GradientTransformation, grads: Any, params: Any, opt_state: Any
) -> tuple[Any, Any]:
    """The parameters and the optimizer's state after a step along `grads`, each lying where it lay."""
    updates, opt_state = optimizer.update(grads, opt_state, params)
    params = constrain_variables(model.config, optax.apply_updates(params, updates))
    return params, constrain_optimizer(model.config, opt_state, params)


def _wide(tree: Any) -> Any:
    return jax.tree.map(lambda leaf: leaf.astype(jnp.float32), tree)


def make_optimizer(
    config: Any, steps: int, group: str = "optimizer", *, master: bool = False
) -> optax.GradientTransformation:
    """Clipping by global norm, then the optimizer under its schedule; non-finite updates are skipped.

    Args:
      config: keys `name`, `learning_rate`, `schedule`, `warmup`, `clip_norm`, `b1`, `b2`, `weight_decay`.
      steps: how many updates the schedule spans.
      group: where the keys stand in the whole config, for messages.
      master: whether the parameters are of low precision and float32 copies of them are to be kept.

    Raises:
      UserError: for a name that is not in the tables.
    """
    for key, table in (("name", OPTIMIZERS), ("schedule", SCHEDULES)):
        if config[key] not in table:
            raise UserError(
                f"{group}.{key} = {config[key]!r} is not known: choose one of {', '.join(table)}."
            )
    schedule = SCHEDULES[config.schedule](config.learning_rate, steps, config.warmup)
    chain = optax.chain(
        optax.clip_by_global_norm(config.clip_norm), OPTIMIZERS[config.name](schedule, config)
    )
    if master:
        chain = with_master_weights(chain)
    guarded = optax.apply_if_finite(chain, max_consecutive_errors=_NEVER_GIVE_UP)
    if not master:
        return guarded
    # The update that a skipped step stands for has the gradients' dtype, and must have that of any other.
    return optax.GradientTransformation(
        guarded.init, lambda grads, state, params: guarded.update(_wide(grads), state, params)
    )
