"""Which synthesis strategies are tried, and what was learned about them.

A prompt asks for a text of one label by one *strategy*, for instance "vary one of these examples".
Strategies are abstract, so what is learned of them on one task says something about the next: a
task's estimate of a strategy starts from the one shared by all tasks and moves away from it as its own
samples come in. Rewards count relative to the other strategies in the same batch, because neither an
easy task nor a policy that has become better says anything about a strategy.

The state is a few small arrays and lives on the host. S is the number of strategies.
"""

from __future__ import annotations

import dataclasses
import math

import flax.struct
import numpy as np

from streamsynth.errors import UserError

# A strategy's index is its place here. Saved states know only the index, so new ones go to the end.
STRATEGIES = (
    "label_only",  # a text of the label, with only its name shown
    "imitate",  # a text like several examples of the label
    "vary_one",  # one example of the label, rewritten with other words
    "combine_two",  # parts of two examples of the label, joined
    "contrast",  # a text of the label, with examples of other labels as what it is not
    "imitate_best",  # a text like the best that were kept of the label so far
    "reshape",  # one example of the label, in another form or length
)


@dataclasses.dataclass(frozen=True)
class Config:
    """How strategies are chosen.

    Attributes:
      floor: share of the prompts that is spread evenly over all strategies; 1 learns nothing.
      temperature: in units of reward; a strategy that is this much better is e times as likely.
      prior: samples that the estimate one level up (shared for a task's, 0 for the shared one) is worth.
      task_decay: how much of a task's statistics is left after each batch of it.
      shared_decay: the same for the shared statistics, after each batch of any task.
    """

    floor: float = 0.25
    temperature: float = 0.1
    prior: float = 32.0
    task_decay: float = 0.9
    shared_decay: float = 0.99

    def __post_init__(self):
        for name in ("floor", "task_decay", "shared_decay"):
            if not 0 <= getattr(self, name) <= 1:
                raise UserError(f"patterns.{name} is {getattr(self, name)}: it must be in [0, 1]")
        for name in ("temperature", "prior"):
            if not (math.isfinite(getattr(self, name)) and getattr(self, name) > 0):
                raise UserError(f"patterns.{name} is {getattr(self, name)}: it must be above 0")


@flax.struct.dataclass
class State:
    """Statistics of rewards by strategy. Those of advantages are decayed, the others are plain sums.

    task_count: [tasks, S] float32, samples.   task_advantage: [tasks, S] float32, sum of advantages.
    shared_count: [S] float32.                 shared_advantage: [S] float32.
    count: [S] float32, samples of all tasks.  reward: [S] float32, sum.   reward_square: [S] float32, sum.
    """

    task_count: np.ndarray
    task_advantage: np.ndarray
    shared_count: np.ndarray
    shared_advantage: np.ndarray
    count: np.ndarray
    reward: np.ndarray
    reward_square: np.ndarray

    @property
    def num_tasks(self) -> int:
        return self.task_count.shape[0]


def empty(num_tasks: int) -> State:
    """The state before anything: all strategies are equally likely."""
    by_task = np.zeros((num_tasks, len(STRATEGIES)), np.float32)
    overall = np.zeros(len(STRATEGIES), np.float32)
    return State(
        task_count=by_task,
        task_advantage=by_task,
        shared_count=overall,
        shared_advantage=overall,
        count=overall,
        reward=overall,
        reward_square=overall,
    )


def extend(state: State, num_tasks: int) -> State:
    """The state with places for tasks appended to the stream; what was there stays as it is."""
    if num_tasks < state.num_tasks:
        raise ValueError(f"cannot take {state.num_tasks} tasks of a stream back to {num_tasks}")
    new = empty(num_tasks - state.num_tasks)
    return state.replace(
        task_count=np.concatenate([state.task_count, new.task_count]),
        task_advantage=np.concatenate([state.task_advantage, new.task_advantage]),
    )


def inherit(state: State, num_tasks: int) -> State:
    """The state at the start of a new stream with the experience of an old one: its shared estimates."""
    return empty(num_tasks).replace(
        shared_count=np.array(state.shared_count), shared_advantage=np.array(state.shared_advantage)
    )


