"""Several processes: who does what, how arrays get to the devices and back, and how a run of them ends."""

from __future__ import annotations

import dataclasses
import json
import signal
import textwrap

import numpy as np
import processes
import pytest
import runs
import tiny

from streamsynth import main, train, weights
from streamsynth.feedback.scorers.records import Records, quota, read_all, tally
from streamsynth.runtime import arrays, hosts
from streamsynth.stream.markers import MarkerFormat
from streamsynth.stream.patterns import STRATEGIES
from streamsynth.stream.prompts import balanced_labels, render

_SCRIPT = """
    import json, os, signal, sys, time
    import jax, jax.numpy as jnp, numpy as np
    from jax.sharding import NamedSharding, PartitionSpec
    from streamsynth.errors import UserError
    from streamsynth.runtime import arrays, hosts, mesh as mesh_lib

    out, address, me = sys.argv[1], sys.argv[2], int(sys.argv[3])

    def left_by_another():
        there = os.path.exists(f"{out}/made")
        time.sleep(0.0 if there else 0.5)
        open(f"{out}/made", "w").close()
        return there

    with hosts.together(address, 2, me), hosts.stop_on_sigterm():
        found = {"index": hosts.index(), "count": hosts.count()}
        # --- Arrays; where `tensor` lies across the hosts, both hold all rows ---
        rows = np.arange(24, dtype=np.float32).reshape(8, 3)
        for name, shape in {"data": (4, 1, 1), "mixed": (2, 1, 2), "tensor": (1, 1, 4)}.items():
            mesh = mesh_lib.make_mesh(dict(zip(mesh_lib.AXES, shape)))
            place = arrays.Placement(mesh_lib.batch_sharding(mesh))
            held = place.held(8)
            mine = np.full_like(rows, np.nan)
            mine[held] = rows[held]  # what others hold needs not be there
            keys = jax.random.split(jax.random.key(0), 8)
            with mesh_lib.use(mesh):
                placed = place({"rows": mine, "keys": keys})
                uniform = jax.jit(jax.vmap(jax.random.uniform))(placed["keys"])
                split = NamedSharding(mesh, PartitionSpec(None, "tensor"))
                moved = arrays.put(arrays.put(np.arange(8.0).reshape(2, 4), split), mesh_lib.replicated(mesh))
                total = float(jnp.sum(placed["rows"]))
                with hosts.local():  # another shape on each, and no word from the other
                    own = float(jnp.sum(jnp.ones(3 + me)))
                again = arrays.fetch({"rows": placed["rows"], "uniform": uniform, "moved": moved, "n": 3})
            expected = np.asarray(jax.vmap(jax.random.uniform)(keys))
            found[name] = {
                "held": held.tolist(), "rows": bool((again["rows"] == rows).all()), "total": total,
                "uniform": bool((again["uniform"] == expected).all()), "own": own,
                "moved": bool((again["moved"] == np.arange(8.0).reshape(2, 4)).all()), "n": again["n"],
            }
        # --- What they tell each other ---
        part = hosts.share(5)
        found["joined"] = hosts.joined("five", {
            "list": list(range(5))[part], "array": np.arange(10).reshape(5, 2)[part]
        })["array"].tolist()
        found["first"] = hosts.from_first("answer", lambda: {"asked": me})
        found["was there"] = hosts.first_before_others("a file", left_by_another)
        found["helped"] = arrays.fetch({"rows": placed["rows"]}, here=me == 0)["rows"] is None
        hosts.agree({"config": "a"})
        try:
            hosts.agree({"config": "a", "folder": me})
        except UserError as error:
            found["parted"] = str(error)
        # --- One of them is asked to stop ---
        if me == 1:
            os.kill(os.getpid(), signal.SIGTERM)
        while not hosts.stop_heard():  # also by the first, which asks nobody
            time.sleep(0.01)
        found["stop"] = [hosts._stop_asked.is_set(), hosts.stop_asked("step 1")]
        with open(f"{out}/{me}.json", "w") as file:
            json.dump(found, file)
        # --- A stall, and then one of them raises while the other waits for a collective ---
        hosts.wait("the stall")
        hosts.watch(1.0)

        def dwell_in_process_1():
            time.sleep(4.0)
            raise OSError("the disk of this host is full")

        def wait_for_a_collective():
            mesh = mesh_lib.make_mesh(dict(data=4, fsdp=1, tensor=1))
            split = arrays.put(np.arange(8.0), mesh_lib.batch_sharding(mesh))
            print(float(jax.jit(jnp.sum, out_shardings=mesh_lib.replicated(mesh))(split)))
            raise AssertionError("it came back without the other")

        dwell_in_process_1() if me else wait_for_a_collective()
"""


