"""A sample without a score is nothing to learn from; secondary parts count among accepted samples alone."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import test_replaying
import test_update
import tiny
from hypothesis import given, settings
from hypothesis import strategies as st

from streamsynth import assemble, validate
from streamsynth.config import from_json, load, to_json
from streamsynth.defaults import default_config
from streamsynth.errors import UserError
from streamsynth.feedback import diversity
from streamsynth.feedback.reward import Reward, make_reward
from streamsynth.feedback.scorers import specs
from streamsynth.feedback.scorers.records import Records
from streamsynth.feedback.scorers.reply import Answer, Reply
from streamsynth.feedback.scorers.scorer import Limits, Scorer, TaskScorer
from streamsynth.learner import advantages, balance
from streamsynth.learner.collect import Scored, failures
from streamsynth.learner.replaying import remember
from streamsynth.learner.update import PARTS, assess
from streamsynth.pytrees import Scores
from streamsynth.stream.markers import MarkerFormat

pytestmark = pytest.mark.usefixtures("quick_xla")

# --- Advantages ---


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 2**31), st.sampled_from([2, 3, 8]))
def test_leave_one_out_is_that_of_the_counted_samples_alone(seed, group):
    rng = np.random.default_rng(seed)
    quality, counted = rng.random((4, group)).astype(np.float32), rng.random((4, group)) < 0.6
    expected = np.zeros((4, group))
    for b in range(4):
        own = np.flatnonzero(counted[b])
        for i in own if len(own) > 1 else []:
            others = [quality[b, j] for j in own if j != i]
            expected[b, i] = quality[b, i] - np.mean(others, dtype=np.float64)
    found = advantages.leave_one_out(quality, counted)
    np.testing.assert_allclose(found, expected, atol=1e-6)
    assert (np.asarray(found)[~counted] == 0).all()
    np.testing.assert_allclose(
        advantages.leave_one_out(quality, np.ones_like(counted)), advantages.leave_one_out(quality), atol=1e-6
    )


def test_the_spread_is_that_of_the_counted_samples():
    part, counted = jnp.array([1.0, 3.0, 0.0, 0.0]), jnp.array([True, True, False, False])
    spread = advantages.update_spread(
        advantages.initial_spread(("quality",)), {"quality": part}, counted={"quality": counted}
    )
    assert spread.mean_square["quality"] == 5.0
    none = {"quality": jnp.zeros(4, bool)}
    assert advantages.update_spread(spread, {"quality": part}, counted=none).mean_square["quality"] == 5.0


def spread_of(names):
    return advantages.Spread(mean_square={name: jnp.float32(0.25 + 0.1 * i) for i, name in enumerate(names)})


def assessed(scores, label, **changes):
    keys = dict(samples=2, floor=0.0, power=1.0, eta=0.5, alpha_max=4.0, weighted=False, remembered=1.0)
    spread = spread_of((*PARTS, *scores.secondary))
    archive = diversity.empty(test_update.LABELS, test_update.D, 0.1)
    balanced = balance.initial(0.5, 1.0)
    return assess(archive, scores, np.int32(label), spread, balanced, **(keys | changes))


@pytest.mark.parametrize("neutral", [True, False])
def test_a_group_without_scores_is_as_if_it_were_not_there(neutral):
    rng = np.random.default_rng(0)
    scores = test_update.scores_of(rng, [1.0, 0.5, 0.3, 0.8, 0.0, 0.0, 0.75, 0.25])
    label, there = np.array([0, 0, 1, 1, 0, 0, 0, 0]), np.array([1, 1, 1, 1, 0, 0, 1, 1], bool)
    scores = scores.replace(scored=there, gate=np.ones(8, np.float32))  # they passed the gates
    found = assessed(scores, label, neutral=neutral)
    without = assessed(jax.tree.map(lambda leaf: leaf[there], scores), label[there], neutral=neutral)
    assert (np.asarray(found.advantage)[~there] == 0).all() and np.abs(found.advantage[there]).min() > 0
    for name in ("advantage", "weight", "credit"):
        np.testing.assert_allclose(getattr(found, name)[there], getattr(without, name), rtol=1e-5, atol=1e-6)
    assert float(found.balance.alpha) == pytest.approx(float(without.balance.alpha), rel=1e-6)
    for name in PARTS:
        assert float(found.spread.mean_square[name]) == pytest.approx(
            float(without.spread.mean_square[name]), rel=1e-5
        )


def test_secondary_parts_compare_accepted_samples_with_each_other():
    rng = np.random.default_rng(1)
    quality = [1.0, 0.6, 0.2, 0.9, 0.1, 0.7]
    tone = np.float32([0.9, 0.5, np.nan, 0.3, np.nan, np.nan])  # the last one's scorer failed
    scores = test_update.scores_of(rng, quality).replace(secondary={"tone": tone})
    plain = assessed(scores.replace(secondary={}), [0] * 6, neutral=True, samples=3)
    found = assessed(scores, [0] * 6, neutral=True, samples=3, secondary=(("tone", 0.5),))
    share = 0.5 / 1.5  # of diversity, at alpha = 0.5
    sigma = np.sqrt(0.25 + 0.1 * len(PARTS))
    expected = (1 - share) * 0.5 * np.array([0.4, -0.4, 0, 0, 0, 0]) / sigma
    np.testing.assert_allclose(found.advantage - plain.advantage, expected, atol=1e-6)
    np.testing.assert_allclose(found.spread.mean_square["tone"], 0.95 * sigma**2 + 0.05 * 0.32 / 3, rtol=1e-5)
    assert float(found.metrics["advantage/tone_weighted"]) == pytest.approx(np.abs(expected).mean(), rel=1e-5)
    no_weight = assessed(scores, [0] * 6, neutral=True, samples=3, secondary=(("tone", 0.0),))
    np.testing.assert_allclose(no_weight.advantage, plain.advantage, atol=1e-7)


def test_only_scored_samples_are_remembered():
    from streamsynth.learner.state import new_task

    config = default_config()
    with config.unlocked():
        config.rollout.update(prompt_length=test_replaying.P, completion_length=test_replaying.T)
        config.feedback.width = test_replaying.D
        config.replay.update(capacity=16, elite_share=0.0, leverage_share=0.0)
    samples, keep = test_replaying.batch_of(0, 2)
    scored = np.arange(test_replaying.N) % 3 > 0
    task = remember(new_task(config, 2), samples, keep & scored, jax.random.key(0), 0.9, 1.0, scored)
    assert int(task.buffer.seen) == scored.sum()
    held = np.asarray(task.buffer.samples.quality)[: scored.sum()]
    np.testing.assert_array_equal(held, np.asarray(samples.quality)[scored])
    assert float(task.quality) == pytest.approx(np.asarray(samples.quality)[scored].mean(), rel=1e-5)
    assert float(task.archive.count.sum()) == (keep & scored).sum()


# --- The reward ---


class Marks:
    """A source that knows the score of each text; what it does not know it fails on."""

    batch, concurrency = 4, 1

    def __init__(self, marks):
        self.marks, self.asked = marks, []

    def ask(self, task, texts, labels):
        self.asked += texts
        known = [self.marks.get((text, label), self.marks.get(text)) for text, label in zip(texts, labels)]  # noqa: B905
        return Reply(tuple(Answer(mark, "" if mark is not None else "refused") for mark in known))


def scorer(name, marks):
    return Scorer(name, Marks(marks), Limits(0, 0.0, 1000), Records(None))


def test_a_missing_score_of_a_judge_loses_the_sample_and_is_not_paid_for_twice():
    task = tiny.world_task()
    one = scorer("one", {"a": 0.9, "b": 0.8, "d": 0.1, "e": 1.0})
    two = scorer("two", {"a": 0.5, "b": 0.6, "d": 0.3})
    tone = scorer("tone", {"a": 0.25})
    reward = Reward(
        {"one": (TaskScorer(one, task), 1.0, 0.75), "two": (TaskScorer(two, task), 0.8, 0.25)},
        {"tone": (TaskScorer(tone, task), 0.3)},
        accept=0.5,
    )
    passed = np.array([1, 1, 1, 1, 1, 0], bool)
    judged = reward(list("abcdef"), np.zeros(6, int), None, None, passed=passed)
    np.testing.assert_allclose(judged.quality, [0.8, 0.75, 0, 0.15, 0, 0], rtol=1e-6)
    np.testing.assert_array_equal(judged.scored, [True, True, False, True, False, True])
    assert judged.failed == {"one": {"refused": 1}, "two": {"refused": 1}, "tone": {"refused": 1}}
    assert one.source.asked == list("abcde") and two.source.asked == list("abde")
    assert tone.source.asked == ["a", "b"]  # what was not accepted has no tone
    np.testing.assert_array_equal(judged.secondary["tone"], np.float32([0.25, *[np.nan] * 5]))
    assert reward.weights() == {"one": 0.75, "two": 0.25, "tone": 0.3}

    scores = Scores(
        passed.astype(np.float32), judged.quality, None, judged.parts, judged.scored, judged.secondary
    )
    figures = Scored(scores, None, judged.failed).figures(reward.weights())
    expected = {
        "reward/quality": np.mean([0.8, 0.75, 0.15, 0.0]),
        "reward/one": np.mean([0.9, 0.8, 0.1, 1.0]),
        "reward/one_weighted": 0.75 * 2.8 / 6,
        "reward/tone": 0.25,
        "reward/tone_weighted": 0.3 * 0.25 / 6,
        "scorer/one/failed": 1,
        "scorer/one/failed/refused": 1,
    }
    for name, value in expected.items():
        assert figures[name] == pytest.approx(value, rel=1e-5), name


def test_failures_add_up_over_batches():
    batches = [{"one": {"timeout": 2}, "two": {}}, {"one": {"timeout": 1, "cap": 3}}]
    assert failures(batches) == {
        "scorer/one/failed": 6,
        "scorer/one/failed/timeout": 3,
        "scorer/one/failed/cap": 3,
        "scorer/two/failed": 0,
    }


def test_a_scorer_is_measured_on_what_it_answers_and_not_asked_where_it_is_not_trusted(caplog):
    context = assemble.judge_context(tiny.policy(), MarkerFormat(tiny.tokenizer(), 96, 24), tiny.world_task())
    labels = context.task.labels
    right = {(e.text, name): float(e.label == name) for e in context.held_back for name in labels}
    half = {key: mark for i, (key, mark) in enumerate(right.items()) if i % 3}
    scorers = {"right": scorer("right", half), "broken": scorer("broken", {})}
    reward = make_reward(context, {"right": 0.5, "broken": 1.0}, scorers)
    assert reward.summary() == {
        "right": {"auc": 1.0, "weight": 0.5}, "broken": {"auc": 0.5, "weight": 0.0}
    }  # fmt: skip
    assert "judge broken is at chance" in caplog.text
    scorers["broken"].source.asked.clear()
    text, name = next(iter(half))
    judged = reward([text], np.array([labels.index(name)]), None, None)
    assert judged.scored.all() and set(judged.parts) == {"right"} and not scorers["broken"].source.asked


# --- What the config says ---


def config_with(specs_, judges=None, secondary=None, **keys):
    config = default_config()
    with config.unlocked():
        config.feedback.scorers = specs_
        config.feedback.judges.update(judges or {})
        config.feedback.secondary.update(secondary or {})
        config.scorers.update(keys)
    return config


@pytest.mark.parametrize(
    "spec, keys, sentence",
    [
        ("my_module:score", {}, "give NAME=module:function"),
        ("tone=my_module", {}, "give NAME=module:function"),
        ("tone=openai:small@ftp://host", {}, "give NAME=module:function"),
        ("tone=openai:small@https://host:port/v1", {}, "give NAME=module:function"),
        ("verifier=m:f", {}, "'verifier', which is taken"),
        ("mood=m:f", {}, "mood, which has no weight"),
        ("tone=openai:small@https://me:pw@host/v1", {}, "more than host, port and path"),
        ("tone=openai:small@https://host/v1?api_key=sk-1", {}, "more than host, port and path"),
        ("tone=openai:small@http://host/v1", {"key_variable": "KEY"}, "plain http to host"),
    ],
)
def test_specs_that_are_refused(spec, keys, sentence):
    with pytest.raises(UserError, match=sentence) as caught:
        specs.sources(config_with((spec,), {"tone": 1.0}, **keys))
    assert "sk-1" not in str(caught.value)


def test_specs_that_are_taken():
    config = config_with(
        ("tone=m.n:f", "mark=openai:org/model@v2@https://host:8/v1", "near=openai:m@http://localhost:8/v1"),
        {"tone": 1.0, "near": 0.5},
        {"mark": 0.25},
        key_variable="KEY",
    )
    found = specs.sources(config)
    assert (found["tone"].spec, found["tone"].batch) == ("m.n:f", 16)
    assert (found["mark"].model, found["mark"].url) == ("org/model@v2", "https://host:8/v1")
    assert set(specs.make_scorers(config, None)) == {"tone", "mark", "near"}
    assemble.check(config)
    validate.check(from_json(to_json(config)))
    assert from_json(to_json(default_config())).to_dict() == default_config().to_dict()


@pytest.mark.parametrize(
    "judges, secondary, sentence",
    [
        ({}, {"tone": 1.0, "other": 1.0}, "secondary.other is neither attribute, utility nor a scorer"),
        ({"tone": 1.0}, {"tone": 1.0}, "leave one of them out"),
        ({}, {"tone": -1.0}, "feedback.secondary.tone = -1.0 is out of range"),
        ({}, {"tone": "much"}, "feedback.secondary.tone = 'much' must be a number"),
        ({"tone": 1.0, "two": 1.0}, {}, "feedback.judges.two is not a judge: choose among .*, tone"),
    ],
)
def test_weights_that_are_refused(judges, secondary, sentence):
    with pytest.raises(UserError, match=sentence):
        assemble.check(config_with(("tone=m:f",), judges, secondary))


def test_weights_of_scorers_are_given_on_the_command_line(tmp_path):
    file = tmp_path / "mine.py"
    file.write_text("from streamsynth.defaults import default_config as get_config\n")
    keys = {"feedback.scorers": "tone=m:f,mark=m:g", "feedback.judges.tone": "0.5"}
    config = load(str(file), {**keys, "feedback.secondary.mark": "1"})
    assert config.feedback.scorers == ("tone=m:f", "mark=m:g")
    assert config.feedback.judges.tone == 0.5 and config.feedback.secondary.mark == 1.0
    with pytest.raises(UserError, match="is a number"):
        load(str(file), {"feedback.judges.tone": "much"})
