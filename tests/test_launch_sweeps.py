"""launch_tpu.sh: sweeps over several slices, and what Ctrl-C ends."""

from __future__ import annotations

import os
import re
import shlex
import signal
import subprocess
import sys

import pytest
from cloud import COMMAND, ROOT, SLICE, WORKDIR, check_mistake, printed, wait_for


def test_a_dry_run_of_several_slices_takes_one_after_the_other(cloud):
    text = "".join(f"train --config=c --workdir={name}\n" for name in "abc")
    done = cloud.launch("sweep", *SLICE, "--slices=2", "--workdir=gs://b", "--dry-run", text=text)
    assert done.returncode == 0 and "launch_tpu.sh: line" not in done.stderr
    runs = [call for call in printed(done.stdout) if "setsid" in call[-1]]
    starts = [(call[4], re.search(r"gs://b/\w", call[-1]).group()) for call in runs]
    assert starts == [("synth-1", "gs://b/a"), ("synth-1", "gs://b/c"), ("synth-2", "gs://b/b")]


def test_a_sweep_runs_every_line_once_over_its_slices(cloud):
    sweep = [sys.executable, str(ROOT / "configs" / "sweep_balance.py"), "tiny"]
    text = subprocess.run(sweep, capture_output=True, text=True, check=True, cwd=ROOT).stdout
    lines = [line.replace(str(ROOT), str(cloud.tree)) for line in text.splitlines()[:4]]
    options = (*SLICE, "--slices=2", "--workdir=gs://bucket/sweep")
    done = cloud.launch("sweep", *options, text="\n".join(["# a comment", "", *lines]))
    assert done.returncode == 0, done.stdout + done.stderr
    assert "4 of 4 commands are finished." in done.stderr
    assert len(re.findall(r"^\[synth-[12]\] turn 1 of", done.stdout, re.MULTILINE)) == 4
    expected = []
    for line in lines:  # the config as the workers know it, the workdir in the bucket
        _, train, config, workdir, *rest = shlex.split(line.replace(f"{cloud.tree}/", ""))
        expected.append([train, config, *rest, workdir.replace("--workdir=", "--workdir=gs://bucket/sweep/")])
    assert sorted(shlex.split(line)[1:] for line in cloud.lines("ran")) == sorted(expected)
    assert {cloud.state("tpu-vm", f"synth-{n}") for n in (1, 2)} == {"READY"}


def test_a_sweep_goes_on_after_a_failure_and_names_it(cloud):
    cloud.write("plan", "3\n")
    text = "".join(f"streamsynth train --config=c --workdir={name}\n" for name in "abc")
    done = cloud.launch("sweep", *SLICE, "--workdir=gs://bucket", text=text)
    assert done.returncode == 1
    assert "not finished: streamsynth train --config=c --workdir=gs://bucket/a\n" in done.stderr
    assert "2 of 3 commands are finished." in done.stderr


def test_ctrl_c_ends_a_sweep_here_and_lets_its_slices_go_on(cloud):
    cloud.write("plan", "hang\n" * 2)
    status = [cloud.folder / "home" / f"synth-{n}" / "0" / "run" / "status" for n in (1, 2)]
    with cloud.start("sweep", *SLICE, "--slices=2", "--workdir=gs://bucket") as started:
        started.stdin.write("train --config=c --workdir=a\ntrain --config=c --workdir=b\n")
        started.stdin.close()
        started.stdin = None
        try:
            shown = ""
            while shown.count("turn 1 of") < 2:
                shown += started.stdout.readline()
            started.send_signal(signal.SIGINT)
            started.communicate(timeout=120)  # until all that may write there has ended
            assert started.returncode == 130
            assert not any(file.exists() for file in status)
            # Each slice takes up what it is at, though another one would come by it first.
            first = "train --config=c --workdir=0\n"
            swapped = f"{first}train --config=c --workdir=b\ntrain --config=c --workdir=a\n"
            with cloud.start("sweep", *SLICE, "--slices=2", "--workdir=gs://bucket") as again:
                again.stdin.write(swapped)
                again.stdin.close()
                again.stdin = None
                shown = ""
                while shown.count("turn 1 of") < 2:
                    shown += again.stdout.readline()
                assert len(cloud.lines("ran")) == 2
                other = cloud.launch("sweep", *SLICE, "--slices=2", "--workdir=gs://bucket", text=first)
                assert other.returncode == 2
                assert "is busy with no command of this sweep: streamsynth train --config=c" in other.stdout
                cloud.write("go", "")
                assert "3 of 3 commands are finished." in again.communicate(timeout=120)[1]
        finally:
            cloud.write("go", "")
    wait_for(lambda: all(file.exists() for file in status))
    assert len(cloud.lines("ran")) == 3


def test_ctrl_c_ends_a_run_here_also_where_gcloud_takes_it_for_itself(cloud):
    cloud.write("plan", "hang\n")
    with cloud.start("run", *SLICE, "--spot", WORKDIR, *COMMAND, start_new_session=True) as started:
        try:
            assert started.stdout.readline().startswith("turn 1 of")
            os.killpg(started.pid, signal.SIGINT)
            assert started.wait(120) == 130
            assert cloud.lines("slept") == []
        finally:
            cloud.write("go", "")
    assert len(cloud.lines("ran")) == 1


@pytest.mark.parametrize(
    "text, sentence",
    [
        ("", "standard input has no commands"),
        ("train --workdir=a\npython train.py --workdir=b\n", "line 2 is no streamsynth command"),
        (
            "train --workdir=a\ntrain --workdir=a\n",
            "line 2: an earlier line has --workdir=gs://bucket/runs/a",
        ),
        ("train '--workdir=a\n", "line 1 has an open quotation mark"),
        ("train --workdir=/a\n", "line 1: the workdir 'gs://bucket/runs//a' is no folder"),
    ],
)
def test_mistakes_in_a_sweep(cloud, text, sentence):
    check_mistake(cloud, cloud.launch("sweep", *SLICE, "--workdir=gs://bucket/runs", text=text), sentence)
