"""launch_tpu.sh: what it would run, and that a run goes on from its bucket whatever becomes of its slice.

No cloud is at hand: `gcloud` is a stand-in (tests/gcloud.sh) that keeps a bucket in a folder and runs what it
is told to run on the workers in home folders of their own.
"""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from cloud import COMMAND, POD, SCRIPT, SLICE, STAND_IN, WORKDIR, check_mistake, plain, printed, wait_for


def test_shellcheck_finds_nothing():
    found = shutil.which("shellcheck", path=f"{Path(sys.executable).parent}:{os.environ['PATH']}")
    assert found, "no shellcheck: install the extra `test`"
    command = [found, SCRIPT, STAND_IN]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.stdout + done.stderr == ""


@pytest.mark.parametrize(
    "arguments, text",
    [
        (("create", *SLICE), ""),
        (("create", *POD, "--spot", "--queued", "--project=p"), ""),
        (("run", *SLICE, WORKDIR, *COMMAND), ""),
        (("run", *POD, "--spot", "--image=mine", WORKDIR, *COMMAND), ""),
        (("run", *POD, "--queued", WORKDIR, *COMMAND), ""),
        (("sweep", *SLICE, WORKDIR), "train --config=a --workdir=1\ntrain --config=b --workdir=2\n"),
    ],
)
def test_a_dry_run_prints_what_a_run_would_call_and_calls_nothing(cloud, arguments, text):
    dry = cloud.launch(arguments[0], "--dry-run", *arguments[1:], text=text)
    assert dry.returncode == 0, dry.stderr
    assert cloud.calls() == []
    wet = cloud.launch(*arguments, text=text)
    assert wet.returncode == 0, wet.stderr
    # Waiting in the queue is the one thing that a dry run cannot know.
    calls, waits = plain(cloud.calls()), 3 if "--queued" in arguments else 0
    repeats = [n for n in range(1, len(calls)) if calls[n] == calls[n - 1] and "describe" in calls[n]]
    assert len(repeats) == waits
    assert plain(printed(dry.stdout)) == [call for n, call in enumerate(calls) if n not in repeats]


def test_the_calls_of_a_run(cloud):
    done = cloud.launch("run", *SLICE, "--spot", "--project=p", WORKDIR, *COMMAND)
    assert done.returncode == 0, done.stderr
    remember, look, create, again, copy, setup, train = plain(cloud.calls())
    vm = ["compute", "tpus", "tpu-vm"]
    place = ["--zone=us-west4-a", "--project=p"]
    assert remember == ["storage", "cp", "-", "gs://bucket/runs/a b/launch.txt"]
    assert look == again == [*vm, "describe", "synth", *place, "--format=value(state)"]
    alive = ["--ssh-flag=-oConnectTimeout=20", "--ssh-flag=-oServerAliveInterval=20"]
    kind = ["--accelerator-type=v5litepod-8", "--version=v2-alpha-tpuv5-lite"]
    assert create == [*vm, "create", "synth", *place, *kind, "--spot"]
    assert copy == [*vm, "scp", "synth.tar.gz", "synth:streamsynth.tar.gz", *place, "--worker=all"]
    assert setup[:-1] == train[:-1] == [*vm, "ssh", "synth", *place, "--worker=all", *alive]
    assert '".[tpu,gcs]"' in setup[-1]
    copied = cloud.folder / "home" / "synth" / "0" / "streamsynth"
    files = {str(file.relative_to(copied)) for file in copied.rglob("*") if file.is_file()}
    assert files == {SCRIPT.name, "configs/a b.py", ".gitignore", "new.py"}
    assert shlex.split(cloud.lines("ran")[0]) == ["synth/0", *COMMAND[1:], WORKDIR]
    assert "turn 1 of" in done.stdout


