"""Planted worlds in which one strategy is better: how soon it is asked for, and what experience does to that.

`python benchmarks/planted.py` writes the medians that the README quotes.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice

import numpy as np
import pytest

from streamsynth import defaults
from streamsynth.stream import patterns

S = len(patterns.STRATEGIES)
SEEDS = range(20)
PROMPTS, SAMPLES = defaults.default_config().rollout.prompts, defaults.default_config().rollout.samples
TURN = 25  # steps of the first task's turn
LIMIT = 60  # steps after which a search counts as that long
GAP = 0.2  # of the better strategy's mean reward to the others'
CONCENTRATION = 4.0  # of a prompt's own mean around its strategy's: samples of a prompt are alike


def config_of(choice: str) -> patterns.Config:
    """The default config of a run, as it stands, with another rule."""
    return patterns.Config(**defaults.default_config().patterns.to_dict() | {"choice": choice})


def planted(best: int, rng: np.random.Generator) -> np.ndarray:
    """[S] mean rewards: a level of the task's own, and the others a little different from each other."""
    level = rng.uniform(0.25, 0.6)
    means = level + rng.uniform(-0.03, 0.03, S)
    means[best] = level + GAP
    return means


def turn(
    state: patterns.State, task: int, means: np.ndarray, config: patterns.Config, *seed: int
) -> Iterator[tuple[float, patterns.State]]:
    """The best strategy's probability and the state, before anything and after each batch of a task.

    Each prompt has a mean of its own, beta around its strategy's; its samples earn 0 or 1.
    """
    rng = np.random.default_rng(seed)
    while True:
        yield patterns.probabilities(state, task, config)[means.argmax()], state
        strategy = patterns.draw(state, task, rng, PROMPTS, config)
        of_prompt = rng.beta(CONCENTRATION * means[strategy], CONCENTRATION * (1 - means[strategy]))
        reward = (rng.random((PROMPTS, SAMPLES)) < of_prompt[:, None]).astype(np.float32)
        state = patterns.record(state, task, strategy, reward.ravel(), config)


def steps_to_find(moments: Iterator[tuple[float, patterns.State]]) -> int:
    """Batches until the probability has passed 0.5; LIMIT for those that take longer."""
    return next((step for step, (p, _) in enumerate(islice(moments, LIMIT)) if p > 0.5), LIMIT)


def shuffled(state: patterns.State, rng: np.random.Generator) -> patterns.State:
    """What is shared, dealt to other strategies."""
    order = rng.permutation(S)
    shared = {name: getattr(state, name) for name in patterns.SHARED}
    return state.replace(**{name: value[order] for name, value in shared.items() if value.ndim})


def searches(choice: str) -> tuple[dict[str, list[int]], list[float]]:
    """For every seed, the steps to the better strategy of each kind of task, and p after the first turn."""
    config, final = config_of(choice), []
    steps: dict[str, list[int]] = {"first": [], "second": [], "shuffled": [], "another": []}
    for seed in SEEDS:
        rng, best = np.random.default_rng((seed, 0)), seed % S
        means, alike = planted(best, rng), planted(best, rng)
        unlike = planted((best + rng.integers(1, S)) % S, rng)
        steps["first"].append(steps_to_find(turn(patterns.empty(2), 0, means, config, seed, 1)))
        p, state = next(islice(turn(patterns.empty(2), 0, means, config, seed, 1), TURN, None))
        final.append(p)
        steps["second"].append(steps_to_find(turn(state, 1, alike, config, seed, 2)))
        steps["shuffled"].append(steps_to_find(turn(shuffled(state, rng), 1, alike, config, seed, 2)))
        steps["another"].append(steps_to_find(turn(state, 1, unlike, config, seed, 2)))
    return steps, final


@pytest.mark.parametrize("choice", patterns.CHOICES)
def test_experience_at_least_halves_the_steps_to_the_better_strategy(choice):
    steps, final = searches(choice)
    median = {kind: np.median(found) for kind, found in steps.items()}
    assert median["first"] >= 2
    assert 2 * median["second"] <= median["first"]
    assert 2 * median["shuffled"] > median["first"]
    assert np.median(final) > 0.5
    # What was learned elsewhere misleads here, and does not prevail.
    assert max(steps["another"]) < LIMIT
    assert median["another"] <= TURN / 2
