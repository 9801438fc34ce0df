"""Which synthesis strategies are tried, and what was learned about them.

A prompt asks for a text of one label by one *strategy*, for instance "vary one of these examples".
Strategies are abstract, so what is learned of them on one task says something about the next: a
task's estimate of a strategy starts from the one shared by all tasks and moves away from it as its own
samples come in. Rewards count relative to the other strategies in the same batch, because neither an
easy task nor a policy that has become better says anything about a strategy.

What is believed of a strategy is a Gaussian of its advantage (`posterior`); how beliefs become chances is
one of `CHOICES`. The state is a few small arrays and lives on the host. S is the number of strategies.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from types import EllipsisType
from typing import NamedTuple

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
      choice: a name in `CHOICES`.
      floor: share of the prompts that is spread evenly over all strategies; 1 learns nothing.
      temperature: of "softmax", in units of reward: a strategy that is this much better is e times as
        likely.
      bonus: of "ucb": how many standard deviations above its mean the bound on a strategy is.
      prior: samples that the estimate one level up (shared for a task's, 0 for the shared one) is worth.
      noise: standard deviation of a sample's reward, as long as nothing is known of it.
      task_decay: how much of a task's statistics is left after each batch of it.
      shared_decay: the same for the shared statistics, after each batch of any task.
      samples: of a step (N): what "ucb" shares out at a time.
    """

    choice: str = "softmax"
    floor: float = 0.25
    temperature: float = 0.05
    bonus: float = 3.0
    prior: float = 64.0
    noise: float = 0.5
    task_decay: float = 0.9
    shared_decay: float = 0.99
    samples: int = 128

    def __post_init__(self):
        if self.choice not in CHOICES:
            raise UserError(f"patterns.choice is {self.choice!r}: choose one of {', '.join(CHOICES)}")
        for name in ("floor", "task_decay", "shared_decay"):
            if not 0 <= getattr(self, name) <= 1:
                raise UserError(f"patterns.{name} is {getattr(self, name)}: it must be in [0, 1]")
        for name in ("temperature", "bonus", "prior", "noise", "samples"):
            if not (math.isfinite(getattr(self, name)) and getattr(self, name) > 0):
                raise UserError(f"patterns.{name} is {getattr(self, name)}: it must be above 0")


@flax.struct.dataclass
class State:
    """Statistics of rewards, by strategy but for the noise. The first six are decayed, the others plain sums.

    task_count: [tasks, S] float32, samples.    task_advantage: [tasks, S] float32, sum of advantages.
    shared_count: [S] float32.                  shared_advantage: [S] float32.
    shared_square: [] float32, sum of squares of the noise.
    shared_freedom: [] float32, how many independent squares are in it.
    count: [tasks, S] float32, samples.         reward: [tasks, S] float32, sum.
    reward_square: [tasks, S] float32, sum.
    """

    task_count: np.ndarray
    task_advantage: np.ndarray
    shared_count: np.ndarray
    shared_advantage: np.ndarray
    shared_square: np.ndarray
    shared_freedom: np.ndarray
    count: np.ndarray
    reward: np.ndarray
    reward_square: np.ndarray

    @property
    def num_tasks(self) -> int:
        return self.task_count.shape[0]


# What says something about tasks never seen, and what is known of one task. All fields are in one of them.
SHARED = ("shared_count", "shared_advantage", "shared_square", "shared_freedom")
BY_TASK = ("task_count", "task_advantage", "count", "reward", "reward_square")


def empty(num_tasks: int) -> State:
    """The state before anything: all strategies are equally likely."""
    by_task = np.zeros((num_tasks, len(STRATEGIES)), np.float32)
    by_strategy, total = np.zeros(len(STRATEGIES), np.float32), np.zeros((), np.float32)
    return State(
        **dict.fromkeys(BY_TASK, by_task),
        shared_count=by_strategy,
        shared_advantage=by_strategy,
        shared_square=total,
        shared_freedom=total,
    )


def extend(state: State, num_tasks: int) -> State:
    """The state with places for tasks appended to the stream; what was there stays as it is."""
    if num_tasks < state.num_tasks:
        raise ValueError(f"cannot take {state.num_tasks} tasks of a stream back to {num_tasks}")
    new = empty(num_tasks - state.num_tasks)
    return state.replace(
        **{name: np.concatenate([getattr(state, name), getattr(new, name)]) for name in BY_TASK}
    )


def inherit(state: State, num_tasks: int) -> State:
    """The state at the start of a new stream with the experience of an old one: its shared estimates."""
    return empty(num_tasks).replace(**{name: np.array(getattr(state, name)) for name in SHARED})


class Belief(NamedTuple):
    """A Gaussian of each strategy's advantage on a task.

    mean: [S] float64.   deviation: [S] float64, above 0.
    noise: standard deviation of one sample's reward around its strategy's mean.
    """

    mean: np.ndarray
    deviation: np.ndarray
    noise: float


