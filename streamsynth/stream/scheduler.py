"""In which order the stream learns: this turn's task, and how much of which past tasks beside it.

Task j is learned in turn j (both from 0), and in turn i only the tasks 0..i exist: nothing here reads
the statistics of a later one. A turn's own task always gets the whole fresh batch; past tasks come
back as replayed samples, whose share grows from 0 in the first turn. The state is one small array per
statistic with a place per task, and lives on the host.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable

import flax.struct
import jax
import numpy as np

from streamsynth.errors import UserError


@dataclasses.dataclass(frozen=True)
class Config:
    """How past tasks are chosen.

    Attributes:
      strategy: a name in `STRATEGIES`.
      samples: fresh samples a step (N); the unit of the share.
      share: replayed samples as a share of the fresh ones, once it is fully grown; 0 is no replay.
      ramp: turns until the share is fully grown; in turn i it is share * min(1, i / ramp).
      floor: what every past task's weight in "progress" has at least; above 0.
      progress: weight of the learning progress |fast - slow| of a task's quality.
      forgetting: weight of what the probes say was lost, max(0, best - last).
      optimism: weight of 1 / sqrt(1 + visits), for tasks that were seldom seen.
      staleness: steps after which an unseen past task is drawn whatever its weight is ("progress" only).
      fast: decay of the fast running mean of quality.
      slow: decay of the slow one.
      probe_every: steps of a turn after which a past task is probed; 0 probes none.
    """

    strategy: str = "progress"
    samples: int = 128
    share: float = 0.25
    ramp: int = 2
    floor: float = 0.05
    progress: float = 1.0
    forgetting: float = 1.0
    optimism: float = 0.1
    staleness: int = 10
    fast: float = 0.7
    slow: float = 0.95
    probe_every: int = 4

    def __post_init__(self):
        if self.strategy not in STRATEGIES:
            raise UserError(f"scheduler.strategy is {self.strategy!r}: choose one of {', '.join(STRATEGIES)}")
        zero_or_more = dict.fromkeys(("share", "progress", "forgetting", "optimism", "probe_every"), 0)
        for name, least in {"samples": 1, "ramp": 1, "staleness": 1, **zero_or_more}.items():
            value = getattr(self, name)
            if not (math.isfinite(value) and value >= least):
                raise UserError(f"scheduler.{name} is {value}: it must be at least {least}")
        if not (math.isfinite(self.floor) and self.floor > 0):
            raise UserError(f"scheduler.floor is {self.floor}: it must be above 0")
        if not 0 <= self.fast < self.slow < 1:
            raise UserError(
                f"scheduler.fast is {self.fast} and scheduler.slow is {self.slow}: "
                "they must be in [0, 1), fast below slow"
            )

    def replayed(self, turn: int) -> int:
        """Replayed samples of a step in that turn, rounded to the nearest."""
        return int(self.samples * self.share * min(1.0, turn / self.ramp) + 0.5)

    @property
    def max_replayed(self) -> int:
        """The most that a step can replay: the static size of a replayed batch."""
        return self.replayed(self.ramp)


@flax.struct.dataclass
class State:
    """What is known of each task, [tasks] arrays.

    visits: int32, steps in which the task was learned from, fresh or replayed.
    last_step: int32, the last such step; -1 before any.
    observations: int32, qualities recorded.
    fast, slow: float32, running means of quality; 0 before any.
    probes: int32, probes recorded.
    best_probe, last_probe: float32; 0 before any.
    probed: int32, the step of the last probe; -1 before any.
    """

    visits: np.ndarray
    last_step: np.ndarray
    observations: np.ndarray
    fast: np.ndarray
    slow: np.ndarray
    probes: np.ndarray
    best_probe: np.ndarray
    last_probe: np.ndarray
    probed: np.ndarray

    @property
    def num_tasks(self) -> int:
        return self.visits.shape[0]

    @property
    def progress(self) -> np.ndarray:
        """[tasks] float32, learning progress: how fast quality moves, up or down."""
        return np.abs(np.asarray(self.fast) - self.slow)

    @property
    def forgetting(self) -> np.ndarray:
        """[tasks] float32, how far the last probe is below the best one."""
        return np.maximum(0.0, np.asarray(self.best_probe) - self.last_probe)


@dataclasses.dataclass(frozen=True)
class Plan:
    """What one step learns from.

    fresh_task: the task that gets fresh samples.
    replay_counts: [tasks] int32, replayed samples by task; 0 for this turn's task and later ones.
    """

    fresh_task: int
    replay_counts: np.ndarray


def empty(num_tasks: int) -> State:
    """The state before anything."""
    integers, floats = np.zeros(num_tasks, np.int32), np.zeros(num_tasks, np.float32)
    return State(
        visits=integers,
        last_step=integers - 1,
        observations=integers,
        fast=floats,
        slow=floats,
        probes=integers,
        best_probe=floats,
        last_probe=floats,
        probed=integers - 1,
    )


def extend(state: State, num_tasks: int) -> State:
    """The state with places for tasks appended to the stream; what was there stays as it is."""
    if num_tasks < state.num_tasks:
        raise ValueError(f"cannot take {state.num_tasks} tasks of a stream back to {num_tasks}")
    new = empty(num_tasks - state.num_tasks)
    return jax.tree.map(lambda old, added: np.concatenate([np.asarray(old), added]), state, new)


def next(state: State, turn: int, step: int, rng: np.random.Generator, config: Config) -> tuple[Plan, State]:
    """Plans a step.

    Args:
      state: with a place for this turn's task at least.
      turn: from 0; the index of the task whose turn it is.
      step: from 0, over the whole stream.
      rng: this step's own, for instance `keys.numpy_rng(seed, "scheduler", step)`.
      config: the same for the whole stream.

    Returns:
      The plan, and the state in which the planned tasks count as visited.
    """
    if not 0 <= turn < state.num_tasks:
        raise ValueError(f"turn {turn} has no task among {state.num_tasks}")
    counts = np.zeros(state.num_tasks, np.int32)
    total = config.replayed(turn)
    if total:
        past = jax.tree.map(lambda leaf: np.asarray(leaf)[:turn], state)
        counts[:turn] = STRATEGIES[config.strategy](past, total, step, rng, config)
    seen = counts > 0
    seen[turn] = True
    state = state.replace(
        visits=np.asarray(state.visits) + seen.astype(np.int32),
        last_step=np.where(seen, np.int32(step), state.last_step),
    )
    return Plan(fresh_task=turn, replay_counts=counts), state


def record(state: State, task: int, quality: float, config: Config) -> State:
    """Takes in the mean quality of fresh samples of a task. The first one starts both running means."""
    _check_finite("quality", quality)
    first = state.observations[task] == 0

    def moved(means: np.ndarray, decay: float) -> np.ndarray:
        value = quality if first else decay * means[task] + (1 - decay) * quality
        return _with(means, task, value)

    return state.replace(
        observations=_with(state.observations, task, state.observations[task] + 1),
        fast=moved(state.fast, config.fast),
        slow=moved(state.slow, config.slow),
    )


def to_probe(state: State, turn: int, steps: int, last: bool, config: Config) -> tuple[int, ...]:
    """The tasks to be probed after `steps` steps of a turn.

    Every so many steps it is the past task that has waited longest, and after the turn's last step its own
    task too: the best that is known of a task when others begin to change the policy.
    """
    if not config.probe_every:
        return ()
    past = turn > 0 and steps % config.probe_every == 0
    longest = (int(np.argmin(np.asarray(state.probed)[:turn])),) if past else ()
    return longest + ((turn,) if last else ())


def record_probe(state: State, task: int, value: float, step: int) -> State:
    """Takes in a probe of a task: the same measure every time, the higher the better."""
    _check_finite("probe", value)
    best = value if state.probes[task] == 0 else max(float(state.best_probe[task]), value)
    return state.replace(
        probes=_with(state.probes, task, state.probes[task] + 1),
        best_probe=_with(state.best_probe, task, best),
        last_probe=_with(state.last_probe, task, value),
        probed=_with(state.probed, task, step),
    )


def _check_finite(what: str, value: float) -> None:
    if not math.isfinite(value):
        raise ValueError(f"a {what} of {value} would stay in the running statistics")


def _with(array: np.ndarray, index: int, value: float) -> np.ndarray:
    array = np.array(array)
    array[index] = value
    return array


# --- How past tasks are chosen: (state of the past tasks, samples, step, rng, config) -> samples by task ---


def _progress(past: State, total: int, step: int, rng: np.random.Generator, config: Config) -> np.ndarray:
    """One sample for each task that has waited too long, the rest by progress, forgetting and optimism."""
    counts = np.zeros(past.num_tasks, np.int32)
    stale = np.flatnonzero(step - past.last_step >= config.staleness)
    longest = stale[np.argsort(past.last_step[stale], kind="stable")][:total]
    counts[longest] = 1
    weights = (
        config.floor
        + config.progress * past.progress
        + config.forgetting * past.forgetting
        + config.optimism / np.sqrt(1.0 + past.visits)
    )
    return counts + allocate(weights, total - len(longest), rng)


def _uniform(past: State, total: int, step: int, rng: np.random.Generator, config: Config) -> np.ndarray:
    del step, config
    return allocate(np.ones(past.num_tasks), total, rng)


def _round_robin(past: State, total: int, step: int, rng: np.random.Generator, config: Config) -> np.ndarray:
    """All to the task that has waited longest, so that they take turns."""
    del step, rng, config
    counts = np.zeros(past.num_tasks, np.int32)
    counts[np.argmin(past.last_step)] = total
    return counts


def _current_only(past: State, total: int, step: int, rng: np.random.Generator, config: Config) -> np.ndarray:
    del total, step, rng, config
    return np.zeros(past.num_tasks, np.int32)


STRATEGIES: dict[str, Callable[[State, int, int, np.random.Generator, Config], np.ndarray]] = {
    "progress": _progress,
    "uniform": _uniform,
    "round_robin": _round_robin,
    "current_only": _current_only,
}


def allocate(weights: np.ndarray, total: int, rng: np.random.Generator) -> np.ndarray:
    """Shares out `total` whole samples in proportion to weights, by systematic resampling (Kitagawa 1996).

    Args:
      weights: [n], at least 0 and not all 0.
      total: samples to share out.
      rng: gives one number.

    Returns:
      [n] int32 that sums to `total`. Each is its exact share rounded up or down, and has the exact share
      as its mean; independent draws would have the same means and vary more.
    """
    weights = np.asarray(weights, np.float64)
    # Rounding must neither lose the last sample nor make a count negative.
    edges = np.minimum(np.cumsum(weights) / np.sum(weights) * total, total)
    edges[-1] = total
    return np.diff(np.floor(edges + rng.random()), prepend=0.0).astype(np.int32)
