"""One turn: what is set at its beginning, and its steps. Write, judge, credit, update, remember."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from streamsynth import assemble as assemble_lib
from streamsynth.assemble import Setting
from streamsynth.dataset.near_duplicates import NearDuplicates
from streamsynth.dataset.rows import Row
from streamsynth.feedback import diversity
from streamsynth.keys import numpy_rng, purpose_key
from streamsynth.learner import balance
from streamsynth.learner.collect import (
    Scored,
    Written,
    failures,
    mean_known,
    score,
    scores_of,
    write,
)
from streamsynth.learner.objective import Fresh
from streamsynth.learner.replaying import remember, replayed_batch, samples_of
from streamsynth.learner.state import RunState, new_task
from streamsynth.learner.update import Assessment, assess, update
from streamsynth.policy.logprobs import sequence_logprobs
from streamsynth.stream import patterns, scheduler
from streamsynth.stream.patterns import STRATEGIES
from streamsynth.tasks.question_answer import fields_of
from streamsynth.tasks.task import Task
from streamsynth.tuning import example_features, split_examples, spread_out_rows, tune


def begin_turn(
    setting: Setting, state: RunState, seen: NearDuplicates
) -> tuple[RunState, dict[str, float], list[Row]]:
    """The first step of a turn: nothing is learned by reward yet.

    The isolated learner forgets everything. Batches of the base policy give the diversity that is to be
    held. Then, in rounds, the policy writes, and is tuned to the examples and to a spread-out choice of all
    that was kept: many different texts, each of which the judges accepted, teach a language without
    narrowing it, which a few examples would. Last, KL's reference is set.

    Args and returns are as in `learn`.
    """
    config, turn, step = setting.config, int(state.turn), int(state.step)
    if config.stream.experience == "isolated" and turn:
        state = _forget(setting, state)
    state = assemble_lib.on_mesh(setting, state.replace(balance=balance.initial(config.balance.alpha, 0.0)))

    task = setting.tasks[turn]
    # What is tuned to comes of prompts that do not show what is held out to measure the tuning.
    asked = dataclasses.replace(task, examples=split_examples(task, config.supervised.held_out)[0])
    rows, features, quality, statistics, held_out, dropped, failed = [], [], [], [], [], 0, []

    def written(params: Any, version: int, purpose: str, *steps: int) -> Assessment:
        """Writes a batch with the given parameters; what is kept of it goes into `rows`."""
        nonlocal state, dropped
        sampled = _sampled(setting, state.replace(params=params), asked, seen, purpose, *steps)
        dropped += sampled.written.dropped_examples
        state, keep = _remembered(setting, state, sampled, seen, version, purpose, *steps)
        rows.extend(_rows(setting.tasks[turn], sampled, keep, step, version))
        features.append(np.asarray(sampled.scored.scores.features)[keep])
        quality.append(sampled.scored.quality)
        failed.append(sampled.scored.failed)
        return sampled.assessment

    # --- The diversity to hold ---
    # That of the base policy: held from turn to turn, a little would be lost each time.
    own = config.balance.target == "policy"
    measured = (state.params, int(state.policy_version)) if own else (setting.initial, 0)
    for batch in range(config.balance.batches):
        statistics.append(float(written(*measured, "measure", step, batch).metrics["diversity/statistic"]))
    found = float(np.mean(statistics))
    if config.balance.target == "examples":
        found = _statistic_of_examples(setting, turn)
    target = found + float(np.log(config.balance.factor))

    # --- Texts to tune to, and the tuning ---
    for round_ in range(config.supervised.rounds):
        for batch in range(config.supervised.batches):
            written(state.params, int(state.policy_version), "explore", step, round_, batch)
        chosen = spread_out_rows(setting, turn, rows, features) if config.supervised.rows else []
        state, losses = tune(setting, state, chosen, round_)
        held_out += losses
    reference = state.params if config.learner.kl_reference == "turn" else setting.initial
    state = state.replace(
        reference=assemble_lib.copy(reference),
        balance=balance.initial(config.balance.alpha, target),
        turn_step=np.int32(1),
        step=np.int32(step + 1),
    )
    figures = {
        "reward/quality": mean_known(quality),
        "diversity/statistic": float(np.mean(statistics)),
        "diversity/target": target,
        "kept": len(rows),
        "prompt/dropped_examples": dropped,
        **failures(failed),
    }
    if held_out:
        figures |= {"supervised/held_out_before": held_out[0], "supervised/held_out": held_out[-1]}
    return assemble_lib.on_mesh(setting, state), figures, rows


def learn(
    setting: Setting, state: RunState, seen: NearDuplicates
) -> tuple[RunState, dict[str, float], list[Row]]:
    """One step: write, score, credit, update, remember.

    Args:
      setting: the fixed parts.
      state: before the step.
      seen: the kept texts of this turn's task; those kept now are added.

    Returns:
      The state after it, the step's figures, and the rows that were kept.
    """
    config, turn, step = setting.config, int(state.turn), int(state.step)
    seed = config.seed

    # --- Plan, write, feedback and credit ---
    plan, scheduled = scheduler.next(
        state.scheduler, turn, step, numpy_rng(seed, "scheduler", step), setting.scheduler
    )
    sampled = _sampled(setting, state, setting.tasks[turn], seen, "rollout", step)
    written, scored, assessment = sampled.written, sampled.scored, sampled.assessment

    # --- Update ---
    rollouts = written.rollouts
    temperature = np.float32(config.rollout.temperature)
    fresh = Fresh(
        prompts=rollouts.prompts,
        tokens=rollouts.tokens,
        mask=rollouts.mask,
        behaviour=rollouts.logprobs,
        reference=sequence_logprobs(
            setting.model,
            setting.variables(state.reference),
            rollouts.prompts,
            rollouts.tokens,
            rollouts.mask,
            temperature,
            chunk=config.objective.chunk,
        ),
        advantage=assessment.advantage,
    )
    replayed = None
    if setting.scheduler.max_replayed:  # in the first turn a batch of none: one program serves all turns
        replayed, state = replayed_batch(
            state,
            plan.replay_counts,
            setting.scheduler.max_replayed,
            purpose_key(seed, "replay", step),
            elite=config.replay.elite,
            decay=config.replay.baseline_decay,
            neutral=config.balance.neutral,
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

    # --- Remember ---
    version = int(state.policy_version)
    state, keep = _remembered(setting, state, sampled, seen, version, "reservoir", step)
    if scored.scores.scored.any():
        scheduled = scheduler.record(scheduled, turn, scored.quality, setting.scheduler)
    state = state.replace(
        params=params,
        opt_state=opt_state,
        scheduler=scheduled,
        balance=assessment.balance,
        policy_version=np.int32(version + 1),
        turn_step=np.int32(state.turn_step + 1),
        step=np.int32(step + 1),
    )
    figures = {
        **scored.figures(setting.rewards[turn].weights()),
        **{f"gate/{name}": share for name, share in scored.gates.shares().items()},
        **{f"reject/{name}": written.rejections.count(name) for name in set(written.rejections) - {""}},
        **assessment.metrics,
        **metrics,
        "kept": keep.sum(),
        "prompt/dropped_examples": written.dropped_examples,
    }
    figures = {name: float(value) for name, value in jax.device_get(figures).items()}
    if not plan.replay_counts.any():
        figures = {name: value for name, value in figures.items() if not name.startswith("replay/")}
    return state, figures, _rows(setting.tasks[turn], sampled, keep, step, version)


# --- Parts of a step ---


@dataclasses.dataclass(frozen=True)
class _Sampled:
    """A batch of the turn's task: as written, as scored, and what it is worth to the learner."""

    written: Written
    scored: Scored
    assessment: Assessment