def posterior(state: State, task: int, config: Config) -> Belief:
    """What is believed of the strategies on a task.

    The conjugate update of a Gaussian mean (Gelman et al., Bayesian Data Analysis, section 2.5) at two
    levels, with sigma the noise, n the decayed counts and priors of variance sigma^2 / prior:

        shared:  m = sum / (n + prior),    v = sigma^2 / (n + prior)
        task:    mean = (sum_t + prior * m) / (n_t + prior),
                 deviation^2 = sigma^2 / (n_t + prior) + (prior / (n_t + prior))^2 * v

    A task never seen has the shared mean, and is less certain of it.
    """
    # One degree of freedom is the prior's: rewards that never differ must not make anything certain.
    variance = (float(state.shared_square) + config.noise**2) / (float(state.shared_freedom) + 1)
    shared = np.asarray(state.shared_count, np.float64) + config.prior
    own = np.asarray(state.task_count[task], np.float64) + config.prior
    shared_mean = np.asarray(state.shared_advantage, np.float64) / shared
    return Belief(
        mean=(np.asarray(state.task_advantage[task], np.float64) + config.prior * shared_mean) / own,
        deviation=np.sqrt(variance * (1 / own + (config.prior / own) ** 2 / shared)),
        noise=math.sqrt(variance),
    )


def advantages(state: State, task: int, config: Config) -> np.ndarray:
    """[S] float64: how much better than the others each strategy is believed to be on a task."""
    return posterior(state, task, config).mean


def probabilities(state: State, task: int, config: Config) -> np.ndarray:
    """[S] float64: floor / S + (1 - floor) * what `config.choice` makes of the posterior."""
    chance = CHOICES[config.choice](posterior(state, task, config), config)
    return config.floor / len(STRATEGIES) + (1 - config.floor) * chance


def draw(state: State, task: int, rng: np.random.Generator, count: int, config: Config) -> np.ndarray:
    """[count] int32: independent draws of strategies for the prompts of one batch."""
    chance = probabilities(state, task, config)
    return rng.choice(len(STRATEGIES), size=count, p=chance).astype(np.int32)


# --- How beliefs become chances, [S] float64 that sums to 1 ---


def _softmax(belief: Belief, config: Config) -> np.ndarray:
    """Softmax(mean / temperature)."""
    chance = np.exp((belief.mean - belief.mean.max()) / config.temperature)
    return chance / chance.sum()


def _thompson(belief: Belief, config: Config) -> np.ndarray:
    """The chance of each strategy that a draw from its Gaussian is above those from all others.

    A strategy drawn by these chances is one chosen by posterior sampling (Thompson 1933), anew for each
    prompt. They are the integrals of prod_{j != s} F_j dF_s, with F the distribution functions, by the
    trapezoid rule on nodes that are dense wherever one of them rises.
    """
    del config
    mean, deviation = belief.mean[:, None], belief.deviation[:, None]
    nodes = np.sort((mean + deviation * _NODES).ravel())
    below = _normal((nodes - mean) / deviation)  # [S, nodes]
    others = np.stack([np.prod(np.delete(below, s, axis=0), axis=0) for s in range(len(below))])
    chance = np.sum(np.diff(below) * (others[:, 1:] + others[:, :-1]) / 2, axis=1)
    return chance / chance.sum()


def _ucb(belief: Belief, config: Config) -> np.ndarray:
    """How a step's samples are shared out if each goes where mean + bonus * deviation is highest.

    Each sample that a strategy gets narrows its deviation before the next one is placed, and leaves its
    mean as it is (GP-BUCB, Desautels et al. 2014). With k = (noise / deviation)^2, the samples that a
    belief is worth, n more make the deviation noise / sqrt(k + n). In the end all bounds that were lowered
    are at one level L, which bisection finds:

        n_s = max(0, (bonus * noise / (L - mean_s))^2 - k_s),    sum_s n_s = samples,

    It is the limit of samples that can be divided, so that no order of the strategies matters.
    """
    reach = config.bonus * belief.noise
    worth = (belief.noise / belief.deviation) ** 2
    behind = belief.mean.max() - belief.mean
    # How far L is above the highest mean: at `low` one strategy takes all samples, at `high` none takes any.
    low = (reach / np.sqrt(worth + config.samples))[behind == 0].min()
    high = np.max(reach / np.sqrt(worth) - behind)
    for _ in range(_BISECTIONS):
        middle = (low + high) / 2
        added = np.maximum(0.0, (reach / (middle + behind)) ** 2 - worth)
        low, high = (middle, high) if added.sum() > config.samples else (low, middle)
    added = np.maximum(0.0, (reach / (low + behind)) ** 2 - worth)
    return added / added.sum()


CHOICES: dict[str, Callable[[Belief, Config], np.ndarray]] = {
    "softmax": _softmax,
    "thompson": _thompson,
    "ucb": _ucb,
}

_NODES = np.linspace(-6, 6, 65)  # in standard deviations; enough for chances to 1e-3
_BISECTIONS = 60

_erf = np.vectorize(math.erf, otypes=[np.float64])


def _normal(z: np.ndarray) -> np.ndarray:
    """The standard normal distribution function."""
    return (1 + _erf(z / math.sqrt(2))) / 2


