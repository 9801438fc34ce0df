"""From buffers to a replayed batch: today's credit, yesterday's baselines, and what it changes."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from streamsynth.defaults import default_config
from streamsynth.feedback import diversity
from streamsynth.learner.collect import Written
from streamsynth.learner.objective import Fresh, ObjectiveConfig, gradients
from streamsynth.learner.optimizer import make_optimizer
from streamsynth.learner.replaying import remember, replayed_batch, samples_of
from streamsynth.learner.state import new_state
from streamsynth.learner.update import FLOORS, update
from streamsynth.pytrees import Rollouts, Scores

pytestmark = pytest.mark.usefixtures("quick_xla")

LABELS = (2, 3, 2)  # of three tasks
B, G, P, T, D, SIZE = 4, 2, 3, 3, 4, 8
N, DECAY = B * G, 0.9


@pytest.fixture(scope="module")
def config():
    config = default_config()
    with config.unlocked():
        config.rollout.update(prompt_length=P, completion_length=T)
        config.feedback.update(width=D, ridge=0.1)
        config.replay.update(capacity=16, elite_share=0.0, leverage_share=0.0)
        config.optimizer.update(warmup=0, learning_rate=1e-2)
    return config


def batch_of(seed, labels):
    """A rollout of one task as `remember` takes it: samples, and which of them are kept."""
    rng = np.random.default_rng(seed)
    tokens, mask = tiny.completions(rng, N, T)
    logprobs = np.where(mask, rng.normal(size=(N, T)) - 3, 0).astype(np.float32)
    rollouts = Rollouts(tiny.prompts(rng, B, P), tokens, mask, logprobs, np.ones(N, bool))
    label, strategy = np.repeat(rng.integers(labels, size=B), G), np.repeat(np.arange(B), G)
    features = rng.normal(size=(N, D))
    features = (features / np.linalg.norm(features, axis=1, keepdims=True)).astype(np.float32)
    quality = rng.random(N).astype(np.float32)
    quality[0] = 0.0
    scores = Scores((quality > 0).astype(np.float32), quality, features, {}, np.ones(N, bool))
    said = (("",) * N, ("",) * N, label, strategy, np.zeros(N, int), ((),) * B, 0, rollouts.finished)
    written = Written(rollouts, *said)
    keep = quality > 0.5
    return samples_of(written, scores, jnp.asarray(quality) ** 2, keep, step=seed), keep


@pytest.fixture(scope="module")
def state(config):
    """Two past tasks with a batch each, and a third that has nothing yet."""
    state = new_state(config, LABELS, {}, ())
    tasks = list(state.tasks)
    for j in range(2):
        tasks[j] = remember(tasks[j], *batch_of(j, LABELS[j]), jax.random.key(j), DECAY, 1.0)
    spread = state.spread.replace(mean_square={"quality": jnp.float32(0.04), "diversity": jnp.float32(0.25)})
    balance = state.balance.replace(alpha=jnp.float32(0.7))
    return state.replace(tasks=tuple(tasks), spread=spread, balance=balance)


def draw(state, counts, key=0, neutral=True):
    return replayed_batch(
        state, np.array(counts), SIZE, jax.random.key(key), elite=0.8, decay=DECAY, neutral=neutral
    )


def test_samples_carry_their_own_prompts():
    samples, keep = batch_of(0, 2)
    for n in range(N):
        np.testing.assert_array_equal(samples.prompt_tokens[n], samples.prompt_tokens[n - n % G])
    assert len(np.unique(samples.prompt_tokens, axis=0)) == B
    np.testing.assert_array_equal(samples.counted, keep)
    assert (np.asarray(samples.step) == 0).all()


def test_remember_fills_buffer_archive_and_baselines(config, state):
    samples, keep = batch_of(1, LABELS[1])
    task = state.tasks[1]
    assert int(task.buffer.seen) == N and int(task.kept) == keep.sum()
    jax.tree.map(
        lambda stored, new: np.testing.assert_array_equal(stored[:N], new), task.buffer.samples, samples
    )
    e = np.sqrt(np.asarray(samples.weight, np.float64))[:, None] * samples.features
    label = np.asarray(samples.label)
    for k in range(LABELS[1]):
        rows = e[keep & (label == k)]
        np.testing.assert_allclose(task.archive.matrix[k], 0.1 * np.eye(D) + rows.T @ rows, atol=1e-6)
        assert task.archive.count[k] == len(rows)
    credit = [marginal_by_hand(state, 1, row) for row in range(N)]
    means = {
        "quality": np.mean(samples.quality),
        "weight": np.mean(samples.weight),
        "credit": np.mean(credit),
    }
    for name, mean in means.items():  # of the first batch, whatever stood there before
        np.testing.assert_allclose(getattr(task, name), mean, rtol=1e-4)
    again, keep = batch_of(7, LABELS[1])
    after = remember(task, again, keep, jax.random.key(7), DECAY, 1.0)
    expected = DECAY * means["quality"] + (1 - DECAY) * np.mean(again.quality)
    np.testing.assert_allclose(after.quality, expected, rtol=1e-5)


def marginal_by_hand(state, j, row):
    """log det of the archive with the sample less that without it, in float64."""
    s, archive = state.tasks[j].buffer.samples, np.asarray(state.tasks[j].archive.matrix, np.float64)
    e = np.sqrt(float(s.weight[row])) * np.asarray(s.features[row], np.float64)
    without = archive[int(s.label[row])] - float(s.counted[row]) * np.outer(e, e)
    return np.linalg.slogdet(without + np.outer(e, e))[1] - np.linalg.slogdet(without)[1]


def row_of(state, j, batch, i):
    """The buffer's slot that row i of a batch came from."""
    [row] = rows_of(state, j, batch, i)
    return row


