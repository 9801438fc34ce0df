"""How much memory does reading a sharded checkpoint take, above the parameters themselves?

    python benchmarks/import_memory.py

Writes checkpoints of about 200M parameters in shards of 64 MB, reads each in fresh processes, on one device,
on four simulated ones with the parameters split or copied, and in two processes with two devices each, and
writes benchmarks/results/import_memory.json. What is counted is anonymous memory (RssAnon of
/proc/self/status, sampled every 2 ms) above what the process had before; mapped files are not part of it.
The claim for every case: peak <= own shards of the parameters + own shards of the largest one + 256 MB.
"""

import argparse
import json
import os
import pathlib
import socket
import subprocess
import sys
import tempfile
import threading
import time

import jax
import jax.numpy as jnp
import numpy as np
from flax import traverse_util

from streamsynth.policy.huggingface.architectures import read_config
from streamsynth.policy.huggingface.description import config_fields
from streamsynth.policy.huggingface.fields import write_json
from streamsynth.policy.huggingface.names import sources
from streamsynth.policy.huggingface.reading import content_hash, load_params
from streamsynth.policy.huggingface.tensors import INDEX, write_file
from streamsynth.policy.transformer import TransformerConfig, logical_axes, param_shapes
from streamsynth.runtime.mesh import make_mesh, param_shardings

ROOT = pathlib.Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results" / "import_memory.json"
SHARD_BYTES = 64 << 20
SLACK = 256 << 20
SHAPES = {
    "200M": dict(
        vocab_size=32000, width=1024, layers=12, heads=16, kv_heads=8, head_width=64, mlp_width=2816
    ),
    "20M": dict(vocab_size=8000, width=512, layers=4, heads=8, kv_heads=4, head_width=64, mlp_width=1408),
}
# name -> (stored dtype, wanted dtype, processes, devices of each, mesh, scan_layers)
CASES = {
    "one device, float32": ("float32", "float32", 1, 1, dict(data=1, fsdp=1), False),
    "one device, bfloat16": ("bfloat16", "bfloat16", 1, 1, dict(data=1, fsdp=1), False),
    "one device, bfloat16 to float32, scanned": ("bfloat16", "float32", 1, 1, dict(data=1, fsdp=1), True),
    "four devices, split, float32": ("float32", "float32", 1, 4, dict(data=1, fsdp=4), False),
    "four devices, split, bfloat16, scanned": ("bfloat16", "bfloat16", 1, 4, dict(data=1, fsdp=4), True),
    "four devices, copies, bfloat16": ("bfloat16", "bfloat16", 1, 4, dict(data=4, fsdp=1), False),
    "four devices, copies, float32, scanned": ("float32", "float32", 1, 4, dict(data=4, fsdp=1), True),
    "two processes, split, float32": ("float32", "float32", 2, 2, dict(data=1, fsdp=4), False),
}


def write_checkpoint(folder: pathlib.Path, size: str, dtype: str) -> None:
    """Random weights in shards."""
    config = TransformerConfig(**SHAPES[size], tied_embeddings=False)
    rng = np.random.default_rng(0)
    shapes = [(name, source.shape) for source in sources(config).values() for name in source.names]
    itemsize = jnp.dtype(dtype).itemsize
    shards, room = [[]], SHARD_BYTES
    for name, shape in shapes:
        if shards[-1] and np.prod(shape) * itemsize > room:
            shards.append([])
            room = SHARD_BYTES
        shards[-1].append((name, shape))
        room -= np.prod(shape) * itemsize
    places = {}
    for number, shard in enumerate(shards):
        file = f"model-{number:05}.safetensors"
        places |= {name: file for name, _ in shard}
        layout = {name: (jnp.dtype(dtype), shape) for name, shape in shard}
        arrays = ((name, rng.standard_normal(shape, np.float32).astype(dtype)) for name, shape in shard)
        write_file(folder / file, layout, arrays)
    write_json(folder / INDEX, {"weight_map": places})
    write_json(folder / "config.json", config_fields(config, dtype=dtype, context=4096))


def anonymous() -> int:
    """Bytes of anonymous memory this process holds."""
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) << 10 for line in file if line.startswith("RssAnon"))


