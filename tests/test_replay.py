"""The replay buffers, and the weights of what they give back."""

import collections
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import serialization
from hypothesis import given, settings
from hypothesis import strategies as st

from streamsynth.errors import UserError
from streamsynth.stream import replay

P, T, D = 3, 4, 2


def numbered(ids):
    """Samples that carry their number in every leaf, so that a row of mixed parts would be seen."""
    ids = np.asarray(ids, np.int32)

    def wide(width, dtype):
        return (ids[:, None] + np.zeros(width, np.int32)).astype(dtype)

    return replay.Samples(
        prompt_tokens=wide(P, np.int32),
        prompt_mask=wide(P, np.int32) % 2 == 1,
        tokens=wide(T, np.int32),
        mask=wide(T, np.int32) % 2 == 1,
        logprobs=-wide(T, np.float32),
        label=ids,
        strategy=ids,
        features=wide(D, np.float32),
        quality=ids.astype(np.float32),
        weight=ids.astype(np.float32),
        counted=ids.astype(np.float32),
        step=ids,
    )


def stored(buffer):
    """The numbers in a buffer's slots in use, after checking that each row is whole."""
    used = np.asarray(buffer.number) >= 0
    return whole(jax.tree.map(lambda leaf: np.asarray(leaf)[used], buffer.samples))


def whole(samples):
    ids = np.asarray(samples.step)
    for got, want in zip(jax.tree.leaves(samples), jax.tree.leaves(numbered(ids)), strict=True):
        assert got.dtype == want.dtype
        np.testing.assert_array_equal(got, want)
    return ids.tolist()


def filled_with(ids, capacity=8, key=0):
    """A buffer that was offered these; always by a batch of 12, so that it compiles once."""
    ids = list(ids)
    batch, offered = numbered([*ids, *[0] * (12 - len(ids))]), np.arange(12) < len(ids)
    return replay.insert(replay.empty(capacity, P, T, D), batch, jax.random.key(key), offered=offered)


def test_a_buffer_fills_in_order_and_then_keeps_its_size():
    buffer = replay.empty(6, P, T, D)
    assert stored(buffer) == []
    for batch in range(20):
        ids = np.arange(3 * batch + 1, 3 * batch + 4)
        buffer = replay.insert(buffer, numbered(ids), jax.random.key(batch))
        if batch < 2:
            assert stored(buffer) == list(range(1, ids[-1] + 1))
    ids = stored(buffer)
    assert len(set(ids)) == 6 and set(ids) <= set(range(1, 61)) and int(buffer.seen) == 60
    assert ids != list(range(1, 7))


@pytest.mark.parametrize("cut", [(5,), (1, 2, 2)])
def test_every_subset_is_exactly_as_likely_by_enumeration(monkeypatch, cut):
    """All outcomes of the draws of algorithm R, with capacity 2 and 5 samples, in one batch or several."""
    outcomes = jnp.array([(0, 0, *rest) for rest in itertools.product(range(3), range(4), range(5))])
    monkeypatch.setattr(jax.random, "randint", lambda key, shape, low, high: key)  # the key is the draws

    def run(draws):
        buffer, start = replay.empty(2, P, T, D), 0
        for size in cut:
            rows = np.arange(start, start + size)
            buffer = replay.insert.__wrapped__(buffer, numbered(rows), draws[rows])
            start += size
        return buffer

    buffers = jax.device_get(jax.jit(jax.vmap(run))(outcomes))
    assert set(buffers.seen) == {5}
    kept = np.array(whole(jax.tree.map(lambda leaf: leaf.reshape(-1, *leaf.shape[2:]), buffers.samples)))
    subsets = collections.Counter(map(frozenset, kept.reshape(-1, 2).tolist()))
    assert len(subsets) == 10 and set(subsets.values()) == {6}


def test_the_real_draws_are_uniform_too():
    def run(key):
        parts = jax.tree.map(lambda leaf: leaf.reshape(3, 5, *leaf.shape[1:]), numbered(range(15)))

        def step(buffer, part):
            return replay.insert(buffer, *part), None

        return jax.lax.scan(step, replay.empty(4, P, T, D), (parts, jax.random.split(key, 3)))[0].samples.step

    trials = 6000
    ids = np.asarray(jax.jit(jax.vmap(run))(jax.random.split(jax.random.key(3), trials)))
    share = np.bincount(ids.ravel(), minlength=15) / trials
    deviation = np.sqrt(4 / 15 * 11 / 15 / trials)
    assert np.abs(share - 4 / 15).max() < 4 * deviation


