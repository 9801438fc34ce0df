"""The stream, from the first task to the report.

A run is a sequence of small pieces of work, each a function of (config, state) alone. After a kill the
state of the last checkpoint says which piece comes next, and the journals are cut back to where they
were then: what follows is bit for bit what would have followed (on another mesh: up to rounding).
"""

from __future__ import annotations

import contextlib
import dataclasses
import zlib
from typing import Any

import jax
import numpy as np
from absl import logging

from streamsynth import assemble as assemble_lib
from streamsynth import programs
from streamsynth.assemble import Setting
from streamsynth.dataset.export import export
from streamsynth.dataset.rows import read_rows
from streamsynth.errors import Stopped
from streamsynth.evaluation import measure
from streamsynth.feedback.selection import selection
from streamsynth.learner.state import RunState, extend
from streamsynth.policy.store import Policy
from streamsynth.runtime import hosts
from streamsynth.runtime import mesh as mesh_lib
from streamsynth.runtime.metrics import JournalWriter, MultiWriter, TensorBoardWriter
from streamsynth.runtime.progress import Progress
from streamsynth.side_programs import side_programs
from streamsynth.stream.kept import Kept
from streamsynth.tasks.task import Task
from streamsynth.turn import begin_turn, learn
from streamsynth.workdir import Workdir


def train(config: Any, workdir: Workdir, tasks: tuple[Task, ...], policy: Policy) -> tuple[Setting, RunState]:
    """Runs the stream to its end, from the beginning or from the last checkpoint.

    All processes of a run go through it side by side, and the first of them writes.

    Args:
      config: resolved.
      workdir: checked against `config` (`Workdir.check`).
      tasks: of the stream.
      policy: the base policy.

    Returns:
      The fixed parts of the run, and its last state.

    Raises:
      Stopped: SIGTERM asked for it; what was done is saved.
    """
    setting = assemble_lib.assemble(config, tasks, policy, workdir.experience(), workdir.scores)
    names = tuple(task.name for task in tasks)
    with mesh_lib.use(setting.mesh):
        state = _restored(setting, workdir)

    # --- The journals, cut back to where the state stands ---
    journals = workdir.journals(names)
    for journal, size in zip(journals, state.journals, strict=True):
        journal.truncate(int(size))
    metrics_journal, evaluations, *kept = journals
    writers = [JournalWriter(metrics_journal)]
    if hosts.first():
        writers.append(TensorBoardWriter(workdir.path / "tensorboard", int(state.step)))
    writer = MultiWriter(writers)
    for program in programs.declared(config, setting.model.config, setting.mesh):
        logging.info("program %s: %s", program.name, program.shapes)
    logging.info(
        "and %d small ones, with as many for students as their data sets have sizes",
        side_programs(config, tasks).total(),
    )

    def save(state: RunState) -> RunState:
        # On disk before the checkpoint that counts on it can be complete, however slowly that is written.
        writer.flush()
        for journal in journals:
            journal.flush()
        sizes = hosts.from_first("sizes of journals", lambda: [journal.size() for journal in journals])
        state = state.replace(journals=np.array(sizes, np.int64))
        mesh = dict(setting.mesh.shape)
        workdir.save(state, {"tasks": len(tasks), "config": config.to_dict(), "mesh": mesh})
        return state

    def stop(state: RunState) -> None:
        workdir.checkpoints.close()
        raise Stopped(
            f"stopped by SIGTERM after step {int(state.step) - 1}, which is saved; the same command goes on."
        )

    # --- The stream ---
    # However it ends, a checkpoint that is being written is waited for.
    with contextlib.closing(workdir.checkpoints), mesh_lib.use(setting.mesh):
        while True:
            turn, done = int(state.turn), int(state.turn_step)
            if np.isnan(state.transfer[0]).any():
                state = evaluate_row(setting, state, 0, setting.initial, evaluations)
            elif np.isnan(state.transfer[turn]).any():
                state = evaluate_row(setting, state, turn, state.params, evaluations)
            elif turn == len(tasks):
                break
            else:
                kept_texts = Kept(
                    tasks[turn],
                    config.dataset.near_duplicate,
                    config.rollout.best_kept,
                    workdir.kept_rows(names[turn]),
                )
                with Progress(
                    config.learner.steps, f"turn {turn + 1}/{len(tasks)} {names[turn]}"
                ) as progress:
                    progress.advance(max(done - 1, 0))
                    while int(state.turn_step) <= config.learner.steps:
                        beginning = int(state.turn_step) == 0
                        state, metrics, rows = (begin_turn if beginning else learn)(
                            setting, state, kept_texts
                        )
                        for row in rows:
                            kept[turn].append(row.to_json())
                        if not beginning:
                            progress.advance(1, quality=metrics["reward/quality"])
                        step = int(state.step) - 1
                        writer.write_texts(step, {"task": names[turn]})
                        writer.write_scalars(step, {"turn": turn + 1, **metrics})
                        stopping = stop_asked(state)
                        if stopping or int(state.step) % config.checkpoint.every == 0:
                            state = save(state)
                        if stopping:
                            stop(state)
                kept[turn].flush()
                if hosts.first():
                    export_task(setting, workdir, turn)
                state = state.replace(
                    turn=np.int32(turn + 1), turn_step=np.int32(0), step=np.int32(state.step + 1)
                )
            state = save(state)
            if stop_asked(state):
                stop(state)
    writer.close()  # and with it the metrics journal
    for journal in (evaluations, *kept):
        journal.close()
    return setting, state


