"""From buffers to a replayed batch: drawn by plan, its credit refreshed, its baseline lagged."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from streamsynth.feedback import diversity
from streamsynth.learner.collect import Written
from streamsynth.learner.objective import Replayed
from streamsynth.learner.state import RunState, TaskState
from streamsynth.learner.update import FLOORS
from streamsynth.pytrees import Array, Prompts, Rollouts, Scores
from streamsynth.runtime.mesh import constrain
from streamsynth.stream import replay


def samples_of(
    written: Written,
    scores: Scores,
    weight: Array,
    keep: Array,
    step: int,
    prompt_length: int | None = None,
) -> replay.Samples:
    """A rollout's N samples in the form that buffers hold: each with its own prompt.

    `keep`, [N] bool, says which of them the archive is about to absorb. Prompts of a shorter bucket are
    padded to the buffer's `prompt_length`; None leaves them as they are.
    """
    return _samples(
        written.rollouts,
        written.label,
        written.strategy,
        scores.features,
        scores.quality,
        weight,
        keep,
        np.int32(step),
        prompt_length=prompt_length,
    )


@functools.partial(jax.jit, static_argnames="prompt_length")
def _samples(
    rollouts: Rollouts,
    label: Array,
    strategy: Array,
    features: Array,
    quality: Array,
    weight: Array,
    keep: Array,
    step: Array,
    *,
    prompt_length: int | None,
) -> replay.Samples:
    length = rollouts.prompts.tokens.shape[1]
    missing = ((0, 0), (0, (prompt_length or length) - length))
    group = rollouts.tokens.shape[0] // rollouts.prompts.tokens.shape[0]
    return replay.Samples(
        prompt_tokens=jnp.pad(jnp.repeat(rollouts.prompts.tokens, group, axis=0), missing),
        prompt_mask=jnp.pad(jnp.repeat(rollouts.prompts.mask, group, axis=0), missing),
        tokens=rollouts.tokens,
        mask=rollouts.mask,
        logprobs=rollouts.logprobs,
        label=label,
        strategy=strategy,
        features=features,
        quality=quality,
        weight=weight,
        counted=keep.astype(jnp.float32),
        step=jnp.full(label.shape, step, jnp.int32),
    )


def replayed_batch(
    state: RunState,
    counts: np.ndarray,
    size: int,
    key: jax.Array,
    *,
    elite: float,
    decay: float,
    neutral: bool,
    diverse: bool = True,
) -> tuple[Replayed, RunState]:
    """`counts[j]` samples of each past task j, ready to learn from, and the state with moved baselines.

    The diversity credit of a stored sample is computed anew against today's archive of its task, less
    its own share where the archive counts it. Quality and credit are compared with running means of the
    task's earlier replayed batches, so that a sample never has a say in its own baseline.

    Args:
      state: before the update.
      counts: [tasks] int, from the scheduler's plan.
      size: M, at least `counts.sum()`; static.
      key: of the draw.
      elite: quality from which a sample is one to imitate.
      decay: of the running means.
      neutral: whether novelty is credit beyond what the sample's weight is usually worth, as for fresh
        samples, or credit beyond what credit usually is.
      diverse: whether diversity is paid at all.
    """
    past = [j for j in range(len(counts)) if counts[j]] or [0]
    draw = replay.sample_tasks(
        [state.tasks[j].buffer for j in past], np.asarray([counts[j] for j in past]), key, size
    )
    found, tasks = _nothing_found(size), list(state.tasks)
    for place, j in enumerate(past):
        tasks[j], found = _refreshed(tasks[j], draw, np.int32(place), found, np.float32(decay))
    share = state.balance.alpha if diverse else np.float32(0)
    batch = _batch(draw, found, share, state.spread.mean_square, np.float32(elite), neutral=neutral)
    return batch, state.replace(tasks=tuple(tasks))


# What a replayed sample is worth today and what is usual, by name: [M] each.
Found = tuple[Array, dict[str, Array]]


@functools.partial(jax.jit, static_argnames="size")
def _nothing_found(size: int) -> Found:
    """Lying where `_refreshed` gives it back: that is one program then."""
    nothing = jnp.zeros(size, jnp.float32)
    return constrain((nothing, dict.fromkeys(("quality", "weight", "credit"), nothing)), "scores")


# A program for each number of labels, and none for each choice of past tasks.
@jax.jit
def _refreshed(
    task: TaskState, draw: replay.Draw, place: Array, found: Found, decay: Array
) -> tuple[TaskState, Found]:
    """One task's part of a draw: its baselines moved on, and `found` filled where samples are its own."""
    s, (credit, usual) = draw.samples, found
    mine = (draw.task == place) & draw.valid
    last = task.archive.matrix.shape[0] - 1
    e = diversity.weighted(s.features, s.weight)
    fresh = diversity.marginal(task.archive, e, jnp.minimum(s.label, last), s.counted)
    credit = jnp.where(mine, fresh, credit)
    usual = {name: jnp.where(mine, getattr(task, name), kept) for name, kept in usual.items()}
    task = task.replace(
        quality=_moved(task.quality, s.quality, mine, decay),
        weight=_moved(task.weight, s.weight, mine, decay),
        credit=_moved(task.credit, fresh, mine, decay),
    )
    return task, constrain((credit, usual), "scores")


