"""Collectives read out of XLA's text: of programs compiled here, and of lines that a TPU's compiler wrote."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from streamsynth.costs import hlo

ROOT = Path(__file__).resolve().parent.parent


def found(text, devices=4):
    return {(one.kind, one.devices): one for one in hlo.collectives(text, devices).collectives}


SCANNED = """
import jax, jax.numpy as jnp
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P
from streamsynth.costs import hlo

mesh = jax.make_mesh((2, 4), ("data", "tensor"), axis_types=(AxisType.Auto,) * 2)
# Seven layers whose weights are split along what is summed over: an all-reduce of [16, 32] floats each.
w = jax.ShapeDtypeStruct((7, 32, 32), jnp.float32, sharding=NamedSharding(mesh, P(None, "tensor", None)))
x = jax.ShapeDtypeStruct((32, 32), jnp.float32, sharding=NamedSharding(mesh, P("data", "tensor")))

@jax.jit
def layers(x, w):
    def layer(x, w):
        x = jax.lax.with_sharding_constraint(jnp.tanh(x), P("data", "tensor"))
        return jax.lax.with_sharding_constraint(x @ w, P("data", None)), None
    return jax.lax.scan(layer, x, w)[0]

@jax.jit
def stepping(x, w):
    # Ends early or after eleven turns: the first counts for 0.
    def go_on(carry):
        step, x = carry
        return (step < 12) & jnp.any(x > 0)
    return jax.lax.while_loop(go_on, lambda c: (c[0] + 1, layers(c[1], w)), (1, x))[1]

with jax.set_mesh(mesh):
    for program in (layers, stepping):
        found = hlo.collectives(program.lower(x, w).compile().as_text(), 8)
        big = [one for one in found.collectives if one.size >= 7 * 16 * 32 * 4]
        print(found.unknown_loops, [(one.kind, one.devices, one.count, one.size, one.sent) for one in big])
"""


def test_a_loop_counts_as_often_as_it_turns():
    env = {
        **os.environ, "PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": "--xla_force_host_platform_device_count=8",
    }  # fmt: skip
    run = subprocess.run(
        [sys.executable, "-c", SCANNED], capture_output=True, text=True, check=True, env=env, cwd=ROOT
    )
    scanned, stepping = run.stdout.splitlines()
    size = 7 * 16 * 32 * 4
    assert scanned == f"0 [('all-reduce', 4, 7, {size}, {2 * size * 3 // 4})]"
    # Its condition asks all devices for a byte, once more often than the loop turns; such a ring sends none.
    assert stepping == f"0 [('all-reduce', 4, {77 + 12}, {11 * size + 12}, {11 * 2 * size * 3 // 4})]"


# Lines as libtpu 0.0.42 writes them, shortened: no trip counts, collectives cut into parts, tiled layouts.
TPU = (ROOT / "tests" / "golden" / "tpu_program.txt").read_text()


@pytest.mark.parametrize("start", [0, 3])
def test_a_tpu_program(start):
    text = TPU.replace("START", str(start))
    assert hlo.collectives(text, 4).unknown_loops == 0
    by_kind = found(text)
    gathered = by_kind["all-gather", 4]
    # Two parts of one collective, in a loop whose condition says how often it turns.
    assert (gathered.places, gathered.count, gathered.size) == (
        1,
        13 - start,
        (13 - start) * 4 * 64 * 256 * 2,
    )
    assert gathered.sent == gathered.size * 3 // 4
    scattered = by_kind["reduce-scatter", 2]
    assert (scattered.count, scattered.size, scattered.sent) == (1, 4096 * 128 * 4, 4096 * 128 * 2)
    # What is sent and what comes of it stand side by side in the type.
    assert by_kind["collective-permute", 4].sent == 8 * 128 * 4
    assert len(by_kind) == 3


def test_a_loop_that_says_nothing_counts_once_and_is_told():
    text = TPU.replace("START", "0").replace("direction=LT", "direction=GT")
    assert hlo.collectives(text, 4).unknown_loops == 1
    assert found(text)["all-gather", 4].count == 1


def test_a_known_trip_count_is_believed():
    text = TPU.replace("START", "0").replace(
        "body=%wide.body", 'body=%wide.body, backend_config={"known_trip_count":{"n":"5"}}'
    )
    assert found(text)["all-gather", 4].count == 5


@pytest.mark.parametrize(
    "rest, size",
    [
        ("replica_groups={{0,1},{2,3}}, dimensions={0}", 2),
        ("replica_groups=[2,4]<=[8]", 4),
        ("replica_groups=[4,2]<=[2,4]T(1,0)", 2),
        ("replica_groups=mesh['axis_0'=2,'axis_1'=4] {'axis_0','axis_1'}", 8),
        ("replica_groups={}", 16),
    ],
)
def test_how_many_take_part(rest, size):
    assert hlo.group_size(rest, 16) == size


def test_sizes_of_types():
    assert hlo.array_bytes("(bf16[4,8]{1,0:T(8,128)(2,1)}, s32[], pred[3], f8e4m3fn[2], s4[4])") == [
        64, 4, 3, 2, 2,
    ]  # fmt: skip
