"""What is remembered of past tasks: a buffer of samples per task, and the weights for learning from it.

A buffer has slots of three kinds. The *reservoir* holds a uniform draw from all samples that were ever
offered (reservoir sampling, Vitter 1985, algorithm R). The *elite* slots hold those of best quality, the
*leverage* slots those that add most to what is kept of the task today. A batch is drawn uniformly from
the distinct samples of all slots, so that the kinds have the shares of their slots.

A replayed sample y was written by an older policy mu, so its gradient is weighted by the truncated
importance ratio of the whole sequence, without any clipping on top:

    sg(min(cap, pi(y | x) / mu(y | x))) * A * grad log pi(y | x)

All functions are pure and may be called inside `jit`. In one stream every buffer has the same shapes,
so each function compiles once however many tasks there are.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np

from streamsynth.errors import UserError
from streamsynth.pytrees import Array
from streamsynth.runtime.mesh import constrain


@flax.struct.dataclass
class Samples:
    """M samples with everything that learning from them again takes. M is C in a buffer.

    prompt_tokens: [M, P] int32.   prompt_mask: [M, P] bool.
    tokens: [M, T] int32.          mask: [M, T] bool.
    logprobs: [M, T] float32, under the policy that wrote the sample (mu).
    label: [M] int32, index within the sample's task.   strategy: [M] int32.
    features: [M, D] float32 unit vectors.
    quality: [M] float32.
    weight: [M] float32, r(quality) in [0, 1]; sqrt(weight) * features is the sample's diversity vector e.
    counted: [M] float32, the weight of e e^T in the archive of its task and label: 0 where it is not there,
      1 where it was just absorbed, and the product of the decays since.
    step: [M] int32, the step at which the policy wrote it.
    """

    prompt_tokens: Array
    prompt_mask: Array
    tokens: Array
    mask: Array
    logprobs: Array
    label: Array
    strategy: Array
    features: Array
    quality: Array
    weight: Array
    counted: Array
    step: Array


@flax.struct.dataclass
class Buffer:
    """What one task is replayed from: C slots, first the reservoir's, then the elite and leverage slots.

    samples: C slots; those that are empty hold nothing of meaning.
    number: [C] int32, which of the samples ever offered a slot holds, counted from 0; -1 where it is empty.
      A sample may have a slot of every kind.
    seen: [] int32, samples ever offered.
    elite, leverage: slots of these kinds; static.
    """

    samples: Samples
    number: Array
    seen: Array
    elite: int = flax.struct.field(pytree_node=False, default=0)
    leverage: int = flax.struct.field(pytree_node=False, default=0)

    @property
    def capacity(self) -> int:
        return self.number.shape[0]

    @property
    def reservoir(self) -> int:
        """Slots of the reservoir."""
        return self.capacity - self.elite - self.leverage

    @property
    def chosen(self) -> Samples:
        """The samples of the elite and leverage slots, whose place depends on today's credit."""
        return jax.tree.map(lambda leaf: leaf[self.reservoir :], self.samples)


@flax.struct.dataclass
class Draw:
    """M samples drawn for one update.

    samples: M samples; rows that are not valid hold nothing of meaning and must be masked.
    task: [M] int32, the index of each sample's buffer.
    valid: [M] bool.
    """

    samples: Samples
    task: Array
    valid: Array


def empty_samples(count: int, prompt_length: int, completion_length: int, feature_width: int) -> Samples:
    """`count` samples of zeros."""
    return Samples(
        prompt_tokens=np.zeros((count, prompt_length), np.int32),
        prompt_mask=np.zeros((count, prompt_length), bool),
        tokens=np.zeros((count, completion_length), np.int32),
        mask=np.zeros((count, completion_length), bool),
        logprobs=np.zeros((count, completion_length), np.float32),
        label=np.zeros((count,), np.int32),
        strategy=np.zeros((count,), np.int32),
        features=np.zeros((count, feature_width), np.float32),
        quality=np.zeros((count,), np.float32),
        weight=np.zeros((count,), np.float32),
        counted=np.zeros((count,), np.float32),
        step=np.zeros((count,), np.int32),
    )