def _sampled(
    setting: Setting, state: RunState, asked: Task, seen: NearDuplicates, purpose: str, *steps: int
) -> _Sampled:
    """Writes and judges one batch, in strategies drawn from what was learned of them.

    `asked` is the turn's task with the examples that prompts may show.
    """
    config, turn = setting.config, int(state.turn)
    r, f, b = config.rollout, config.feedback, config.balance
    strategy = patterns.draw(
        state.patterns,
        turn,
        numpy_rng(config.seed, f"{purpose}/patterns", *steps),
        r.prompts,
        setting.patterns,
    )
    written = write(
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
    )
    where = (purpose, *steps)
    scored = score(
        setting.tasks[turn], written, setting.rewards[turn], setting.featurize, seen.seen, f, where
    )
    assessment = assess(
        state.tasks[turn].archive,
        setting.place(dataclasses.replace(scored.scores, parts={})),
        setting.place(written.label),
        state.spread,
        state.balance,
        samples=r.samples,
        floor=f.floor,
        power=f.power,
        eta=b.eta,
        alpha_max=b.alpha_max,
        weighted=b.weighted,
        neutral=b.neutral,
        remembered=b.archive,
        secondary=tuple((name, weight) for name, (_, weight) in setting.rewards[turn].secondary.items()),
    )
    return _Sampled(written, scored, assessment)


def _remembered(
    setting: Setting,
    state: RunState,
    sampled: _Sampled,
    seen: NearDuplicates,
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
    keep = _kept(identities, quality, config.feedback.accept, seen)
    task = remember(
        state.tasks[turn],
        samples_of(written, scores, assessment.weight, keep, version),
        assessment,
        keep,
        purpose_key(config.seed, purpose, *steps),
        config.replay.baseline_decay,
        counted,
    )
    state = state.replace(
        tasks=(*state.tasks[:turn], task, *state.tasks[turn + 1 :]),
        patterns=patterns.record(
            state.patterns, turn, written.strategy[counted], quality[counted], setting.patterns
        ),
        spread=assessment.spread,
    )
    return state, keep


def _kept(texts: Sequence[str], quality: np.ndarray, accept: float, seen: NearDuplicates) -> np.ndarray:
    """[N] bool: good enough, and no near-duplicate of a kept text, those of this batch included."""
    keep = np.zeros(len(texts), bool)
    for i in np.flatnonzero(quality >= accept):
        if not seen.seen(texts[i]):
            seen.add(texts[i])
            keep[i] = True
    return keep


def _rows(task: Task, sampled: _Sampled, keep: np.ndarray, step: int, version: int) -> list[Row]:
    written, scores, credit = sampled.written, sampled.scored.scores, np.asarray(sampled.assessment.credit)
    group = len(written.label) // len(written.shown)
    return [
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
        )
        for i in np.flatnonzero(keep)
    ]


def _statistic_of_examples(setting: Setting, turn: int) -> float:
    features, label = example_features(setting, turn)
    found, valid = diversity.statistic(
        jnp.asarray(features), jnp.ones(len(label)), jnp.asarray(label), len(setting.tasks[turn].labels)
    )
    return balance.target_from(found, valid)


def _forget(setting: Setting, state: RunState) -> RunState:
    """The isolated learner at the start of a turn: nothing is left of what was learned before it."""
    fresh = assemble_lib.first_state(setting)
    return fresh.replace(
        turn=state.turn,
        step=state.step,
        policy_version=state.policy_version,
        tasks=tuple(
            new_task(setting.config, len(task.labels)).replace(kept=old.kept)
            for task, old in zip(setting.tasks, state.tasks, strict=True)
        ),
        transfer=state.transfer,
        journals=state.journals,
    )