def test_samples_not_offered_leave_no_trace():
    buffer = replay.empty(3, P, T, D)
    offered = np.array([False, True, False, True, True, False])
    buffer = replay.insert(buffer, numbered(range(6)), jax.random.key(0), offered=offered)
    assert stored(buffer) == [1, 3, 4] and int(buffer.seen) == 3
    for key in range(20):
        later = replay.insert(buffer, numbered(range(10, 16)), jax.random.key(key), offered=offered)
        assert set(stored(later)) <= {1, 3, 4, 11, 13, 14} and int(later.seen) == 6
    same = replay.insert(buffer, numbered(range(6)), jax.random.key(1), offered=np.zeros(6, bool))
    jax.tree.map(np.testing.assert_array_equal, same, buffer)


@settings(deadline=None, max_examples=60)
@given(st.integers(0, 12), st.integers(0, 2**31 - 1))
def test_sample_never_repeats_and_tells_what_is_real(inserted, seed):
    buffer = filled_with(range(1, inserted + 1))
    samples, valid = jax.device_get(replay.sample(buffer, jax.random.key(seed), 5))
    drawn = whole(jax.tree.map(lambda leaf: leaf[valid], samples))
    assert len(drawn) == len(set(drawn)) == min(5, inserted)
    assert set(drawn) <= set(stored(buffer))
    assert not np.any(np.diff(valid.astype(int)) > 0)


def test_sample_draws_all_subsets_alike():
    buffer = filled_with(range(6))
    keys = jax.random.split(jax.random.key(5), 9000)
    drawn = np.asarray(jax.vmap(lambda key: replay.sample(buffer, key, 2)[0].step)(keys))
    pairs = collections.Counter(map(frozenset, drawn.tolist()))
    assert len(pairs) == 15
    deviation = np.sqrt(1 / 15 * 14 / 15 * 9000)
    assert max(abs(n - 600) for n in pairs.values()) < 4 * deviation


# --- Chosen slots ---

RESERVOIR, ELITE, LEVERAGE, BATCH = 6, 3, 2, 6


def offer(buffer, ids, quality, credit, key=0):
    """Offers samples of these qualities; `credit` is today's of every sample there is."""
    batch = numbered(ids).replace(quality=np.float32(quality)[ids])
    today = np.float32(credit)
    refreshed = today[np.asarray(buffer.chosen.step)]
    return replay.insert(buffer, batch, jax.random.key(key), today[ids], refreshed)


def with_chosen_slots():
    return replay.empty(RESERVOIR + ELITE + LEVERAGE, P, T, D, ELITE, LEVERAGE)


def slots(buffer):
    """The numbers in the reservoir, the elite and the leverage slots, -1 where empty."""
    number, step = np.asarray(buffer.number), np.asarray(buffer.samples.step)
    assert (step == number)[number >= 0].all()  # samples are numbered in the order they are offered
    return [part.tolist() for part in np.split(number, [buffer.reservoir, buffer.reservoir + ELITE])]


def best(rivals, count, *keys):
    """A kind's slots as they should be: best by `keys`, then newest, none whose first key is 0."""
    worthy = sorted((i for i in rivals if keys[0][i] > 0), key=lambda i: (*(k[i] for k in keys), i))
    found = worthy[::-1][:count]
    return found + [-1] * (count - len(found))


@settings(deadline=None, max_examples=40)
@given(st.integers(1, 4), st.integers(0, 2**31 - 1))
def test_chosen_slots_hold_the_best_by_todays_credit(batches, seed):
    """Few distinct values, so that there are ties; and the credit of what is stored changes every time."""
    rng = np.random.default_rng(seed)
    quality = rng.integers(0, 3, batches * BATCH) / 2
    buffer = with_chosen_slots()
    elite, leverage = [], []
    for batch in range(batches):
        credit = rng.integers(0, 4, batches * BATCH) / 4
        new = list(range(batch * BATCH, (batch + 1) * BATCH))
        buffer = offer(buffer, new, quality, credit, seed)
        elite = best([i for i in elite if i >= 0] + new, ELITE, quality, credit)
        leverage = best([i for i in leverage if i >= 0] + new, LEVERAGE, credit)
        assert slots(buffer)[1:] == [elite, leverage]
    assert set(elite) - {-1} <= set(best(range(batches * BATCH), batches * BATCH, quality))


