"""Checkpoints of a whole run: atomic, the last few kept, restored exactly or not at all.

Orbax writes a checkpoint into a temporary folder and renames it when it is complete, so a kill at any
moment leaves the earlier checkpoints whole; what a killed save left behind is removed on opening.
Orbax alone would hand back an array of another shape or dtype than the template asks for: beside the
arrays stands a manifest of their paths, shapes and dtypes, and `restore` compares it first.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from flax import traverse_util

from streamsynth.errors import UserError

Tree = dict[str, Any]  # nested dicts with string keys; leaves are arrays (or None)
LeafPath = tuple[str, ...]


class Checkpoints:
    """The checkpoints in one folder.

    Args:
      directory: made by the first `save`.
      keep: how many of the latest checkpoints stay.
    """

    def __init__(self, directory: str | os.PathLike, keep: int = 2):
        self.directory = Path(directory).absolute()
        self.keep = keep

    @functools.cached_property
    def _manager(self) -> ocp.CheckpointManager:
        return ocp.CheckpointManager(
            self.directory,
            item_handlers={
                "state": ocp.StandardCheckpointHandler(),
                "manifest": ocp.JsonCheckpointHandler(),
                "meta": ocp.JsonCheckpointHandler(),
            },
            options=ocp.CheckpointManagerOptions(
                max_to_keep=self.keep,
                enable_async_checkpointing=False,  # when `save` returns, the checkpoint counts
                cleanup_tmp_directories=True,
                create=True,
            ),
        )

    def save(self, step: int, tree: Tree, meta: Mapping[str, Any]) -> None:
        """Stores `tree` and the JSON object `meta` as checkpoint `step`; returns when it is complete.

        `tree` may hold numpy and jax arrays of any shape (empty ones too) and dtype, except typed random
        keys: keep the uint32 seeds they follow from. Raises ValueError unless `step` is above every
        earlier one, and TypeError for a leaf that is no array.
        """
        latest = self.latest_step()
        if latest is not None and step <= latest:
            raise ValueError(f"checkpoint {step} is not above the latest one, {latest}")
        arrays = _arrays(tree)
        manifest = [
            [list(path), list(leaf.shape), np.dtype(leaf.dtype).name] for path, leaf in arrays.items()
        ]
        self._manager.save(
            step,
            args=ocp.args.Composite(
                state=ocp.args.StandardSave(_stored(arrays)),
                manifest=ocp.args.JsonSave({"arrays": manifest}),
                meta=ocp.args.JsonSave(dict(meta)),
            ),
        )

    def latest_step(self) -> int | None:
        """The newest complete checkpoint, or None."""
        return self._manager.latest_step() if self.directory.is_dir() else None

    def meta(self, step: int) -> dict[str, Any]:
        """The JSON object that `save` was given."""
        return self._restore(step, meta=ocp.args.JsonRestore())["meta"]

    def shapes(self, step: int) -> Tree:
        """What checkpoint `step` holds: nested dicts with a `jax.ShapeDtypeStruct` for every array."""
        return traverse_util.unflatten_dict(
            {
                path: jax.ShapeDtypeStruct(shape, dtype)
                for path, (shape, dtype) in self._manifest(step).items()
            }
        )

    def restore(self, step: int, template: Tree) -> Tree:
        """Reads checkpoint `step` into the structure of `template`.

        A template leaf with a sharding (a `jax.Array`, or a `jax.ShapeDtypeStruct` that names one) comes
        back as a jax array placed so, on however many devices; any other leaf as a numpy array. None and
        empty dicts come back as they stand in the template.

        Raises UserError naming the first array whose path, shape or dtype differs.
        """
        wanted = _arrays(template)
        _compare(self.directory / str(step), self._manifest(step), wanted)
        stored = _stored({path: _target(leaf) for path, leaf in wanted.items()})
        state = self._restore(step, state=ocp.args.StandardRestore(stored))["state"]
        flat = traverse_util.flatten_dict(template, keep_empty_nodes=True)
        restored = traverse_util.flatten_dict(state)
        for path, leaf in wanted.items():
            flat[path] = restored[path] if leaf.size else np.zeros(leaf.shape, leaf.dtype)
        return traverse_util.unflatten_dict(flat)

    def close(self) -> None:
        if "_manager" in self.__dict__:
            self._manager.close()

    def _manifest(self, step: int) -> dict[LeafPath, tuple[tuple[int, ...], np.dtype]]:
        rows = self._restore(step, manifest=ocp.args.JsonRestore())["manifest"]["arrays"]
        return {tuple(path): (tuple(shape), jax.numpy.dtype(dtype)) for path, shape, dtype in rows}

    def _restore(self, step: int, **args: Any) -> Mapping[str, Any]:
        if not self.directory.is_dir() or step not in self._manager.all_steps():
            raise UserError(f"{self.directory} has no checkpoint {step}; its latest is {self.latest_step()}.")
        return self._manager.restore(step, args=ocp.args.Composite(**args))


def _arrays(tree: Tree) -> dict[LeafPath, Any]:
    """The array leaves by path, numpy scalars made arrays; TypeError for leaves that are no arrays."""
    arrays = {}
    for path, leaf in traverse_util.flatten_dict(tree).items():
        if leaf is None:
            continue
        if isinstance(leaf, np.generic):
            leaf = np.asarray(leaf)
        is_array = isinstance(leaf, (np.ndarray, jax.Array, jax.ShapeDtypeStruct))
        if not is_array or jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key):
            raise TypeError(f"{'/'.join(path)} is no array that a checkpoint can hold: {type(leaf).__name__}")
        arrays[path] = leaf
    return arrays


def _stored(arrays: Mapping[LeafPath, Any]) -> Tree:
    """What Orbax is given: it refuses arrays of size 0, so those live in the manifest alone."""
    return traverse_util.unflatten_dict({path: leaf for path, leaf in arrays.items() if leaf.size})


def _target(leaf: Any) -> Any:
    sharding = getattr(leaf, "sharding", None)
    if sharding is not None:
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)
    return np.empty(leaf.shape, leaf.dtype)


def _compare(where: Path, stored: Mapping[LeafPath, tuple], wanted: Mapping[LeafPath, Any]) -> None:
    mend = "the checkpoint belongs to another config: use that config, or start in a new workdir."
    for path in sorted(stored.keys() | wanted.keys()):
        name = "/".join(path)
        if path not in stored:
            raise UserError(f"{where} has no array {name}: {mend}")
        if path not in wanted:
            raise UserError(f"{where} holds an array {name} that this run does not know: {mend}")
        expected = (tuple(wanted[path].shape), np.dtype(wanted[path].dtype))
        if stored[path] != expected:
            has, needs = (f"{dtype.name}{list(shape)}" for shape, dtype in (stored[path], expected))
            raise UserError(f"{where}: {name} is {has} but this run needs {needs}: {mend}")
