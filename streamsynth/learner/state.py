"""Everything a run has learned and where it stands: one pytree, and exactly what a checkpoint holds.

Whatever is not in it follows from (config, step).
"""

from __future__ import annotations

from typing import Any

import flax.struct
import jax
import numpy as np
from flax import serialization
from jax.sharding import Mesh

from streamsynth.feedback import diversity
from streamsynth.learner import advantages, balance
from streamsynth.learner.update import PARTS
from streamsynth.pytrees import Array
from streamsynth.runtime import mesh as mesh_lib
from streamsynth.stream import patterns, replay, scheduler


@flax.struct.dataclass
class TaskState:
    """What is remembered of one task.

    buffer: its replay buffer.   archive: what is kept, per label, as diversity sees it.
    quality, weight, credit: [] float32, running means over its samples, fresh and replayed: the lagged
      baselines. The weight is r(q).
    kept: [] int32, rows in its journal.
    """

    buffer: replay.Buffer
    archive: diversity.Archive
    quality: Array
    weight: Array
    credit: Array
    kept: Array


@flax.struct.dataclass
class RunState:
    """The state of a run.

    Attributes:
      turn: [] int32, turns that are finished.
      turn_step: [] int32, steps taken in the present turn; the first one only measures.
      step: [] int32, steps taken in all. It names the random keys and never runs back.
      policy_version: [] int32, updates taken in all, by tuning and by reward.
      samples: [] int64, texts written so far to learn from or to probe: the budget that was used.
      params: what is trained of the policy's variables: {"params": tree}, or {"lora": adapter} where the
        network itself is frozen. Then a checkpoint holds the adapter alone.
      reference: the snapshot of the same that KL refers to.
      opt_state: the optimizer's.
      tasks: one TaskState a task.
      patterns, scheduler: their states.
      spread, balance: the running deviations of the parts, and alpha with its target.
      transfer: [tasks + 1, tasks] float32, R[i, j], NaN where not measured.
      journals: [2 + tasks] int64, bytes of the metrics and evaluations journals and of each task's rows.
    """

    turn: Array
    turn_step: Array
    step: Array
    policy_version: Array
    samples: Array
    params: Any
    reference: Any
    opt_state: Any
    tasks: tuple[TaskState, ...]
    patterns: patterns.State
    scheduler: scheduler.State
    spread: advantages.Spread
    balance: balance.Balance
    transfer: Array
    journals: Array


def new_buffer(config: Any) -> replay.Buffer:
    """An empty replay buffer: of `replay.capacity` slots, or as many as fit into `replay.megabytes`.

    Raises:
      UserError: not even one sample fits.
    """
    r, c = config.rollout, config.replay
    widths = (r.prompt_length, r.completion_length, config.feedback.width)
    capacity = min(c.capacity, replay.capacity_for(int(c.megabytes * 1e6), *widths)) if c.capacity else 0
    elite, leverage = (int(capacity * share + 1e-6) for share in (c.elite_share, c.leverage_share))
    return replay.empty(capacity, *widths, elite, min(leverage, capacity - elite))


def new_task(config: Any, num_labels: int) -> TaskState:
    """Nothing remembered yet."""
    return TaskState(
        buffer=new_buffer(config),
        archive=diversity.empty(num_labels, config.feedback.width, config.feedback.ridge),
        quality=np.float32(0),
        weight=np.float32(0),
        credit=np.float32(0),
        kept=np.int32(0),
    )


def new_state(
    config: Any,
    labels: tuple[int, ...],
    params: Any,
    opt_state: Any,
    experience: patterns.State | None = None,
) -> RunState:
    """The state before anything.

    Args:
      config: the whole config.
      labels: number of labels of each task.
      params: what is trained, before anything.
      opt_state: a fresh one.
      experience: what the patterns of an earlier run had learned.
    """
    count = len(labels)
    return RunState(
        turn=np.int32(0),
        turn_step=np.int32(0),
        step=np.int32(0),
        policy_version=np.int32(0),
        samples=np.int64(0),
        params=params,
        reference=params,
        opt_state=opt_state,
        tasks=tuple(new_task(config, k) for k in labels),
        patterns=patterns.inherit(experience, count) if experience else patterns.empty(count),
        scheduler=scheduler.empty(count),
        spread=advantages.initial_spread((*PARTS, *config.feedback.secondary)),
        balance=balance.initial(config.balance.alpha, 0.0),
        transfer=np.full((count + 1, count), np.nan, np.float32),
        journals=np.zeros(2 + count, np.int64),
    )


def extend(state: RunState, config: Any, labels: tuple[int, ...]) -> RunState:
    """The state with places for tasks appended to the stream."""
    count, old = len(labels), len(state.tasks)
    transfer = np.full((count + 1, count), np.nan, np.float32)
    transfer[: old + 1, :old] = state.transfer
    journals = np.zeros(2 + count, np.int64)
    journals[: 2 + old] = state.journals
    return state.replace(
        tasks=(*state.tasks, *(new_task(config, k) for k in labels[old:])),
        patterns=patterns.extend(state.patterns, count),
        scheduler=scheduler.extend(state.scheduler, count),
        transfer=transfer,
        journals=journals,
    )


def remembered_shardings(state: RunState, mesh: Mesh) -> dict[str, Any]:
    """Where what a state remembers lies, as far as programs work on it: by part, trees like each."""

    def by(array: str, tree: Any) -> Any:
        return jax.tree.map(lambda leaf: mesh_lib.sharding(array, mesh, np.shape(leaf)), tree)

    tasks = tuple(
        by("statistics", task).replace(buffer=by("replay", task.buffer), archive=by("archive", task.archive))
        for task in state.tasks
    )
    return {
        "tasks": tasks,
        "spread": by("statistics", state.spread),
        "balance": by("statistics", state.balance),
    }


def to_tree(state: RunState) -> dict[str, Any]:
    """Nested dicts of arrays, as checkpoints hold them."""
    return serialization.to_state_dict(state)


def from_tree(template: RunState, tree: dict[str, Any]) -> RunState:
    """Inverse of `to_tree`, into the structure of `template`."""
    return serialization.from_state_dict(template, tree)
