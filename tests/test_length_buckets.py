"""Shorter lengths for batches of short prompts: the same results, and a program for each and no more."""

from __future__ import annotations

import collections
import dataclasses

import draws
import jax
import numpy as np
import pytest
import runs
import tiny

from streamsynth import step, turn
from streamsynth.keys import sample_keys
from streamsynth.learner.objective import Fresh, ObjectiveConfig, gradients
from streamsynth.policy.families import own_config
from streamsynth.policy.logprobs import group_logprobs, read_group
from streamsynth.policy.rollout import rollout
from streamsynth.policy.sampling import uniforms
from streamsynth.programs import declared
from streamsynth.runtime import mesh as mesh_lib
from streamsynth.stream.kept import Kept
from streamsynth.stream.markers import MarkerFormat

B, G, T, FULL, SHORT = 6, 4, 5, 16, 6
TEMPERATURE = np.float32(0.8)
LENGTHS = (42, 45)  # both are met within a few steps of the smallest run, and so is the full one of 48


def padded(prompts, length):
    """Prompts with more room behind them; what stands in it must not matter."""
    more = ((0, 0), (0, length - prompts.tokens.shape[1]))
    tokens = np.pad(prompts.tokens, more, constant_values=7)
    return prompts.replace(tokens=tokens, mask=np.pad(prompts.mask, more))


def test_a_batch_is_cut_to_the_first_length_that_holds_its_prompts():
    form = MarkerFormat(tiny.tokenizer(), FULL, T, buckets=(SHORT, 9))
    rows = [[5] * 4, [6] * 6, [7]]
    whole = form.pad_prompts(rows, np.zeros(3), np.zeros(3))
    assert whole.tokens.shape == (3, FULL)
    for longest, length in ((1, 6), (6, 6), (7, 9), (9, 9), (10, 16), (16, 16)):
        cut = form.shortened(whole, longest)
        assert cut.tokens.shape == cut.mask.shape == (3, length)
    short = form.shortened(whole, 6)
    assert short.mask.sum(axis=1).tolist() == [4, 6, 1]
    jax.tree.map(np.testing.assert_array_equal, padded(short, FULL).mask, whole.mask)
    assert MarkerFormat(tiny.tokenizer(), FULL, T).shortened(whole, 1).tokens.shape == (3, FULL)


@pytest.mark.slow
def test_samples_logprobs_and_gradients_are_those_of_the_full_length():
    rng = np.random.default_rng(0)
    short = tiny.prompts(rng, B, SHORT)
    keys = sample_keys(jax.random.key(1), B, G)
    advantage = rng.normal(size=B * G).astype(np.float32)
    params = tiny.initial_params()

    @tiny.quick_jit
    def write(prompts):
        return rollout(tiny.MODEL, params, prompts, keys, TEMPERATURE, samples=G, length=T, stops=(2,))

    @tiny.quick_jit
    def learn(prompts, drawn):
        forced = group_logprobs(tiny.MODEL, params, prompts, drawn.tokens, drawn.mask, TEMPERATURE)
        fresh = Fresh(prompts, drawn.tokens, drawn.mask, drawn.logprobs, 0.9 * drawn.logprobs, advantage)
        config = ObjectiveConfig(kl_weight=0.1, chunk=16)
        return forced, gradients(tiny.MODEL, params, {}, fresh, None, TEMPERATURE, config)

    expected, found = write(padded(short, FULL)), write(short)
    logits = tiny.MODEL.apply(
        params, read_group(tiny.MODEL, params, short, expected.tokens).before, method="logits"
    )
    drawn = [np.asarray(leaf) for leaf in (expected.tokens, found.tokens, expected.mask)]
    assert draws.unexplained(*drawn, np.asarray(logits) / TEMPERATURE, np.asarray(uniforms(keys, T))) == []
    same = (drawn[0] == drawn[1]).all(axis=1)
    assert same.mean() > 0.9
    np.testing.assert_allclose(found.logprobs[same], expected.logprobs[same], atol=1e-5)
    (forced, (grads, figures)), (wanted, (gradient, of_full)) = (
        learn(prompts, expected) for prompts in (short, padded(short, FULL))
    )
    np.testing.assert_allclose(forced.logprobs, wanted.logprobs, atol=1e-5)
    assert np.linalg.norm(tiny.flat(gradient)) > 1e-2
    np.testing.assert_allclose(tiny.flat(grads), tiny.flat(gradient), atol=1e-5)
    for name, value in of_full.items():
        np.testing.assert_allclose(figures[name], value, rtol=1e-4, atol=1e-5, err_msg=name)