def rows_of(state, j, batch, i):
    """All slots that hold it."""
    s = state.tasks[j].buffer.samples
    return np.flatnonzero((np.asarray(s.logprobs) == np.asarray(batch.behaviour[i])).all(1)).tolist()


@pytest.mark.parametrize("neutral", [True, False])
def test_credit_is_refreshed_and_baselines_lag(state, neutral):
    batch, after = draw(state, [3, 4, 0], neutral=neutral)
    np.testing.assert_array_equal(batch.valid, [1, 1, 1, 1, 1, 1, 1, 0])
    kinds = set()
    seen = {0: [], 1: []}
    for i in range(7):
        j = 0 if i < 3 else 1
        row, task = row_of(state, j, batch, i), state.tasks[j]
        s = task.buffer.samples
        quality, credit = float(s.quality[row]), marginal_by_hand(state, j, row)
        usual = float(task.credit)
        if neutral:  # the going rate for the sample's weight
            usual *= float(s.weight[row]) / max(float(task.weight), 0.05)
        novelty = (credit - usual) / 0.5
        expected = ((quality - float(task.quality)) / 0.2 + 0.7 * novelty) / 1.7
        np.testing.assert_allclose(batch.advantage[i], expected, rtol=1e-4, atol=1e-5)
        assert batch.elite[i] == (quality >= 0.8)
        np.testing.assert_array_equal(batch.tokens[i], s.tokens[row])
        np.testing.assert_array_equal(batch.mask[i], s.mask[row])
        np.testing.assert_array_equal(batch.prompts.tokens[i], s.prompt_tokens[row])
        kinds.add(bool(s.counted[row]))
        seen[j].append((row, quality, credit))
    assert kinds == {True, False}
    assert len({row for row, _, _ in seen[0]}) == 3 and len({row for row, _, _ in seen[1]}) == 4
    # The baselines move only after they were used.
    for j, rows in seen.items():
        for name, place in (("quality", 1), ("credit", 2)):
            before = float(getattr(state.tasks[j], name))
            expected = DECAY * before + (1 - DECAY) * np.mean([row[place] for row in rows])
            np.testing.assert_allclose(getattr(after.tasks[j], name), expected, rtol=1e-4)
    jax.tree.map(np.testing.assert_array_equal, after.tasks[2], state.tasks[2])
    jax.tree.map(np.testing.assert_array_equal, after.tasks[0].buffer, state.tasks[0].buffer)