@functools.partial(jax.jit, static_argnames="neutral")
def _batch(
    draw: replay.Draw,
    found: Found,
    alpha: Array,
    mean_square: dict[str, Array],
    elite: Array,
    *,
    neutral: bool,
) -> Replayed:
    """The draw as it is learned from: quality and novelty compared, scaled and weighed."""
    s, (credit, usual) = draw.samples, found
    expected = usual["credit"]
    if neutral:
        expected = s.weight * expected / jnp.maximum(usual["weight"], FLOORS["quality"])

    def scaled(values: Array, part: str) -> Array:
        return values / jnp.maximum(jnp.sqrt(mean_square[part]), FLOORS[part])

    share = alpha / (1.0 + alpha)
    advantage = (1.0 - share) * scaled(s.quality - usual["quality"], "quality")
    advantage += share * scaled(credit - expected, "diversity")
    batch = Replayed(
        prompts=Prompts(s.prompt_tokens, s.prompt_mask, s.label, s.strategy),
        tokens=s.tokens,
        mask=s.mask & draw.valid[:, None],
        behaviour=s.logprobs,
        advantage=jnp.where(draw.valid, advantage, 0.0),
        elite=s.quality >= elite,
        valid=draw.valid,
    )
    return constrain(batch, "rollouts")


@functools.partial(jax.jit, static_argnames="archive_decay")
def remember(
    task: TaskState,
    samples: replay.Samples,
    keep: Array,
    key: jax.Array,
    decay: float,
    archive_decay: float,
    scored: Array | None = None,
) -> TaskState:
    """The task's state after a batch: samples offered to its buffer, the kept ones absorbed by its archive.

    The archive decays first. The credit of the samples, the offered ones and those whose slot depends on it,
    is what each adds to the archive as it is after the batch, less its own share: what a draw would find.
    The baselines start from the fresh samples' means, so that replay finds them in place.

    Args:
      task: before the batch.
      samples: all of the batch.
      keep: [N] bool, which of them the archive absorbs.
      key: of the reservoir.
      decay: of the baselines.
      archive_decay: what is left of a sample's weight in the archive after each later batch of its task.
      scored: [N] bool, which samples are offered and counted; all by default.
    """
    e = diversity.weighted(samples.features, samples.weight)
    archive, buffer = task.archive, task.buffer
    if archive_decay < 1:
        archive, buffer = diversity.decay(archive, archive_decay), replay.decay(buffer, archive_decay)
    archive = diversity.absorb(archive, e, samples.label, keep)
    chosen = buffer.chosen
    refreshed = diversity.marginal(
        archive, diversity.weighted(chosen.features, chosen.weight), chosen.label, chosen.counted
    )
    credit = diversity.marginal(archive, e, samples.label, samples.counted)
    scored = jnp.ones(keep.shape, bool) if scored is None else jnp.asarray(scored)
    decay = jnp.where(buffer.seen > 0, decay, 0.0)  # nothing came before the first batch
    return task.replace(
        buffer=replay.insert(buffer, samples, key, credit, refreshed, scored),
        archive=archive,
        quality=_moved(task.quality, samples.quality, scored, decay),
        weight=_moved(task.weight, samples.weight, scored, decay),
        credit=_moved(task.credit, credit, scored, decay),
        kept=task.kept + keep.sum(dtype=jnp.int32),
    )


def _moved(mean: Any, values: Array, mine: Array, decay: Array | float) -> jax.Array:
    count = mine.sum()
    new = jnp.where(mine, values, 0.0).sum() / jnp.maximum(count, 1)
    return jnp.where(count > 0, decay * mean + (1.0 - decay) * new, mean)
