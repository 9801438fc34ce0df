"""Set-level diversity with exact credit for every sample.

A sample is a vector e_i = sqrt(r_i) * phi_i: its unit feature vector phi_i times the root of a reward weight
r_i in [0, 1], which is 0 for a gated sample. What was kept of label k is one matrix

    S_k = ridge * I + sum of e e^T over the kept samples of label k,

and a batch E_k of samples of that label is worth the log-volume that it adds:

    f(Y | S) = sum_k logdet(I + E_k S_k^-1 E_k^T) = sum_k logdet(S_k + E_k^T E_k) - logdet(S_k).

With H = E_k (S_k + E_k^T E_k)^-1 E_k^T the matrix determinant lemma gives every leave-one-out difference:

    credit_i = f(Y) - f(Y without i) = -log(1 - h_ii),

and the Sherman-Morrison formula gives the credit that sample j would have if sample i were not there,
-log(1 - h_jj - h_ij^2 / (1 - h_ii)), whose mean over the other samples j of the label is the baseline b_i.
Neither f(Y without i) nor b_i depends on sample i, so sum_i (credit_i - b_i) * grad log pi(y_i) is an
unbiased estimate of the gradient of E[f], provided that e_i depends on y_i alone and S on nothing of this
batch.

Functions here are pure and jittable. With N sharded over a mesh, E^T E is summed over it once; the baseline
and the statistic also look at all pairs, [N, N].
"""

from __future__ import annotations

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np

from streamsynth.errors import UserError
from streamsynth.pytrees import Array

# Below this the float32 Cholesky factor of a filled archive is no longer to be trusted.
MIN_RIDGE = 1e-2
# The largest leverage h_ii. In exact arithmetic h_ii <= 1 / (1 + ridge), so this only catches rounding.
MAX_LEVERAGE = 1.0 - 1e-6
# A label whose pairs weigh less than this in total has no diversity to speak of.
MIN_PAIR_WEIGHT = 1e-8
# Mean squared similarities are clipped here, which caps the statistic at log(1e6), about 13.8.
MIN_SIMILARITY = 1e-6
# Credit is a difference of log-volumes: TF32 or bfloat16 passes would drown it.
PRECISION = jax.lax.Precision.HIGHEST


@flax.struct.dataclass
class Archive:
    """What is kept of one task, as far as diversity is concerned.

    matrix: [K, D, D] float32, S_k of each label, symmetric positive definite.
    count: [K] float32, how many samples each S_k holds (a decayed sample counts for less than one).
    ridge: [] float32, the lambda of S_k.
    """

    matrix: Array
    count: Array
    ridge: Array


def empty(num_labels: int, width: int, ridge: float = 0.1) -> Archive:
    """The archive of K labels and D feature dimensions that holds nothing.

    A sample on its own is worth at most log(1 + 1 / ridge).

    Raises:
      UserError: `ridge` is below 0.01.
    """
    if not ridge >= MIN_RIDGE:
        raise UserError(
            f"the ridge of the diversity archive is {ridge}, but float32 needs at least {MIN_RIDGE}: raise it"
        )
    matrix = np.tile(np.float32(ridge) * np.eye(width, dtype=np.float32), (num_labels, 1, 1))
    return Archive(matrix=matrix, count=np.zeros(num_labels, np.float32), ridge=np.float32(ridge))


def reward_weight(quality: Array, floor: float = 0.0, power: float = 1.0) -> jax.Array:
    """r(q) = clip((q - floor) / (1 - floor), 0, 1) ** power: how much of its novelty a sample is paid for.

    Quality 0, which a gated sample has, always gives 0, and quality 1 always gives 1. A floor denies
    novelty to poor samples altogether; a power above 1 favours the best.

    Args:
      quality: [N] in [0, 1].
      floor: in [0, 1).
      power: above 0.

    Returns:
      [N] in [0, 1].

    Raises:
      UserError: `floor` or `power` is out of range.
    """
    if not 0.0 <= floor < 1.0:
        raise UserError(
            f"the floor of the diversity weight is {floor}: give a number from 0 up to, but not, 1"
        )
    if not power > 0.0:
        raise UserError(f"the power of the diversity weight is {power}: give a number above 0")
    return jnp.clip((quality - floor) / (1.0 - floor), 0.0, 1.0) ** power


