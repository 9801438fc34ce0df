"""One turn: what is set at its beginning, and its steps. Write, judge, credit, update, remember."""

from __future__ import annotations

import dataclasses
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
from streamsynth.learner.collect import Scored, Written, score, write
from streamsynth.learner.lessons import example_lessons, lesson_batch
from streamsynth.learner.objective import Fresh
from streamsynth.learner.replaying import remember, replayed_batch, samples_of
from streamsynth.learner.state import RunState, new_task
from streamsynth.learner.supervised import supervised_step
from streamsynth.learner.update import Assessment, assess, update
from streamsynth.policy.logprobs import sequence_logprobs
from streamsynth.stream import patterns, scheduler
from streamsynth.stream.patterns import STRATEGIES
from streamsynth.tasks.task import Task, split_fields


def begin_turn(setting: Setting, state: RunState) -> tuple[RunState, dict[str, float]]:
    """The first step of a turn: nothing is learned by reward yet.

    The isolated learner forgets everything. The policy is tuned to the examples where the config says
    so, KL's reference is set, and batches that are not learned from give the deviations of the parts
    and the diversity that is to be held.
    """
    config, turn, step = setting.config, int(state.turn), int(state.step)
    if config.stream.experience == "isolated" and turn:
        state = _forget(setting, state)
    state = _tune_to_examples(setting, state)
    reference = state.params if config.learner.kl_reference == "turn" else setting.policy.params
    state = state.replace(reference=assemble_lib.copy(reference))
    task, archive = setting.tasks[turn], state.tasks[turn].archive
    statistics, quality = [], []
    state = assemble_lib.on_mesh(setting, state.replace(balance=balance.initial(config.balance.alpha, 0.0)))
    # What is to be held is the diversity of the base policy: held from turn to turn, a little would be lost
    # each time.
    measured = state if config.balance.target == "policy" else state.replace(params=setting.policy.params)
    for batch in range(config.balance.batches):
        rng = numpy_rng(config.seed, "measure/patterns", step, batch)
        strategy = patterns.draw(state.patterns, turn, rng, config.rollout.prompts, setting.patterns)
        written = _write(setting, measured, turn, strategy, "measure", (step, batch))
        scored = score(
            task, written, setting.rewards[turn], setting.featurize, lambda text: False, config.feedback
        )
        assessment = _assess(setting, archive, scored, written, state.spread, state.balance)
        state = state.replace(spread=assessment.spread)
        statistics.append(float(assessment.metrics["diversity/statistic"]))
        quality.append(float(scored.scores.quality.mean()))
    found = float(np.mean(statistics))
    if config.balance.target == "examples":
        found = _statistic_of_examples(setting, turn)
    state = state.replace(
        balance=balance.initial(config.balance.alpha, found + float(np.log(config.balance.factor))),
        turn_step=np.int32(1),
        step=np.int32(step + 1),
    )
    return assemble_lib.on_mesh(setting, state), {
        "reward/quality": float(np.mean(quality)),
        "diversity/statistic": float(np.mean(statistics)),
        "diversity/target": found + float(np.log(config.balance.factor)),
    }


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
    seed, task = config.seed, setting.tasks[turn]

    # --- Plan and write ---
    plan, scheduled = scheduler.next(
        state.scheduler, turn, step, numpy_rng(seed, "scheduler", step), setting.scheduler
    )
    strategy = patterns.draw(
        state.patterns, turn, numpy_rng(seed, "patterns", step), config.rollout.prompts, setting.patterns
    )
    written = _write(setting, state, turn, strategy, "rollout", (step,))

    # --- Feedback and credit ---
    scored = score(task, written, setting.rewards[turn], setting.featurize, seen.seen, config.feedback)
    assessment = _assess(setting, state.tasks[turn].archive, scored, written, state.spread, state.balance)

    # --- Update ---
    rollouts = written.rollouts
    temperature = np.float32(config.rollout.temperature)
    fresh = Fresh(
        prompts=rollouts.prompts,
        tokens=rollouts.tokens,
        mask=rollouts.mask,
        behaviour=rollouts.logprobs,
        reference=sequence_logprobs(
            setting.model, state.reference, rollouts.prompts, rollouts.tokens, rollouts.mask, temperature
        ),
        advantage=assessment.advantage,
    )
    replayed = None
    if plan.replay_counts.any():
        replayed, state = replayed_batch(
            state,
            plan.replay_counts,
            setting.scheduler.max_replayed,
            purpose_key(seed, "replay", step),
            elite=config.replay.elite,
            decay=config.replay.baseline_decay,
        )
    params, opt_state, metrics = update(
        setting.model,
        setting.optimizer,
        setting.objective,
        state.params,
        state.opt_state,
        fresh,
        replayed,
        temperature,
    )

    # --- Remember ---
    scores, version = scored.scores, int(state.policy_version)
    keep = _kept(written.texts, np.asarray(scores.quality), config.feedback.accept, seen)
    samples = samples_of(written, scores, assessment.weight, keep, version)
    remembered = remember(
        state.tasks[turn],
        samples,
        assessment,
        keep,
        purpose_key(seed, "reservoir", step),
        config.replay.baseline_decay,
    )
    quality = np.asarray(scores.quality)
    state = state.replace(
        params=params,
        opt_state=opt_state,
        tasks=(*state.tasks[:turn], remembered, *state.tasks[turn + 1 :]),
        patterns=patterns.record(state.patterns, turn, written.strategy, quality, setting.patterns),
        scheduler=scheduler.record(scheduled, turn, float(quality.mean()), setting.scheduler),
        spread=assessment.spread,
        balance=assessment.balance,
        policy_version=np.int32(version + 1),
        turn_step=np.int32(state.turn_step + 1),
        step=np.int32(step + 1),
    )
    figures = {
        "reward/quality": quality.mean(),
        **{f"reward/{name}": part.mean() for name, part in scores.parts.items()},
        **{
            f"reward/{name}_weighted": (scores.gate * part).mean() * setting.rewards[turn].judges[name][2]
            for name, part in scores.parts.items()
        },
        **{f"gate/{name}": share for name, share in scored.gates.shares().items()},
        **assessment.metrics,
        **metrics,
        "kept": keep.sum(),
        "prompt/dropped_examples": written.dropped_examples,
    }
    figures = {name: float(value) for name, value in jax.device_get(figures).items()}
    return state, figures, _rows(task, written, scored, assessment, keep, step, version)