def test_two_processes_share_work_and_end_together(tmp_path):
    argv = ["-c", textwrap.dedent(_SCRIPT), str(tmp_path), "localhost:PORT", "PROCESS"]
    assert processes.finish(processes.start(argv, tmp_path, flags=False), 400) == [1, 1]
    logs = [(tmp_path / f"{me}.log").read_text() for me in range(2)]
    found = [json.loads((tmp_path / f"{me}.json").read_text()) for me in range(2)]
    held = {
        "data": [[0, 1, 2, 3], [4, 5, 6, 7]],
        "mixed": [[0, 1, 2, 3], [4, 5, 6, 7]],
        "tensor": [[*range(8)]] * 2,
    }
    for me in range(2):
        assert (found[me]["index"], found[me]["count"]) == (me, 2)
        for mesh, of_process in held.items():
            got = found[me][mesh]
            assert got["held"] == of_process[me] and got["rows"] and got["uniform"] and got["moved"]
            assert (got["total"], got["own"], got["n"]) == (276.0, 3.0 + me, 3)
        assert found[me]["joined"] == np.arange(10).reshape(5, 2).tolist()
        assert found[me]["first"] == {"asked": 0}
        assert found[me]["stop"] == [me == 1, True]
        assert found[me]["was there"] == (me == 1) and found[me]["helped"] == (me == 1)
        assert found[me]["parted"].startswith("process 1 has another folder than process 0: start the same")
        assert f"no progress for 1 s; process {me} is here:" in logs[me]
    assert "in wait_for_a_collective" in logs[0] and "in dwell_in_process_1" in logs[1]
    assert "streamsynth: error: process 1 failed: OSError: the disk of this host is full" in logs[0]
    assert "OSError: the disk of this host is full" in logs[1] and "Traceback" in logs[1]
    assert "AssertionError" not in logs[0]


def test_another_text_label_or_file_is_seen(tmp_path):
    """What processes compare before they start."""
    task = tiny.world_task()
    last = task.test[-1]
    others = [
        dataclasses.replace(task, test=(*task.test[:-1], dataclasses.replace(last, **changed)))
        for changed in ({"label": "other"}, {"fields": (last.text + ".",)}, {"id": "other"})
    ]
    sums = [one.checksum for one in (task, dataclasses.replace(task, verifier=None), *others)]
    assert sums[0] == sums[1] and len(set(sums)) == 4
    for name, content in {"config.json": "{1}", "a.safetensors": "12", "README.md": "1"}.items():
        (tmp_path / name).write_text(content)
    found = [weights.listing(str(tmp_path))]
    for name, content in {"config.json": "{2}", "a.safetensors": "123", "README.md": "2"}.items():
        (tmp_path / name).write_text(content)
        found.append(weights.listing(str(tmp_path)))
    assert found[0] != found[1] != found[2] == found[3]


def test_one_process_has_all_there_is_and_asks_nobody():
    assert (hosts.count(), hosts.index(), hosts.first()) == (1, 0, True)
    assert hosts.share(7) == slice(0, 7)
    given = {"texts": ["a"], "array": np.ones(2)}
    assert hosts.joined("x", given) == given and hosts.gather("x", given)[0] is given
    assert hosts.from_first("x", lambda: given) is given
    assert arrays.fetch({"n": 3, "rows": np.ones(2)})["n"] == 3


def test_sigterm_is_taken_back_where_it_was_caught():
    before = signal.getsignal(signal.SIGTERM)
    with hosts.stop_on_sigterm():
        assert not hosts.stop_asked("step 1")
        signal.raise_signal(signal.SIGTERM)
        assert hosts.stop_asked("step 1") and hosts.stop_heard()
    assert signal.getsignal(signal.SIGTERM) is before and not hosts.stop_heard()


def test_sigterm_saves_the_step_and_ends_with_75(tmp_path, monkeypatch, capsys, quick_xla):
    taken = []

    class Enough(Exception):
        pass

    def evaluated(setting, state, row, params, journal):
        transfer = np.array(state.transfer)
        transfer[row] = 0.5
        return state.replace(transfer=transfer, step=np.int32(state.step + 1))

    def stepped(setting, state, kept):
        taken.append(int(state.step))
        if taken == [1, 2]:
            signal.raise_signal(signal.SIGTERM)
        if len(taken) == 3:
            raise Enough
        state = state.replace(turn_step=np.int32(state.turn_step + 1), step=np.int32(state.step + 1))
        return state, {"reward/quality": 0.5}, []

    monkeypatch.setattr(train, "evaluate_row", evaluated)
    monkeypatch.setattr(train, "begin_turn", stepped)
    monkeypatch.setattr(train, "learn", stepped)
    little = ("--config.pretrain.steps=1", "--config.feedback.judges.posterior=0")
    argv = runs.arguments(tmp_path / "cache", tmp_path / "run", *little)
    assert main.main(argv) == 75
    said = capsys.readouterr().err.splitlines()[-1]
    assert said == "streamsynth: stopped by SIGTERM after step 2, which is saved; the same command goes on."
    assert [line["step"] for line in runs.read_jsonl(tmp_path / "run" / "metrics.jsonl")] == [1, 2]
    with pytest.raises(Enough):
        main.main(argv)
    assert taken == [1, 2, 3]  # no step is taken twice, though only every second one is saved by itself