def test_the_reservoir_is_the_same_beside_chosen_slots():
    quality = credit = np.linspace(0, 1, 30)
    alone, beside = replay.empty(RESERVOIR, P, T, D), with_chosen_slots()
    for batch in range(5):
        ids = np.arange(batch * BATCH, (batch + 1) * BATCH)
        alone, beside = (offer(buffer, ids, quality, credit, batch) for buffer in (alone, beside))
    assert slots(beside)[0] == np.asarray(alone.number).tolist()
    assert slots(beside)[1:] == [[29, 28, 27], [29, 28]]


def test_a_sample_in_several_slots_is_drawn_once_and_as_often_as_any_other():
    buffer = offer(with_chosen_slots(), np.arange(BATCH), np.linspace(0, 1, BATCH), np.linspace(1, 0, BATCH))
    assert slots(buffer) == [[0, 1, 2, 3, 4, 5], [5, 4, 3], [0, 1]]
    samples, valid = replay.sample(buffer, jax.random.key(0), 9)
    assert sorted(np.asarray(samples.step)[np.asarray(valid)]) == [0, 1, 2, 3, 4, 5]
    keys = jax.random.split(jax.random.key(7), 3000)
    drawn = np.asarray(jax.vmap(lambda key: replay.sample(buffer, key, 2)[0].step)(keys))
    pairs = collections.Counter(map(frozenset, drawn.tolist()))
    assert len(pairs) == 15 and max(abs(n - 200) for n in pairs.values()) < 4 * np.sqrt(200 * 14 / 15)


@pytest.mark.parametrize("elite, leverage", [(ELITE, 0), (0, ELITE), (2, 1)])
def test_a_buffer_without_a_reservoir(elite, leverage):
    buffer = replay.empty(ELITE, P, T, D, elite, leverage)
    buffer = offer(buffer, np.arange(BATCH), np.full(BATCH, 0.5), np.linspace(0, 1, BATCH))
    assert buffer.reservoir == 0
    expected = [5, 4, 3] if 0 in (elite, leverage) else [5, 4, 5]
    assert np.asarray(buffer.number).tolist() == expected


def test_a_buffer_of_no_slots_only_counts():
    buffer = offer(replay.empty(0, P, T, D), np.arange(BATCH), np.ones(BATCH), np.ones(BATCH))
    assert buffer.capacity == 0 and int(buffer.seen) == BATCH
    with pytest.raises(ValueError, match="2 slots"):
        replay.empty(2, P, T, D, 2, 1)


def test_decay_is_of_what_the_archive_counts():
    buffer = replay.decay(filled_with(range(1, 5)), 0.5)
    np.testing.assert_array_equal(buffer.samples.counted[:4], [0.5, 1, 1.5, 2])
    np.testing.assert_array_equal(buffer.samples.quality[:4], [1, 2, 3, 4])


def test_too_large_a_draw_is_refused():
    with pytest.raises(ValueError, match="capacity 8"):
        replay.sample(filled_with([1]), jax.random.key(0), 9)


