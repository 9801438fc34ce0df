"""The programs of a run beside those of `programs.declared`: small ones, and readers of examples alone."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from typing import Any

from streamsynth.assemble import judges_share, scheduler_config
from streamsynth.evaluation.measure import has_student
from streamsynth.feedback.utility import UTILITIES
from streamsynth.tasks.task import Task


def side_programs(config: Any, tasks: Sequence[Task]) -> Counter[str]:
    """How many there are of each function that is compiled, in a run that starts at its first step.

    Not counted are those whose shapes only the run itself will know: of students, one for each size to which
    a data set or a test set is filled up, and of a sentence encoder, one for each such length. Nor are those
    that judge attributes without a test.

    Args:
      config: of the run.
      tasks: of the stream, with their examples.
    """
    f, b, s, r = config.feedback, config.balance, config.supervised, config.rollout
    labels = [len(task.labels) for task in tasks]
    # What is kept of a task has a row for each label, and a program of its own with it.
    kinds, past = len({*labels}), len({labels[0], *labels[:-1]})
    sized = {(len(task.labels), len(task.examples)) for task in tasks}
    rewarded = bool(config.phases.reward and config.learner.steps)
    explores = bool(config.phases.initialization and s.rounds and s.batches)
    adapter = bool(config.policy.lora.rank)
    hidden = f.features == "hidden"
    asked, step = ((c.prompts, c.samples) for c in (config.evaluation, r))

    # --- Keys: folded from so many numbers ---
    parts = {2}  # of a batch, by its step
    if hidden or any(map(has_student, tasks)):
        parts.add(1)
    if b.batches:
        parts.add(3)  # by step and number
    if explores:
        parts.add(4)  # by round as well
    # An adapter is made outside of the mesh, with a program of its own.
    found = Counter(_folded=len(parts) + adapter, sample_keys=len({asked, step}))

    # --- State ---
    found.update(init=1 + adapter, copy=1, _samples=1 + len(r.buckets), assess=kinds, remember=kinds)
    if b.others:
        found["kept"] += past if len(tasks) > 1 else 0
    if b.target == "examples":
        found["statistic"] += len(sized)
    if rewarded:
        found["_learned_from"] += 1
        if scheduler_config(config).max_replayed:
            found.update(_nothing_drawn=1, _place=1, _nothing_found=1, _refreshed=past, _batch=1)

    # --- Feedback ---
    if f.judges.get("posterior", 0.0) > 0:
        measured = {(len(task.labels), len(judges_share(task)[1])) for task in tasks}
        # The program that `declared` has is one of these.
        found.update(label_loglikelihood=kinds + len(measured) - 1, verdict=kinds + len(measured))
    if hidden:
        examples = {count for _, count in sized}
        found.update(mean_hidden=len(examples), project_hidden=len({math.prod(step), *examples}))
    if f.secondary.get("utility", 0.0):
        found[UTILITIES[f.utility.form].__name__] += len(sized)

    # --- Tuning ---
    if config.phases.tuning and s.rounds and s.held_out:
        found["held_out_nll"] += kinds
        found["copy"] += bool(s.early_stop)  # of the optimizer's state
    return +found