def weighted(features: Array, weight: Array) -> jax.Array:
    """e_i = sqrt(r_i) * phi_i, from unit vectors [N, D] and weights [N] in [0, 1] to [N, D]."""
    return jnp.sqrt(weight)[:, None] * features


def credit(archive: Archive, e: Array, label: Array) -> tuple[jax.Array, jax.Array]:
    """What each sample adds to the value of the whole batch, and a baseline that knows nothing of the sample.

    Args:
      archive: state from before the batch.
      e: [N, D] weighted features.
      label: [N] int, the label asked for, in [0, K).

    Returns:
      credit: [N], f(Y) - f(Y without i), at least 0 and exactly 0 where e_i = 0.
      baseline: [N], the mean credit of the label's other samples in Y without i; 0 for a sample that is
        alone.
    """
    own, total, others = _leave_one_out(archive, e, label)
    return own, total / jnp.maximum(jnp.sum(others, axis=1), 1)


def neutral_credit(archive: Archive, e: Array, label: Array) -> tuple[jax.Array, jax.Array]:
    """Credit, and credit for novelty alone: what a sample adds beyond what its quality would add on average.

        credit_i - r_i * m_i,    m_i = sum_{j != i} credit_j(Y without i) / sum_{j != i} r_j

    Since e = sqrt(r) phi, plain credit mostly tells valid samples from invalid ones: as a reward it asks for
    quality once more, and the more it weighs the less diverse a policy becomes. m_i, the going rate of
    credit for a unit of weight, does not depend on sample i. Against it a gated sample gets 0, a valid
    sample that resembles the others less than 0 and a rare one more. What sum_i novelty_i grad log pi(y_i)
    estimates is not grad E[f] but grad E[f] less m_i grad E[r_i], and the gradient of no function, since the
    rate is not differentiated (tests/test_enumeration.py).

    Args:
      archive, e, label: as in `credit`.

    Returns:
      credit: [N], as in `credit`.
      novelty: [N]; 0 where e_i = 0 and for a sample that is alone in its label.
    """
    own, total, others = _leave_one_out(archive, e, label)
    weight = jnp.sum(e * e, axis=-1)
    weight_of_others = jnp.sum(jnp.where(others, weight[None, :], 0.0), axis=1)
    alone = weight_of_others <= MIN_PAIR_WEIGHT
    rate = total / jnp.where(alone, 1.0, weight_of_others)
    return own, jnp.where(alone, 0.0, own - weight * rate)


