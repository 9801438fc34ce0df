"""Advantages: the leave-one-out mean, lagged scales, and a sum whose parts can all be seen."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from streamsynth.errors import UserError
from streamsynth.learner import advantages

FLOORS = {"quality": 0.05, "utility": 1e-6, "diversity": 0.1}


def test_leave_one_out_by_hand():
    quality = jnp.array([[1.0, 0.0, 0.0], [0.2, 0.4, 0.9]])
    expected = [[1.0, -0.5, -0.5], [0.2 - 0.65, 0.4 - 0.55, 0.9 - 0.3]]
    np.testing.assert_allclose(advantages.leave_one_out(quality), expected, atol=1e-6)


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 2**31), st.sampled_from([2, 3, 8]))
def test_leave_one_out_equals_the_definition(seed, group):
    quality = np.random.default_rng(seed).random((4, group)).astype(np.float32)
    others = [[np.delete(row, i).mean(dtype=np.float64) for i in range(group)] for row in quality]
    np.testing.assert_allclose(advantages.leave_one_out(quality), quality - np.array(others), atol=1e-6)


@pytest.mark.parametrize("level", [0.0, 0.1, 0.7, 1.0])
def test_equal_qualities_give_exactly_zero(level):
    assert (advantages.leave_one_out(jnp.full((2, 7), level)) == 0.0).all()


def test_a_group_of_one_is_refused():
    with pytest.raises(UserError, match="samples per prompt"):
        advantages.leave_one_out(jnp.ones((3, 1)))


def parts_of(seed, scale=1.0):
    rng = np.random.default_rng(seed)
    return {name: jnp.asarray(scale * rng.normal(size=16), jnp.float32) for name in FLOORS}


def test_the_first_batch_only_initialises():
    spread = advantages.initial_spread()
    parts = parts_of(0)
    weights = {"quality": 1.0, "utility": 0.3, "diversity": 0.5}
    assert (advantages.combine(parts, weights, spread, FLOORS).total == 0.0).all()
    spread = advantages.update_spread(spread, parts)
    for name, part in parts.items():
        np.testing.assert_allclose(spread.mean_square[name], np.mean(np.square(part)), rtol=1e-6)
    assert (advantages.combine(parts_of(1), weights, spread, FLOORS).total != 0.0).all()


def test_sum_and_parts():
    spread = advantages.update_spread(advantages.initial_spread(), parts_of(0))
    parts = parts_of(1)
    result = advantages.combine(parts, {"quality": 1.0, "utility": 0.3, "diversity": 0.5}, spread, FLOORS)
    sigma = {
        name: np.sqrt(np.mean(np.square(part))) for name, part in parts_of(0).items()
    }  # of the batch before
    expected = parts["quality"] / sigma["quality"]
    expected += 0.3 * parts["utility"] / sigma["utility"] + 0.5 * parts["diversity"] / sigma["diversity"]
    np.testing.assert_allclose(result.total, expected, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(sum(result.weighted.values()), result.total, rtol=1e-6)
    for name, part in parts.items():
        np.testing.assert_array_equal(result.raw[name], part)
        np.testing.assert_allclose(result.normalized[name] * result.sigma[name], part, rtol=1e-5)


def test_running_mean_square():
    spread = advantages.initial_spread(("quality",))
    for value in (2.0, 4.0, 0.0):
        spread = advantages.update_spread(spread, {"quality": jnp.full(5, value)}, decay=0.75)
    np.testing.assert_allclose(spread.mean_square["quality"], 0.75 * (0.75 * 4.0 + 0.25 * 16.0), rtol=1e-6)


def test_a_part_that_starts_late_has_its_own_first_batch():
    """A utility of 0 for the first batches must not leave a sigma that is far too small."""
    spread = advantages.initial_spread()
    parts = parts_of(0)
    for _ in range(3):
        spread = advantages.update_spread(spread, parts | {"utility": jnp.zeros(16)})
    late = advantages.combine(parts, dict.fromkeys(FLOORS, 1.0), spread, FLOORS)
    assert (late.weighted["utility"] == 0.0).all()
    assert (late.weighted["quality"] != 0.0).all()
    spread = advantages.update_spread(spread, parts)
    np.testing.assert_allclose(spread.mean_square["utility"], np.mean(np.square(parts["utility"])), rtol=1e-6)


def test_the_floor_and_values_that_are_not_finite():
    tiny = {"quality": jnp.array([1e-4, -1e-4])}
    spread = advantages.update_spread(advantages.initial_spread(), tiny)
    result = advantages.combine(tiny, {"quality": 1.0}, spread, FLOORS)
    np.testing.assert_allclose(result.total, np.array([1e-4, -1e-4]) / 0.05, rtol=1e-5)
    poisoned = advantages.update_spread(spread, {"quality": jnp.array([jnp.nan, 1.0])})
    assert poisoned.mean_square["quality"] == spread.mean_square["quality"]


def test_equal_qualities_keep_their_diversity_signal_under_jit():
    spread = advantages.update_spread(
        advantages.initial_spread(("quality", "diversity")),
        {"quality": jnp.array([1.0, -1.0]), "diversity": jnp.array([2.0, -2.0])},
    )

    @jax.jit
    def total(quality, diversity, alpha, spread):
        parts = {"quality": advantages.leave_one_out(quality).reshape(-1), "diversity": diversity}
        return advantages.combine(parts, {"quality": 1.0, "diversity": alpha}, spread, FLOORS).total

    actual = total(jnp.full((2, 2), 0.9), jnp.array([1.0, 0.0, -1.0, 3.0]), jnp.float32(0.5), spread)
    np.testing.assert_allclose(actual, [0.25, 0.0, -0.25, 0.75], atol=1e-6)