# --- Parts of a step ---


def _write(
    setting: Setting, state: RunState, task: int, strategy: np.ndarray, purpose: str, steps: tuple[int, ...]
) -> Written:
    r = setting.config.rollout
    return write(
        setting.model,
        state.params,
        setting.form,
        setting.tokens[task],
        strategy,
        seed=setting.config.seed,
        purpose=purpose,
        steps=steps,
        samples=r.samples,
        temperature=r.temperature,
        place=setting.place,
    )


def _assess(
    setting: Setting, archive: diversity.Archive, scored: Scored, written: Written, spread: Any, balanced: Any
) -> Assessment:
    b, f = setting.config.balance, setting.config.feedback
    scores = dataclasses.replace(scored.scores, parts={})
    return assess(
        archive,
        setting.place(scores),
        setting.place(written.label),
        spread,
        balanced,
        samples=setting.config.rollout.samples,
        floor=f.floor,
        power=f.power,
        eta=b.eta,
        alpha_max=b.alpha_max,
        weighted=b.weighted,
        neutral=b.neutral,
    )


def _kept(texts: tuple[str, ...], quality: np.ndarray, accept: float, seen: NearDuplicates) -> np.ndarray:
    """[N] bool: good enough, and no near-duplicate of a kept text, those of this batch included."""
    keep = np.zeros(len(texts), bool)
    for i in np.flatnonzero(quality >= accept):
        if not seen.seen(texts[i]):
            seen.add(texts[i])
            keep[i] = True
    return keep


def _rows(
    task: Task,
    written: Written,
    scored: Scored,
    assessment: Assessment,
    keep: np.ndarray,
    step: int,
    version: int,
) -> list[Row]:
    scores, credit = scored.scores, np.asarray(assessment.credit)
    group = len(written.label) // len(written.shown)
    return [
        Row(
            fields=split_fields(written.texts[i], len(task.fields)),
            label=task.labels[written.label[i]],
            pattern=STRATEGIES[written.strategy[i]],
            step=step,
            policy_version=version,
            examples=written.shown[i // group],
            scores={
                "quality": float(scores.quality[i]),
                **{name: float(part[i]) for name, part in scores.parts.items()},
                "diversity": float(credit[i]),
            },
        )
        for i in np.flatnonzero(keep)
    ]


def _tune_to_examples(setting: Setting, state: RunState) -> RunState:
    """Maximum likelihood on the task's examples: each is a target of prompts that show others."""
    config, turn = setting.config, int(state.turn)
    s = config.supervised
    lessons = example_lessons(setting.tasks[turn])
    params, opt_state = state.params, state.opt_state
    for i in range(s.steps):
        rng = numpy_rng(config.seed, "supervised", int(state.step), i)
        drawn = [lessons[k] for k in rng.integers(len(lessons), size=config.rollout.prompts)]
        batch = setting.place(lesson_batch(setting.form, drawn, rng, s.samples))
        params, opt_state, _ = supervised_step(
            setting.model, setting.optimizer, params, opt_state, batch, prompt_weight=s.prompt_weight
        )
    return state.replace(params=params, opt_state=opt_state)


def _statistic_of_examples(setting: Setting, turn: int) -> float:
    task = setting.tasks[turn]
    texts = [example.text for example in task.examples]
    label = np.array([task.labels.index(example.label) for example in task.examples], np.int32)
    completions = [setting.form.tokenizer.encode(text)[: setting.form.completion_length] for text in texts]
    tokens, mask = setting.form.pad_completions(completions)
    features = setting.featurize(texts, tokens, mask)
    found, valid = diversity.statistic(
        jnp.asarray(features), jnp.ones(len(texts)), jnp.asarray(label), len(task.labels)
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
