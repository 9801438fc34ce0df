"""What is remembered of past tasks: one reservoir of samples per task, and the weights for learning from it.

A buffer holds C samples, a uniform draw from all that were ever offered to it (reservoir sampling,
Vitter 1985, algorithm R). A replayed sample y was written by an older policy mu, so its gradient is
weighted by the truncated importance ratio of the whole sequence, without any clipping on top:

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

from streamsynth.errors import UserError
from streamsynth.pytrees import Array


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
    in_archive: [M] bool, whether the archive of its task and label counts e e^T.
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
    in_archive: Array
    step: Array


@flax.struct.dataclass
class Buffer:
    """The reservoir of one task.

    samples: C slots; those from `filled` on are empty (zeros).
    seen: [] int32, samples ever offered.
    """

    samples: Samples
    seen: Array

    @property
    def capacity(self) -> int:
        return self.samples.label.shape[0]

    @property
    def filled(self) -> Array:
        """[] int32, the number of slots in use; they are the first ones."""
        return jnp.minimum(self.seen, self.capacity)


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
        prompt_tokens=jnp.zeros((count, prompt_length), jnp.int32),
        prompt_mask=jnp.zeros((count, prompt_length), bool),
        tokens=jnp.zeros((count, completion_length), jnp.int32),
        mask=jnp.zeros((count, completion_length), bool),
        logprobs=jnp.zeros((count, completion_length), jnp.float32),
        label=jnp.zeros((count,), jnp.int32),
        strategy=jnp.zeros((count,), jnp.int32),
        features=jnp.zeros((count, feature_width), jnp.float32),
        quality=jnp.zeros((count,), jnp.float32),
        weight=jnp.zeros((count,), jnp.float32),
        in_archive=jnp.zeros((count,), bool),
        step=jnp.zeros((count,), jnp.int32),
    )


def empty(capacity: int, prompt_length: int, completion_length: int, feature_width: int) -> Buffer:
    """A buffer that has seen nothing."""
    if capacity < 1:
        raise ValueError(f"a replay buffer needs at least one slot, not {capacity}")
    samples = empty_samples(capacity, prompt_length, completion_length, feature_width)
    return Buffer(samples=samples, seen=jnp.zeros((), jnp.int32))


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
            f"a replay buffer of {byte_budget} bytes cannot hold one sample, which takes {one} bytes "
            f"(prompt {prompt_length}, completion {completion_length}, features {feature_width}): "
            "raise its budget"
        )
    return capacity


@jax.jit
def insert(buffer: Buffer, samples: Samples, key: jax.Array, offered: Array | None = None) -> Buffer:
    """Offers N samples, in their order, to the reservoir.

    The same as N single steps of algorithm R: the t-th sample ever offered (from 0) takes slot t while
    there is one; later it takes a slot drawn from 0..t, or is let go if that slot does not exist.

    Args:
      buffer: of capacity C.
      samples: N samples.
      key: used up.
      offered: [N] bool, true where a sample is offered at all; all of them by default. The others
        leave no trace, and with a mask the shapes stay the same from batch to batch.

    Returns:
      The buffer after it.
    """
    count, capacity = samples.label.shape[0], buffer.capacity
    offered = jnp.ones(count, bool) if offered is None else jnp.asarray(offered)
    order = buffer.seen + jnp.cumsum(offered) - 1
    drawn = jax.random.randint(key, (count,), 0, jnp.maximum(order, 0) + 1)
    slot = jnp.where(order < capacity, order, drawn)
    slot = jnp.where(offered, slot, capacity)
    # A slot drawn twice belongs to the later sample; a scatter with repeated indices has no such order.
    owner = jnp.full(capacity, -1).at[slot].max(jnp.arange(count), mode="drop")

    def replace(old: Array, new: Array) -> Array:
        taken = (owner >= 0).reshape((capacity,) + (1,) * (new.ndim - 1))
        return jnp.where(taken, jnp.asarray(new)[jnp.maximum(owner, 0)].astype(old.dtype), old)

    seen = buffer.seen + jnp.sum(offered).astype(jnp.int32)
    return Buffer(samples=jax.tree.map(replace, buffer.samples, samples), seen=seen)


@functools.partial(jax.jit, static_argnames="count")
def sample(buffer: Buffer, key: jax.Array, count: int) -> tuple[Samples, jax.Array]:
    """`count` of the buffer's samples, uniformly without replacement.

    Returns:
      The samples, and [count] bool: true where a row is one. While fewer than `count` slots are in
      use, every sample comes once, first, and the other rows are not valid.

    Raises:
      ValueError: `count` is more than the capacity.
    """
    if count > buffer.capacity:
        raise ValueError(f"cannot draw {count} samples from a replay buffer of capacity {buffer.capacity}")
    used = jnp.arange(buffer.capacity) < buffer.filled
    # The slots with the largest of independent random numbers are a uniform subset; empty slots come last.
    rank = jnp.where(used, jax.random.uniform(key, (buffer.capacity,)), -1.0)
    _, index = jax.lax.top_k(rank, count)
    return jax.tree.map(lambda leaf: jnp.asarray(leaf)[index], buffer.samples), used[index]


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
    counts = jnp.asarray(counts)
    starts = jnp.cumsum(counts) - counts
    template = buffers[0].samples
    samples = jax.tree.map(lambda leaf: jnp.zeros((size, *leaf.shape[1:]), leaf.dtype), template)
    draw = Draw(samples=samples, task=jnp.zeros(size, jnp.int32), valid=jnp.zeros(size, bool))
    for task, buffer in enumerate(buffers):
        task_key = jax.random.fold_in(key, task)
        draw = _place(draw, buffer, task_key, jnp.asarray(task), starts[task], counts[task])
    return draw


@jax.jit
def _place(draw: Draw, buffer: Buffer, key: jax.Array, task: Array, start: Array, count: Array) -> Draw:
    """Writes `count` samples of one task to the rows from `start` on."""
    size = draw.valid.shape[0]
    samples, valid = sample(buffer, key, size)
    place = jnp.arange(size) - start
    mine = (place >= 0) & (place < count)
    source = jnp.where(mine, place, 0)

    def write(old: Array, new: Array) -> Array:
        return jnp.where(mine.reshape((-1,) + (1,) * (old.ndim - 1)), new[source], old)

    return Draw(
        samples=jax.tree.map(write, draw.samples, samples),
        task=jnp.where(mine, task, draw.task),
        valid=write(draw.valid, valid),
    )


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
    squares = jnp.sum(weights**2)
    return jnp.where(squares > 0, jnp.sum(weights) ** 2 / jnp.where(squares > 0, squares, 1.0), 0.0)
