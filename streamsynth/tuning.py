"""Tuning: maximum likelihood on a task's examples and on a spread-out choice of what was kept."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np

from streamsynth.assemble import Setting, copy
from streamsynth.dataset.rows import Row
from streamsynth.feedback import diversity
from streamsynth.keys import numpy_rng
from streamsynth.learner.lessons import examination, lesson_batch, task_lesson
from streamsynth.learner.state import RunState
from streamsynth.learner.supervised import held_out_nll, supervised_step
from streamsynth.runtime import arrays
from streamsynth.stream.prompts import balanced_labels
from streamsynth.tasks.task import Example, Task


def tune(setting: Setting, state: RunState, rows: Sequence[Row], round_: int) -> tuple[RunState, list[float]]:
    """Maximum likelihood on the examples and the given rows: each is a target of prompts that show others.

    With `supervised.early_stop` the loss on held-out examples is measured every `supervised.measure_every`
    steps. After so many measurements without a gain the round ends, and what measured best stays, be it the
    policy as it was before the round.

    Returns the state after it, and the loss on `supervised.held_out` examples a label before and after; none
    where none are held out.
    """
    config, task = setting.config, setting.tasks[int(state.turn)]
    s = config.supervised
    tuned, held = split_examples(task, s.held_out)
    exam = examination(setting.form, task, tuned, held)
    examined = bool(exam.mask.any())  # or none is held out, or none fits into a completion

    def measured(params: Any) -> float:
        t = np.float32(config.rollout.temperature)
        variables, chunk = setting.variables(params), config.objective.chunk
        return float(arrays.fetch(held_out_nll(setting.model, variables, exam, t, chunk=chunk)))

    texts = (*tuned, *rows)
    lessons = [task_lesson(task.brief, label, texts) for label in task.labels]
    params, opt_state = state.params, state.opt_state
    before = measured(params) if examined else None
    stop = None
    if s.early_stop and examined:
        stop = EarlyStop(s.early_stop, before, copy(params), copy(opt_state))
    steps = 0
    while steps < s.steps and not (stop and stop.over):
        rng = numpy_rng(config.seed, "supervised", int(state.step), round_, steps)
        drawn = [lessons[k] for k in balanced_labels(config.rollout.prompts, len(lessons), rng)]
        batch = setting.place(lesson_batch(setting.form, drawn, rng, s.samples))
        params, opt_state, _ = supervised_step(
            setting.model,
            setting.optimizer,
            params,
            setting.frozen,
            opt_state,
            batch,
            np.float32(config.rollout.temperature),
            prompt_weight=s.prompt_weight,
            chunk=config.objective.chunk,
            microbatches=config.learner.microbatches,
        )
        steps += 1
        if stop and (steps % s.measure_every == 0 or steps == s.steps):
            stop = stop.after(steps, measured(params), params, opt_state)
    if stop:
        params, opt_state, steps, after = stop.params, stop.opt_state, stop.steps, stop.loss
    else:
        after = measured(params) if examined else None
    version = np.int32(state.policy_version + steps)
    state = state.replace(params=params, opt_state=opt_state, policy_version=version)
    return state, [before, after] if examined else []


@dataclasses.dataclass(frozen=True)
class EarlyStop:
    """The best of a round of tuning so far, and how long ago it was.

    patience: measurements without a gain after which the round is over.
    loss: on held-out examples.   params, opt_state: copies, as steps give theirs away. The optimizer's state
      goes with the parameters: it may hold them itself, in float32.
    steps: taken until then.   waited: measurements since.
    """

    patience: int
    loss: float
    params: Any
    opt_state: Any
    steps: int = 0
    waited: int = 0

    @property
    def over(self) -> bool:
        return self.waited >= self.patience

    def after(self, steps: int, loss: float, params: Any, opt_state: Any) -> EarlyStop:
        """The best with one more measurement; a loss that is no number is no gain."""
        if loss < self.loss:
            return EarlyStop(self.patience, loss, copy(params), copy(opt_state), steps)
        return dataclasses.replace(self, waited=self.waited + 1)


def split_examples(task: Task, held_out: int) -> tuple[tuple[Example, ...], tuple[Example, ...]]:
    """A task's examples: those that are tuned to, and of each label the last `held_out` ones."""
    by_label = [task.examples_of(label) for label in task.labels]
    tuned = tuple(example for own in by_label for example in own[: len(own) - held_out])
    return tuned, tuple(example for own in by_label for example in own[len(own) - held_out :])


def chosen_rows(
    setting: Setting, turn: int, rows: Sequence[Row], features: Sequence[np.ndarray]
) -> list[Row]:
    """Of each label `supervised.rows` rows: the most spread-out, beside its examples too, or the first."""
    s, ridge, task = setting.config.supervised, setting.config.feedback.ridge, setting.tasks[turn]
    if not rows:
        return []
    of_rows, (of_examples, label) = np.concatenate(features), setting.examples[turn]
    chosen = []
    for k, name in enumerate(task.labels):
        own = [i for i, row in enumerate(rows) if row.label == name]
        order = range(min(s.rows, len(own)))
        if s.select == "spread_out":
            order = diversity.spread_out(of_rows[own], s.rows, ridge, of_examples[label == k])
        chosen += [rows[own[i]] for i in order]
    return chosen
