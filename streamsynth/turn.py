"""One turn: what is set at its beginning, and its steps. Write, judge, credit, update, remember."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import numpy as np

from streamsynth import assemble as assemble_lib
from streamsynth.assemble import Setting
from streamsynth.dataset.rows import Row
from streamsynth.feedback import diversity
from streamsynth.keys import numpy_rng
from streamsynth.learner import balance
from streamsynth.learner.collect import arrive, failures, mean_known
from streamsynth.learner.state import RunState, new_task
from streamsynth.learner.update import Assessment
from streamsynth.probe import probe
from streamsynth.runtime import arrays
from streamsynth.step import dispatched, judged, remembered, rows_of, sampled_batch, updated
from streamsynth.stream import patterns, scheduler
from streamsynth.stream.kept import Kept
from streamsynth.tuning import chosen_rows, split_examples, tune

_statistic = jax.jit(diversity.statistic, static_argnums=3)


def begin_turn(setting: Setting, state: RunState, kept: Kept) -> tuple[RunState, dict[str, float], list[Row]]:
    """The first step of a turn: nothing is learned by reward yet.

    The isolated learner forgets everything. Batches of the base policy give the diversity that is to be
    held. Then, in rounds, the policy writes (the phase `initialization`), and is tuned (`tuning`) to the
    examples and to a spread-out choice of all that was kept: many different texts, each of which the judges
    accepted, teach a language without narrowing it, which a few examples would. Last, KL's reference is set.

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
        sampled = sampled_batch(setting, state.replace(params=params), asked, kept, purpose, *steps)
        dropped += sampled.written.dropped_examples
        state, keep = remembered(setting, state, sampled, kept, version, purpose, *steps)
        rows.extend(rows_of(setting.tasks[turn], sampled, keep, step, version, kept))
        features.append(arrays.fetch(sampled.scored.scores.features)[keep])
        quality.append(sampled.scored.quality)
        failed.append(sampled.scored.failed)
        return sampled.assessment

    # --- The diversity to hold ---
    # That of the base policy: held from turn to turn, a little would be lost each time.
    own = config.balance.target == "policy"
    measured = (state.params, int(state.policy_version)) if own else (setting.initial, 0)
    for batch in range(config.balance.batches):
        metrics = written(*measured, "measure", step, batch).metrics
        statistics.append(float(arrays.fetch(metrics["diversity/statistic"])))
    found = float(np.mean(statistics))
    if config.balance.target == "examples":
        found = _statistic_of_examples(setting, turn)
    target = found + float(np.log(config.balance.factor))

    # --- Texts to tune to, and the tuning ---
    explored = config.supervised.batches if config.phases.initialization else 0
    chooses = config.phases.initialization and config.supervised.rows
    for round_ in range(config.supervised.rounds):
        for batch in range(explored):
            written(state.params, int(state.policy_version), "explore", step, round_, batch)
        if config.phases.tuning:
            chosen = chosen_rows(setting, turn, rows, features) if chooses else []
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
        "budget/samples": float(state.samples),
        **failures(failed),
    }
    if held_out:
        figures |= {"supervised/held_out_before": held_out[0], "supervised/held_out": held_out[-1]}
    return assemble_lib.on_mesh(setting, state), figures, rows


def learn(setting: Setting, state: RunState, kept: Kept) -> tuple[RunState, dict[str, float], list[Row]]:
    """One step: write, score, credit, update, remember.

    With `rollout.lag` the batch was dispatched a step ago, and the first thing to be done is to dispatch the
    next one: the device writes it while the host judges this one. What it is follows from the state before
    this step and not from how long anything takes. The first batch of a turn has no step before it and lags
    behind nothing; the last step of a turn dispatches none.

    Without the phase `reward` there is no update: a step then spends its samples on the data set alone.

    Args:
      setting: the fixed parts.
      state: before the step.
      kept: what is kept of this turn's task; what is kept now is added.

    Returns:
      The state after it, the step's figures, and the rows that were kept.
    """
    config, turn, step = setting.config, int(state.turn), int(state.step)
    seed = config.seed

    # --- Plan, write ---
    plan, scheduled = scheduler.next(
        state.scheduler, turn, step, numpy_rng(seed, "scheduler", step), setting.scheduler
    )
    task, following = setting.tasks[turn], None
    pending = state.pending or dispatched(setting, state, task, kept, "rollout", step)
    arrived = arrive(pending)  # before the device has anything else to do
    if config.rollout.lag and int(state.turn_step) < config.learner.steps:
        following = dispatched(setting, state, task, kept, "rollout", step + 1)

    # --- Feedback and credit ---
    sampled = judged(setting, state, arrived, kept, "rollout", step)
    written, scored, assessment = sampled.written, sampled.scored, sampled.assessment

    # --- Update ---
    version, metrics = int(pending.version), {}
    if config.phases.reward:
        state, metrics = updated(setting, state, sampled, plan)

    # --- Remember ---
    state, keep = remembered(setting, state, sampled, kept, version, "reservoir", step)
    if scored.scores.scored.any():
        scheduled = scheduler.record(scheduled, turn, scored.quality, setting.scheduler)
    quality = np.asarray(scored.scores.quality)
    state = state.replace(
        scheduler=scheduled,
        balance=assessment.balance,
        turn_step=np.int32(state.turn_step + 1),
        step=np.int32(step + 1),
        pending=following,
    )
    state, probed = probe(setting, state)
    groups = quality.reshape(-1, config.rollout.samples)
    figures = {
        **scored.figures({**setting.rewards[turn].weights(), **sampled.weights}),
        **{f"gate/{name}": share for name, share in scored.gates.shares().items()},
        **{f"reject/{name}": written.rejections.count(name) for name in set(written.rejections) - {""}},
        **assessment.metrics,
        **metrics,
        "group/dead": np.mean(groups.max(axis=1) == groups.min(axis=1)),
        "completion/truncated": 1.0 - written.finished.mean(),
        "kept": keep.sum(),
        "prompt/dropped_examples": written.dropped_examples,
        **{f"scheduler/{setting.tasks[j].name}": n for j, n in enumerate(plan.replay_counts) if n},
        **probed,
        **patterns.metrics(state.patterns, turn, setting.patterns),
        "budget/samples": state.samples,
    }
    figures = {name: float(value) for name, value in arrays.fetch(figures).items()}
    if not plan.replay_counts.any():
        figures = {name: value for name, value in figures.items() if not name.startswith("replay/")}
    return state, figures, rows_of(task, sampled, keep, step, version, kept)


def _statistic_of_examples(setting: Setting, turn: int) -> float:
    features, label = setting.examples[turn]
    weight, labels = np.ones(len(label), np.float32), len(setting.tasks[turn].labels)
    return balance.target_from(*arrays.fetch(_statistic(features, weight, label, labels)))


def _forget(setting: Setting, state: RunState) -> RunState:
    """The isolated learner at the start of a turn: nothing is left of what was learned before it."""
    fresh = assemble_lib.first_state(setting)
    return fresh.replace(
        turn=state.turn,
        step=state.step,
        policy_version=state.policy_version,
        samples=state.samples,
        tasks=tuple(
            new_task(setting.config, len(task.labels)).replace(kept=old.kept)
            for task, old in zip(setting.tasks, state.tasks, strict=True)
        ),
        transfer=state.transfer,
        journals=state.journals,
    )