def empty(
    capacity: int,
    prompt_length: int,
    completion_length: int,
    feature_width: int,
    elite: int = 0,
    leverage: int = 0,
) -> Buffer:
    """A buffer that has seen nothing, `elite` and `leverage` of its slots for chosen samples."""
    if min(elite, leverage, capacity - elite - leverage) < 0:
        raise ValueError(f"a buffer of {capacity} slots cannot have {elite} + {leverage} for chosen samples")
    return Buffer(
        samples=empty_samples(capacity, prompt_length, completion_length, feature_width),
        number=np.full((capacity,), -1, np.int32),
        seen=np.int32(0),
        elite=elite,
        leverage=leverage,
    )


def nbytes(buffer: Buffer) -> int:
    """Bytes of all arrays of a buffer; also of its `jax.eval_shape`."""
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(buffer))


def capacity_for(byte_budget: int, prompt_length: int, completion_length: int, feature_width: int) -> int:
    """The largest capacity with which a buffer of these widths takes at most `byte_budget` bytes.

    Raises:
      UserError: not even one sample fits.
    """
    shapes = (prompt_length, completion_length, feature_width)
    one, two = (nbytes(jax.eval_shape(lambda c=c: empty(c, *shapes))) for c in (1, 2))
    per_sample = two - one
    capacity = (byte_budget - (one - per_sample)) // per_sample
    if capacity < 1:
        raise UserError(
            f"replay.megabytes = {byte_budget / 1e6:g} cannot hold one sample, which takes {one} bytes "
            f"(prompt {prompt_length}, completion {completion_length}, features {feature_width}): raise it."
        )
    return capacity


def decay(buffer: Buffer, factor: float) -> Buffer:
    """The buffer after its task's archive has decayed by this factor."""
    samples = buffer.samples
    return buffer.replace(samples=samples.replace(counted=factor * samples.counted))


@jax.jit
def insert(
    buffer: Buffer,
    samples: Samples,
    key: jax.Array,
    credit: Array | None = None,
    refreshed: Array | None = None,
    offered: Array | None = None,
) -> Buffer:
    """Offers N samples, in their order, to all kinds of slots.

    The reservoir's are the same as N single steps of algorithm R: the t-th sample ever offered (from 0)
    takes slot t while there is one; later it takes a slot drawn from 0..t, or is let go if that slot does
    not exist. The elite are the best by quality, then by credit, and then the newest, which today's policy
    has moved least away from; quality must be above 0. The leverage slots' are the best by credit above 0,
    then the newest.

    Args:
      buffer: of capacity C.
      samples: N samples.
      key: used up.
      credit: [N] float32, what each sample adds to today's archive without itself; 0 by default.
      refreshed: [elite + leverage] float32, the same of `buffer.chosen`.
      offered: [N] bool, true where a sample is offered at all; all of them by default. The others
        leave no trace, and with a mask the shapes stay the same from batch to batch.

    Returns:
      The buffer after it.
    """
    count, capacity, reservoir = samples.label.shape[0], buffer.capacity, buffer.reservoir
    offered = jnp.ones(count, bool) if offered is None else jnp.asarray(offered)
    order = (buffer.seen + jnp.cumsum(offered) - 1).astype(jnp.int32)
    drawn = jax.random.randint(key, (count,), 0, jnp.maximum(order, 0) + 1)
    slot = jnp.where(order < reservoir, order, drawn)
    slot = jnp.where(offered, slot, reservoir)
    # A slot drawn twice belongs to the later sample; a scatter with repeated indices has no such order.
    owner = jnp.full(reservoir, -1).at[slot].max(jnp.arange(count), mode="drop")

    # --- Which of the C + N samples, the stored ones first, each slot holds from now on ---
    pool = jax.tree.map(
        lambda old, new: jnp.concatenate([old, jnp.asarray(new, old.dtype)]), buffer.samples, samples
    )
    number = jnp.concatenate([buffer.number, jnp.where(offered, order, -1)])
    credit = jnp.zeros(count) if credit is None else credit
    refreshed = jnp.zeros(capacity - reservoir) if refreshed is None else refreshed
    credit = jnp.concatenate([jnp.zeros(reservoir), refreshed, credit])

    def best(start: int, slots: int, *keys: Array) -> tuple[Array, Array]:
        """The `slots` best of the kind's own samples and the new ones by `keys`, and their numbers."""
        rivals = jnp.concatenate([jnp.arange(start, start + slots), capacity + jnp.arange(count)])
        worthy = (number[rivals] >= 0) & (keys[0][rivals] > 0)
        falling = [jnp.where(worthy, key[rivals], -1) for key in (number, *reversed(keys))]
        first = jnp.lexsort([-key for key in falling])[:slots]
        return rivals[first], jnp.where(worthy, number[rivals], -1)[first]

    kept = jnp.where(owner >= 0, capacity + owner, jnp.arange(reservoir))
    elite, elite_number = best(reservoir, buffer.elite, pool.quality, credit)
    leverage, leverage_number = best(reservoir + buffer.elite, buffer.leverage, credit)
    source = jnp.concatenate([kept, elite, leverage])
    return buffer.replace(
        samples=jax.tree.map(lambda leaf: leaf[source], pool),
        number=jnp.concatenate([number[kept], elite_number, leverage_number]),
        seen=buffer.seen + jnp.sum(offered).astype(jnp.int32),
    )


