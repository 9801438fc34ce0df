"""A whole stream run compiles the programs that it declares, and fetches where it says so."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import textwrap
from collections import Counter
from pathlib import Path

import pytest
import runs

from streamsynth import assemble, programs
from streamsynth.policy.store import load_policy
from streamsynth.runtime import mesh as mesh_lib
from streamsynth.side_programs import side_programs
from streamsynth.tasks import worlds

KEYS = {"rollout__prompts": "4", "evaluation__prompts": "4"}
# The second task of this stream is a folder with two labels; those of the others are four.
LABELS = {"stream__tasks": "worlds:market_1,files:{folder},worlds:market_2"}
# Whatever else runs the network, or has a program of its own.
PARTS = {
    "stream__tasks": "worlds:market_1,worlds:restaurant_1",
    "policy__lora__rank": "2",
    "feedback__features": "hidden",
    "balance__target": "examples",
    "balance__others": "0.1",
    "supervised__held_out": "1",
    "supervised__early_stop": "1",
    "evaluation__samples": "4",
    "learner__steps": "2",
}

# On two devices: numpy reads an array of a single CPU device without asking the array.
_SCRIPT = """
    import collections, json, pathlib, sys, traceback
    import jax
    import runs
    import streamsynth
    from streamsynth import api, train as train_lib
    from streamsynth.runtime import arrays

    keys, cache, workdir = json.loads(sys.argv[1]), *map(pathlib.Path, sys.argv[2:])
    package = pathlib.Path(streamsynth.__file__).parent
    compiled, stated, others = collections.Counter(), collections.Counter(), collections.Counter()
    watching, inside = [], []

    def frames():
        return [frame for frame in traceback.extract_stack() if frame.filename != "<string>"]

    def place(found):
        # A comprehension is a frame of its own or none, by the version of Python.
        own = [
            frame for frame in found
            if package in pathlib.Path(frame.filename).parents and not frame.name.startswith("<")
        ]
        return f"{pathlib.Path(own[-1].filename).stem}.{own[-1].name}" if own else "elsewhere"

    def on_compile(event, seconds, **found):
        if watching and event == "/jax/core/compile/backend_compile_duration":
            # Writing a checkpoint, Orbax compiles slices of its own.
            if not any("orbax" in frame.filename for frame in frames()):
                compiled[found["fun_name"].removeprefix("jit(").removesuffix(")")] += 1

    jax.monitoring.register_event_duration_secs_listener(on_compile)
    fetch = arrays.fetch

    def spied_fetch(tree, here=True):
        if watching:
            stated[place(frames())] += 1
        inside.append(True)
        try:
            return fetch(tree, here)
        finally:
            inside.pop()

    arrays.fetch = spied_fetch
    kind = type(jax.numpy.zeros(()))

    def spy_on(name):
        method = getattr(kind, name)

        def spied(self, *args, **kwargs):
            if watching and not inside and not any("orbax" in frame.filename for frame in frames()):
                others[f"{place(frames())} by {name}"] += 1
            return method(self, *args, **kwargs)

        setattr(kind, name, spied)

    for name in ("__array__", "__float__", "__int__", "__bool__", "__index__", "item", "tolist"):
        spy_on(name)
    float(jax.numpy.zeros(()))

    original = train_lib.train

    def train(*args):
        watching.append(True)
        try:
            return original(*args)
        finally:
            watching.pop()

    train_lib.train = train
    api.train(runs.config(cache, mesh__data="2", **keys), workdir)
    print(json.dumps({"compiled": compiled, "stated": stated, "others": others}))
"""

# Where the loop fetches: tokens and masks of a batch, what a judge on the device says, what strategies and
# rows need of the credit, the kept rows' features and the diversity that sets a turn's target, the figures of
# a step, and a student's answers.
STATED = {
    "collect.example_features",
    "collect.arrive",
    "reward._posterior",
    "reward.judge",
    "step._recorded",
    "step.rows_of",
    "turn.begin_turn",
    "turn.written",
    "turn.learn",
    "student.predict",
}
# And where a config asks for more: other tasks' archives, the loss on held-out examples, their diversity.
STATED_OF_PARTS = {"step._elsewhere", "tuning.measured", "turn._statistic_of_examples"}


def two_labels(folder):
    """A data set of two of a world's labels."""
    task = worlds.load_task("bank_1", train_per_label=40, test_per_label=20)
    for name, examples in (("train", task.train), ("test", task.test)):
        rows = [{"text": e.text, "label": e.label} for e in examples if e.label in task.labels[:2]]
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.mark.slow
@pytest.mark.parametrize("more, stated", [(LABELS, set()), (PARTS, STATED_OF_PARTS)], ids=["labels", "parts"])
def test_programs_and_fetches_are_those_declared(more, stated, finished, tmp_path):
    two_labels(tmp_path)
    keys = {name: value.format(folder=tmp_path) for name, value in {**KEYS, **more}.items()}
    env = {
        **os.environ,
        "XLA_FLAGS": "--xla_force_host_platform_device_count=2",
        "PYTHONPATH": os.pathsep.join([str(runs.ROOT), str(Path(__file__).parent)]),
    }
    script = textwrap.dedent(_SCRIPT)
    argv = [sys.executable, "-c", script, json.dumps(keys), str(finished.cache), str(tmp_path / "run")]
    done = subprocess.run(argv, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout.splitlines()[-1])

    config = runs.config(finished.cache, **keys)
    network = load_policy(tmp_path / "run" / "policy").model.config
    mesh = mesh_lib.make_mesh({"data": 1, "fsdp": 1, "tensor": 1})
    declared = programs.declared(config, network, mesh)
    expected = Counter(program.function.__name__ for program in declared)
    expected += side_programs(config, assemble.load_tasks(config))
    compiled = Counter(found["compiled"])
    students = {name: compiled.pop(name) for name in ("_train", "_predict")}
    assert compiled == expected
    # A size for few rows, and one for as many as a set has.
    assert all(1 <= count <= 2 for count in students.values())
    assert found["others"] == {}
    assert set(found["stated"]) == STATED | stated
