"""From a policy and a task to a data set; and what a finished run is summarised by."""

from __future__ import annotations

import dataclasses
import functools
import pathlib
from typing import Any

import numpy as np

from streamsynth import assemble as assemble_lib
from streamsynth.assemble import Setting
from streamsynth.dataset.export import export, select
from streamsynth.dataset.near_duplicates import NearDuplicates
from streamsynth.dataset.rows import Row, read_rows
from streamsynth.errors import UserError
from streamsynth.evaluation import measure
from streamsynth.feedback.selection import selection
from streamsynth.keys import numpy_rng
from streamsynth.learner.collect import score, scores_of, write
from streamsynth.learner.state import RunState
from streamsynth.runtime import hosts
from streamsynth.runtime import mesh as mesh_lib
from streamsynth.runtime.progress import Progress
from streamsynth.stream import patterns
from streamsynth.stream.kept import Kept
from streamsynth.stream.patterns import STRATEGIES
from streamsynth.tasks import sources, worlds
from streamsynth.tasks.attributes import asked_for
from streamsynth.tasks.question_answer import fields_of
from streamsynth.tasks.task import Task
from streamsynth.workdir import Workdir

# A policy whose samples are accepted this rarely is given up.
_MOST_SAMPLES_PER_ROW = 50


def synthesize(
    setting: Setting, state: RunState, workdir: Workdir, name: str, rows: int, output: pathlib.Path
) -> dict[str, Any]:
    """Writes `rows` accepted, different, balanced rows of a task into a folder.

    Args:
      setting, state: of a run.
      workdir: its folder.
      name: a task of its stream, or the spec of any other, for which no attributes are proposed.
      rows: how many.
      output: the folder.

    Returns:
      The summary of `export`, with "asked" and "written".

    Raises:
      UserError: the task is unknown, or too few samples are accepted.
    """
    setting, index = _with_task(setting, name)
    config, task = setting.config, setting.tasks[index]
    shared = (
        state
        if index < len(state.tasks)
        else state.replace(patterns=patterns.inherit(state.patterns, index + 1))
    )
    wanted = -(-rows // len(task.labels))
    counts = dict.fromkeys(task.labels, 0)
    seen = NearDuplicates(config.dataset.near_duplicate)
    accepted: list[Row] = []
    written_count = 0
    with mesh_lib.use(setting.mesh), Progress(rows, f"synthesizing {task.name}") as progress:
        batch = 0
        while min(counts.values()) < wanted:
            if written_count > _MOST_SAMPLES_PER_ROW * max(rows, 200):
                poorest = min(counts, key=counts.get)
                raise UserError(
                    f"only {counts[poorest]} of {wanted} rows of label {poorest!r} were accepted among "
                    f"{written_count} samples: ask for fewer --rows, or lower feedback.accept."
                )
            rng = numpy_rng(config.seed, f"synthesize/{task.name}/patterns", batch)
            strategy = patterns.draw(shared.patterns, index, rng, config.rollout.prompts, setting.patterns)
            written = write(
                setting.model,
                setting.variables(state.params),
                setting.form,
                task,
                strategy,
                seed=config.seed,
                purpose=f"synthesize/{task.name}",
                steps=(batch,),
                samples=config.rollout.samples,
                temperature=config.rollout.temperature,
                place=setting.place,
            )
            scored = score(
                task,
                written,
                setting.rewards[index],
                setting.featurize,
                seen.seen,
                config.feedback,
                (f"synthesize/{task.name}", batch),
            )
            quality = np.asarray(scored.scores.quality)
            for i in np.flatnonzero(quality >= config.feedback.accept):
                label = task.labels[written.label[i]]
                identity = task.identity(written.texts[i])
                if counts[label] < wanted and not seen.seen(identity):
                    seen.add(identity)
                    counts[label] += 1
                    accepted.append(
                        Row(
                            fields=fields_of(task, written.texts[i]),
                            label=label,
                            pattern=STRATEGIES[written.strategy[i]],
                            step=batch,
                            policy_version=int(state.policy_version),
                            examples=written.shown[i // config.rollout.samples],
                            attributes=asked_for(task.attributes, task.cells[written.cell[i]]),
                            scores=scores_of(scored.scores, i),
                        )
                    )
                    progress.advance(1)
            written_count += len(written.texts)
            batch += 1

    def written_out() -> dict[str, Any]:
        with hosts.local():
            return export(
                task,
                accepted,
                output,
                threshold=config.dataset.near_duplicate,
                config_summary={"run": workdir.path.name, "seed": config.seed, "policy": setting.policy.hash},
            )

    summary = hosts.from_first(f"the data set of {task.name}", written_out)
    return {**summary, "asked": rows, "written": written_count}


def summarise(setting: Setting, state: RunState, workdir: Workdir) -> dict[str, Any]:
    """What the report needs beside the journals: anchors, data sets, patterns, judges, the best rows.

    The anchors of a task, all students with as many steps: on the examples alone, on all real data, on
    the first rows of the run's data set, on the whole of it, and on as many rows as the first ones of the
    base policy, as they come and as the best of n by the task's own judges. Questions and answers have none.
    """
    names = [task.name for task in setting.tasks]
    found: dict[str, dict[str, Any]] = {}
    learned = patterns.report(state.patterns, setting.patterns)
    with mesh_lib.use(setting.mesh), Progress(len(names), "anchors") as progress:
        for index, task in enumerate(setting.tasks):
            own = found[task.name] = hosts.from_first(
                f"summary of {task.name}", functools.partial(_of_task, setting, workdir, task)
            )
            if measure.has_student(task):
                own["anchors"] |= _base_rows(setting, index)
            progress.advance(1)

    def by_task(part: str) -> dict[str, Any]:
        return {name: own[part] for name, own in found.items() if part in own}

    return {
        "tasks": names,
        "anchors": by_task("anchors"),
        "datasets": by_task("dataset"),
        "patterns": {
            "stream": learned["stream"],
            "tasks": {name: learned["tasks"][index] for index, name in enumerate(names)},
        },
        "elites": by_task("elites"),
        "attributes": {
            task.name: {one.name: [value.name for value in one.values] for one in task.attributes}
            for task in setting.tasks
            if task.attributes
        },
        "judges": {name: reward.summary() for name, reward in zip(names, setting.rewards, strict=True)},
        "best_samples": by_task("best"),
    }


def _of_task(setting: Setting, workdir: Workdir, task: Task) -> dict[str, Any]:
    """What a task's rows say: "elites", "dataset", "best", and "anchors" where it has a student."""
    config = setting.config
    kept = read_rows(workdir.kept(task.name))
    archive = Kept(task, config.dataset.near_duplicate, config.rollout.best_kept, kept)
    with hosts.local():
        rows, dataset = select(
            task,
            kept,
            per_label=config.dataset.per_label or None,
            threshold=config.dataset.near_duplicate,
            choose=selection(config),
        )
        found = {
            "elites": sum(archive.counts().values()),
            "dataset": dataset,
            "best": [{"text": row.text, "label": row.label, "quality": row.quality} for row in rows[:20]],
        }
        if measure.has_student(task):
            first = rows[: config.evaluation.rows_per_label * len(task.labels)]
            found["anchors"] = {
                **measure.anchors(task, config, seed=config.seed),
                "synthetic": _student(setting, task, first),
                "synthetic_all": _student(setting, task, rows),
            }
    return found


def _student(setting: Setting, task: Task, rows: list[Row]) -> float:
    label = np.array([task.labels.index(row.label) for row in rows], np.int64)
    return measure.fit_student(
        task, [row.text for row in rows], label, setting.config, seed=setting.config.seed
    )["accuracy"]


def _base_rows(setting: Setting, index: int) -> dict[str, float]:
    """Students on rows of the base policy: the first that pass the gates, and the best of n."""
    config, task = setting.config, setting.tasks[index]
    drawn = measure.draw(
        setting.model,
        setting.policy.variables,
        setting.form,
        task,
        config,
        seed=config.seed,
        place=setting.place,
        batches=config.evaluation.batches * config.evaluation.best_of,
    )
    tokens, mask = setting.form.pad_completions(
        [setting.form.answer(task.brief, text) for text in drawn.texts]
    )
    passed = drawn.gates.passed
    reward = dataclasses.replace(setting.rewards[index], secondary={})  # the best by the judges alone
    quality = reward(
        drawn.texts, drawn.label, tokens, mask, where=(f"summary/{task.name}",), passed=passed
    ).quality
    per_label, count = config.evaluation.rows_per_label, len(task.labels)
    first = measure.first_of_each(drawn.label, passed, count, per_label)
    order = np.argsort(-quality, kind="stable")
    best = order[measure.first_of_each(drawn.label[order], passed[order], count, per_label)]

    def fit(chosen: np.ndarray) -> float:
        texts = [drawn.texts[i] for i in chosen]
        return measure.fit_student(task, texts, drawn.label[chosen], config, seed=config.seed)["accuracy"]

    def both() -> dict[str, float]:
        with hosts.local():
            return {"base": fit(first), "base_best_of_n": fit(best)}

    return hosts.from_first(f"students of the base policy's rows of {task.name}", both)


def _with_task(setting: Setting, name: str) -> tuple[Setting, int]:
    """The setting with the named task in it, and its index."""
    names = [task.name for task in setting.tasks]
    if name in names:
        return setting, names.index(name)
    if ":" not in name:
        raise UserError(
            f"--task={name}: the run has no such task ({', '.join(names)}); give one of them or a spec."
        )
    config = setting.config
    task = sources.load(
        name,
        examples_per_label=config.stream.examples_per_label,
        seed=config.seed,
        on_bad_row=config.stream.on_bad_row,
        difficulty=worlds.Difficulty(**config.worlds.to_dict()),
    )
    context = assemble_lib.judge_context(
        setting.policy, setting.form, task, config.objective.chunk, setting.encoder
    )
    with mesh_lib.use(setting.mesh):
        reward = assemble_lib.task_reward(context, config.feedback, setting.scorers)
    return (
        dataclasses.replace(
            setting,
            tasks=(*setting.tasks, task),
            rewards=(*setting.rewards, reward),
        ),
        len(names),
    )