def test_the_calls_for_a_place_in_the_queue(cloud):
    done = cloud.launch("create", *POD, "--spot", "--queued")
    assert done.returncode == 0, done.stderr
    queue = ["compute", "tpus", "queued-resources"]
    look = [*queue, "describe", "synth", "--zone=us-west4-a", "--format=value(state.state)"]
    create = [*queue, "create", "synth", "--zone=us-west4-a", "--accelerator-type=v5p-16"]
    create += ["--runtime-version=v2-alpha-tpuv5", "--node-id=synth", "--spot"]
    vm = ["compute", "tpus", "tpu-vm", "describe", "synth", "--zone=us-west4-a", "--format=value(state)"]
    assert cloud.calls() == [look, create, look, look, look, look, vm]
    said = [line.split()[-1] for line in done.stderr.splitlines() if " is " in line]
    assert said == ["WAITING_FOR_RESOURCES", "PROVISIONING", "READY"]  # each once
    assert cloud.lines("slept") == ["30"] * 3
    assert cloud.launch("create", *POD, "--spot", "--queued").returncode == 0
    assert len(cloud.calls()) == 7 + 2  # there already


def test_setup_copies_the_tree_and_folders_of_the_bucket_to_all_workers(cloud):
    (cloud.folder / "bucket" / "bucket" / "weights").mkdir(parents=True)
    cloud.write("bucket/bucket/weights/config.json", "{}")
    assert cloud.launch("create", *POD).returncode == 0
    for _ in range(2):
        done = cloud.launch("setup", *POD, "--fetch=gs://bucket/weights/")
        assert done.returncode == 0, done.stderr
    for worker in "01":
        tree = cloud.folder / "home" / "synth" / worker / "streamsynth"
        assert (tree / "launch_tpu.sh").exists() and (tree / "weights" / "config.json").exists()
    (cloud.folder / "bucket" / "bucket" / "configs").mkdir()
    done = cloud.launch("setup", *POD, "--fetch=gs://bucket/configs")
    assert done.returncode == 2 and "the working tree has a configs of its own" in done.stderr


def test_a_run_goes_on_whatever_becomes_of_its_slice(cloud):
    cloud.write("plan", "preempt\nvanish\nterminate\n")
    done = cloud.launch("run", *SLICE, "--spot", WORKDIR, *COMMAND)
    assert done.returncode == 0, done.stderr
    assert cloud.lines("bucket/bucket/runs/a b/journal") == ["turn"] * 4
    assert "turn 1 of" in done.stdout and "saved" in done.stdout and "turn 4 of" in done.stdout
    look, start = "describe tpu-vm", "ssh tpu-vm"
    made = [look, "create tpu-vm", look, "scp tpu-vm", start]
    preempted = [look, "describe queued-resources", look, "delete tpu-vm"]
    # Exit code 75 alone asks for no new slice.
    assert cloud.verbs() == ["cp storage", *made, *preempted, *made, *made, look, start]
    assert cloud.lines("slept") == ["30", "60", "120"]  # before the second, third and fourth start


def test_a_preempted_place_in_the_queue_is_taken_anew(cloud):
    cloud.write("plan", "preempt\n")
    done = cloud.launch("run", *POD, "--spot", "--queued", WORKDIR, *COMMAND)
    assert done.returncode == 0, done.stderr
    queue = [call[3] for call in cloud.calls() if call[2] == "queued-resources" and call[3] != "describe"]
    assert queue == ["create", "delete", "create"]
    assert "synth is SUSPENDED" in done.stderr
    assert cloud.lines("bucket/bucket/runs/a b/journal") == ["turn"] * 2


def test_a_slice_that_is_gone_altogether_is_made_again(cloud):
    assert cloud.launch("run", *SLICE, WORKDIR, *COMMAND).returncode == 0
    assert cloud.launch("delete", *SLICE[:2]).returncode == 0
    done = cloud.launch("resume", WORKDIR)
    assert done.returncode == 0, done.stderr
    assert "turn 2 of" in done.stdout
    assert cloud.verbs().count("create tpu-vm") == 2