@functools.partial(jax.jit, static_argnames="count")
def sample(buffer: Buffer, key: jax.Array, count: int) -> tuple[Samples, jax.Array]:
    """`count` of the buffer's distinct samples, uniformly without replacement.

    Returns:
      The samples, and [count] bool: true where a row is one. Where there are fewer than `count` distinct
      samples, each comes once, first, and the other rows are not valid.

    Raises:
      ValueError: `count` is more than the capacity.
    """
    if count > buffer.capacity:
        raise ValueError(f"cannot draw {count} samples from a replay buffer of capacity {buffer.capacity}")
    once = _once(buffer.number)
    # The slots with the largest of independent random numbers are a uniform subset; the others come last.
    rank = jnp.where(once, jax.random.uniform(key, once.shape), -1.0)
    _, index = jax.lax.top_k(rank, count)
    return jax.tree.map(lambda leaf: jnp.asarray(leaf)[index], buffer.samples), once[index]


def _once(number: Array) -> jax.Array:
    """[C] bool: true at one slot of every sample that has any."""
    order = jnp.argsort(number)
    ordered = number[order]
    first = jnp.concatenate([jnp.ones(1, bool), ordered[1:] != ordered[:-1]])[: len(number)]
    return jnp.zeros(number.shape, bool).at[order].set(first & (ordered >= 0))


def sample_tasks(buffers: Sequence[Buffer], counts: Array, key: jax.Array, size: int) -> Draw:
    """Draws `counts[j]` samples from buffer j for every j, laid one after the other in `size` rows.

    `size` is static and `counts` is not, so a plan that changes from step to step compiles nothing new.
    A buffer with fewer samples than its count leaves rows that are not valid, and so do the rows past
    `sum(counts)`, which must not be more than `size`.

    Args:
      buffers: one per task, J of them, of equal shapes and a capacity of at least `size`.
      counts: [J] int32.
      key: used up.
      size: rows of the result.
    """
    counts = np.asarray(counts, np.int32)
    starts = np.cumsum(counts, dtype=np.int32) - counts
    draw = _nothing_drawn(buffers[0].samples, size)
    for task, buffer in enumerate(buffers):
        draw = _place(draw, buffer, key, np.int32(task), starts[task], counts[task])
    return draw


