"""The parts of a step: a batch is written and assessed, the policy updated, what came of it remembered."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from streamsynth.assemble import Setting
from streamsynth.dataset.rows import Row
from streamsynth.feedback import diversity
from streamsynth.feedback.reward import ATTRIBUTE, UTILITY
from streamsynth.feedback.utility import UTILITIES
from streamsynth.keys import numpy_rng, purpose_key
from streamsynth.learner.adherence import adherence
from streamsynth.learner.collect import Arrived, Scored, Written, arrive, dispatch, read, score, scores_of
from streamsynth.learner.objective import Fresh
from streamsynth.learner.pending import Pending
from streamsynth.learner.replaying import remember, replayed_batch, samples_of
from streamsynth.learner.state import RunState, TaskState
from streamsynth.learner.update import Assessment, assess, update
from streamsynth.policy.logprobs import sequence_logprobs
from streamsynth.pytrees import Array
from streamsynth.runtime import arrays
from streamsynth.stream import patterns, scheduler
from streamsynth.stream.kept import Kept
from streamsynth.stream.patterns import STRATEGIES
from streamsynth.tasks.attributes import asked_for
from streamsynth.tasks.question_answer import fields_of
from streamsynth.tasks.task import Task

_kept_of = jax.jit(diversity.kept)


@jax.jit
def _learned_from(mask: Array, counted: Array) -> Array:
    """[N, T] bool: the tokens of the samples that are counted."""
    return mask & counted[:, None]


@dataclasses.dataclass(frozen=True)
class Sampled:
    """A batch of the turn's task: as written, as scored, and what it is worth to the learner.

    weights: of the secondary parts.
    """

    written: Written
    scored: Scored
    assessment: Assessment
    weights: dict[str, float]


def sampled_batch(
    setting: Setting, state: RunState, asked: Task, kept: Kept, purpose: str, *steps: int
) -> Sampled:
    """Writes and judges one batch: see `dispatched` and `judged`."""
    pending = dispatched(setting, state, asked, kept, purpose, *steps)
    return judged(setting, state, arrive(pending), kept, purpose, *steps)


def dispatched(
    setting: Setting, state: RunState, asked: Task, kept: Kept, purpose: str, *steps: int
) -> Pending:
    """Sets the device to write one batch, in strategies drawn from what was learned of them.

    `asked` is the turn's task with the examples that prompts may show. Nothing is waited for: what the batch
    is follows from the state and from what is kept now, however long it takes.
    """
    config, turn, r = setting.config, int(state.turn), setting.config.rollout
    strategy = patterns.draw(
        state.patterns,
        turn,
        numpy_rng(config.seed, f"{purpose}/patterns", *steps),
        r.prompts,
        setting.patterns,
    )
    return dispatch(
        setting.model,
        setting.variables(state.params),
        setting.form,
        asked,
        strategy,
        seed=config.seed,
        purpose=purpose,
        steps=steps,
        samples=r.samples,
        temperature=r.temperature,
        place=setting.place,
        best=kept.best,
        version=int(state.policy_version),
    )


def judged(
    setting: Setting, state: RunState, arrived: Arrived, kept: Kept, purpose: str, *steps: int
) -> Sampled:
    """Reads and judges a batch of the turn's task; near-duplicates are those of what is kept now."""
    turn, f, b = int(state.turn), setting.config.feedback, setting.config.balance
    written = read(setting.form, setting.tasks[turn], arrived, f"{purpose} {steps}")
    task, reward, weights = setting.tasks[turn], setting.rewards[turn], _secondary(setting, turn)
    scored = score(task, written, reward, setting.featurize, kept.seen, f, (purpose, *steps))
    if ATTRIBUTE in weights:
        scored = scored.with_secondary(ATTRIBUTE, _adherence(setting, task, written), f.accept)
    utility = _utility(setting, turn, scored, written) if UTILITY in weights else None
    assessment = assess(
        state.tasks[turn].archive,
        setting.place(dataclasses.replace(scored.scores, parts={})),
        setting.place(written.label),
        state.spread,
        state.balance,
        samples=setting.config.rollout.samples,
        floor=f.floor,
        power=f.power,
        eta=b.eta,
        alpha_max=b.alpha_max,
        weighted=b.weighted,
        neutral=b.neutral,
        remembered=b.archive,
        reward=setting.config.learner.reward,
        choices=setting.objective.choices,
        constants=setting.rivals,
        elsewhere=_elsewhere(state.tasks[:turn], f.width, b.others) if b.others else None,
        secondary=tuple(weights.items()),
        utility=utility,
    )
    return Sampled(written, scored, assessment, weights)


def _secondary(setting: Setting, turn: int) -> dict[str, float]:
    """The weights of the secondary parts that there are for a task."""
    there = {*setting.rewards[turn].secondary, UTILITY}
    if setting.tasks[turn].attributes:
        there.add(ATTRIBUTE)
    weights = setting.config.feedback.secondary.to_dict()
    return {name: weight for name, weight in weights.items() if weight and name in there}


def _adherence(setting: Setting, task: Task, written: Written) -> np.ndarray:
    """[N] float32, by the frozen base policy where a value has no test."""
    return adherence(
        setting.model,
        setting.policy.variables,
        setting.form,
        task,
        written.texts,
        written.label,
        written.cell,
        written.rollouts.tokens,
        written.rollouts.mask,
        samples=setting.config.rollout.samples,
        chunk=setting.config.objective.chunk,
        microbatches=setting.config.learner.microbatches,
    )


