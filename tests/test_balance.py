"""Dual ascent: by hand, held in its bounds, and binding on a problem whose answer is known."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from streamsynth.errors import UserError
from streamsynth.learner import balance

step = jax.jit(balance.dual_ascent, static_argnames=("eta", "alpha_max"))


def test_one_step_by_hand():
    state = balance.initial(0.5, 2.0)
    assert step(state, 1.0, True, eta=0.1, alpha_max=4.0).alpha == pytest.approx(0.6)  # too little diversity
    assert step(state, 5.0, True, eta=0.1, alpha_max=4.0).alpha == pytest.approx(0.2)  # more than wanted
    assert step(state, 9.0, True, eta=0.1, alpha_max=4.0).alpha == 0.0
    assert step(state, 0.0, True, eta=9.0, alpha_max=4.0).alpha == 4.0


def test_a_batch_that_says_nothing_changes_nothing():
    state = balance.initial(0.5, 2.0)
    for statistic, valid in ((0.0, False), (jnp.nan, True), (jnp.nan, False), (jnp.inf, True)):
        after = step(state, statistic, valid, eta=0.1, alpha_max=4.0)
        assert after.alpha == 0.5
        assert after.target == 2.0


@settings(deadline=None)
@given(st.lists(st.floats(-20, 20, width=32), min_size=1, max_size=20))
def test_alpha_stays_in_its_bounds(statistics):
    state = balance.initial(1.0, 2.0)
    for statistic in statistics:
        state = step(state, statistic, True, eta=0.7, alpha_max=3.0)
        assert 0.0 <= state.alpha <= 3.0


@pytest.mark.parametrize(("target", "alpha", "diversity"), [(1.5, 2.0, 1.5), (0.2, 0.0, 0.5)])
def test_it_finds_the_multiplier_of_a_known_problem(target, alpha, diversity):
    """maximise -(x - 1/2)^2 subject to x >= target: the multiplier is 2 (target - 1/2), or 0 when slack."""
    state = balance.initial(0.0, target)
    best = 0.5
    for _ in range(300):
        best = 0.5 + float(state.alpha) / 2.0  # the policy's answer to this weight
        state = step(state, best, True, eta=0.2, alpha_max=10.0)
    assert state.alpha == pytest.approx(alpha, abs=1e-3)
    assert best == pytest.approx(diversity, abs=1e-3)


def test_one_alpha_for_each_task():
    state = balance.initial(np.zeros(2), np.array([1.0, 2.0]))
    after = step(state, jnp.array([0.5, 0.5]), jnp.array([True, False]), eta=1.0, alpha_max=4.0)
    np.testing.assert_allclose(after.alpha, [0.5, 0.0])


def test_target():
    assert balance.target_from(jnp.float32(2.0), jnp.array(True), factor=0.75) == pytest.approx(1.5)
    with pytest.raises(UserError, match="diversity target"):
        balance.target_from(0.0, False)
