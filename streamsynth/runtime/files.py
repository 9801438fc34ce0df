"""Files that are either wholly there or not at all, in a local folder or in a bucket.

A path with a scheme (gs://BUCKET/NAME) is an `epath.Path`, any other a `pathlib.Path`; their methods have the
same names. What differs is here: a bucket replaces an object whole or not at all, and cannot append to it.
"""

from __future__ import annotations

import contextlib
import importlib.util
import os
import pathlib
import secrets
import shutil
import tempfile
from collections.abc import Iterator
from typing import Any

from streamsynth.errors import UserError

PathLike = str | os.PathLike[str]


def is_local(path: PathLike) -> bool:
    """Whether a path is of the local file system (a mounted bucket is, too)."""
    return "://" not in os.fspath(path)


def as_path(path: PathLike) -> Any:
    """The path as an object.

    Raises:
      UserError: its scheme is not gs://, or the library for that is missing.
    """
    if is_local(path):
        return pathlib.Path(path)
    text = os.fspath(path)
    if not text.startswith("gs://"):
        raise UserError(f"{text}: give a local path or one of Google Cloud Storage (gs://BUCKET/NAME).")
    if importlib.util.find_spec("gcsfs") is None:
        raise UserError(f"{text}: reading a bucket needs gcsfs: pip install 'streamsynth[gcs]'.")
    import fsspec  # comes with gcsfs
    from etils import epath

    # Other processes, and Orbax in this one, write what a listing from before does not show.
    fsspec.config.conf.setdefault("gcs", {}).setdefault("use_listings_cache", False)
    return epath.Path(text)


def atomic_write(path: PathLike, content: str | bytes) -> None:
    """Writes `content` to `path` so that a reader, or a crash, never meets half of it.

    Locally the content goes to a temporary file in the same folder (a rename is atomic only within one file
    system), is synced, and takes the name of `path`. Missing parent folders are made. Text is UTF-8.
    """
    path = as_path(path)
    data = content.encode() if isinstance(content, str) else content
    if not is_local(path):
        path.write_bytes(data)
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(6)}.tmp")
    try:
        with open(temporary, "xb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    sync_folder(path.parent)


def sync_folder(folder: PathLike) -> None:
    """Makes new names in a local `folder` survive a power cut: a file's own fsync does not cover its name."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def local_copy(path: Any) -> Iterator[pathlib.Path]:
    """A local file with the content of `path`, for libraries that open files: itself where it is local."""
    if is_local(path):
        yield pathlib.Path(path)
        return
    with tempfile.TemporaryDirectory(prefix="streamsynth-") as folder:
        copied = pathlib.Path(folder, path.name)
        copied.write_bytes(path.read_bytes())
        yield copied


def size(path: Any) -> int:
    """Bytes of a file. Raises FileNotFoundError where there is none."""
    return path.stat().st_size if is_local(path) else path.stat().length


def names_within(folder: Any) -> list[str]:
    """The files of a folder and of all folders in it, by their names from there, sorted."""

    def walk(place: Any, prefix: str) -> Iterator[str]:
        for path in place.iterdir():
            if path.is_dir():
                yield from walk(path, f"{prefix}{path.name}/")
            else:
                yield prefix + path.name

    return sorted(walk(folder, ""))


def remove_folder(folder: Any) -> None:
    """Removes a folder with all that is in it; what is gone already is no error."""
    if is_local(folder):
        shutil.rmtree(folder, ignore_errors=True)
    else:
        folder.rmtree(missing_ok=True)
