"""launch_tpu.sh: what it would run, and that a run lost half-way goes on from its saved workdir.

No cloud is at hand: `gcloud` is a stand-in that keeps a bucket in a folder and runs what it is told to run
on the VM in a home folder of its own.
"""

from __future__ import annotations

import os
import subprocess
import tarfile
from pathlib import Path

import pytest

SCRIPT = Path(__file__).resolve().parent.parent / "launch_tpu.sh"
OPTIONS = ("--name=synth", "--zone=us-west4-a", "--type=v5litepod-8", "--workdir=gs://bucket/runs/a b")
COMMAND = ("--", "train", "--config=configs/quickstart.py", "--config.note=two words")

GCLOUD = """#!/usr/bin/env bash
echo "$*" | head -1 >> "$LOG"
case "$*" in
  *" describe "*) [ -e "$VM/made" ] ;;
  *" create "*) touch "$VM/made" ;;
  *" scp "*) cp "$5" "$VM/streamsynth.tar.gz" ;;
  *" ssh "*) HOME="$VM" bash -c "${*#*--command=}" ;;
  "storage ls "*) [ -e "$BUCKET/$(basename "$3")" ] ;;
  "storage cp --quiet gs://"*) cp "$BUCKET/$(basename "$4")" "$5" ;;
  "storage cp --quiet "*) cp "$4" "$BUCKET/$(basename "$5")" ;;
  *) echo "unexpected: $*" >&2; exit 9 ;;
esac
"""

# Makes an environment whose `streamsynth` counts its runs in the workdir, and fails in the first one.
UV = """#!/usr/bin/env bash
if [ "$1" = venv ]; then
  mkdir -p "$HOME/environment/bin"
  cat > "$HOME/environment/bin/streamsynth" <<'END'
#!/usr/bin/env bash
printf '%s\\n' "$@" > "$HOME/arguments"
work="${@: -1}"; work="${work#--workdir=}"
echo run >> "$work/journal"
[ "$(wc -l < "$work/journal")" -gt 1 ]
END
  chmod +x "$HOME/environment/bin/streamsynth"
fi
"""


def launch(*arguments: str, env: dict[str, str] | None = None) -> subprocess.CompletedProcess:
    command = ["bash", str(SCRIPT), *arguments]
    return subprocess.run(command, capture_output=True, text=True, env=env, check=False)


def test_dry_run_prints_every_command_and_runs_none(tmp_path):
    # A gcloud that fails at whatever it is asked shows that none is run.
    (tmp_path / "gcloud").write_text("#!/bin/sh\nexit 9\n")
    (tmp_path / "gcloud").chmod(0o755)
    env = {**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}"}
    done = launch(*OPTIONS, "--spot", "--project=p", "--dry-run", *COMMAND, env=env)
    assert done.returncode == 0, done.stderr
    create, copy, install, train = shlex_lines(done.stdout)
    common = ["gcloud", "compute", "tpus", "tpu-vm"]
    place = ["--zone=us-west4-a", "--project=p"]
    assert create == [
        *common,
        "create",
        "synth",
        *place,
        "--accelerator-type=v5litepod-8",
        "--version=v2-alpha-tpuv5-lite",
        "--spot",
    ]
    assert copy[:5] == [*common, "scp"] and copy[6:] == ["synth:streamsynth.tar.gz", *place, "--worker=all"]
    assert install[:-1] == train[:-1] == [*common, "ssh", "synth", *place, "--worker=all"]
    assert '".[tpu]"' in install[-1]
    assert (
        'streamsynth train --config=configs/quickstart.py --config.note=two\\ words --workdir="$work"'
        in train[-1]
    )


def shlex_lines(text: str) -> list[list[str]]:
    """The commands of a dry run; each was printed in the shell's own quoting, on one line."""
    quoted = subprocess.run(
        [
            "bash",
            "-c",
            'while IFS= read -r line; do eval "set -- $line"; printf "%s\\0" "$@"; printf "\\1\\0"; done',
        ],
        input=text,
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    return [command.strip("\0").split("\0") for command in quoted.split("\1\0")[:-1]]


def test_a_run_that_was_lost_goes_on_from_the_saved_workdir(tmp_path):
    folders = {name: tmp_path / name for name in ("bin", "vm", "bucket")}
    for folder in folders.values():
        folder.mkdir()
    uv = folders["vm"] / ".local" / "bin" / "uv"
    uv.parent.mkdir(parents=True)
    programs = {folders["bin"] / "gcloud": GCLOUD, uv: UV}
    for name in ("python3", "curl"):  # uv is there already; no metadata server answers
        programs[folders["bin"] / name] = f"#!/bin/sh\n[ {name} = python3 ]\n"
    for path, text in programs.items():
        path.write_text(text)
        path.chmod(0o755)
    env = {
        **os.environ,
        "PATH": f"{folders['bin']}:{os.environ['PATH']}",
        "VM": str(folders["vm"]),
        "BUCKET": str(folders["bucket"]),
        "LOG": str(tmp_path / "log"),
    }

    first = launch(*OPTIONS, *COMMAND, env=env)
    assert first.returncode == 1, first.stderr  # the exit code of the command passes through
    assert (folders["vm"] / "streamsynth" / "setup.py").exists()
    assert (folders["vm"] / "arguments").read_text().splitlines() == [
        "train",
        "--config=configs/quickstart.py",
        "--config.note=two words",
        f"--workdir={folders['vm']}/workdir",
    ]
    assert os.listdir(folders["bucket"]) == ["workdir.tar.gz"]

    # The VM is taken away with its disk; only the bucket is left.
    (folders["vm"] / "made").unlink()
    (folders["vm"] / "workdir" / "journal").unlink()
    second = launch(*OPTIONS, *COMMAND, env=env)
    assert second.returncode == 0, second.stderr
    with tarfile.open(folders["bucket"] / "workdir.tar.gz") as archive:
        assert archive.extractfile("./journal").read() == b"run\nrun\n"
    third = launch(*OPTIONS, *COMMAND, env=env)
    assert third.returncode == 0
    made = [line for line in (tmp_path / "log").read_text().splitlines() if " create " in line]
    assert len(made) == 2  # the third start found the VM


@pytest.mark.parametrize(
    "arguments, sentence",
    [
        (OPTIONS[1:] + COMMAND, "--name is missing"),
        ((*OPTIONS[:3], "--workdir=here", *COMMAND), "--workdir=here is no bucket folder"),
        (OPTIONS, "no command"),
        (("--nmae=x", *COMMAND), "unknown option --nmae=x"),
    ],
)
def test_mistakes_exit_with_2_and_one_sentence(arguments, sentence):
    done = launch(*arguments)
    assert done.returncode == 2
    assert done.stdout == "" and done.stderr.startswith("launch_tpu.sh: error: ") and sentence in done.stderr
    assert done.stderr.count("\n") == 1