def _utility(setting: Setting, turn: int, scored: Scored, written: Written) -> jax.Array:
    """[N]: what each accepted sample does for a student that is validated on the task's examples."""
    f, scores = setting.config.feedback, scored.scores
    features, label = setting.examples[turn]
    accepted = scores.scored & (np.asarray(scores.quality) >= f.accept)
    return UTILITIES[f.utility.form](
        scores.features,
        written.label,
        accepted.astype(np.float32),
        features,
        label,
        len(setting.tasks[turn].labels),
        setting.student,
    )


def updated(
    setting: Setting, state: RunState, sampled: Sampled, plan: scheduler.Plan
) -> tuple[RunState, dict[str, Any]]:
    """The state after an update on a batch and on what `plan` replays, and the update's figures."""
    config = setting.config
    rollouts, assessment = sampled.written.rollouts, sampled.assessment
    temperature = np.float32(config.rollout.temperature)
    fresh = Fresh(
        prompts=rollouts.prompts,
        tokens=rollouts.tokens,
        mask=_learned_from(rollouts.mask, assessment.counted),
        behaviour=rollouts.logprobs,
        reference=sequence_logprobs(
            setting.model,
            setting.variables(state.reference),
            rollouts.prompts,
            rollouts.tokens,
            rollouts.mask,
            temperature,
            chunk=config.objective.chunk,
            microbatches=config.learner.microbatches,
        ),
        advantage=assessment.advantage,
    )
    replayed = None
    if setting.scheduler.max_replayed:  # in the first turn a batch of none: one program serves all turns
        replayed, state = replayed_batch(
            state,
            plan.replay_counts,
            setting.scheduler.max_replayed,
            purpose_key(config.seed, "replay", int(state.step)),
            elite=config.replay.elite,
            decay=config.replay.baseline_decay,
            neutral=config.balance.neutral,
            diverse=config.learner.reward == "credit",
        )
    params, opt_state, metrics = update(
        setting.model,
        setting.optimizer,
        setting.objective,
        state.params,
        setting.frozen,
        state.opt_state,
        fresh,
        replayed,
        temperature,
    )
    version = np.int32(state.policy_version + 1)
    return state.replace(params=params, opt_state=opt_state, policy_version=version), metrics


def _elsewhere(past: Sequence[TaskState], width: int, others: float) -> np.ndarray:
    """[D, D] float32: what past tasks kept, as it counts under every label of this turn's task."""
    kept = [arrays.fetch(_kept_of(task.archive)) for task in past]
    return others * np.sum([np.zeros((width, width), np.float32), *kept], axis=0)


def remembered(
    setting: Setting,
    state: RunState,
    sampled: Sampled,
    kept: Kept,
    version: int,
    purpose: str,
    *steps: int,
) -> tuple[RunState, np.ndarray]:
    """The state with a batch in its buffer, archive and statistics, and which samples were kept, [N] bool.

    `version` is the writing policy's.
    """
    config, turn = setting.config, int(state.turn)
    written, scores, assessment = sampled.written, sampled.scored.scores, sampled.assessment
    quality, counted = np.asarray(scores.quality), scores.scored
    identities = [setting.tasks[turn].identity(text) for text in written.texts]
    keep = _kept(identities, quality, config.feedback.accept, kept)
    task = remember(
        state.tasks[turn],
        samples_of(written, scores, assessment.weight, keep, version, config.rollout.prompt_length),
        keep,
        purpose_key(config.seed, purpose, *steps),
        config.replay.baseline_decay,
        config.balance.decay,
        counted,
    )
    state = state.replace(
        tasks=(*state.tasks[:turn], task, *state.tasks[turn + 1 :]),
        patterns=_recorded(setting, state.patterns, turn, sampled),
        spread=assessment.spread,
        samples=np.int64(state.samples + len(keep)),
    )
    return state, keep


def _recorded(setting: Setting, state: patterns.State, turn: int, sampled: Sampled) -> patterns.State:
    """The statistics of strategies after a batch: what its prompts' samples earned.

    A sample without a score counts as the mean of its prompt's others, and a prompt without any not at all.
    """
    group = setting.config.rollout.samples
    earned = np.where(sampled.scored.scores.scored, arrays.fetch(sampled.assessment.earned), np.nan)
    earned = earned.reshape(-1, group)
    there = np.isfinite(earned).any(axis=1)
    if not there.any():
        return state
    earned = earned[there]
    filled = np.where(np.isfinite(earned), earned, np.nanmean(earned, axis=1, keepdims=True))
    strategy = sampled.written.strategy[::group][there]
    return patterns.record(state, turn, strategy, filled.reshape(-1), setting.patterns)


def _kept(texts: Sequence[str], quality: np.ndarray, accept: float, kept: Kept) -> np.ndarray:
    """[N] bool: good enough, and no near-duplicate of a kept text, those of this batch included."""
    keep = np.zeros(len(texts), bool)
    for i in np.flatnonzero(quality >= accept):
        if not kept.seen(texts[i]):
            kept.add(texts[i])
            keep[i] = True
    return keep


def rows_of(task: Task, sampled: Sampled, keep: np.ndarray, step: int, version: int, kept: Kept) -> list[Row]:
    """The rows of the samples with `keep`, which join what later prompts may show."""
    written, scores = sampled.written, sampled.scored.scores
    credit = arrays.fetch(sampled.assessment.credit)
    group = len(written.label) // len(written.shown)
    rows = [
        Row(
            fields=fields_of(task, written.texts[i]),
            label=task.labels[written.label[i]],
            pattern=STRATEGIES[written.strategy[i]],
            step=step,
            policy_version=version,
            examples=written.shown[i // group],
            scores={
                **scores_of(scores, i),
                "diversity": float(credit[i]),
            },
            attributes=asked_for(task.attributes, task.cells[written.cell[i]]),
        )
        for i in np.flatnonzero(keep)
    ]
    for row in rows:
        kept.remember(row)
    return rows