# --- What batches say ---


def record(state: State, task: int, strategy: np.ndarray, reward: np.ndarray, config: Config) -> State:
    """Takes in a batch of one task.

    The advantage of a sample is its reward minus the mean, over the strategies in the batch, of their
    mean rewards. Each strategy weighs the same in it: otherwise the one drawn most would be compared
    with little but itself. A batch of one strategy compares nothing and is only counted.

    The noise of a sample is G times the variance of a prompt's mean: samples of one prompt have its
    examples in common, and G of them say less than G prompts would.

    Args:
      state: with a place for the task.
      task: its index.
      strategy: [B] int, of each prompt.
      reward: [B * G] float, of the samples of each prompt in turn; finite.
      config: the same for the whole stream.

    Raises:
      ValueError: a reward is not finite, or there are not as many for each prompt.
    """
    strategy, reward = np.asarray(strategy), np.asarray(reward, np.float64)
    if not np.all(np.isfinite(reward)):
        raise ValueError("a reward that is not finite would stay in the statistics of its strategy")
    by_prompt = reward.reshape(len(strategy), -1)
    group = by_prompt.shape[1]

    def by_strategy(of_prompt: np.ndarray) -> np.ndarray:
        return np.bincount(strategy, of_prompt, minlength=len(STRATEGIES))

    count = group * by_strategy(np.ones(len(strategy)))
    total = by_strategy(by_prompt.sum(1))
    state = state.replace(
        count=_added(state.count, task, count),
        reward=_added(state.reward, task, total),
        reward_square=_added(state.reward_square, task, by_strategy((by_prompt**2).sum(1))),
    )
    present = count > 0
    if present.sum() < 2:
        return state
    mean = total / np.maximum(count, 1)
    advantage = total - count * np.mean(mean[present])
    square = group * np.sum((by_prompt.mean(1) - mean[strategy]) ** 2)
    decay = config.shared_decay
    return state.replace(
        task_count=_added(state.task_count, task, count, config.task_decay),
        task_advantage=_added(state.task_advantage, task, advantage, config.task_decay),
        shared_count=_added(state.shared_count, ..., count, decay),
        shared_advantage=_added(state.shared_advantage, ..., advantage, decay),
        shared_square=_added(state.shared_square, ..., square, decay),
        shared_freedom=_added(state.shared_freedom, ..., len(strategy) - present.sum(), decay),
    )


def _added(
    statistics: np.ndarray, place: int | EllipsisType, values: np.ndarray, decay: float = 1.0
) -> np.ndarray:
    """A float32 copy of the statistics in which what stood at a place is decayed and values are added."""
    statistics = np.array(statistics, np.float32)
    statistics[place] = decay * statistics[place].astype(np.float64) + values
    return statistics


# --- What is reported ---


def metrics(state: State, task: int, config: Config) -> dict[str, float]:
    """For the history: {"pattern/NAME": probability} on a task."""
    chance = probabilities(state, task, config)
    return {f"pattern/{name}": float(p) for name, p in zip(STRATEGIES, chance, strict=True)}


def summary(state: State, task: int, config: Config) -> dict[str, dict[str, float | None]]:
    """For the report: by strategy its probability on a task, and the rewards of all its samples so far.

    Returns:
      {strategy: {"probability", "advantage", "mean_reward", "standard_error", "count"}}; the error, which
      takes samples for independent, is None below two samples, and the mean below one.
    """
    return _figures(state, task, config, *(np.sum(sums, axis=0, dtype=np.float64) for sums in _sums(state)))


def report(state: State, config: Config) -> dict[str, dict]:
    """For the report: the figures of `summary` over the stream and of each task.

    Returns:
      {"stream": figures, "tasks": {index: figures}}. Those of a task count its own samples. Those of the
      stream count all, and their probability and advantage are what a task never seen would start with.
    """
    unseen = extend(state, state.num_tasks + 1)
    return {
        "stream": summary(unseen, state.num_tasks, config),
        "tasks": {
            task: _figures(state, task, config, *(sums[task] for sums in _sums(state)))
            for task in range(state.num_tasks)
        },
    }


def _sums(state: State) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    return state.count, state.reward, state.reward_square


def _figures(
    state: State, task: int, config: Config, count: np.ndarray, total: np.ndarray, squares: np.ndarray
) -> dict[str, dict[str, float | None]]:
    """Probability and advantage on a task, and what sums [S] over samples say of their rewards."""
    chance, advantage = probabilities(state, task, config), advantages(state, task, config)
    result = {}
    for index, name in enumerate(STRATEGIES):
        n = float(count[index])
        mean = float(total[index]) / n if n else None
        variance = max(0.0, float(squares[index]) - n * mean**2) / (n - 1) if n > 1 else None
        result[name] = {
            "probability": float(chance[index]),
            "advantage": float(advantage[index]),
            "mean_reward": mean,
            "standard_error": math.sqrt(variance / n) if variance is not None else None,
            "count": int(n),
        }
    return result
