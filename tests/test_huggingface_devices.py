"""Hugging Face folders with several devices and processes, and the memory that reading one takes."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import textwrap
from pathlib import Path

import golden_files
import jax
import numpy as np
from safetensors.numpy import load_file

from streamsynth.policy.huggingface.reading import content_hash

ROOT = Path(__file__).resolve().parent.parent


def environment(devices: int) -> dict[str, str]:
    paths = [str(ROOT), str(ROOT / "tests"), os.environ.get("PYTHONPATH", "")]
    return {
        **os.environ,
        "JAX_PLATFORMS": "cpu",
        "JAX_NUM_CPU_DEVICES": str(devices),
        "PYTHONPATH": os.pathsep.join(paths),
    }


_COMMON = """
    import json, sys
    import jax, numpy as np
    from jax.sharding import NamedSharding, PartitionSpec
    import golden_files
    from streamsynth.policy.huggingface.architectures import read_config
    from streamsynth.policy.huggingface.reading import content_hash, load_params
    from streamsynth.policy.huggingface.writing import save_model
    from streamsynth.policy.transformer import logical_axes, param_shapes
    from streamsynth.runtime.mesh import make_mesh, param_shardings

    def load(family, mesh, **runtime):
        config = read_config(golden_files.FOLDER / family, **runtime)
        mesh = make_mesh({"data": 1, "tensor": 1, **mesh})
        shardings = param_shardings(param_shapes(config), logical_axes(config), mesh)
        return config, load_params(golden_files.FOLDER / family, config, shardings)
"""

_FOUR_DEVICES = """
    whole = golden_files.load("gemma3", scan_layers=True).params
    for mesh in ({"fsdp": 4}, {"data": 2, "fsdp": 2}, {"data": 4, "fsdp": 1}):
        _, params = load("gemma3", mesh, scan_layers=True)
        same = jax.tree.map(lambda a, b: np.array_equal(np.asarray(a), np.asarray(b)), params, whole)
        assert all(jax.tree.leaves(same)), mesh
        # Devices may share what was read, so what one does to its copy must not reach the others.
        doubled = jax.jit(lambda tree: jax.tree.map(lambda a: 2 * a, tree), donate_argnums=0)(params)
        for twice, once in zip(jax.tree.leaves(doubled), jax.tree.leaves(whole)):
            for shard in twice.addressable_shards:
                np.testing.assert_array_equal(shard.data, 2 * np.asarray(once)[shard.index])
    print("agrees")
"""

_TWO_PROCESSES = """
    port, process, out = sys.argv[1:]
    jax.distributed.initialize(f"127.0.0.1:{port}", 2, int(process))
    config, params = load("gemma3", {"fsdp": 4}, scan_layers=True)
    assert not params["embedding"].is_fully_addressable
    save_model(out, config, params, files={}, bos=1, eos=(2,), pad=0)
    print(content_hash(golden_files.FOLDER / "gemma3"))
"""


def script(text: str) -> list[str]:
    return [sys.executable, "-c", textwrap.dedent(_COMMON) + textwrap.dedent(text)]


def test_four_devices_read_what_one_reads():
    done = subprocess.run(
        script(_FOUR_DEVICES), env=environment(4), capture_output=True, text=True, timeout=300
    )
    assert done.stdout == "agrees\n", done.stderr


def test_two_processes_read_hash_and_export(tmp_path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    running = [
        subprocess.Popen(
            [*script(_TWO_PROCESSES), str(port), str(process), str(tmp_path / "out")],
            env=environment(2),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for process in range(2)
    ]
    finished = [process.communicate(timeout=300) for process in running]
    expected = content_hash(golden_files.FOLDER / "gemma3")
    for output, errors in finished:
        assert expected in output.splitlines(), errors  # gloo speaks on the same stream
    original = load_file(golden_files.FOLDER / "gemma3" / "model.safetensors")
    exported = load_file(tmp_path / "out" / "model.safetensors")
    assert original.keys() == exported.keys()
    assert jax.tree.all(jax.tree.map(np.array_equal, original, exported))


def test_reading_takes_little_more_memory_than_the_parameters(tmp_path):
    # Stacked and cast on one device; split over two processes. 19M parameters are 76 MB in float32.
    command = [sys.executable, ROOT / "benchmarks" / "import_memory.py", "--size=20M", "--cases=2,7"]
    subprocess.run(
        [*command, f"--out={tmp_path / 'report.json'}"],
        env=environment(1),
        check=True,
        capture_output=True,
        timeout=300,
    )
    report = json.loads((tmp_path / "report.json").read_text())
    measured = [process for case in report["cases"].values() for process in case]
    assert [process["own"] for process in measured] == [measured[0]["own"]] + [measured[0]["own"] / 2] * 2
    for process in measured:
        assert process["own"] * 0.9 < process["peak"]
        assert process["peak"] < process["own"] + process["largest"] + (48 << 20)
    assert len({process["hash"] for process in measured[1:]}) == 1
