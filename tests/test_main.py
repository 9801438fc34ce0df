"""The command: what it passes on, and how it says that something is wrong."""

from __future__ import annotations

import os
import subprocess
import sys
import types
from pathlib import Path

import pytest

import streamsynth
from streamsynth import main as main_lib
from streamsynth.errors import UserError

CONFIG = """
from ml_collections import ConfigDict
from streamsynth import config as config_lib

def get_config(arg=""):
    arg = config_lib.parse_arg(arg, tiny=False)
    return ConfigDict({"steps": 2 if arg.tiny else 100, "learner": {"alpha": 0.5, "name": "adam"}})
"""


@pytest.fixture
def config_file(tmp_path) -> str:
    path = tmp_path / "small.py"
    path.write_text(CONFIG)
    return str(path)


@pytest.fixture
def calls(monkeypatch) -> list:
    """Stands in for the api and records what it is asked to do."""
    calls = []
    api = types.ModuleType("streamsynth.api")
    for verb in ("train", "synthesize", "evaluate", "report"):
        setattr(api, verb, lambda *args, verb=verb, **kwargs: calls.append((verb, args, kwargs)))
    monkeypatch.setitem(sys.modules, "streamsynth.api", api)
    monkeypatch.setattr(streamsynth, "api", api, raising=False)
    return calls


def test_train_passes_the_resolved_config_on(config_file, calls):
    argv = [
        "train",
        f"--config={config_file}:tiny",
        "--config.learner.alpha=0.25",
        "--config.learner.name",
        "lion",
        "--workdir=run",
        "--init_from",
        "old",
    ]
    assert main_lib.main(argv) == 0
    [(verb, (config, workdir), kwargs)] = calls
    assert (verb, workdir, kwargs) == ("train", "run", {"init_from": "old"})
    assert config.to_dict() == {"steps": 2, "learner": {"alpha": 0.25, "name": "lion"}}
    assert config.is_locked


def test_an_override_may_be_a_negative_number(config_file, calls):
    argv = ["train", "--workdir=run", "--config.learner.alpha", "-0.5", f"--config={config_file}"]
    assert main_lib.main(argv) == 0
    assert calls[0][1][0].learner.alpha == -0.5


def test_the_other_verbs_pass_their_arguments_on(calls):
    assert main_lib.main(["synthesize", "--workdir=w", "--task=files:d", "--rows=50", "--output", "o"]) == 0
    assert main_lib.main(["evaluate", "--workdir=w"]) == 0
    assert main_lib.main(["report", "--workdir", "w"]) == 0
    assert calls == [
        ("synthesize", ("w",), {"task": "files:d", "rows": 50, "output": "o"}),
        ("evaluate", ("w",), {}),
        ("report", ("w",), {}),
    ]


@pytest.mark.parametrize(
    "argv, sentence",
    [
        ([], "required: {train,synthesize,evaluate,report,export,compile}"),
        (["trian"], "invalid choice: 'trian'"),
        (["train", "--config=FILE"], "--workdir"),
        (["train", "--workdir=w"], "--config"),
        (["train", "--config=FILE", "--workdir=w", "--speed=9"], "unrecognized arguments: --speed=9"),
        (["train", "--conf=FILE", "--workdir=w"], "--config"),
        (["train", "--config=absent.py", "--workdir=w"], "absent.py does not exist"),
        (["train", "--config=FILE:tinny", "--workdir=w"], "'tinny' is not known"),
        (["train", "--config=FILE", "--workdir=w", "--config.learner.alfa=1"], "nearest are: learner.alpha"),
        (["train", "--config=FILE", "--workdir=w", "--config.steps=few"], "--config.steps is a whole number"),
        (["train", "--config=FILE", "--workdir=w", "--config.steps"], "--config.steps needs a value"),
        (["train", "--config=FILE", "--config.steps", "--workdir=w"], "--config.steps needs a value"),
        (["train", "--config=FILE", "--workdir=w", "--config.steps=1", "--config.steps=2"], "given twice"),
        (["report", "--workdir=w", "--config.steps=1"], "--config.steps: report takes no config"),
        (["synthesize", "--workdir=w", "--task=t", "--output=o", "--rows=0"], "not a whole number above 0"),
        (["synthesize", "--workdir=w", "--task=t", "--output=o", "--rows=x"], "not a whole number above 0"),
    ],
)
def test_mistakes_end_with_code_2_and_one_sentence(argv, sentence, config_file, calls, capsys):
    argv = [word.replace("FILE", config_file) for word in argv]
    assert main_lib.main(argv) == 2
    out, err = capsys.readouterr()
    assert out == "" and calls == []
    assert err.startswith("streamsynth: error: ") and err.count("\n") == 1
    assert sentence in err


def test_what_the_api_finds_wrong_is_said_the_same_way(calls, capsys, monkeypatch):
    def evaluate(workdir):
        raise UserError(f"{workdir} has no run; train one first.")

    monkeypatch.setattr(streamsynth.api, "evaluate", evaluate)
    assert main_lib.main(["evaluate", "--workdir=w"]) == 2
    assert capsys.readouterr().err == "streamsynth: error: w has no run; train one first.\n"


def test_ctrl_c_ends_with_130_and_no_traceback(calls, capsys, monkeypatch):
    def train(config, workdir, init_from):
        raise KeyboardInterrupt

    monkeypatch.setattr(streamsynth.api, "report", lambda workdir: train(None, workdir, None))
    assert main_lib.main(["report", "--workdir=w"]) == 130
    assert capsys.readouterr().err.count("\n") == 1


def test_other_errors_are_bugs_and_keep_their_traceback(calls, monkeypatch):
    def report(workdir):
        raise ValueError("a bug")

    monkeypatch.setattr(streamsynth.api, "report", report)
    with pytest.raises(ValueError, match="a bug"):
        main_lib.main(["report", "--workdir=w"])


def test_as_a_process_help_needs_no_jax_and_mistakes_exit_with_2(tmp_path):
    def run(*argv):
        command = [sys.executable, "-X", "importtime", "-m", "streamsynth.main", *argv]
        env = {**os.environ, "PYTHONPATH": str(Path(streamsynth.__file__).parent.parent)}
        return subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=env, check=False)

    helped = run("train", "--help")
    assert helped.returncode == 0
    assert "--config FILE[:ARG]" in helped.stdout
    assert " jax" not in helped.stderr  # -X importtime lists every import there

    mistaken = run("train", "--config=absent.py", "--workdir=w")
    assert mistaken.returncode == 2
    assert "Traceback" not in mistaken.stderr
    assert "streamsynth: error: The config file absent.py does not exist" in mistaken.stderr
    assert list(tmp_path.iterdir()) == []