def test_sample_tasks_lays_the_counts_one_after_the_other():
    buffers = [
        filled_with(range(100 * task + 1, 100 * task + 1 + size)) for task, size in enumerate((8, 2, 0, 7))
    ]
    draw = replay.sample_tasks(buffers, np.array([2, 3, 1, 1], np.int32), jax.random.key(0), 8)
    np.testing.assert_array_equal(draw.valid, [True, True, True, True, False, False, True, False])
    np.testing.assert_array_equal(np.asarray(draw.task)[:7], [0, 0, 1, 1, 1, 2, 3])
    rows = np.flatnonzero(draw.valid)
    ids = whole(jax.tree.map(lambda leaf: np.asarray(leaf)[rows], draw.samples))
    assert [n // 100 for n in ids] == [0, 0, 1, 1, 3] and len(set(ids)) == 5


def test_a_new_plan_compiles_nothing_new():
    buffers = [filled_with(range(1, 9)), filled_with(range(101, 109))]
    replay.sample_tasks(buffers, np.array([1, 2], np.int32), jax.random.key(0), 4)
    before = replay._place._cache_size()
    for counts in ([0, 0], [4, 0], [2, 2]):
        draw = replay.sample_tasks([*buffers, buffers[0]], np.array([*counts, 0]), jax.random.key(1), 4)
        assert int(draw.valid.sum()) == sum(counts)
    assert replay._place._cache_size() == before


def test_bytes_and_budget():
    buffer = replay.empty(10, 7, 5, 3)
    assert replay.nbytes(buffer) == sum(np.asarray(leaf).nbytes for leaf in jax.tree.leaves(buffer))
    assert replay.capacity_for(replay.nbytes(buffer), 7, 5, 3) == 10
    assert replay.capacity_for(replay.nbytes(buffer) - 1, 7, 5, 3) == 9
    with pytest.raises(UserError, match="megabytes = 0.0001 "):
        replay.capacity_for(100, 7, 5, 3)


def test_a_restored_buffer_goes_on_as_if_nothing_had_happened():
    buffer = filled_with(range(12))
    restored = serialization.from_state_dict(
        replay.empty(8, P, T, D), jax.tree.map(np.asarray, serialization.to_state_dict(buffer))
    )
    straight = replay.insert(buffer, numbered(range(20, 26)), jax.random.key(9))
    resumed = replay.insert(restored, numbered(range(20, 26)), jax.random.key(9))
    jax.tree.map(np.testing.assert_array_equal, straight, resumed)


# --- Weights ---


def all_sequences(logits):
    """[V**T, T] sequences and their token log-probabilities under position-wise logits [T, V]."""
    length, size = logits.shape
    sequences = np.array(list(itertools.product(range(size), repeat=length)))
    logprobs = jax.nn.log_softmax(logits)
    return sequences, logprobs[np.arange(length), sequences]


def test_replayed_gradient_is_that_of_the_new_policy_by_enumeration():
    """Sum over y of mu(y) * w(y) * A(y) * grad log pi(y) = grad of sum over y of pi(y) * A(y)."""
    rng = np.random.default_rng(0)
    new, old = jnp.array(rng.normal(size=(2, 3, 3)), jnp.float32)
    sequences, logprobs_old = all_sequences(old)
    advantage = rng.normal(size=len(sequences)).astype(np.float32)
    mask = np.ones(sequences.shape, bool)
    probability_old = np.exp(logprobs_old.sum(-1))

    def replayed(logits):
        _, logprobs = all_sequences(logits)
        weight = replay.sequence_weight(logprobs, logprobs_old, mask, cap=1e6)
        return jnp.sum(probability_old * weight * advantage * logprobs.sum(-1))

    def expected(logits):
        return jnp.sum(jnp.exp(all_sequences(logits)[1].sum(-1)) * advantage)

    np.testing.assert_allclose(jax.grad(replayed)(new), jax.grad(expected)(new), atol=2e-6)


def test_sequence_weight_is_truncated_masked_and_never_overflows():
    new = np.array([[-1.0, -1.0], [-1.0, -9.0], [-0.0, -0.0], [-900.0, -900.0], [-0.5, -0.5]], np.float32)
    old = np.array([[-1.0, -1.0], [-1.5, -1.0], [-500.0, -500.0], [-0.0, -0.0], [-1.0, -0.25]], np.float32)
    mask = np.array([[1, 1], [1, 0], [1, 1], [1, 1], [1, 1]], bool)
    weight = replay.sequence_weight(new, old, mask, cap=2.0)
    np.testing.assert_allclose(weight, [1, np.exp(0.5), 2, 0, np.exp(0.25)], rtol=1e-6)
    # What stands behind a completion's end may be anything.
    behind = np.where(mask, new, np.nan)
    np.testing.assert_array_equal(replay.sequence_weight(behind, old, mask), weight)
    gradient = jax.grad(lambda x: replay.sequence_weight(x, old, mask).sum())(jnp.array(new))
    np.testing.assert_array_equal(gradient, 0)


def test_only_bad_samples_that_the_policy_left_are_dropped():
    log_ratio = np.array([-5.0, -5.0, -1.0, 5.0, -5.0, -2.0], np.float32)
    advantage = np.array([-1.0, 1.0, -1.0, -1.0, 0.0, -1.0], np.float32)
    kept = replay.drift_mask(log_ratio, advantage, limit=2.0)
    np.testing.assert_array_equal(kept, [False, True, True, True, True, True])


@settings(deadline=None, max_examples=50)
@given(
    st.lists(st.tuples(st.floats(2**-10, 2, width=32), st.booleans()), min_size=1, max_size=20),
    st.floats(2**-7, 128, width=32),
)
def test_effective_sample_size_is_bounded_and_free_of_scale(rows, scale):
    weights, mask = np.array([w for w, _ in rows], np.float32), np.array([m for _, m in rows])
    size = float(replay.effective_sample_size(weights, mask))
    if not mask.any():
        assert size == 0
        return
    assert 1 - 1e-5 <= size <= mask.sum() * (1 + 1e-5)
    assert size == pytest.approx(float(replay.effective_sample_size(weights * scale, mask)), rel=1e-4)
    equal = replay.effective_sample_size(np.full_like(weights, scale), mask)
    assert float(equal) == pytest.approx(mask.sum())