@pytest.mark.parametrize("size", [0, 1, 5, 16, 33])
@pytest.mark.parametrize("count", [1, 2, 3, 8])
def test_every_thing_is_in_the_share_of_one_process(monkeypatch, size, count):
    monkeypatch.setattr(hosts, "count", lambda: count)
    parts = []
    for index in range(count):
        monkeypatch.setattr(hosts, "index", lambda index=index: index)
        parts.append(list(range(size))[hosts.share(size)])
    assert [i for part in parts for i in part] == list(range(size))
    assert max(map(len, parts)) - min(map(len, parts)) <= 1


def test_any_split_of_the_prompts_renders_the_same_ones():
    task, form = tiny.world_task(), MarkerFormat(tiny.tokenizer(), 60, 24)
    rng = np.random.default_rng(0)
    batch = 24
    label = balanced_labels(batch, len(task.labels), rng)
    strategy = np.arange(batch) % len(STRATEGIES)

    def rendered(only=None):
        return render(form, task, label, strategy, np.random.default_rng((3, 7)), only=only)

    whole = rendered()
    assert whole.dropped.any() and len({tuple(ids) for ids in whole.shown}) > batch / 2
    for count in (2, 3, 8):
        owner = rng.integers(count, size=batch)
        for process in range(count):
            mine = np.flatnonzero(owner == process)
            part = rendered(set(mine.tolist()))
            for name in ("tokens", "mask", "label", "strategy"):
                np.testing.assert_array_equal(
                    getattr(part.prompts, name)[mine], getattr(whole.prompts, name)[mine]
                )
            assert [part.shown[b] for b in mine] == [whole.shown[b] for b in mine]
            np.testing.assert_array_equal(part.dropped[mine], whole.dropped[mine])
            others = np.flatnonzero(owner != process)
            assert not part.prompts.mask[others].any() and not any(part.shown[b] for b in others)


@pytest.mark.parametrize(
    "flags, said",
    [
        (["--coordinator=here:1"], "--processes is not given"),
        (["--processes=2", "--process_id=0"], "--coordinator is not given"),
        (["--distributed", "--processes=2"], "--distributed detects"),
        (["--process_id=-1"], "whole number"),
        (["--processes=0"], "above 0"),
    ],
)
def test_flags_that_name_no_processes_are_refused(capsys, tmp_path, flags, said):
    assert main.main(["evaluate", f"--workdir={tmp_path}", *flags]) == 2
    assert said in capsys.readouterr().err


@pytest.mark.parametrize("verb", ["report", "export"])
def test_what_runs_no_program_on_a_mesh_takes_no_processes(capsys, tmp_path, verb):
    output = ["--output=x"] if verb == "export" else []
    assert main.main([verb, f"--workdir={tmp_path}", *output, "--distributed"]) == 2
    assert "--distributed" in capsys.readouterr().err


# --- What scorers answered, a file of each process ---


def record(sample: int, request: int = 1, **more) -> dict:
    return {
        "purpose": "rollout",
        "steps": [3],
        "sample": sample,
        "digest": f"d{sample}",
        "request": request,
        **more,
    }


def test_each_process_writes_its_own_scores_and_reads_all(tmp_path):
    path = tmp_path / "scores" / "tone.jsonl"
    Records(path, 0).write([record(0, score=0.5)])
    Records(path, 2).write([record(1, score=0.25), record(2, failed="busy", attempt=1, again=True)])
    assert sorted(file.name for file in path.parent.iterdir()) == ["tone.2.jsonl", "tone.jsonl"]
    for process in range(4):
        found = Records(path, process)
        assert found.requests == 3 and found.spent == {0: 1, 2: 2}
        assert [found.find(("rollout", 3), i, f"d{i}").get("score") for i in range(3)] == [0.5, 0.25, None]
    # Another process takes over the text that failed; whatever the order of the files, its answer is newer.
    Records(path, 1).write([record(2, score=1.0)])
    assert Records(path, 0).find(("rollout", 3), 2, "d2")["score"] == 1.0
    assert tally(read_all(path)) == {"asked": 3, "scored": 3, "failed": {}, "requests": 4}


@pytest.mark.parametrize("count", [1, 2, 3, 5])
def test_all_processes_together_never_ask_more_than_the_cap(count):
    rng = np.random.default_rng(count)
    for most in (0, 1, 7, 100):
        fresh = [quota({}, most, p, count) for p in range(count)]
        assert sum(fresh) == most and max(fresh) - min(fresh) <= 1
        # As many processes as before: each has what it has not spent.
        spent = {p: int(rng.integers(part + 1)) for p, part in enumerate(fresh)}
        assert [quota(spent, most, p, count) for p in range(count)] == [
            part - spent[p] for p, part in enumerate(fresh)
        ]
        for _ in range(20):  # another number of them, with any history
            spent = {p: int(rng.integers(most + 1)) for p in range(int(rng.integers(1, 6)))}
            left = max(0, most - sum(spent.values()))
            assert sum(quota(spent, most, p, count) for p in range(count)) <= left