@functools.partial(jax.jit, static_argnames="size")
def _nothing_drawn(template: Samples, size: int) -> Draw:
    """What a draw starts from, lying where `_place` gives it back: that is one program then."""
    samples = jax.tree.map(lambda leaf: jnp.zeros((size, *leaf.shape[1:]), leaf.dtype), template)
    return constrain(Draw(samples, jnp.zeros(size, jnp.int32), jnp.zeros(size, bool)), "rollouts")


@jax.jit
def _place(draw: Draw, buffer: Buffer, key: jax.Array, task: Array, start: Array, count: Array) -> Draw:
    """Writes `count` samples of one task to the rows from `start` on."""
    size = draw.valid.shape[0]
    samples, valid = sample(buffer, jax.random.fold_in(key, task), size)
    place = jnp.arange(size) - start
    mine = (place >= 0) & (place < count)
    source = jnp.where(mine, place, 0)

    def write(old: Array, new: Array) -> Array:
        return jnp.where(mine.reshape((-1,) + (1,) * (old.ndim - 1)), new[source], old)

    drawn = Draw(
        samples=jax.tree.map(write, draw.samples, samples),
        task=jnp.where(mine, task, draw.task),
        valid=write(draw.valid, valid),
    )
    return constrain(drawn, "rollouts")


def sequence_log_ratio(logprobs_new: Array, logprobs_old: Array, mask: Array) -> jax.Array:
    """[N] float32: log(pi / mu) of whole completions, from [N, T] token log-probabilities."""
    difference = jnp.where(mask, jnp.asarray(logprobs_new) - logprobs_old, 0.0)
    return jnp.sum(difference.astype(jnp.float32), axis=-1)


def sequence_weight(logprobs_new: Array, logprobs_old: Array, mask: Array, cap: float = 2.0) -> jax.Array:
    """Truncated importance weights min(cap, pi / mu) of whole completions, without gradient.

    Ionides 2008 (truncated importance sampling), over the sequence. Truncation keeps the variance
    bounded and weighs what today's policy likes better than mu did too little.

    Args:
      logprobs_new: [N, T] under today's policy, at the sampler's temperature.
      logprobs_old: [N, T] under the policy that wrote the completions.
      mask: [N, T] bool, true at the completion's tokens.
      cap: largest weight.

    Returns:
      [N] float32 in [0, cap].
    """
    log_ratio = sequence_log_ratio(logprobs_new, logprobs_old, mask)
    # The minimum is taken of the logarithms, where nothing overflows.
    return jax.lax.stop_gradient(jnp.exp(jnp.minimum(log_ratio, jnp.log(cap))))


def drift_mask(log_ratio: Array, advantage: Array, limit: float) -> jax.Array:
    """[N] bool: false where a sample is to be dropped because it drifted too far.

    Dropped are samples with a negative advantage and log(mu / pi) > limit (nats, of the sequence as
    in `sequence_weight`): the policy has left them already, and nothing is gained by pushing it still
    further away. Samples with an advantage of 0 or more all stay. After the off-policy sequence masking
    of DeepSeek-V3.2 (arXiv 2512.02556), which takes the mean over tokens instead.
    """
    return (jnp.asarray(advantage) >= 0) | (jnp.asarray(log_ratio) >= -limit)


def effective_sample_size(weights: Array, mask: Array) -> jax.Array:
    """[] float32: (sum w)^2 / sum w^2 over the rows of `mask` (Kish 1965); 0 where there are none.

    It is the number of equally weighted samples that carry as much, between 1 and sum(mask).
    """
    weights = jnp.where(mask, weights, 0.0)
    return effective_size(jnp.sum(weights), jnp.sum(weights**2))


def effective_size(total: Array, squares: Array) -> jax.Array:
    """The same, from the sum of the weights and that of their squares."""
    return jnp.where(squares > 0, total**2 / jnp.where(squares > 0, squares, 1.0), 0.0)