def stop_asked(state: RunState) -> bool:
    """Whether the run is to stop here; asked by all processes, whose host states are compared with it."""
    on_host = (state.patterns, state.scheduler, state.samples, state.transfer)
    content = b"".join(np.asarray(leaf).tobytes() for leaf in jax.tree.leaves(on_host))
    return hosts.stop_asked(f"step {int(state.step)}", zlib.crc32(content))


def evaluate_row(setting: Setting, state: RunState, row: int, params: Any, journal: Any) -> RunState:
    """Fills what is missing in row `row` of the transfer matrix with the given parameters."""
    transfer = np.array(state.transfer)
    missing = np.flatnonzero(np.isnan(transfer[row]))
    with Progress(len(missing), f"evaluation after turn {row}") as progress:
        for j in missing:
            record = {"turn": row, **evaluate_task(setting, params, int(j))}
            journal.append(record)
            transfer[row, j] = record[record["score"]]
            progress.advance(1, **{record["score"]: transfer[row, j]})
    return state.replace(transfer=transfer, step=np.int32(state.step + 1))


def evaluate_task(setting: Setting, params: Any, index: int) -> dict[str, Any]:
    """One cell: what a policy with these trained parameters is worth for one task.

    The prompts and keys are the same whatever the policy.
    """
    config, task = setting.config, setting.tasks[index]
    drawn = measure.draw(
        setting.model,
        setting.variables(params),
        setting.form,
        task,
        config,
        seed=config.seed,
        place=setting.place,
    )

    def cell() -> dict[str, Any]:
        with hosts.local():
            return measure.cell(task, drawn, config, seed=config.seed)

    return hosts.from_first(f"evaluation of {task.name}", cell)


def export_task(setting: Setting, workdir: Workdir, index: int) -> dict[str, Any]:
    """Writes the data set of a task from its kept rows."""
    config, task = setting.config, setting.tasks[index]
    with hosts.local():
        return export(
            task,
            read_rows(workdir.kept(task.name)),
            workdir.dataset(task.name),
            per_label=config.dataset.per_label or None,
            threshold=config.dataset.near_duplicate,
            choose=selection(config),
            config_summary={
                "seed": config.seed,
                "steps": config.learner.steps,
                "policy": setting.policy.hash,
            },
        )


def _restored(setting: Setting, workdir: Workdir) -> RunState:
    """The state of the last checkpoint, with places for appended tasks, or the first state."""
    saved_with, mesh = workdir.saved_with(), dict(setting.mesh.shape)
    if not saved_with:
        return assemble_lib.first_state(setting)
    old, before_mesh = saved_with["tasks"], saved_with.get("mesh", mesh)
    if before_mesh != mesh:
        logging.warning(
            "%s was saved on the mesh %s and goes on on %s: from here results agree with those of the old "
            "mesh by tolerance, not bit for bit", workdir.path, before_mesh, mesh,
        )  # fmt: skip
    before = dataclasses.replace(setting, tasks=setting.tasks[:old])
    state = workdir.restore(assemble_lib.first_state(before), setting.mesh)
    logging.info("continuing after step %d of %s", int(state.step), workdir.path)
    state = extend(state, setting.config, tuple(len(task.labels) for task in setting.tasks))
    return assemble_lib.on_mesh(setting, state)
