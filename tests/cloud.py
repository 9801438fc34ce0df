"""A working tree and a cloud without Google: see gcloud.sh, the stand-in for all that launch_tpu.sh calls."""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
SCRIPT = ROOT / "launch_tpu.sh"
STAND_IN = ROOT / "tests" / "gcloud.sh"
# What most commands are about.
SLICE = ("--name=synth", "--zone=us-west4-a", "--type=v5litepod-8")
POD = ("--name=synth", "--zone=us-west4-a", "--type=v5p-16")  # two hosts
WORKDIR = "--workdir=gs://bucket/runs/a b"
COMMAND = ("--", "train", "--config=configs/quickstart.py", "--config.note=two words")


def make_tree(tree: Path) -> Path:
    """A small working tree with the script: a file of each kind that matters to what is copied."""
    shutil.copy(SCRIPT, tree)
    (tree / "configs").mkdir()
    files = {"configs/a b.py": "", "deleted.py": "", ".gitignore": "ignored\n", "ignored": "", "new.py": ""}
    for name, text in files.items():
        (tree / name).write_text(text)
    subprocess.run(["git", "init", "--quiet"], cwd=tree, check=True)
    subprocess.run(["git", "add", SCRIPT.name, "configs", "deleted.py", ".gitignore"], cwd=tree, check=True)
    (tree / "deleted.py").unlink()
    return tree


def _hear_interrupts() -> None:
    signal.signal(signal.SIGINT, signal.SIG_DFL)


class Cloud:
    """The folder of the stand-in, what is asked of it, and the working tree that the script is started in."""

    def __init__(self, folder: Path, tree: Path):
        self.folder = folder
        self.tree = tree
        for name in ("bin", "bucket", "states"):
            (folder / name).mkdir(parents=True)
        for name in ("gcloud", "curl", "python3", "sleep", "streamsynth", "uv"):
            (folder / "bin" / name).symlink_to(STAND_IN)

    def start(self, *arguments: str, **more: Any) -> subprocess.Popen:
        env = {**os.environ, "PATH": f"{self.folder}/bin:{os.environ['PATH']}", "CLOUD": str(self.folder)}
        command = ["bash", str(self.tree / SCRIPT.name), *arguments]
        keys = dict(
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=env, **more
        )
        # Where tests run in the background SIGINT is ignored, and bash cannot take that back.
        return subprocess.Popen(command, **keys, preexec_fn=_hear_interrupts)

    def launch(self, *arguments: str, text: str = "") -> subprocess.CompletedProcess:
        with self.start(*arguments) as started:
            out, error = started.communicate(text, timeout=120)
        return subprocess.CompletedProcess(arguments, started.returncode, out, error)

    def write(self, name: str, text: str) -> None:
        (self.folder / name).write_text(text)

    def lines(self, name: str) -> list[str]:
        file = self.folder / name
        return file.read_text().splitlines() if file.exists() else []

    def state(self, kind: str, name: str) -> str | None:
        return next(iter(self.lines(f"states/{kind}.{name}")), None)

    def calls(self) -> list[list[str]]:
        file = self.folder / "calls"
        return commands(file.read_text()) if file.exists() else []

    def verbs(self) -> list[str]:
        """What was asked, in short; what a slice's state is counts once however often it was asked."""
        names = []
        for call in self.calls():
            kind, verb = call[:2] if call[0] == "storage" else call[2:4]
            names += [f"{verb} {kind}"] if not (names and names[-1] == f"{verb} {kind}") else []
        return names


def commands(text: str) -> list[list[str]]:
    """Commands from words that end with \\0, and commands with \\1\\0."""
    return [command.strip("\0").split("\0") for command in text.split("\1\0")[:-1]]


def printed(text: str) -> list[list[str]]:
    """The commands of a dry run, each on one line in the shell's own quoting."""
    script = """while IFS= read -r line; do eval "set -- $line"; printf '%s\\0' "$@" $'\\1'; done"""
    words = subprocess.run(["bash", "-c", script], input=text, capture_output=True, text=True, check=True)
    assert all(command[0] == "gcloud" for command in commands(words.stdout))
    return [command[1:] for command in commands(words.stdout)]


def plain(calls: list[list[str]]) -> list[list[str]]:
    """Without what differs from start to start: the folder of the packed tree, and the id of a run."""
    for pattern, plainly in {r"^/\S*/(\w+.tar.gz)$": r"\1", r"(?m)^id=\S+$": "id"}.items():
        calls = [[re.sub(pattern, plainly, word) for word in words] for words in calls]
    return calls


def wait_for(happens: Callable[[], bool]) -> None:
    end = time.monotonic() + 20
    while not happens():
        assert time.monotonic() < end
        time.sleep(0.05)


def check_mistake(cloud: Cloud, done: subprocess.CompletedProcess, sentence: str) -> None:
    assert done.returncode == 2, done.stderr
    said = [line for line in done.stderr.splitlines() if not line.startswith("ERROR: (gcloud")]
    assert done.stdout == "" and len(said) == 1, done.stderr
    assert said[0].startswith("launch_tpu.sh: error: ") and sentence in said[0]
    assert [call for call in cloud.calls() if call[0] != "storage"] == []
