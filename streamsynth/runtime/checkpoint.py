"""Checkpoints of a whole run: atomic, the last few kept, restored exactly or not at all.

`save` copies the arrays to the host and returns; a thread writes them meanwhile. Orbax writes into a
temporary folder and renames it when all processes are done (in a bucket, which knows no rename, it adds a
file that says so), so a kill at any moment leaves the earlier checkpoints whole. Only complete ones count.

Orbax alone would hand back an array of another shape or dtype than the template asks for, and take most
damage for data. So there stand beside the arrays a manifest of their paths, shapes and dtypes, which
`restore` compares first, and a seal: sizes and CRC-32 of all files, which `last_whole` compares.

Orbax's own manager of several checkpoints is not used: it counts one that is still being written, and from
its thread it tells the preemption service of a step that lies behind.
"""

from __future__ import annotations

import functools
import json
import os
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from absl import logging
from flax import traverse_util
from jax.experimental import multihost_utils

from streamsynth.errors import UserError
from streamsynth.runtime import files, seal

Tree = dict[str, Any]  # nested dicts with string keys; leaves are arrays (or None)
LeafPath = tuple[str, ...]

_TEMPORARY = ocp.path.atomicity.TMP_DIR_SUFFIX
_COMMITTED = ocp.path.atomicity.COMMIT_SUCCESS_FILE
_JSON = "metadata"  # the file of a JSON item in its folder
# For a checkpoint to be written, and read back by one process for its seal: with all of a network trained 16
# bytes a parameter (itself, the reference, a float32 copy, two moments), 150 GB of 9.2e9.
_WRITE_SECONDS = 4 * 3600


