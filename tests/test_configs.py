"""Every config under configs/ resolves, whole and tiny, and can be computed with."""

from __future__ import annotations

import shlex
import subprocess
import sys

import pytest
from runs import ROOT

from streamsynth import assemble, config
from streamsynth import main as main_lib

SCRIPTS = {"paper_folders.py"}
CONFIGS = sorted(path for path in (ROOT / "configs").glob("*.py") if path.name not in SCRIPTS)
SWEEPS = [path for path in CONFIGS if path.name.startswith("sweep_")]


@pytest.mark.parametrize("arg", ["", "tiny", "tiny,seed=3"])
@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_a_config_resolves_and_is_valid(path, arg):
    resolved = config.load(f"{path}:{arg}")
    assemble.check(resolved)
    assert resolved.seed == (3 if "seed" in arg else 0)
    assert config.from_json(config.to_json(resolved)) == resolved


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_tiny_is_smaller(path):
    whole, tiny = (config.load(f"{path}:{arg}") for arg in ("", "tiny"))
    assert len(tiny.stream.tasks) <= 2
    assert tiny.pretrain.steps * tiny.policy.width < whole.pretrain.steps * whole.policy.width / 10
    assert tiny.learner.steps < whole.learner.steps


@pytest.mark.parametrize("path", SWEEPS, ids=lambda path: path.stem)
def test_a_sweep_prints_commands_that_resolve(path):
    command = [sys.executable, str(path), "tiny"]
    run = subprocess.run(command, capture_output=True, text=True, check=True, env={"PYTHONPATH": str(ROOT)})
    lines = run.stdout.splitlines()
    parsed = []
    for line in lines:
        program, *argv = shlex.split(line)
        rest, overrides = main_lib._split_overrides(argv)
        assert (program, rest[0], rest[2].split("=")[0]) == ("streamsynth", "train", "--workdir")
        resolved = config.load(rest[1].removeprefix("--config="), overrides)
        assemble.check(resolved)
        parsed.append((rest[2], config.content_hash(resolved)))
    workdirs, hashes = zip(*parsed, strict=True)
    assert len(set(workdirs)) == len(lines) >= 5
    # A run may be the config as it is; no two runs are otherwise the same.
    assert len(set(hashes)) >= len(lines) - 1


def test_sweep_covers_the_keys_of_the_balance():
    changed = set()
    spec = config._import_file(str(ROOT / "configs" / "sweep_balance.py"))
    spec.sweep(lambda name, overrides: changed.update(overrides))
    assert changed == {"balance.alpha", "balance.eta", "balance.factor", "objective.kl_weight"}
