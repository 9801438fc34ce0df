"""What all tests share: the CPU, one compilation cache, and the folder of real data."""

from __future__ import annotations

import dataclasses
import fcntl
import os
import shutil
import tempfile
from pathlib import Path
from typing import Any

import pytest
from hypothesis import settings

# Before JAX is imported anywhere. Tests state what they need of a device; by default it is the CPU.
os.environ.setdefault("JAX_PLATFORMS", "cpu")

# Tests that start the command several times compile the same programs each time: the processes of one
# test session share what they compiled. Workers of a parallel session find the name set already.
_OWN_CACHE = None
if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
    _OWN_CACHE = tempfile.mkdtemp(prefix="streamsynth-test-cache-")
    os.environ["JAX_COMPILATION_CACHE_DIR"] = _OWN_CACHE
    # The tiny runs have many programs in common that take less than the second from which JAX keeps one.
    os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0.1"

# A busy machine is no failure, and a run that failed fails again the same way.
settings.register_profile("streamsynth", deadline=None, derandomize=True)
settings.load_profile("streamsynth")

ROOT = Path(__file__).resolve().parent.parent


# Minutes each: begun last, one would be run while the other workers have nothing left to do.
_LONGEST = ("test_hosts_run.py", "test_sharded.py", "test_lag_processes.py", "test_stories.py")


def pytest_configure(config: pytest.Config) -> None:
    if config.option.markexpr == "slow":
        config.option.loadscopereorder = False  # xdist's own order, by the number of tests


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if config.option.markexpr == "slow":
        items.sort(key=lambda item: item.path.name not in _LONGEST)


def pytest_unconfigure() -> None:
    if _OWN_CACHE is not None:
        shutil.rmtree(_OWN_CACHE, ignore_errors=True)


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder with real data sets and weights; tests that need it skip where it is absent."""
    folder = Path(os.environ.get("STREAMSYNTH_SHARED", ROOT.parent / "shared"))
    if not folder.is_dir():
        pytest.skip("no folder of real data; name one with STREAMSYNTH_SHARED")
    return folder


@dataclasses.dataclass(frozen=True)
class Finished:
    """A whole run that tests may read, but not write into.

    workdir: its folder.   results: what `api.train` returned.   cache: where its base policy is cached.
    """

    workdir: Path
    results: dict[str, Any]
    cache: Path


@pytest.fixture(scope="session")
def finished(tmp_path_factory) -> Finished:
    """The smallest run there is, never interrupted; the workers of a parallel session share one."""
    import runs

    from streamsynth import api

    folder = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        folder = folder.parent
    workdir, cache = folder / "finished" / "run", folder / "finished" / "cache"
    with open(folder / "finished.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not (workdir / "report" / "results.json").is_file():
            # In a process of its own: in this one, what was compiled for tests may be less optimized.
            runs.finish(runs.arguments(cache, workdir))
    return Finished(workdir, api.results(workdir), cache)


@pytest.fixture(scope="module")
def quick_xla():
    """Nearly all of a tiny run is compilation: half the time for programs that are twice as slow."""
    import jax

    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)
    # JAX tells programs apart by their arguments, not by how they were compiled: later runs would take these,
    # and differ in their last digits from the same run in another process.
    jax.clear_caches()


@pytest.fixture(scope="module")
def tree(tmp_path_factory) -> Path:
    """A working tree with the launch script, for all that a module starts in a cloud."""
    import cloud

    return cloud.make_tree(tmp_path_factory.mktemp("tree"))


@pytest.fixture
def cloud(tmp_path, tree) -> Any:
    """A cloud without Google: see cloud.py."""
    from cloud import Cloud

    return Cloud(tmp_path / "cloud", tree)
