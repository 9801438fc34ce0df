"""A run's folder: which files it has, and what it takes to continue in it."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from typing import Any

import numpy as np
from jax.sharding import Mesh
from ml_collections import ConfigDict

from streamsynth import config as config_lib
from streamsynth.dataset.rows import Row, read_rows
from streamsynth.errors import UserError
from streamsynth.learner import pending
from streamsynth.learner.state import RunState, from_tree, to_tree
from streamsynth.runtime import files, hosts
from streamsynth.runtime.checkpoint import Checkpoints
from streamsynth.runtime.files import atomic_write
from streamsynth.runtime.journal import Journal, NoJournal
from streamsynth.stream import patterns
from streamsynth.tasks import attributes as attributes_lib
from streamsynth.tasks.attributes import Attribute

# Keys that may differ between a run and its continuation: they change nothing of what is computed. Named
# weights may move: what they are is held by their hash. On another mesh sums are taken in another order:
# what follows agrees by tolerance, no longer bit for bit.
_FREE = (
    "checkpoint.",
    "hosts.",
    "mesh.",
    "cache_dir",
    "policy.init",
    "scorers.concurrency",
    "scorers.key_variable",
)


Path = Any  # a `pathlib.Path`, or of a bucket an `epath.Path`


class Workdir:
    """Paths and journals of a run, in a local folder or a bucket's.

    config.json, metrics.jsonl, evaluations.jsonl, kept/TASK.jsonl, checkpoints/, policy/ (the base
    policy), experience.json (of a run that starts from another), attributes.json (where the policy proposed
    them), scores/NAME.jsonl (what scorers answered), datasets/TASK/, report/, summary.json, tensorboard/.

    Of a run's processes the first alone writes there; but checkpoints and what scorers answered are written
    by all, and must lie where all of them reach it.
    """

    def __init__(self, directory: files.PathLike, keep: int = 2, asynchronous: bool = False):
        self.path = files.as_path(directory)
        self.checkpoints = Checkpoints(self.path / "checkpoints", keep, asynchronous)

    @property
    def policy(self) -> Path:
        return self.path / "policy"

    @property
    def scores(self) -> Path:
        return self.path / "scores"

    def kept(self, task: str) -> Path:
        return self.path / "kept" / f"{task}.jsonl"

    def kept_rows(self, task: str) -> list[Row]:
        """What was kept of a task so far, as the process that writes finds it."""
        found = hosts.from_first(
            f"rows of {task}", lambda: [row.to_json() for row in read_rows(self.kept(task))]
        )
        return [Row.from_json(row) for row in found]

    def dataset(self, task: str) -> Path:
        return self.path / "datasets" / task

    def journals(self, tasks: tuple[str, ...]) -> tuple[Journal | NoJournal, ...]:
        """Metrics, evaluations, and each task's kept rows: the order of `RunState.journals`."""
        rows = (self.kept(name) for name in tasks)
        paths = (self.path / "metrics.jsonl", self.path / "evaluations.jsonl", *rows)
        return tuple(Journal(path) if hosts.first() else NoJournal() for path in paths)

    def config(self) -> ConfigDict:
        """The config of the run.

        Raises:
          UserError: there is no run here.
        """
        path = self.path / "config.json"
        if not path.is_file():
            raise UserError(
                f"{self.path} holds no run (no config.json): give the --workdir of a train command."
            )
        return config_lib.from_json(path.read_text(), str(path))

    def write_experience(self, state: patterns.State) -> None:
        """Keeps what the patterns of the run that this one starts from had learned."""
        shared = {name: getattr(state, name).tolist() for name in patterns.SHARED}
        self.write("experience.json", json.dumps(shared, indent=1) + "\n")

    def experience(self) -> patterns.State | None:
        """What `write_experience` was given, as far as another stream can use it; None for a fresh run.

        Raises:
          UserError: it was written with other strategies or other statistics of them.
        """
        path = self.path / "experience.json"
        if not path.is_file():
            return None
        shared = json.loads(path.read_text())
        state = patterns.empty(0)
        for name in patterns.SHARED:
            values = np.asarray(shared.get(name, ()), np.float32)
            if values.shape != getattr(state, name).shape:
                raise UserError(
                    f"{path} does not hold {name} of {len(patterns.STRATEGIES)} strategies (another version "
                    "wrote it): train anew in a new --workdir."
                )
            state = state.replace(**{name: values})
        return state

    def write_attributes(self, proposed: Mapping[str, tuple[Attribute, ...]]) -> None:
        """Keeps what the base policy proposed, by the name of the task."""
        content = {
            task: {one.name: [value.name for value in one.values] for one in found}
            for task, found in proposed.items()
        }
        self.write("attributes.json", json.dumps(content, indent=1, ensure_ascii=False) + "\n")

    def attributes(self) -> dict[str, tuple[Attribute, ...]]:
        """What `write_attributes` was given; {} of a run in which nothing was proposed.

        With several processes all of them call it.

        Raises:
          UserError: the file was edited or damaged.
        """
        # Read by one: to another machine the folder may look as it was some seconds ago.
        content = hosts.from_first("what was proposed", self._proposed)
        where = self.path / "attributes.json"
        return {
            task: tuple(
                dataclasses.replace(one, proposed=True)
                for one in attributes_lib.read(found, f"{where}, task {task}")
            )
            for task, found in content.items()
        }

    def _proposed(self) -> dict[str, Any]:
        path = self.path / "attributes.json"
        if not path.is_file():
            return {}
        try:
            return dict(json.loads(path.read_text()))
        except (ValueError, TypeError):
            raise UserError(
                f"{path} does not hold attributes by task: it was edited or damaged; put the original back."
            ) from None

    def write_config(self, config: ConfigDict) -> None:
        self.write("config.json", config_lib.to_json(config))

    def write(self, name: str, content: str) -> None:
        """Writes a file of the folder, in the process that writes."""
        if hosts.first():
            atomic_write(self.path / name, content)

    def check(self, config: ConfigDict) -> int:
        """Whether `config` may go on with what is here, and how many tasks the stream had so far.

        Raises:
          UserError: the run here has another config; only appending tasks to its stream is allowed.
        """
        if self.path.exists() and not self.path.is_dir():
            raise UserError(f"{self.path} is a file: give a folder, or the name of a new one, as --workdir.")
        if not (self.path / "config.json").is_file():
            if self.path.is_dir() and any(self.path.iterdir()):
                raise UserError(f"{self.path} is not empty and holds no run: give an empty or new --workdir.")
            return 0
        old = self.config()
        before, after = tuple(old.stream.tasks), tuple(config.stream.tasks)
        if after[: len(before)] != before:
            raise UserError(
                f"stream.tasks of {self.path} begins with {', '.join(before)}: a continued stream may only "
                "append tasks; use a new --workdir with --init_from to start anew with this experience."
            )
        changed = config_lib.differences(old, config)
        for key, (was, now) in changed.items():
            if key != "stream.tasks" and not key.startswith(_FREE):
                raise UserError(
                    f"{self.path} is a run of another config: {key} was {was} and is now {now}; "
                    "restore the key or use a new --workdir."
                )
        return len(before)

    def save(self, state: RunState, meta: dict[str, Any]) -> None:
        """Checkpoints the whole state: copies it, and may return before it is written.

        What it counts on, the journals to the lengths in `state.journals`, must be on disk before.
        """
        told = None if state.pending is None else state.pending.told()
        self.checkpoints.save(int(state.step), to_tree(state), {**meta, "pending": told})

    def restore(self, template: RunState, mesh: Mesh | None = None) -> RunState | None:
        """The state of the last whole checkpoint, placed as `template` is, or None without one.

        A batch that was being written comes back as the sampler leaves it on `mesh`, or onto the host.
        """
        step = self.checkpoints.last_whole()
        if step is None:
            return None
        told = self.checkpoints.meta(step).get("pending")
        if told is not None:
            waiting = pending.template(self.checkpoints.shapes(step)["pending"], told, mesh)
            template = template.replace(pending=waiting)
        return from_tree(template, self.checkpoints.restore(step, to_tree(template)))

    def saved_with(self) -> dict[str, Any]:
        """What `save` was told beside the state of the last whole checkpoint; {} without one."""
        step = self.checkpoints.last_whole()
        return {} if step is None else self.checkpoints.meta(step)

    def tasks_in_checkpoint(self) -> int:
        """How many tasks the stream had when that checkpoint was written."""
        return int(self.saved_with().get("tasks", 0))