def test_resume_needs_the_workdir_alone_and_takes_other_options(cloud):
    cloud.write("plan", "terminate\n")
    done = cloud.launch("run", *POD, "--queued", WORKDIR, *COMMAND)
    assert done.returncode == 75
    assert "not finished; ./launch_tpu.sh resume --workdir=gs://bucket/runs/a b goes on" in done.stderr
    done = cloud.launch("resume", WORKDIR, "--name=other", "--type=v5p-8")
    assert done.returncode == 0, done.stderr
    first, *_, last = [shlex.split(line) for line in cloud.lines("ran")]
    assert first[1:] == [*COMMAND[1:], "--distributed", WORKDIR]
    assert last == ["other/0", *COMMAND[1:], WORKDIR]  # one host
    assert cloud.state("queued-resources", "other") == "ACTIVE"
    assert "--name=other" in cloud.lines("bucket/bucket/runs/a b/launch.txt")


def test_a_run_that_was_copied_goes_on_in_its_copy(cloud):
    assert cloud.launch("run", *SLICE, WORKDIR, *COMMAND).returncode == 0
    bucket = cloud.folder / "bucket" / "bucket"
    shutil.copytree(bucket / "runs", bucket / "copies")
    assert cloud.launch("resume", "--workdir=gs://bucket/copies/a b").returncode == 0
    assert shlex.split(cloud.lines("ran")[-1])[-1] == "--workdir=gs://bucket/copies/a b"


def test_a_run_with_no_room_waits_longer_each_time_and_gives_up_in_the_end(cloud):
    no_room = '{"code": 8, "message": "There is no more capacity in the zone \\"us-west4-a\\""}\n'
    cloud.write("refuse", no_room * 7)
    done = cloud.launch("run", *SLICE, "--spot", WORKDIR, *COMMAND)
    assert done.returncode == 0, done.stderr
    assert cloud.lines("slept") == ["30", "60", "120", "240", "480", "960", "960"]
    cloud.launch("delete", *SLICE)
    cloud.write("refuse", no_room * 7)
    done = cloud.launch("run", *SLICE, "--spot", "--restarts=2", WORKDIR, *COMMAND)
    assert done.returncode == 75 and "no more capacity" in done.stderr
    assert "not finished; ./launch_tpu.sh resume --workdir=gs://bucket/runs/a b goes on" in done.stderr


@pytest.mark.parametrize("code", [1, 2, 137])
def test_any_other_failure_ends_the_run_with_its_message_and_exit_code(cloud, code):
    cloud.write("plan", f"{code}\n")
    done = cloud.launch("run", *SLICE, "--spot", WORKDIR, *COMMAND)
    assert done.returncode == code
    assert f"the message of exit code {code}" in done.stdout
    assert f"streamsynth ended with exit code {code} on synth." in done.stderr
    assert len(cloud.lines("ran")) == 1


def test_what_gcloud_refuses_ends_the_run_the_first_time(cloud):
    cloud.write("refuse", "INVALID_ARGUMENT: no such type\n")
    done = cloud.launch("run", *SLICE, "--spot", WORKDIR, *COMMAND)
    assert done.returncode == 1 and "no such type" in done.stderr
    cloud.write("offline", "")
    done = cloud.launch("run", *SLICE, "--spot", WORKDIR, *COMMAND)
    assert done.returncode == 1 and "a problem refreshing your current auth tokens" in done.stderr
    assert cloud.lines("slept") == []


def test_a_failed_place_in_the_queue_is_no_place_to_wait(cloud):
    cloud.write("states/queued-resources.synth", "FAILED\n")
    done = cloud.launch("run", *SLICE, "--spot", "--queued", WORKDIR, *COMMAND)
    assert done.returncode == 1
    assert "see with gcloud's describe why synth is FAILED, then delete it." in done.stderr
    assert cloud.lines("slept") == [] and cloud.lines("ran") == []


def test_what_ends_while_the_connection_is_lost_is_not_run_again(cloud):
    cloud.write("go", "")
    cloud.write("plan", "lose\n")
    done = cloud.launch("run", *SLICE, "--restarts=1", WORKDIR, *COMMAND)
    assert done.returncode == 0, done.stderr
    assert "restart 1 of at most 1" in done.stderr and "turn 1 of" in done.stdout
    assert len(cloud.lines("ran")) == 1
    assert cloud.launch("run", *SLICE, WORKDIR, *COMMAND).returncode == 0
    assert len(cloud.lines("ran")) == 2  # asked for again