class Peak(threading.Thread):
    """Watches this process's anonymous memory while it lives."""

    def __init__(self):
        super().__init__(daemon=True)
        self.bytes, self.done = 0, threading.Event()

    def run(self):
        while not self.done.wait(0.002):
            self.bytes = max(self.bytes, anonymous())

    def __enter__(self):
        self.start()
        return self

    def __exit__(self, *_):
        self.done.set()
        self.join()


def own_bytes(leaf: jax.Array) -> int:
    return sum(shard.data.nbytes for shard in leaf.addressable_shards)


def read(folder: str, wanted: str, mesh: dict[str, int], scan_layers: bool) -> dict[str, float]:
    """Reads a checkpoint in this process; bytes, and seconds."""
    config = read_config(folder, param_dtype=wanted, scan_layers=scan_layers)
    shardings = param_shardings(param_shapes(config), logical_axes(config), make_mesh({**mesh, "tensor": 1}))
    jax.block_until_ready(jnp.zeros(8) + 1)  # what JAX needs at all
    before = anonymous()
    start = time.perf_counter()
    with Peak() as peak:
        params = load_params(folder, config, shardings)
    seconds = time.perf_counter() - start
    owned = [own_bytes(leaf) for leaf in traverse_util.flatten_dict(params).values()]
    after = anonymous()
    return {
        "seconds": round(seconds, 2),
        "own": sum(owned),
        "largest": max(owned),
        "peak": max(peak.bytes, after) - before,
        "after": after - before,
        "hash": content_hash(folder),
    }


def in_processes(folder: pathlib.Path, name: str) -> list[dict[str, float]]:
    """One case in fresh processes; what each measured."""
    _, _, processes, devices, _, _ = CASES[name]
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": str(devices)}
    command = [sys.executable, __file__, f"--folder={folder}", f"--case={name}", f"--port={port}"]
    running = [
        subprocess.Popen([*command, f"--process={i}"], env=environment, stdout=subprocess.PIPE, text=True)
        for i in range(processes)
    ]
    outputs = [process.communicate()[0] for process in running]
    if any(process.returncode for process in running):
        raise SystemExit(f"{name}: a process failed")
    # Gloo speaks on the same stream.
    lines = [next(line for line in output.splitlines() if line.startswith("{")) for output in outputs]
    return [json.loads(line) for line in lines]


def one_process(arguments: argparse.Namespace) -> None:
    _, wanted, processes, _, mesh, scan_layers = CASES[arguments.case]
    if processes > 1:
        jax.distributed.initialize(f"127.0.0.1:{arguments.port}", processes, arguments.process)
    print(json.dumps(read(arguments.folder, wanted, mesh, scan_layers)))


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--size", choices=SHAPES, default="200M")
    parser.add_argument("--cases", default=",".join(map(str, range(len(CASES)))), help="their numbers")
    parser.add_argument("--out", type=pathlib.Path, default=RESULTS)
    for name in ("folder", "case"):  # what the processes of a case are told
        parser.add_argument(f"--{name}", help=argparse.SUPPRESS)
    for name in ("port", "process"):
        parser.add_argument(f"--{name}", type=int, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.case:
        return one_process(arguments)
    found = {}
    for name in (list(CASES)[int(number)] for number in arguments.cases.split(",")):
        stored = CASES[name][0]
        with tempfile.TemporaryDirectory() as folder:
            write_checkpoint(pathlib.Path(folder), arguments.size, stored)
            found[name] = in_processes(pathlib.Path(folder), name)
        for measured in found[name]:
            above = measured["peak"] - measured["own"]
            measured["holds"] = above <= measured["largest"] + SLACK
            numbers = ", ".join(
                f"{key} {measured[key] / 2**20:.0f}" for key in ("own", "largest", "peak", "after")
            )
            print(
                f"{name}: {numbers} MB; {above / 2**20:.0f} MB above own; {measured['seconds']} s", flush=True
            )
    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout.strip()
    report = {
        "command": "python benchmarks/import_memory.py"
        + f" --size={arguments.size}" * (arguments.size != "200M"),
        "commit": commit,
        "shape": SHAPES[arguments.size],
        "shard_bytes": SHARD_BYTES,
        "slack_bytes": SLACK,
        "cases": found,
    }
    arguments.out.write_text(json.dumps(report, indent=1) + "\n")
    return None


if __name__ == "__main__":
    main()