class Checkpoints:
    """The checkpoints in one folder, which all processes of a run share.

    With several processes each calls every method, in the same order.

    Args:
      directory: a local folder or a bucket's (gs://BUCKET/NAME); made by the first `save`.
      keep: how many of the latest checkpoints stay; one more while another is written.
      asynchronous: whether `save` returns while the checkpoint is written.
    """

    def __init__(self, directory: str | os.PathLike, keep: int = 2, asynchronous: bool = False):
        self.directory = files.as_path(directory)
        if files.is_local(self.directory):
            self.directory = self.directory.absolute()  # as Orbax wants it
        self.keep = keep
        self.asynchronous = asynchronous
        self._writing: int | None = None
        self._has_written = False  # who only reads removes nothing
        self._damage: dict[int, str] = {}  # of the checkpoints that were looked at; "" is none

    @functools.cached_property
    def _checkpointer(self) -> ocp.AsyncCheckpointer:
        registry = ocp.handlers.DefaultCheckpointHandlerRegistry()
        state = ocp.StandardCheckpointHandler()
        registry.add("state", ocp.args.StandardSave, state)
        registry.add("state", ocp.args.StandardRestore, state)
        for item in ("manifest", "meta"):
            registry.add(item, ocp.args.JsonSave, ocp.JsonCheckpointHandler(filename=_JSON))
        return ocp.AsyncCheckpointer(
            ocp.CompositeCheckpointHandler(handler_registry=registry),
            async_options=ocp.AsyncOptions(
                timeout_secs=_WRITE_SECONDS, post_finalization_callback=self._before_commit
            ),
        )

    def save(self, step: int, tree: Tree, meta: Mapping[str, Any]) -> None:
        """Stores `tree` and the JSON object `meta` as checkpoint `step`; it counts once `wait` returns.

        An earlier checkpoint that is still being written is waited for. When `save` returns, `tree` may be
        overwritten or donated: its arrays are copied before.

        `tree` may hold numpy and jax arrays of any shape (empty ones too) and dtype, except typed random
        keys: keep the uint32 seeds they follow from. With several processes global arrays are written by
        all, each the shards it has; numpy arrays, `meta` and arrays that lie on one process's devices alone
        by process 0. Raises ValueError unless `step` is above every earlier one that is whole, and
        TypeError for a leaf that is no array.
        """
        self._finish()
        good = [old for old in self._steps() if not self._damage.get(old)]
        if good and step <= good[-1]:
            raise ValueError(f"checkpoint {step} is not above the latest one, {good[-1]}")
        arrays = _arrays(tree)
        manifest = [
            [list(path), list(leaf.shape), np.dtype(leaf.dtype).name] for path, leaf in arrays.items()
        ]
        if jax.process_index() == 0:
            self._clear_away()
        self._damage = {}
        self._writing, self._has_written = step, True
        self._checkpointer.save(
            self.directory / str(step),
            args=ocp.args.Composite(
                state=ocp.args.StandardSave(_stored(arrays)),
                manifest=ocp.args.JsonSave({"arrays": manifest, "sealed": True}),
                meta=ocp.args.JsonSave(dict(meta)),
            ),
        )
        if not self.asynchronous:
            self.wait()

    def wait(self) -> None:
        """Returns when no checkpoint is being written any more; raises what made one fail."""
        self._finish()
        if self._has_written and jax.process_index() == 0:
            self._prune()

    def latest_step(self) -> int | None:
        """The newest complete checkpoint, or None."""
        steps = self._steps()
        return steps[-1] if steps else None

    def last_whole(self) -> int | None:
        """The newest checkpoint that nothing is wrong with, or None where there is none at all.

        A warning names those that were passed over, and what is wrong with them. Nothing is changed; the
        next `save` puts them aside under another name.

        Raises UserError where there are checkpoints, but none is whole.
        """
        found, said = None, []
        if jax.process_index() == 0:
            for step in reversed(self._steps()):
                if step not in self._damage:
                    self._damage[step] = _damage(self.directory / str(step))
                    if self._damage[step]:
                        said.append(step)
                if not self._damage[step]:
                    found = step
                    break
        found, damage = _from_first_process([found, list(self._damage.items())])
        self._damage = dict(map(tuple, damage))
        reasons = "; ".join(
            f"{step} ({why})" for step, why in sorted(self._damage.items(), reverse=True) if why
        )
        if found is None and reasons:
            raise UserError(
                f"{self.directory}: every checkpoint is damaged: {reasons}. Put back a copy of one, or "
                "start in a new workdir."
            )
        if said:
            logging.warning(
                "%s: damaged: checkpoint %s. Going on from checkpoint %d; the damaged one will be renamed.",
                self.directory, reasons, found,
            )  # fmt: skip
        return found

    def meta(self, step: int) -> dict[str, Any]:
        """The JSON object that `save` was given."""
        return self._read_json(step, "meta")

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
        back as a jax array placed so, on however many devices of however many processes; any other leaf as
        a numpy array. None and empty dicts come back as they stand in the template.

        Raises UserError naming the first array whose path, shape or dtype differs.
        """
        wanted = _arrays(template)
        _compare(self.directory / str(step), self._manifest(step), wanted)
        stored = _stored({path: _target(leaf) for path, leaf in wanted.items()})
        where = self.directory / str(step)
        state = self._checkpointer.restore(
            where, args=ocp.args.Composite(state=ocp.args.StandardRestore(stored))
        )["state"]
        flat = traverse_util.flatten_dict(template, keep_empty_nodes=True)
        restored = traverse_util.flatten_dict(state)
        for path, leaf in wanted.items():
            array = restored[path] if leaf.size else np.zeros(leaf.shape, leaf.dtype)
            flat[path] = jax.device_put(array, leaf.sharding) if _is_local(leaf) else array
        return traverse_util.unflatten_dict(flat)

    def close(self) -> None:
        """Waits, and ends the threads that write."""
        self.wait()
        if "_checkpointer" in self.__dict__:
            self.__dict__.pop("_checkpointer").close()

    # --- What is in the folder ---

    def _steps(self) -> list[int]:
        """The complete checkpoints, oldest first."""
        return sorted(int(path.name) for path in self._children() if self._is_complete(path))

    def _children(self) -> list[Any]:
        return list(self.directory.iterdir()) if self.directory.is_dir() else []

    def _is_complete(self, path: Any) -> bool:
        # A local folder has a temporary name until it is complete.
        return path.name.isdecimal() and (files.is_local(path) or (path / _COMMITTED).exists())

    def _read_json(self, step: int, item: str) -> dict[str, Any]:
        # Not by the list of the folder: on another machine that may be some seconds old.
        folder = self.directory / str(step)
        if not (folder.is_dir() and self._is_complete(folder)):
            raise UserError(f"{self.directory} has no checkpoint {step}; its latest is {self.latest_step()}.")
        return json.loads((folder / item / _JSON).read_bytes())

    def _manifest(self, step: int) -> dict[LeafPath, tuple[tuple[int, ...], np.dtype]]:
        rows = self._read_json(step, "manifest")["arrays"]
        return {tuple(path): (tuple(shape), jax.numpy.dtype(dtype)) for path, shape, dtype in rows}

    # --- Writing ---

    def _finish(self) -> None:
        if self._writing is not None:
            try:
                self._checkpointer.wait_until_finished()
            finally:
                self._writing = None

    def _before_commit(self) -> None:
        """In the thread of process 0, when all files of a checkpoint are there and it does not count yet."""
        name = str(self._writing)
        where = self.directory / (name + _TEMPORARY if files.is_local(self.directory) else name)
        seal.write(where)
        self._prune()

    def _prune(self) -> None:
        for step in self._steps()[: -self.keep]:
            files.remove_folder(self.directory / str(step))

    def _clear_away(self) -> None:
        """Removes what killed processes left half-written, and renames what `last_whole` found damaged."""
        for path in self._children():
            if _TEMPORARY in path.name or path.name.isdecimal() and not self._is_complete(path):
                files.remove_folder(path)
        for step, why in self._damage.items():
            if why:
                taken = {path.name for path in self._children()}
                names = (f"{step}.damaged", *(f"{step}.damaged.{i}" for i in range(2, len(taken) + 3)))
                (self.directory / str(step)).rename(
                    self.directory / next(name for name in names if name not in taken)
                )


def _damage(folder: Any) -> str:
    """What is wrong with a checkpoint; "" where nothing is known to be. The oldest ones have no seal."""
    try:
        manifest = seal.read_json(folder, f"manifest/{_JSON}")
        seal.read_json(folder, f"meta/{_JSON}")
        if "sealed" in manifest:
            seal.check(folder)
    except seal.Damaged as error:
        return str(error)
    return ""


def _from_first_process(value: Any) -> Any:
    """What process 0 has, a JSON value, in all processes."""
    if jax.process_count() == 1:
        return value
    text = json.dumps(value).encode()
    length = int(multihost_utils.broadcast_one_to_all(np.int32(len(text))))
    data = np.frombuffer(text.ljust(length)[:length], np.uint8)
    return json.loads(np.asarray(multihost_utils.broadcast_one_to_all(data)).tobytes())


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
    return traverse_util.unflatten_dict(
        {path: np.asarray(leaf) if _is_local(leaf) else leaf for path, leaf in arrays.items() if leaf.size}
    )


def _is_local(leaf: Any) -> bool:
    """Whether an array lies on devices of this process alone, among several: Orbax takes only global ones."""
    sharding = getattr(leaf, "sharding", None)
    return jax.process_count() > 1 and sharding is not None and sharding.is_fully_addressable


def _target(leaf: Any) -> Any:
    sharding = getattr(leaf, "sharding", None)
    if sharding is not None and not _is_local(leaf):
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)
    return np.empty(leaf.shape, leaf.dtype)


def _compare(where: Any, stored: Mapping[LeafPath, tuple], wanted: Mapping[LeafPath, Any]) -> None:
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
