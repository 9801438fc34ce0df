"""How what is believed of strategies becomes chances to be drawn, rule by rule."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from streamsynth import validate
from streamsynth.defaults import default_config
from streamsynth.stream import patterns

S = len(patterns.STRATEGIES)


def test_the_configs_choices_are_the_tables():
    assert validate._CHOICES["patterns.choice"] == tuple(patterns.CHOICES)


def test_defaults_are_those_of_the_config():
    assert patterns.Config(**default_config().patterns.to_dict()) == patterns.Config()


def test_softmax_by_hand():
    belief = patterns.Belief(0.1 * np.log(np.arange(1.0, S + 1)), np.full(S, 0.1), 0.5)
    chance = patterns.CHOICES["softmax"](belief, patterns.Config(temperature=0.1))
    np.testing.assert_allclose(chance, np.arange(1, S + 1) / (S * (S + 1) / 2))


def test_thompson_of_two_is_the_normal_distribution_function():
    """P(x_0 > x_1) = Phi((m_0 - m_1) / sqrt(d_0^2 + d_1^2)); 0.8413... at one standard deviation."""
    belief = patterns.Belief(np.array([0.05, 0.0]), np.array([0.03, 0.04]), 0.5)
    chance = patterns.CHOICES["thompson"](belief, patterns.Config())
    np.testing.assert_allclose(chance, [0.8413447, 0.1586553], atol=1e-3)


@pytest.mark.parametrize("choice", patterns.CHOICES)
@settings(deadline=None, max_examples=50)
@given(
    count=st.lists(st.floats(0, 1e9, width=32), min_size=2 * S, max_size=2 * S),
    mean=st.lists(st.floats(-1e3, 1e3, width=32), min_size=2 * S, max_size=2 * S),
    square=st.floats(0, 1e9, width=32),
    freedom=st.floats(0, 1e9, width=32),
)
def test_no_counts_however_odd_make_what_is_no_number(choice, count, mean, square, freedom):
    count = np.float32(count).reshape(2, S)
    total = count * np.float32(mean).reshape(2, S)
    state = patterns.empty(1).replace(
        task_count=count[:1],
        task_advantage=total[:1],
        shared_count=count[1],
        shared_advantage=total[1],
        shared_square=np.float32(square),
        shared_freedom=np.float32(freedom),
    )
    config = patterns.Config(choice=choice)
    p = patterns.probabilities(state, 0, config)
    assert abs(p.sum() - 1) < 1e-12
    assert p.min() >= config.floor / S - 1e-12


def test_thompson_is_the_chance_of_the_highest_draw():
    rng = np.random.default_rng(0)
    for spread in (0.0, 0.05, 0.3):
        mean, deviation = spread * rng.normal(size=S), rng.uniform(0.02, 0.2, S)
        belief = patterns.Belief(mean, deviation, 0.5)
        draws = rng.normal(mean, deviation, (100_000, S)).argmax(1)
        chance = patterns.CHOICES["thompson"](belief, patterns.Config())
        np.testing.assert_allclose(chance, np.bincount(draws, minlength=S) / len(draws), atol=0.006)


@pytest.mark.parametrize("bonus", [0.5, 3.0])
def test_ucb_is_one_sample_after_another_to_the_highest_bound(bonus):
    config = patterns.Config(bonus=bonus)
    rng = np.random.default_rng(0)
    for spread in (0.0, 0.02, 0.1, 0.5):
        belief = patterns.Belief(spread * rng.normal(size=S), rng.uniform(0.02, 0.1, S), 0.4)
        added = np.zeros(S)
        for _ in range(10 * config.samples):  # tenths of a sample
            worth = (belief.noise / belief.deviation) ** 2 + added
            added[np.argmax(belief.mean + bonus * belief.noise / np.sqrt(worth))] += 0.1
        share = patterns.CHOICES["ucb"](belief, config)
        np.testing.assert_allclose(share, added / added.sum(), atol=2e-3)