def test_a_machine_that_went_down_starts_the_run_again(cloud):
    cloud.write("plan", "reboot\n")
    done = cloud.launch("run", *SLICE, "--restarts=1", WORKDIR, *COMMAND)
    assert done.returncode == 0, done.stderr
    assert cloud.lines("bucket/bucket/runs/a b/journal") == ["turn"] * 2


def test_gcloud_may_fail_once_a_run_is_under_way(cloud):
    cloud.write("plan", "offline\n")
    done = cloud.launch("run", *SLICE, "--restarts=1", WORKDIR, *COMMAND)
    assert done.returncode == 1
    assert "restart 1 of at most 1" in done.stderr and "streamsynth ended with exit code 1" in done.stderr
    assert len(cloud.lines("ran")) == 1  # how it ended was asked a second time


def test_gcloud_may_fail_while_a_place_in_the_queue_is_waited_for(cloud):
    assert cloud.launch("create", *POD, "--queued").returncode == 0
    assert cloud.launch("delete", *POD[:2]).returncode == 0
    cloud.write("states/queued-resources.synth", "WAITING_FOR_RESOURCES\nOFFLINE\nOFFLINE\nACTIVE\n")
    done = cloud.launch("create", *POD, "--queued")
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("refreshing your current auth tokens") == 2
    cloud.write("states/queued-resources.other", "WAITING_FOR_RESOURCES\n" + "OFFLINE\n" * 12)
    done = cloud.launch("create", "--name=other", *POD[1:], "--queued")
    assert done.returncode == 1 and done.stderr.count("refreshing your current auth tokens") == 10


def test_a_setup_that_goes_on_alone_is_waited_for(cloud):
    assert cloud.launch("setup", *SLICE).returncode != 0  # there is no slice yet
    assert cloud.launch("create", *SLICE).returncode == 0
    home = cloud.folder / "home" / "synth" / "0" / "run"
    home.mkdir()
    (home / "line").write_text("setup\n")
    with subprocess.Popen(["flock", home / "lock", "cat"], stdin=subprocess.PIPE) as other:
        wait_for((home / "lock").exists)
        with cloud.start("run", *SLICE, WORKDIR, *COMMAND) as started:
            wait_for(lambda: "5" in cloud.lines("slept"))
            assert cloud.lines("ran") == []
            other.stdin.close()
            assert started.wait(60) == 0
    assert len(cloud.lines("ran")) == 1


def test_a_busy_slice_is_joined_by_the_same_line_and_refuses_another(cloud):
    cloud.write("plan", "lose\n")
    assert cloud.launch("run", *SLICE, WORKDIR, *COMMAND).returncode == 75  # and it goes on
    other = cloud.launch("run", *SLICE, "--workdir=gs://bucket/other", *COMMAND)
    setup = cloud.launch("setup", *SLICE)
    for done in (other, setup):
        assert done.returncode == 2
        assert "the slice is busy: streamsynth train --config=configs/quickstart.py" in done.stderr
    with cloud.start("run", *SLICE, WORKDIR, *COMMAND) as joined:
        assert joined.stdout.readline().startswith("turn 1 of")
        cloud.write("go", "")
        assert joined.wait(60) == 0
    assert len(cloud.lines("ran")) == 1


def test_several_hosts_run_the_same_command_and_worker_0_is_shown(cloud):
    done = cloud.launch("run", *POD, WORKDIR, *COMMAND)
    assert done.returncode == 0, done.stderr
    ran = sorted(shlex.split(line) for line in cloud.lines("ran"))
    assert ran == [[f"synth/{worker}", *COMMAND[1:], "--distributed", WORKDIR] for worker in "01"]
    assert "turn 1 of" in done.stdout and "worker 1" not in done.stdout + done.stderr
    cloud.write("others", "1")
    done = cloud.launch("run", *POD, WORKDIR, *COMMAND)
    assert done.returncode == 1
    assert "worker 1: the message of worker 1" in done.stderr


