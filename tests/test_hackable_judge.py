"""A planted judge that can be hacked: it scores length. Student utility has to hold the policy back.

The policy chooses among real texts, by a table of logits for each label: honest sentences of an embedded
world, and hacks, long strings of words of any of its labels. The judge prefers the hacks, and no gate stops
them.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from streamsynth.feedback import gates
from streamsynth.feedback.features import ngram_features
from streamsynth.feedback.utility import UtilityConfig, utility
from streamsynth.learner import advantages
from streamsynth.tasks import worlds

WORLD = "market_1"
SEEDS = 20
HONEST, HACKS = 24, 24  # texts a label
HACK_WORDS = 30, 60  # their lengths
START = 0.2  # the hack rate before anything is learned
PROMPTS, SAMPLES = 2, 8  # prompts a label, samples a prompt
STEPS = 100
LEARNING_RATE = 1.0  # on the logits of one label
# Chosen on tuning worlds: 2 left about half of the hacks there, 8 next to none. It is above 1 since the judge
# tells hacks by a full sigma_q to either side, while utility varies for many reasons and tells them by about
# a third of sigma_u.
UTILITY_WEIGHT = 4.0
FLOORS = {"quality": 0.01, "utility": 1e-6}
BASELINE_DECAY = 0.9
# What is learned from: weight of the utility, and whether its values are dealt anew among the samples.
ARMS = {"judge only": (0.0, False), "utility": (UTILITY_WEIGHT, False), "shuffled": (UTILITY_WEIGHT, True)}


def table(seed):
    """The texts of all labels by what the feedback says of each, honest ones first.

    Returns:
      features [K, M, D], passed [K, M], quality [K, M], and the validation examples [V, D], [V].
    """
    task = worlds.load_task(WORLD, seed=seed, train_per_label=60, test_per_label=2)
    rng = np.random.default_rng(seed)
    vocabulary = [word for example in task.train for word in example.text.split()]
    texts = []
    for label in task.labels:
        texts += [example.text for example in task.train if example.label == label][:HONEST]
        for length in rng.integers(HACK_WORDS[0], HACK_WORDS[1] + 1, HACKS):
            texts.append(" ".join(rng.choice(vocabulary, length)))

    def check(max_words):
        return gates.check(
            texts,
            np.ones(len(texts), bool),
            [""] * len(texts),
            task=task,
            min_words=2,
            max_words=max_words,
            seen=lambda text: False,
        ).passed.reshape(-1, HONEST + HACKS)

    limited, passed = check(HACK_WORDS[0] - 1), check(10**6)
    assert limited[:, :HONEST].all() and not limited[:, HONEST:].any()
    assert passed.all()  # with the length gate off nothing but the utility knows a hack
    judged = np.array([min(len(text.split()) / HACK_WORDS[1], 1.0) for text in texts])
    return (
        ngram_features(texts).reshape(*passed.shape, -1),
        passed.astype(np.float32),
        np.float32(passed * judged.reshape(passed.shape)),
        ngram_features([example.text for example in task.examples]),
        np.array([task.labels.index(example.label) for example in task.examples]),
    )


@jax.jit
def hack_rates(features, passed, quality, val_features, val_label, weight, shuffled, key):
    """The hack rate [STEPS] after each step of gradient ascent on the table, with the learner's own parts."""
    num_labels, num_texts, _ = features.shape
    label = np.repeat(np.arange(num_labels), PROMPTS * SAMPLES)
    hack = jnp.arange(num_texts) >= HONEST
    start = jnp.where(hack, jnp.log(START / HACKS), jnp.log((1.0 - START) / HONEST))

    def step(state, key):
        logits, spread, baseline = state
        drawn, dealt = jax.random.split(key)
        text = jax.random.categorical(drawn, logits[label])
        found = utility(
            features[label, text],
            label,
            passed[label, text],
            val_features,
            val_label,
            num_labels,
            UtilityConfig(),
        )
        found = jnp.where(shuffled, jax.random.permutation(dealt, found), found)
        parts = {
            "quality": advantages.leave_one_out(quality[label, text].reshape(-1, SAMPLES)).reshape(-1),
            "utility": found - baseline,
        }
        combined = advantages.combine(parts, {"quality": 1.0, "utility": weight}, spread, FLOORS)
        ascent = jax.grad(
            lambda logits: (
                jnp.sum(combined.total * jax.nn.log_softmax(logits)[label, text]) / (PROMPTS * SAMPLES)
            )
        )(logits)
        logits = logits + LEARNING_RATE * ascent
        spread = advantages.update_spread(spread, parts)
        baseline = BASELINE_DECAY * baseline + (1.0 - BASELINE_DECAY) * found.mean()
        return (logits, spread, baseline), jnp.sum(jax.nn.softmax(logits) * hack, axis=-1).mean()

    state = (
        jnp.tile(start, (num_labels, 1)),
        advantages.initial_spread(("quality", "utility")),
        jnp.float32(0.0),
    )
    return jax.lax.scan(step, state, jax.random.split(key, STEPS))[1]


def rates_of_arms():
    """For each arm, the hack rate [SEEDS, STEPS]."""
    tables = [np.stack(column) for column in zip(*map(table, range(SEEDS)), strict=True)]
    keys = jax.vmap(jax.random.key)(np.arange(SEEDS))
    return {
        arm: np.asarray(
            jax.vmap(functools.partial(hack_rates, weight=weight, shuffled=shuffled))(*tables, key=keys)
        )
        for arm, (weight, shuffled) in ARMS.items()
    }


def test_utility_halves_the_hacks():
    rates = rates_of_arms()
    median = {arm: np.median(rate[:, -1]) for arm, rate in rates.items()}
    assert median["judge only"] > 0.9  # from 0.2: the judge is hacked
    assert median["utility"] <= 0.5 * median["judge only"]
    assert np.mean(rates["utility"][:, -1] <= 0.5 * rates["judge only"][:, -1]) >= 0.75  # of the seeds
    # Noise of the same size does not hold the policy back: what a sample's own utility says does.
    assert median["shuffled"] > 0.9 * median["judge only"]
