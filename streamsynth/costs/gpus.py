"""What XLA wants to know of a GPU that is not there, as its `GpuTargetConfigProto`."""

from __future__ import annotations

import dataclasses


@dataclasses.dataclass(frozen=True)
class Gpu:
    """One kind of GPU, on an SXM board; numbers are those that its driver reports.

    name: as the driver says it.   capability: the major number of its compute capability.
    processors: streaming multiprocessors, with so many float32 `lanes` each.
    shared: bytes of shared memory of a multiprocessor, and `for_block` of it at most for one block.
    cache: bytes of L2.   clock: in GHz.   memory: bytes.   memory_rate: bytes a second.
    """

    name: str
    capability: int
    processors: int
    lanes: int
    shared: int
    for_block: int
    cache: int
    clock: float
    memory: int
    memory_rate: int


_HOPPER = dict(
    capability=9, processors=132, lanes=128, shared=233_472, for_block=232_448, cache=50 * 2**20, clock=1.98
)
KINDS = {
    "a100": Gpu(
        "NVIDIA A100-SXM4-80GB",
        capability=8,
        processors=108,
        lanes=64,
        shared=167_936,
        for_block=166_912,
        cache=40 * 2**20,
        clock=1.41,
        memory=85_100_068_864,
        memory_rate=2_039_040_000_000,
    ),
    "h100": Gpu("NVIDIA H100 80GB HBM3", **_HOPPER, memory=84_942_979_072, memory_rate=3_352_320_000_000),
    "h200": Gpu("NVIDIA H200 141GB HBM3e", **_HOPPER, memory=151_397_597_184, memory_rate=4_800_000_000_000),
}


def target_config(kind: str) -> str:
    """The protocol buffer of a row of `KINDS`, as text. Limits that all its rows share are CUDA's."""
    gpu = KINDS[kind]
    described = {
        "threads_per_block_limit": 1024,
        "threads_per_warp": 32,
        "threads_per_core_limit": 2048,
        "block_dim_limit_x": 2**31 - 1,
        "block_dim_limit_y": 2**16 - 1,
        "block_dim_limit_z": 2**16 - 1,
        "registers_per_core_limit": 2**16,
        "registers_per_block_limit": 2**16,
        "shared_memory_per_block": 48 * 2**10,
        "shared_memory_per_block_optin": gpu.for_block,
        "shared_memory_per_core": gpu.shared,
        "core_count": gpu.processors,
        "fpus_per_core": gpu.lanes,
        "l2_cache_size": gpu.cache,
        "clock_rate_ghz": gpu.clock,
        "device_memory_size": gpu.memory,
        "memory_bandwidth": gpu.memory_rate,
    }
    lines = [f"  {name}: {value}" for name, value in described.items()]
    capability = f"  cuda_compute_capability {{ major: {gpu.capability} }}"
    return "\n".join(
        [
            "gpu_device_info {",
            *lines,
            capability,
            "}",
            'platform_name: "CUDA"',
            "dnn_version_info { major: 9 minor: 10 }",
            "runtime_version { major: 13 }",
            f'device_description_str: "{gpu.name}"',
        ]
    )