def test_the_programs_of_every_length_are_declared(tmp_path):
    config = runs.config(tmp_path, rollout__buckets="32,40", evaluation__prompts="10")
    mesh = mesh_lib.make_mesh(config.mesh.to_dict())
    found = declared(config, own_config(config.policy, config.policy.vocab_size), mesh)
    full = [program.name for program in found if " P=" not in program.name]
    assert full == ["rollout", "reference", "update", "supervised", "evaluation", "judge"]
    of_length = {p.name: p.args[2].tokens.shape[1] for p in found if "rollout" in p.name}
    assert of_length == {"rollout": 48, "rollout P=32": 32, "rollout P=40": 40}
    assert {name.partition(" P=")[0] for name in {p.name for p in found} - set(full)} == {
        *("rollout", "reference", "update", "evaluation")
    }
    assert len(found) == len(full) + 2 * 4


@pytest.fixture
def compiled():
    """How often each program is compiled, by the name of its function."""
    counts = collections.Counter()

    def listen(event, seconds, fun_name="", **more):
        if event == "/jax/core/compile/backend_compile_duration":
            counts[fun_name.removeprefix("jit(").removesuffix(")")] += 1

    jax.monitoring.register_event_duration_secs_listener(listen)
    yield counts
    jax.monitoring.unregister_event_duration_listener(listen)


@pytest.mark.slow
def test_a_program_for_each_length_that_is_met_and_no_more(finished, quick_xla, compiled):
    setting, state = runs.third_turn(finished, rollout__buckets=",".join(map(str, LENGTHS)))
    task = setting.tasks[int(state.turn)]
    kept = Kept(task, setting.config.dataset.near_duplicate, setting.config.rollout.best_kept)
    met = []

    def dispatched(*arguments):
        pending = step.dispatched(*arguments)
        met.append(pending.rollouts.prompts.tokens.shape[1])
        longest = int(np.asarray(pending.rollouts.prompts.mask).sum(axis=1).max())
        assert met[-1] == min(length for length in (*LENGTHS, 48) if length >= longest)
        return pending

    jax.clear_caches()  # of what other tests compiled
    compiled.clear()
    with pytest.MonkeyPatch.context() as patch, mesh_lib.use(setting.mesh):
        patch.setattr(turn, "dispatched", dispatched)
        for _ in range(4):
            state, figures, _ = turn.learn(setting, state, kept)
            assert figures["update/skipped"] == 0 and figures["replay/samples"] > 0
    assert len(set(met)) > 1, met
    # Probes write by the same programs, and may meet a length that no step does.
    assert compiled["update"] == compiled["sequence_logprobs"] == len(set(met))
    assert len(set(met)) <= compiled["rollout"] <= len(LENGTHS) + 1
    samples = state.tasks[int(state.turn)].buffer.samples
    assert samples.prompt_tokens.shape[1] == samples.prompt_mask.shape[1] == 48
    stored = set(np.asarray(samples.prompt_mask).sum(axis=1).tolist())
    assert max(stored) <= 48 and min(stored - {0}) > 0
    # A batch is what it is at the full length.
    plain = dataclasses.replace(setting, form=dataclasses.replace(setting.form, buckets=()))
    with mesh_lib.use(setting.mesh):
        for number in range(100, 120):
            short = step.dispatched(setting, state, task, kept, "rollout", number).rollouts
            if short.prompts.tokens.shape[1] < 48:
                break
        full = step.dispatched(plain, state, task, kept, "rollout", number).rollouts
    assert short.prompts.tokens.shape[1] < full.prompts.tokens.shape[1] == 48
    np.testing.assert_array_equal(short.tokens, full.tokens)
    np.testing.assert_allclose(short.logprobs, full.logprobs, atol=1e-5)