def _leave_one_out(archive: Archive, e: Array, label: Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Credit [N]; the sum over the label's other samples of credit without i [N]; who they are [N, N]."""
    blocks = _blocks(e, label, archive.matrix.shape[0])
    whitened = _whiten(_cholesky(archive.matrix + _gram(blocks, e)), blocks)
    leverage = jnp.minimum(jnp.sum(whitened * whitened, axis=-1), MAX_LEVERAGE)  # h_ii
    cross = jnp.matmul(whitened, whitened.T, precision=PRECISION)  # h_ij, meaningful within a label
    others = _other_samples(label)
    without = leverage[None, :] + cross**2 / (1.0 - leverage)[:, None]  # [i, j]: h_jj once i is gone
    credit_without = -jnp.log1p(-jnp.minimum(without, MAX_LEVERAGE))
    total = jnp.sum(jnp.where(others, credit_without, 0.0), axis=1)
    return -jnp.log1p(-leverage), total, others


def marginal(archive: Archive, e: Array, label: Array, counted: Array) -> jax.Array:
    """What each sample alone adds to the archive, once its own share is taken out of it.

    This refreshes the credit of a replayed sample: log(1 + e^T (S - c e e^T)^-1 e), which with h = e^T S^-1 e
    is log(1 + h / (1 - c h)).

    Args:
      archive: today's archive.
      e: [N, D] weighted features, as they were absorbed.
      label: [N] int, in [0, K).
      counted: [N] c in [0, 1], the weight of e e^T in the archive: 0 where it is not there, 1 where it is,
        and the product of the decays since where it has decayed.

    Returns:
      [N], at least 0.
    """
    whitened = _whiten(_cholesky(archive.matrix), _blocks(e, label, archive.matrix.shape[0]))
    leverage = jnp.sum(whitened * whitened, axis=-1)
    return jnp.log1p(leverage / (1.0 - jnp.minimum(counted * leverage, MAX_LEVERAGE)))


def value(archive: Archive, e: Array, label: Array) -> jax.Array:
    """f(Y | S) of each label, [K], at least 0 up to rounding; the batch is worth the sum.

    Args:
      archive: state from before the batch.
      e: [N, D] weighted features.
      label: [N] int, in [0, K).
    """
    after = _cholesky(archive.matrix + _gram(_blocks(e, label, archive.matrix.shape[0]), e))
    # Subtracting factor by factor keeps the digits that the difference of two large sums would lose.
    return 2.0 * jnp.sum(jnp.log(_diagonal(after)) - jnp.log(_diagonal(_cholesky(archive.matrix))), axis=-1)


def absorb(archive: Archive, e: Array, label: Array, keep: Array) -> Archive:
    """The archive after the samples with `keep`, [N] bool, were added to their labels."""
    num_labels = archive.matrix.shape[0]
    kept = jnp.where(keep[:, None], e, 0.0)
    added = jnp.sum(jnp.where(keep[:, None], jax.nn.one_hot(label, num_labels), 0.0), axis=0)
    matrix = archive.matrix + _gram(_blocks(kept, label, num_labels), kept)
    return archive.replace(matrix=matrix, count=archive.count + added)


def spread_out(features: np.ndarray, count: int, ridge: float, given: np.ndarray) -> np.ndarray:
    """Indices of up to `count` vectors that add most log-volume, each to those chosen before it. On the host.

    The log-volume logdet(ridge * I + sum of e e^T) is monotone and submodular, so the greedy choice reaches
    1 - 1/e of the best one (Nemhauser, Wolsey and Fisher, 1978). Ties go to the earlier vector.

    Args:
      features: [N, D] candidates.
      count: how many to choose; all N if there are fewer.
      ridge: lambda, above 0.
      given: [M, D] vectors that are there already.

    Returns:
      [min(count, N)] int, in the order of choice.
    """
    rows = np.asarray(features, np.float64)
    start = ridge * np.eye(rows.shape[1]) + np.asarray(given, np.float64).T @ given
    solved = np.linalg.solve(start, rows.T).T  # S^-1 e_i
    gain = np.sum(rows * solved, axis=1)  # e_i^T S^-1 e_i; log(1 + gain) is what i would add
    chosen: list[int] = []
    for _ in range(min(count, len(rows))):
        best = int(np.argmax(gain))
        chosen.append(best)
        # Sherman and Morrison's formula, for every candidate at once.
        along = rows @ solved[best]
        scale = 1.0 + along[best]
        solved = solved - np.outer(along / scale, solved[best])
        gain -= along**2 / scale
        gain[best] = -np.inf
    return np.array(chosen, int)


def decay(archive: Archive, factor: Array | float) -> Archive:
    """The archive with every kept sample counting `factor` times as much; the ridge stays as it is."""
    ridge = archive.ridge * jnp.eye(archive.matrix.shape[-1], dtype=archive.matrix.dtype)
    return archive.replace(matrix=ridge + factor * (archive.matrix - ridge), count=factor * archive.count)


def kept(archive: Archive) -> jax.Array:
    """[D, D]: the sum of e e^T over all that the archive counts, whatever its label."""
    ridge = archive.ridge * jnp.eye(archive.matrix.shape[-1], dtype=archive.matrix.dtype)
    return jnp.sum(archive.matrix - ridge, axis=0)


def beside(archive: Archive, elsewhere: Array) -> Archive:
    """The archive of one task for crediting, where what other tasks kept counts under each of its labels.

    Args:
      archive: of K labels.
      elsewhere: [D, D], a sum of e e^T such as `kept` gives, times how much it counts.
    """
    return archive.replace(matrix=archive.matrix + elsewhere)


def statistic(features: Array, weight: Array, label: Array, num_labels: int) -> tuple[jax.Array, jax.Array]:
    """How diverse a set is within its labels, without regard to any archive.

        d = mean over labels of -log( sum_{i != j} w_i w_j s_ij^2 / sum_{i != j} w_i w_j ),
        s_ij = phi_i . phi_j

    The quotient is a U-statistic of order 2: self-pairs are left out, so its mean does not depend on how
    many samples there are, and sets of unlike size can be compared (the logarithm adds a bias of the order
    of 1 / n). 0 says that all samples of a label are the same; exp(d) is the order-2 Vendi score
    n^2 / sum_ij s_ij^2 without its self-pairs. Randomly projected features of unrelated texts still have
    s^2 of about 1 / D, so d levels off near log D.

    Args:
      features: [N, D] unit vectors.
      weight: [N] in [0, 1], usually `reward_weight(quality)`; ones for real examples.
      label: [N] int, in [0, K).
      num_labels: K.

    Returns:
      d: [], 0 where not valid.
      valid: [] bool, whether any label had two samples with weight. Labels without are left out of the mean.
    """
    similarity = jnp.matmul(features, features.T, precision=PRECISION)
    pairs = jnp.where(_other_samples(label), weight[:, None] * weight[None, :], 0.0)
    member = jax.nn.one_hot(label, num_labels, dtype=pairs.dtype)  # [N, K]
    pair_weight = jnp.matmul(jnp.sum(pairs, axis=1), member, precision=PRECISION)  # [K]
    squares = jnp.matmul(jnp.sum(pairs * similarity**2, axis=1), member, precision=PRECISION)
    present = pair_weight > MIN_PAIR_WEIGHT
    mean_square = squares / jnp.where(present, pair_weight, 1.0)
    of_label = -jnp.log(jnp.clip(mean_square, MIN_SIMILARITY, 1.0))
    num_present = jnp.sum(present)
    return jnp.sum(jnp.where(present, of_label, 0.0)) / jnp.maximum(num_present, 1), num_present > 0


def _blocks(e: Array, label: Array, num_labels: int) -> jax.Array:
    """[N, K, D]: e_i in the block of its own label, else zeros, so that one matmul serves all labels."""
    return jax.nn.one_hot(label, num_labels, dtype=e.dtype)[:, :, None] * e[:, None, :]


def _gram(blocks: jax.Array, e: Array) -> jax.Array:
    """E_k^T E_k of every label, [K, D, D]."""
    return jnp.einsum("nkd,nf->kdf", blocks, e, precision=PRECISION)


def _cholesky(matrix: jax.Array) -> jax.Array:
    # One label after the other. On a CPU the batched LAPACK call (jaxlib 0.10) blocks a thread of the pool
    # until other threads of the same pool have done its parts: two such calls at once stop a machine with
    # two cores for good.
    return jax.lax.map(jnp.linalg.cholesky, matrix)


def _diagonal(factor: jax.Array) -> jax.Array:
    return jnp.diagonal(factor, axis1=-2, axis2=-1)


def _whiten(factor: jax.Array, blocks: jax.Array) -> jax.Array:
    """L_k^-1 e_i for the label k of each sample, [N, D], from the Cholesky factors L [K, D, D].

    The small inverses are the same on every device; what runs over the samples is a matmul, which shards.
    """
    identity = jnp.eye(factor.shape[-1], dtype=factor.dtype)
    inverse = jax.lax.map(lambda one: jax.scipy.linalg.solve_triangular(one, identity, lower=True), factor)
    return jnp.einsum("nkf,kdf->nd", blocks, inverse, precision=PRECISION)


def _other_samples(label: Array) -> jax.Array:
    """[N, N] bool: i and j are different samples of the same label."""
    return (label[:, None] == label[None, :]) & ~jnp.eye(label.shape[0], dtype=bool)