def test_logs(cloud):
    assert cloud.launch("create", *POD).returncode == 0
    done = cloud.launch("logs", *POD[:2])
    assert done.returncode == 2 and "nothing has run here" in done.stderr
    assert cloud.launch("run", *POD, WORKDIR, *COMMAND).returncode == 0
    assert "turn 1 of" in cloud.launch("logs", *POD[:2]).stdout
    assert cloud.launch("logs", *POD[:2], "--worker=1", "--follow").stdout == "the message of worker 1\n"


def test_delete_takes_what_there_is(cloud):
    slices = (*POD, "--slices=2")
    assert cloud.launch("create", *slices, "--queued").returncode == 0
    assert cloud.state("tpu-vm", "synth-1") == cloud.state("tpu-vm", "synth-2") == "READY"
    assert cloud.launch("delete", *slices[:2], "--slices=2").returncode == 0
    for kind in ("tpu-vm", "queued-resources"):
        assert cloud.state(kind, "synth-1") is cloud.state(kind, "synth-2") is None
    done = cloud.launch("delete", *SLICE[:2])
    assert done.returncode == 0 and "there is no synth in us-west4-a." in done.stderr
    dry = printed(cloud.launch("delete", *SLICE[:2], "--dry-run").stdout)
    assert dry[-1] == ["compute", "tpus", "tpu-vm", "delete", "synth", "--zone=us-west4-a", "--quiet"]


def test_delete_finds_a_slice_beside_a_place_in_the_queue_that_is_used_up(cloud):
    assert cloud.launch("create", *SLICE).returncode == 0
    cloud.write("states/queued-resources.synth", "SUSPENDED\n")
    assert cloud.launch("delete", *SLICE[:2]).returncode == 0
    assert cloud.state("tpu-vm", "synth") is cloud.state("queued-resources", "synth") is None


RUN = ("run", *SLICE)


@pytest.mark.parametrize(
    "arguments, sentence",
    [
        ((), "say what to do: create, "),
        (("start", *SLICE), "say what to do: create, "),
        (("run", *SLICE[1:], WORKDIR, *COMMAND), "--name is missing"),
        (("create", *SLICE[:2]), "--type is missing"),
        ((*RUN, *COMMAND), "--workdir is missing"),
        ((*RUN, "--workdir=here", *COMMAND), "the workdir 'here' is no folder in a bucket"),
        ((*RUN, "--workdir=gs://bucket", *COMMAND), "the workdir 'gs://bucket' is no folder in a bucket"),
        ((*RUN, WORKDIR), "no command"),
        ((*RUN, WORKDIR, "--", "trian"), "the command behind -- is no streamsynth command"),
        ((*RUN, WORKDIR, *COMMAND, "--config.a=b\nc"), "has a line break"),
        ((*RUN, "--nmae=x", *COMMAND), "--nmae=x is no option"),
        ((*RUN, "--name=", *COMMAND), "--name= is no option"),
        ((*RUN, "train"), "train is no option"),
        ((*RUN, "--type=v5p", *COMMAND), "--type=v5p is no accelerator type"),
        ((*RUN, "--restarts=-1", *COMMAND), "--restarts=-1 has to be a whole number"),
        (("create", *SLICE, "--slices=0"), "--slices=0 has to be a whole number"),
        ((*RUN, "--slices=2", WORKDIR, *COMMAND), "run is for one slice"),
        (("setup", *SLICE, "--fetch=weights"), "--fetch=weights is no folder in a bucket"),
        (("setup", *SLICE, *COMMAND), "setup takes no command"),
        ((*RUN, WORKDIR, "--", "synthesize", "--output=here"), "--output=here would be lost with the slice"),
        (("run", *POD, WORKDIR, "--", "export"), "export runs on one host"),
        (("resume", "--workdir=gs://bucket/none"), "--workdir=gs://bucket/none: no run was started there"),
    ],
)
def test_mistakes_exit_with_2_and_one_sentence(cloud, arguments, sentence):
    check_mistake(cloud, cloud.launch(*arguments), sentence)
