"""Judges are measured before they are trusted, and what they say is weighed by that."""

import dataclasses
import logging
import zlib

import numpy as np
import pytest
import tiny
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import mannwhitneyu

from streamsynth.assemble import judge_context
from streamsynth.errors import UserError
from streamsynth.feedback import judge as judge_lib
from streamsynth.feedback import reward as reward_lib
from streamsynth.feedback.reward import Reward, make_reward, measure
from streamsynth.policy.logprobs import group_logprobs
from streamsynth.stream.markers import MarkerFormat

pytestmark = pytest.mark.usefixtures("quick_xla")


def context_of(task, prompt_length=96):
    return judge_context(tiny.policy(), MarkerFormat(tiny.tokenizer(), prompt_length, 24), task)


@pytest.fixture(scope="module")
def context():
    return context_of(tiny.world_task())


def shown_texts(prompts):
    """The texts between the example markers of each prompt."""
    tokenizer, texts = tiny.tokenizer(), []
    for ids, mask in zip(prompts.tokens, prompts.mask, strict=True):
        part = None
        for index in ids[mask][:-1]:
            if index == tokenizer.marker("<example>"):
                part = []
                texts.append(part)
            elif part is not None:
                part.append(index)
    return {tokenizer.decode(part) for part in texts}


def test_held_back_examples_never_stand_in_the_judges_prompts(context):
    task = tiny.world_task()
    shown, held_back = shown_texts(context.prompts), {e.text for e in context.held_back}
    assert shown and held_back and not shown & held_back
    assert shown | held_back <= {e.text for e in task.examples}
    assert {e.label for e in context.held_back} == set(task.labels)


def test_a_text_that_is_twice_among_the_examples_is_not_held_back():
    task = tiny.world_task()
    twice = tuple(
        dataclasses.replace(e, id=f"{e.id}-{copy}") for label in task.labels for copy in "ab"
        for e in task.examples_of(label)
    )  # fmt: skip
    context = context_of(dataclasses.replace(task, examples=twice))
    assert not shown_texts(context.prompts) & {e.text for e in context.held_back}


def test_many_texts_are_read_in_parts_with_the_same_verdicts(context):
    policy, (tokens, mask) = tiny.policy(), context.encode([e.text for e in context.held_back][:7])
    at_once, in_parts = (
        judge_lib.label_loglikelihood(
            policy.model, policy.variables, context.prompts, tokens, mask, at_a_time=count
        )
        for count in (7, 3)
    )
    assert judge_lib.parts(7, 3) == 3
    np.testing.assert_allclose(in_parts, at_once, rtol=1e-5, atol=1e-4)


def test_loglikelihood_is_that_of_each_text_read_alone(context):
    policy = tiny.policy()
    tokens, mask = context.encode([e.text for e in context.held_back[::4]])
    table = judge_lib.label_loglikelihood(
        policy.model, policy.variables, context.prompts, tokens, mask, chunk=64
    )

    @tiny.quick_jit
    def alone(prompts, tokens, mask):
        return group_logprobs(policy.model, policy.variables, prompts, tokens, mask).logprobs.sum()

    p = context.prompts
    for k in range(table.shape[1]):
        one = p.replace(tokens=p.tokens[k : k + 1], mask=p.mask[k : k + 1])
        for n in range(len(tokens)):
            np.testing.assert_allclose(
                table[n, k], alone(one, tokens[n : n + 1], mask[n : n + 1]), rtol=1e-4, atol=1e-3
            )


def test_posterior_is_bayes_and_sums_to_one():
    table = np.random.default_rng(0).normal(size=(5, 4)).astype(np.float32) * 3 - 80
    every = np.stack([judge_lib.posterior(table, np.full(5, k)) for k in range(4)], axis=1)
    np.testing.assert_allclose(every.sum(1), 1, rtol=1e-5)
    likelihood = np.exp(table.astype(np.float64) + 80)
    np.testing.assert_allclose(every, likelihood / likelihood.sum(1, keepdims=True), rtol=1e-5)


def test_fluency_is_one_half_two_deviations_below_real_texts():
    length, centre, scale = np.array([10, 5, 8]), -2.0, 0.5
    table = np.stack([length * -3.0, length * -2.0, length * -1.0], axis=1).astype(np.float32)
    got = judge_lib.fluency(table, np.array([0, 1, 2]), length, centre, scale)
    np.testing.assert_allclose(got, 1 / (1 + np.exp(-np.array([0.0, 2.0, 4.0]))), rtol=1e-5)


def test_the_posterior_judge_is_posterior_times_fluency(context):
    judge = reward_lib.JUDGES["posterior"](context)
    texts = [e.text for e in context.held_back]
    tokens, mask = context.encode(texts)
    label = np.arange(len(texts)) % len(context.task.labels)
    table = np.asarray(
        judge_lib.label_loglikelihood(context.model, context.base, context.prompts, tokens, mask), np.float64
    )
    truth = np.array([context.task.labels.index(e.label) for e in context.held_back])
    rows = np.arange(len(texts))
    real = table[rows, truth] / mask.sum(1)
    own = table[rows, label] / mask.sum(1)
    fluent = 1 / (1 + np.exp(-((own - real.mean()) / max(real.std(), 0.1) + 2)))
    odds = np.exp(table - table[rows, label][:, None])
    got = judge(texts, label, tokens, mask)
    np.testing.assert_allclose(got, fluent / odds.sum(1), rtol=2e-3)
    assert ((got >= 0) & (got <= 1)).all()