def advantages(state: State, task: int, config: Config) -> np.ndarray:
    """[S] float64: how much better than the others each strategy is believed to be on a task.

    Means with a prior: (sum + prior * m) / (count + prior), where m is the shared estimate for a
    task's, and 0 for the shared one. A task never seen has the shared estimates.
    """
    shared = np.asarray(state.shared_advantage, np.float64) / (np.asarray(state.shared_count) + config.prior)
    count = np.asarray(state.task_count[task], np.float64)
    return (state.task_advantage[task] + config.prior * shared) / (count + config.prior)


def probabilities(state: State, task: int, config: Config) -> np.ndarray:
    """[S] float64: floor / S + (1 - floor) * softmax(advantages / temperature)."""
    logits = advantages(state, task, config) / config.temperature
    softmax = np.exp(logits - logits.max())
    softmax /= softmax.sum()
    return config.floor / len(STRATEGIES) + (1 - config.floor) * softmax


def draw(state: State, task: int, rng: np.random.Generator, count: int, config: Config) -> np.ndarray:
    """[count] int32: independent draws of strategies for the prompts of one batch."""
    chance = probabilities(state, task, config)
    return rng.choice(len(STRATEGIES), size=count, p=chance).astype(np.int32)


def record(state: State, task: int, strategy: np.ndarray, reward: np.ndarray, config: Config) -> State:
    """Takes in a batch of one task.

    The advantage of a sample is its reward minus the mean, over the strategies in the batch, of their
    mean rewards. Each strategy weighs the same in it: otherwise the one drawn most would be compared
    with little but itself. A batch of one strategy compares nothing and leaves the advantages alone.

    Args:
      state: with a place for the task.
      task: its index.
      strategy: [N] int, of each sample.
      reward: [N] float, of each sample; finite.
      config: the same for the whole stream.
    """
    strategy, reward = np.asarray(strategy), np.asarray(reward, np.float64)
    if not np.all(np.isfinite(reward)):
        raise ValueError("a reward that is not finite would stay in the statistics of its strategy")
    size = len(STRATEGIES)
    count = np.bincount(strategy, minlength=size).astype(np.float64)
    total = np.bincount(strategy, reward, minlength=size)
    squares = np.bincount(strategy, reward**2, minlength=size)
    state = state.replace(
        count=_float32(state.count + count),
        reward=_float32(state.reward + total),
        reward_square=_float32(state.reward_square + squares),
    )
    present = count > 0
    if present.sum() < 2:
        return state
    centre = np.mean(total[present] / count[present])
    advantage = total - count * centre
    task_count, task_advantage = np.array(state.task_count), np.array(state.task_advantage)
    task_count[task] = config.task_decay * task_count[task] + count
    task_advantage[task] = config.task_decay * task_advantage[task] + advantage
    return state.replace(
        task_count=task_count,
        task_advantage=task_advantage,
        shared_count=_float32(config.shared_decay * state.shared_count + count),
        shared_advantage=_float32(config.shared_decay * state.shared_advantage + advantage),
    )


def summary(state: State, task: int, config: Config) -> dict[str, dict[str, float | None]]:
    """For the report: by strategy its probability on a task, and the rewards of all its samples so far.

    Returns:
      {strategy: {"probability", "mean_reward", "standard_error", "count"}}; the error, which takes
      samples for independent, is None below two samples, and the mean below one.
    """
    chance = probabilities(state, task, config)
    result = {}
    for index, name in enumerate(STRATEGIES):
        count, total, squares = (float(x[index]) for x in (state.count, state.reward, state.reward_square))
        mean = total / count if count else None
        variance = max(0.0, squares - count * mean**2) / (count - 1) if count > 1 else None
        result[name] = {
            "probability": float(chance[index]),
            "mean_reward": mean,
            "standard_error": math.sqrt(variance / count) if variance is not None else None,
            "count": int(count),
        }
    return result


def _float32(values: np.ndarray) -> np.ndarray:
    return np.asarray(values, np.float32)
