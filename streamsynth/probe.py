"""Probes: what the policy still knows of tasks whose turn is over, at the price of a batch each."""

from __future__ import annotations

import dataclasses

import numpy as np

from streamsynth.assemble import Setting
from streamsynth.learner.collect import score, write
from streamsynth.learner.state import RunState
from streamsynth.stream import scheduler
from streamsynth.stream.patterns import STRATEGIES


def probe(setting: Setting, state: RunState) -> tuple[RunState, dict[str, float]]:
    """The probes that are due after a step by reward.

    A probe is the mean quality of as many texts as a step writes, by the same program, with prompts of the
    probed task. To be the same measure every time it takes the strategies of `evaluation.strategies` in equal
    shares, and near-duplicates of what was kept count like other texts. Its texts are neither learned from
    nor kept, but they are part of the budget.

    Args:
      setting: the fixed parts.
      state: after the step.

    Returns:
      The state with what the probes found, and a figure for each.
    """
    config, turn, step = setting.config, int(state.turn), int(state.step) - 1
    r, steps = config.rollout, int(state.turn_step) - 1
    known = np.array([STRATEGIES.index(name) for name in config.evaluation.strategies], np.int32)
    figures = {}
    last = steps == config.learner.steps
    for j in scheduler.to_probe(state.scheduler, turn, steps, last, setting.scheduler):
        task = setting.tasks[j]
        written = write(
            setting.model,
            setting.variables(state.params),
            setting.form,
            task,
            np.resize(known, r.prompts),
            seed=config.seed,
            purpose="probe",
            steps=(step, j),
            samples=r.samples,
            temperature=r.temperature,
            place=setting.place,
        )
        judges = dataclasses.replace(setting.rewards[j], secondary={})  # a probe is of the quality alone
        scored = score(
            task, written, judges, setting.featurize, lambda text: False, config.feedback, ("probe", step, j)
        )
        found = float(np.mean(np.asarray(scored.scores.quality)))
        figures[f"probe/{task.name}"] = found
        state = state.replace(
            scheduler=scheduler.record_probe(state.scheduler, j, found, step),
            samples=np.int64(state.samples + len(written.texts)),
        )
    return state, figures