@pytest.mark.parametrize("share", [0.0, 0.25])
def test_the_archive_decays_and_credit_knows_by_how_much(config, share):
    """Against sums in float64, where a kept sample weighs 0.8 ** (batches since)."""
    config = config.copy_and_resolve_references()
    with config.unlocked():
        config.replay.update(capacity=40, elite_share=share, leverage_share=share)
    state, batches = new_state(config, (2,), {}, ()), [batch_of(seed, 2) for seed in range(4)]
    task = state.tasks[0]
    for seed, batch in enumerate(batches):
        task = remember(task, *batch, jax.random.key(seed), DECAY, 0.8)
    state = state.replace(tasks=(task,))
    s = {
        name: np.concatenate([np.asarray(getattr(b, name)) for b, _ in batches])
        for name in ("weight", "label")
    }
    e = (
        np.concatenate([np.asarray(b.features, np.float64) for b, _ in batches])
        * np.sqrt(s["weight"])[:, None]
    )
    counted = np.concatenate([keep * 0.8 ** (3 - t) for t, (_, keep) in enumerate(batches)])

    def archive(k, but=None):
        rows = (s["label"] == k) & (np.arange(4 * N) != but)
        return 0.1 * np.eye(D) + (counted[rows, None] * e[rows]).T @ e[rows]

    for k in range(2):
        np.testing.assert_allclose(task.archive.matrix[k], archive(k), atol=1e-6)
        np.testing.assert_allclose(task.archive.count[k], counted[s["label"] == k].sum(), rtol=1e-6)
    credit = np.array(
        [np.log1p(e[i] @ np.linalg.solve(archive(s["label"][i], i), e[i])) for i in range(4 * N)]
    )
    buffer = task.buffer
    used, number = np.asarray(buffer.number) >= 0, np.asarray(buffer.number)
    np.testing.assert_allclose(np.asarray(buffer.samples.counted)[used], counted[number[used]], rtol=1e-6)
    for row in np.flatnonzero(used):
        assert marginal_by_hand(state, 0, row) == pytest.approx(credit[number[row]], rel=1e-4, abs=1e-6)
    if share:  # the slots were dealt by the credit of the archive after each batch
        assert (buffer.elite, buffer.leverage) == (10, 10)
        quality = np.concatenate([np.asarray(b.quality) for b, _ in batches])
        assert set(number[20:30]) == set(np.argsort(quality)[-10:])
        last = number[30:][number[30:] >= 3 * N]  # of the last batch: credit then is credit now
        assert np.mean(credit[last]) > np.mean(credit[3 * N :])
    # What a batch is paid for is the same number.
    batch, _ = draw(state, [SIZE], neutral=False)
    drawn = [int(number[row]) for row in (rows_of(state, 0, batch, i)[0] for i in range(SIZE))]
    assert len(set(drawn)) == SIZE
    a = float(state.balance.alpha)
    quality = np.array([float(batches[i // N][0].quality[i % N]) for i in drawn])
    expected = (quality - float(task.quality)) / FLOORS["quality"]
    expected += a * (credit[drawn] - float(task.credit)) / FLOORS["diversity"]
    np.testing.assert_allclose(batch.advantage, expected / (1 + a), rtol=1e-3, atol=1e-3)


def test_credit_follows_todays_archive(state):
    """What was kept since makes a sample less of a novelty; its own share counts neither way."""
    s = state.tasks[0].buffer.samples
    e = diversity.weighted(s.features, s.weight)
    fuller = diversity.absorb(state.tasks[0].archive, -e, s.label, np.asarray(s.weight) > 0)
    crowded = state.replace(tasks=(state.tasks[0].replace(archive=fuller), *state.tasks[1:]))
    (before, _), (after, _) = draw(state, [7, 0, 0]), draw(crowded, [7, 0, 0])
    np.testing.assert_array_equal(before.tokens, after.tokens)
    worthless = np.array([float(s.weight[row_of(state, 0, before, i)]) == 0 for i in range(7)])
    lower = np.asarray(after.advantage)[:7] < np.asarray(before.advantage)[:7]
    np.testing.assert_array_equal(lower, ~worthless)


def test_filler_rows_and_empty_buffers_are_not_valid(state):
    batch, after = draw(state, [2, 0, 3])
    np.testing.assert_array_equal(batch.valid, [1, 1, 0, 0, 0, 0, 0, 0])
    assert (np.asarray(batch.advantage)[2:] == 0).all() and not np.asarray(batch.mask)[2:].any()
    jax.tree.map(np.testing.assert_array_equal, after.tasks[2], state.tasks[2])
    full, _ = draw(state, [0, 8, 0])
    assert full.valid.all()


def test_a_batch_of_none_teaches_nothing(state):
    """The first turn has nothing to replay; its update is that without replay, by the same program."""
    batch, after = draw(state, [0, 0, 0])
    assert not np.asarray(batch.valid).any() and not np.asarray(batch.mask).any()
    jax.tree.map(np.testing.assert_array_equal, after.tasks, state.tasks)
    rng = np.random.default_rng(3)
    tokens, mask = tiny.completions(rng, N, T)
    behaviour = np.where(mask, -3.0, 0.0).astype(np.float32)
    advantage = rng.normal(size=N).astype(np.float32)
    fresh = Fresh(tiny.prompts(rng, B, P), tokens, mask, behaviour, behaviour, advantage)
    objective = ObjectiveConfig(cloning_weight=0.5, chunk=16)
    jitted = tiny.quick_jit(gradients, static_argnums=(0, 6))
    with_none, figures = jitted(tiny.MODEL, tiny.params(), {}, fresh, batch, np.float32(1.0), objective)
    without, _ = jitted(tiny.MODEL, tiny.params(), {}, fresh, None, np.float32(1.0), objective)
    np.testing.assert_allclose(tiny.flat(with_none), tiny.flat(without), rtol=1e-5, atol=1e-8)
    assert figures["replay/samples"] == figures["replay/gradient_share"] == 0


def test_sigma_has_its_floor(state):
    unknown = state.replace(
        spread=state.spread.replace(mean_square=dict.fromkeys(FLOORS, jnp.float32(0))),
        balance=state.balance.replace(alpha=jnp.float32(0)),
    )
    batch, _ = draw(unknown, [3, 0, 0])
    for i in range(3):
        quality = float(state.tasks[0].buffer.samples.quality[row_of(state, 0, batch, i)])
        expected = (quality - float(state.tasks[0].quality)) / FLOORS["quality"]
        np.testing.assert_allclose(batch.advantage[i], expected, rtol=1e-5)


def test_an_update_with_replay_goes_another_way_than_one_without(config, state):
    """And what it adds makes the replayed samples with a positive advantage likelier."""
    rng = np.random.default_rng(5)
    before = tiny.initial_params()
    tokens, mask = tiny.completions(rng, N, T)
    behaviour = np.where(mask, -3.0, 0.0).astype(np.float32)
    fresh = Fresh(
        tiny.prompts(rng, B, P), tokens, mask, behaviour, behaviour, np.zeros(N, np.float32)
    )  # nothing to learn from
    optimizer = make_optimizer(config.optimizer, 10)
    batch, _ = draw(state, [3, 4, 0])
    batch = batch.replace(advantage=np.where(batch.valid, 1.0, 0.0).astype(np.float32))

    def step(replayed):
        params = jax.tree.map(jnp.array, before)
        return update(
            tiny.MODEL,
            optimizer,
            ObjectiveConfig(kl_weight=0.0, chunk=16),
            params,
            {},
            optimizer.init(params),
            fresh,
            replayed,
            np.float32(1.0),
        )

    with_replay, _, metrics = step(batch)
    without, _, off = step(batch.replace(valid=np.zeros(SIZE, bool)))
    assert metrics["replay/gradient_share"] == 1.0 and off["replay/gradient_share"] == 0.0
    np.testing.assert_array_equal(tiny.flat(without), tiny.flat(before))
    assert (tiny.flat(with_replay) != tiny.flat(without)).mean() > 0.5
    _, _, after = update(
        tiny.MODEL,
        optimizer,
        ObjectiveConfig(kl_weight=0.0, chunk=16),
        jax.tree.map(jnp.array, with_replay),
        {},
        optimizer.init(with_replay),
        fresh,
        batch,
        np.float32(1.0),
    )
    assert after["replay/effective_samples"] > 1 and after["replay/loss"] < metrics["replay/loss"]
