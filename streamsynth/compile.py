"""Compiles the programs of a run for a slice of chips that need not be there, and says whether they fit."""

from __future__ import annotations

import dataclasses
import importlib.util
import pathlib
import re
import sys
import time
from collections.abc import Sequence
from importlib import metadata
from typing import Any

import jax
from jax.experimental import topologies

from streamsynth import validate
from streamsynth.costs import fit, gpus, hlo, report
from streamsynth.costs.chips import GIB, GPUS, Topology, parse_topology
from streamsynth.costs.fit import Load, Memory
from streamsynth.errors import UserError
from streamsynth.policy.families import choices, own_config
from streamsynth.policy.huggingface.architectures import read_config
from streamsynth.policy.huggingface.published import PUBLISHED, model_name, published_config
from streamsynth.policy.transformer import TransformerConfig
from streamsynth.programs import Program, declared, make_kept
from streamsynth.runtime import mesh as mesh_lib
from streamsynth.weights import weights_folder


def compile_run(config: Any, topology: str, name: str, only: Sequence[str] = ()) -> dict[str, Any]:
    """The report of a config on a topology: see `costs.report`. Nothing is allocated.

    Args:
      config: of the run.
      topology: such as v5e:16x16, or h100:8.
      name: of the config, for the report.
      only: names of programs; all by default.

    Raises:
      UserError: the topology is unknown, what compiles for it is missing, the mesh does not fit the devices
        or the network, the network is not known, or a program of `only` is none of the run's.
    """
    where, network, mesh = _planned(config, topology)
    kept, _ = make_kept(config, network, mesh)
    programs = declared(config, network, mesh)
    if unknown := sorted({*only} - {program.name for program in programs}):
        known = ", ".join(program.name for program in programs)
        raise UserError(f"--only={unknown[0]}: this run has no such program, it has: {known}.")
    programs = [program for program in programs if not only or program.name in only]
    found = []
    for place, program in enumerate(programs):
        print(f"compiling {program.name} ({place + 1} of {len(programs)})", file=sys.stderr, flush=True)
        found.append(_compiled(program, mesh, where))
    loads = [load for load, _ in found]
    chip = where.chip
    told = fit.advice(loads, kept.bytes_by_part(), _keys(config, mesh), chip)
    return {
        "config": name,
        "topology": str(where),
        "devices": mesh.size,
        "mesh": dict(mesh.shape),
        "chip": vars(chip),
        "versions": versions(where),
        "parameters": kept.parameters,
        "trained": kept.trained_parameters,
        "kept": kept.bytes_by_part(),
        "programs": [of_program for _, of_program in found],
        "fits": not told,
        "advice": told,
    }


def program_names(config: Any, topology: str) -> list[str]:
    """The programs that `compile_run` compiles."""
    _, network, mesh = _planned(config, topology)
    return [program.name for program in declared(config, network, mesh)]


def _planned(config: Any, topology: str) -> tuple[Topology, TransformerConfig, Any]:
    validate.check(config)
    where = parse_topology(topology)
    mesh = mesh_lib.make_mesh(config.mesh.to_dict(), topology_devices(where))
    return where, planned_network(config), mesh


def topology_devices(where: Topology) -> list[Any]:
    """The devices of a slice, or of a host with GPUs, as far as compiling goes.

    Raises:
      UserError: what compiles for them is missing, or libtpu knows no such slice.
    """
    if where.kind in GPUS:
        return _gpus(where)
    if importlib.util.find_spec("libtpu") is None:
        raise UserError(
            f"--topology={where}: compiling for a TPU takes libtpu, which needs no TPU: install the optional "
            "extra `tpu`, or `pip install libtpu`."
        )
    # One device a chip, as a run on a pod sees v4.
    options = {"chip_config_name": "megacore"} if where.kind == "v4" else {}
    try:
        found = topologies.get_topology_desc(topology_name=str(where), platform="tpu", **options)
    except jax.errors.JaxRuntimeError as error:
        said = str(error).splitlines()[0]
        raise UserError(f"--topology={where}: libtpu knows no such slice ({said}).") from error
    return list(found.devices)


def _gpus(where: Topology) -> list[Any]:
    if importlib.util.find_spec("jax_cuda13_plugin") is None:
        version = metadata.version("jax")
        raise UserError(
            f"--topology={where}: compiling for a GPU takes JAX's CUDA plugin, which needs no GPU: install "
            f"the optional extra `cuda`, or `pip install --no-deps jax-cuda13-pjrt=={version} "
            f"jax-cuda13-plugin=={version}`."
        )
    found = topologies.get_topology_desc(
        topology_name=str(where),
        platform="cuda",
        target_config=gpus.target_config(where.kind),
        topology=f"1x1x{where.count}",  # partitions, hosts, devices
    )
    return list(found.devices)


