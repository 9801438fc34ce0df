"""What a program costs by hand, against XLA's own count where no loop hides a part of it from that."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from streamsynth.costs import counts
from streamsynth.costs.counts import Batch, Costs
from streamsynth.learner.supervised import SupervisedBatch, supervised_step
from streamsynth.policy.families import family_config
from streamsynth.policy.logprobs import sequence_logprobs
from streamsynth.policy.lora import LoraConfig, init_adapter
from streamsynth.policy.rollout import rollout
from streamsynth.policy.transformer import Transformer, empty_cache, param_shapes
from streamsynth.pytrees import Prompts

# Wide enough that what is no product of matrices is little, and unrolled: XLA counts a loop's body once.
SHAPE = dict(vocab_size=700, width=128, layers=1, heads=4, kv_heads=2, head_width=32, mlp_width=512)
LLAMA = family_config("llama", **SHAPE)
GEMMA = family_config("gemma2", window=8, **{**SHAPE, "layers": 2})
BATCH = Batch(prompts=2, samples=3, prompt_length=24, completion_length=16)


def shaped(dtype, *shape):
    return jax.ShapeDtypeStruct(shape, dtype)


def prompts(batch):
    b, p = batch.prompts, batch.prompt_length
    return Prompts(shaped(jnp.int32, b, p), shaped(bool, b, p), shaped(jnp.int32, b), shaped(jnp.int32, b))


def texts(batch):
    shape = batch.completions, batch.completion_length
    return shaped(jnp.int32, *shape), shaped(bool, *shape)


def flops(function, *args, **kwargs):
    return function.lower(*args, **kwargs).cost_analysis()["flops"]


def bytes_accessed(function, *args, **kwargs):
    return function.lower(*args, **kwargs).cost_analysis()["bytes accessed"]


@pytest.mark.parametrize("config", [LLAMA, GEMMA], ids=["llama", "gemma2"])
def test_teacher_forcing(config):
    variables = {"params": param_shapes(config)}
    positions = BATCH.completions * BATCH.completion_length
    args = (Transformer(config), variables, prompts(BATCH), *texts(BATCH), shaped(jnp.float32))
    found = flops(sequence_logprobs, *args, chunk=positions)
    by_hand = counts.logprobs(config, BATCH, positions)
    assert 1.0 <= found / by_hand.flops < 1.1  # norms, softmax and the like come on top
    assert bytes_accessed(sequence_logprobs, *args, chunk=positions) > by_hand.bytes_on_a_device(1, 1, 1)


@pytest.mark.parametrize("rank, remat", [(0, False), (0, True), (8, True)])
def test_a_training_step(rank, remat):
    lora = LoraConfig(rank, 8.0) if rank else None
    config = dataclasses.replace(LLAMA, lora=lora, remat=remat)
    params = param_shapes(config)
    trained, frozen = {"params": params}, {}
    if rank:
        adapter = jax.eval_shape(lambda: init_adapter(lora, params, jax.random.key(0)))
        trained, frozen = {"lora": adapter}, trained
    optimizer = optax.sgd(1e-3)
    positions = BATCH.completions * BATCH.completion_length
    found = flops(
        supervised_step, Transformer(config), optimizer, trained, frozen, optimizer.init(trained),
        SupervisedBatch(prompts(BATCH), *texts(BATCH)), shaped(jnp.float32), chunk=positions,
    )  # fmt: skip
    by_hand = counts.gradient(config, BATCH, positions).flops
    # The adapter's own small matrices are differentiated in both factors, and are counted once.
    assert 0.97 <= found / by_hand < 1.1


@pytest.mark.parametrize("config", [LLAMA, GEMMA], ids=["llama", "gemma2"])
def test_decoding_with_one_turn_of_its_loop(config):
    batch = dataclasses.replace(BATCH, completion_length=2)
    args = (
        Transformer(config), {"params": param_shapes(config)}, prompts(batch),
        shaped(jax.random.key(0).dtype, batch.completions), shaped(jnp.float32),
    )  # fmt: skip
    found = flops(rollout, *args, samples=batch.samples, length=2, stops=(1,))
    assert 1.0 <= found / counts.rollout(config, batch).flops < 1.1


def test_what_scanned_layers_hide_from_xla():
    """The reason for counting by hand: the same program, and XLA sees one of its four layers."""
    unrolled = dataclasses.replace(LLAMA, layers=4)
    scanned = dataclasses.replace(unrolled, scan_layers=True)
    positions = BATCH.completions * BATCH.completion_length
    args = (prompts(BATCH), *texts(BATCH), shaped(jnp.float32))
    found = {
        config.scan_layers: flops(
            sequence_logprobs, Transformer(config), {"params": param_shapes(config)}, *args, chunk=positions
        )
        for config in (unrolled, scanned)
    }
    by_hand = [counts.logprobs(config, BATCH, positions).flops for config in (unrolled, scanned)]
    assert by_hand[0] == by_hand[1] and found[True] < 0.7 * found[False]


def test_weights_are_those_of_the_network():
    for config in (LLAMA, GEMMA, dataclasses.replace(LLAMA, tied_embeddings=False)):
        shapes = param_shapes(config)
        kernels = [
            x.size for path, x in jax.tree_util.tree_leaves_with_path(shapes) if path[-1].key == "kernel"
        ]
        table = config.width * config.vocab_size
        assert counts.network_weights(config) == sum(kernels) + table
    lora = LoraConfig(8, 8.0)
    config = dataclasses.replace(LLAMA, lora=lora)
    adapter = jax.eval_shape(lambda: init_adapter(lora, param_shapes(config), jax.random.key(0)))
    assert config.layers * counts.adapter_weights(config) == sum(x.size for x in jax.tree.leaves(adapter))


def test_the_cache_is_that_of_the_network():
    """By hand it is as large as what prefill and `empty_cache` make, windows and all."""
    for config in (LLAMA, GEMMA, dataclasses.replace(GEMMA, scan_layers=True, compute_dtype="bfloat16")):
        tokens = shaped(jnp.int32, BATCH.prompts, BATCH.prompt_length)
        variables = {"params": param_shapes(config)}
        _, prompt = jax.eval_shape(Transformer(config).apply, variables, tokens, tokens)
        own = jax.eval_shape(lambda c=config: empty_cache(c, BATCH.completions, BATCH.completion_length))
        kept = [x for x in jax.tree.leaves((prompt, own)) if x.dtype == jnp.dtype(config.compute_dtype)]
        assert counts.cache_bytes(config, BATCH) == sum(x.size * x.dtype.itemsize for x in kept)


def test_costs_on_a_device():
    one = Costs(flops=8.0, weight_bytes=4.0, cache_bytes=16.0, state_bytes=8.0)
    assert one.bytes_on_a_device(1, 1, 1) == 28.0
    # Weights are gathered along fsdp, the cache is split over all axes, the optimizer over two.
    assert one.bytes_on_a_device(data=2, fsdp=2, tensor=2) == 2.0 + 2.0 + 2.0
    assert one + one == Costs(16.0, 8.0, 32.0, 16.0)


def test_chunks_are_filled():
    assert [counts.chunk_positions(n, 8) for n in (1, 8, 9, 17, 24)] == [1, 8, 10, 18, 24]


def test_an_optimizer_step_touches_all_it_keeps():
    by_hand = counts.optimizer_step(trained=10, param_bytes=20, state_bytes=120)
    assert by_hand.flops == 0 and by_hand.state_bytes == 2 * 140 + 40
    assert np.isclose(by_hand.bytes_on_a_device(4, 2, 5), 32.0)