@settings(max_examples=60)
@given(
    st.lists(st.integers(0, 6), min_size=1, max_size=12), st.lists(st.integers(0, 6), min_size=1, max_size=12)
)
def test_auc_is_mann_whitneys_u(positive, negative):
    """Few different values, so that there are ties."""
    got = judge_lib.auc(np.array(positive) / 7, np.array(negative) / 7)
    u = mannwhitneyu(positive, negative).statistic
    assert got == pytest.approx(u / (len(positive) * len(negative)))
    assert judge_lib.auc(np.array(negative), np.array(positive)) == pytest.approx(1 - got)


def test_trust_is_nothing_at_chance_or_below():
    assert judge_lib.auc(np.array([]), np.array([1.0])) == 0.5
    assert [judge_lib.trust(area) for area in (0.0, 0.3, 0.5, 0.75, 1.0)] == [0.0, 0.0, 0.0, 0.5, 1.0]


def by_text(verdict):
    """A judge that says `verdict(text, label)`."""
    return lambda context: (
        lambda texts, label, tokens, mask: np.array(
            [verdict(text, k) for text, k in zip(texts, label, strict=True)], np.float32
        )
    )


@pytest.fixture
def judges(monkeypatch):
    def noise(text, k):
        return zlib.crc32(f"{text}/{k}".encode()) / 2**32

    task = tiny.world_task()

    def wrong(text, k):
        return 1.0 - task.verifier(text, task.labels[k])

    for name, verdict in (("constant", lambda text, k: 0.7), ("noise", noise), ("wrong", wrong)):
        monkeypatch.setitem(reward_lib.JUDGES, name, by_text(verdict))


@pytest.mark.parametrize("name", ["constant", "wrong"])
def test_a_judge_at_chance_or_below_has_no_weight_and_says_so(context, judges, caplog, name):
    with caplog.at_level(logging.WARNING):
        reward = make_reward(context, {name: 1.0})
    assert reward.summary()[name]["weight"] == 0.0
    assert any(f"judge {name} is at chance" in record.getMessage() for record in caplog.records)
    texts = ["some text", "another"]
    judged = reward(texts, np.array([0, 1]), *context.encode(texts))
    assert set(judged.parts) == {name} and (judged.quality == 1).all() and judged.quality.dtype == np.float32


def test_a_random_judge_has_hardly_any_weight_beside_a_good_one(judges):
    reward = make_reward(context_of(tiny.world_task(examples_per_label=60)), {"noise": 1.0, "verifier": 1.0})
    summary = reward.summary()
    assert summary["noise"]["weight"] < 0.1 and abs(summary["noise"]["auc"] - 0.5) < 0.05
    assert summary["verifier"] == {"auc": 1.0, "weight": 1.0}


def test_a_worlds_verifier_is_exact(context):
    task = context.task
    reward = make_reward(context, {"verifier": 0.5})
    assert reward.summary() == {"verifier": {"auc": 1.0, "weight": 0.5}}
    texts = [e.text for e in task.examples] + ["no such sentence"]
    label = np.array([task.labels.index(e.label) for e in task.examples] + [0])
    judged = reward(texts, label, *context.encode(texts))
    np.testing.assert_array_equal(judged.quality, [*np.ones(len(texts) - 1), 0])
    np.testing.assert_array_equal(judged.parts["verifier"], judged.quality)
    other = reward(texts[:-1], (label[:-1] + 1) % len(task.labels), *context.encode(texts[:-1]))
    assert other.quality.mean() < 0.05


def test_quality_is_the_mean_by_trusted_weight():
    def constant(value):
        return lambda texts, label, tokens, mask: np.full(len(texts), value, np.float32)

    reward = Reward({"a": (constant(1.0), 1.0, 0.6), "b": (constant(0.25), 0.6, 0.2)})
    judged = reward(["x", "y"], np.zeros(2, int), None, None)
    np.testing.assert_allclose(judged.quality, (0.6 + 0.05) / 0.8, rtol=1e-6)
    np.testing.assert_array_equal(judged.parts["b"], [0.25, 0.25])


def test_measure_compares_the_own_label_with_the_others(context, monkeypatch):
    """A judge that always favours the first label says nothing; one that knows the truth says all."""
    favourite = by_text(lambda text, k: float(k == 0))(context)
    assert measure(context, favourite) == pytest.approx(0.5)
    truth = {e.text: context.task.labels.index(e.label) for e in context.held_back}
    assert measure(context, by_text(lambda text, k: float(truth[text] == k))(context)) == 1.0


def test_without_a_verifier_that_judge_is_left_out(context):
    plain = dataclasses.replace(context, task=dataclasses.replace(context.task, verifier=None))
    assert make_reward(plain, {"verifier": 1.0}).judges == {}
    assert make_reward(context, {"verifier": 0.0, "posterior": 0.0}).judges == {}


@pytest.mark.parametrize(
    ("weights", "sentence"),
    [
        ({"oracle": 1.0}, "feedback.judges.oracle.*verifier, posterior"),
        ({"verifier": -0.5}, "-0.5 is negative"),
    ],
)
def test_mistakes_are_refused(context, weights, sentence):
    with pytest.raises(UserError, match=sentence):
        make_reward(context, weights)


def test_a_judge_needs_an_example_that_it_has_not_read():
    task = tiny.world_task()
    single = tuple(task.examples_of(label)[0] for label in task.labels)
    context = context_of(dataclasses.replace(task, examples=single))
    with pytest.raises(UserError, match="examples_per_label to 2"):
        make_reward(context, {"verifier": 1.0})


def test_a_text_that_is_too_long_is_cut(context):
    tokens, mask = context.encode(["word " * 100, "a"])
    assert tokens.shape == (2, 24) and mask[0].all() and 1 < mask[1].sum() < 24
    assert tokens[1][mask[1]][-1] == tiny.tokenizer().eos