def planned_network(config: Any) -> TransformerConfig:
    """The network of a config: of its weights' folder, of the published model it is named after, or our own.

    Raises:
      UserError: there is no such folder, and its name is no published model's.
    """
    folder = weights_folder(config)
    if folder is None:
        return own_config(config.policy, config.policy.vocab_size)
    if pathlib.Path(folder).is_dir():
        return read_config(folder, **choices(config.policy))
    name = model_name(folder)
    if name is None:
        raise UserError(
            f"policy.init = {config.policy.init!r}: there is no such folder, and its name is none of the "
            f"published models that are known without one: {', '.join(PUBLISHED)}."
        )
    return published_config(name, **choices(config.policy))


def _compiled(program: Program, mesh: Any, where: Topology) -> tuple[Load, dict[str, Any]]:
    """What compiling one program says, as numbers to judge by and as the report has it."""
    begun = time.monotonic()
    memory, found, costs, error, asked = None, None, {}, "", 0
    try:
        with mesh_lib.use(mesh):
            compiled = program.function.lower(*program.args, **program.kwargs).compile(_options(where))
        memory, costs = _memory(compiled), compiled.cost_analysis() or {}
        found = hlo.collectives(compiled.as_text(), mesh.size)
    except jax.errors.JaxRuntimeError as failure:
        if "RESOURCE_EXHAUSTED" not in str(failure):
            raise
        error, asked = str(failure).splitlines()[0], asked_for(str(failure))
    load = Load(program.name, memory, program.beside, asked)
    sizes, devices = dict(mesh.shape), mesh.size
    cache = int(program.cache / devices)
    return load, {
        "name": program.name,
        "shapes": program.shapes,
        "seconds_to_compile": round(time.monotonic() - begun, 1),
        "memory": None if memory is None else {**report.memory_fields(memory), "cache": cache},
        "beside": program.beside,
        "total": load.total,
        "fits": load.fits(where.chip),
        "flops": {"hand": program.costs.flops / devices, "xla": costs.get("flops")},
        "bytes": {"hand": program.costs.bytes_on_a_device(**sizes), "xla": costs.get("bytes accessed")},
        "floor_seconds": report.floors(where.chip, sizes, program.costs, found),
        "collectives": [dataclasses.asdict(one) for one in found.collectives] if found else [],
        "unknown_loops": found.unknown_loops if found else 0,
        "error": error,
    }


def _options(where: Topology) -> dict[str, Any]:
    """Of XLA. Without a GPU its products by Triton cannot be tuned, and untuned ones may not compile."""
    return {"xla_gpu_enable_triton_gemm": False} if where.kind in GPUS else {}


def _memory(compiled: Any) -> Memory:
    said = compiled.memory_analysis()
    return Memory(
        arguments=said.argument_size_in_bytes,
        outputs=said.output_size_in_bytes,
        aliased=said.alias_size_in_bytes,
        temporary=said.temp_size_in_bytes,
        code=said.generated_code_size_in_bytes,
        peak=said.peak_memory_in_bytes,
    )


def asked_for(message: str) -> int:
    """Bytes that a program asked for, from XLA's message that it ran out of memory; 0 where it says none.

    It has been seen as "Used 20.50G of 15.75G hbm" and as "total memory required for HLO temporaries (1.28T)
    exceeds available HBM (15.75G)".
    """
    said = re.search(r"Used ([\d.]+)([KMGT]?) of|required[^(]*\(([\d.]+)([KMGT]?)\)", message)
    if said is None:
        return 0
    number, unit = (said[1], said[2]) if said[1] else (said[3], said[4])
    return int(float(number) * {"": 1, "K": 2**10, "M": 2**20, "G": GIB, "T": 2**40}[unit])


def _keys(config: Any, mesh: Any) -> fit.Keys:
    return fit.Keys(
        **dict(mesh.shape),
        prompts=config.rollout.prompts,
        samples=config.rollout.samples,
        microbatches=config.learner.microbatches,
        remat=config.policy.remat,
        rank=config.policy.lora.rank,
        chunk=config.objective.chunk,
        early_stop=bool(config.supervised.early_stop),
    )


def versions(where: Topology) -> dict[str, str]:
    """Of what compiles."""
    compiler = "jax-cuda13-plugin" if where.kind in GPUS else "libtpu"
    return {name: metadata.version(name) for name in ("jax", "jaxlib", compiler, "flax", "optax")}
