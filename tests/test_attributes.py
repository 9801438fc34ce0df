"""Attributes of a task: cells, exact tests, what task.json may say, and what prompts make of them."""

from __future__ import annotations

import dataclasses
import json

import jax
import numpy as np
import pytest
import tiny
from hypothesis import given
from hypothesis import strategies as st

from streamsynth.errors import UserError
from streamsynth.learner.adherence import adherence
from streamsynth.learner.collect import write
from streamsynth.policy.logprobs import group_logprobs
from streamsynth.policy.transformer import Transformer
from streamsynth.stream.markers import MarkerFormat
from streamsynth.stream.patterns import STRATEGIES
from streamsynth.stream.prompts import render
from streamsynth.tasks import attributes, sources, worlds
from streamsynth.tasks.attributes import Attribute, Value, asked_for, by_length, cells, phrases, read
from streamsynth.tasks.task import join_fields

pytestmark = pytest.mark.usefixtures("quick_xla")

LENGTH = Attribute("length", (Value("short", max_words=3), Value("long", min_words=4)))
TONE = Attribute("tone", (Value("polite"), Value("angry"), Value("dry")))
FORM = MarkerFormat(tiny.tokenizer(), 96, 16)


def test_cells_are_all_combinations_and_of_nothing_the_empty_one():
    found = cells([LENGTH, TONE])
    assert len(found) == 6 == len(set(found))
    assert phrases([LENGTH, TONE], found[1]) == ("length: short", "tone: angry")
    assert asked_for([LENGTH, TONE], found[5]) == {"length": "long", "tone": "dry"}
    assert cells([]) == ((),) and phrases([], ()) == ()


@pytest.mark.parametrize(
    ("value", "text", "holds"),
    [
        (Value("x", min_words=3), "one two three", True),
        (Value("x", min_words=3), "one two", False),
        (Value("x", max_words=3), join_fields(("one two", "three")), True),
        (Value("x", max_words=3), "one two three four", False),
        (Value("x", any_of=("fee", "bank card")), "My Bank card!", True),
        (Value("x", any_of=("fee", "bank card")), "coffee on the bank, card lost", True),
        (Value("x", any_of=("fee",)), "coffee", False),
        (Value("x", any_of=("fee",)), 'a "fee", they said', True),
        (Value("x"), "anything", True),
    ],
)
def test_tested_values_are_checked_word_by_word(value, text, holds):
    assert value.holds(text) == holds
    assert value.tested == (value != Value("x"))


@given(st.lists(st.integers(1, 30), min_size=1, max_size=20), st.integers(1, 40))
def test_every_text_has_exactly_one_of_two_lengths(lengths, count):
    attribute = by_length([" ".join(["word"] * n) for n in lengths])
    assert sum(value.holds(" ".join(["word"] * count)) for value in attribute.values) == 1


def test_task_json_names_attributes(tmp_path):
    content = {
        "length": {"short": {"max_words": 3}, "long": {"min_words": 4}},
        "topic": {"fees": {"any_of": ["fee", "charge"]}, "other": None},
        "tone": ["polite", "angry"],
    }
    for part in ("train", "test"):
        rows = [{"text": f"{label} text {i} {part}", "label": label} for label in "ab" for i in range(6)]
        (tmp_path / f"{part}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "task.json").write_text(json.dumps({"attributes": content}))
    task = sources.load(f"files:{tmp_path}", examples_per_label=2, seed=0)
    assert task.attributes[0] == LENGTH and len(task.cells) == 8
    assert task.attributes[1].values == (Value("fees", any_of=("fee", "charge")), Value("other"))
    assert [value.tested for value in task.attributes[2].values] == [False, False]


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ([], "object"),
        ({"tone": ["polite"]}, "two or more"),
        ({"tone": "polite"}, "two or more"),
        ({"tone": ["polite", "polite"]}, "twice"),
        ({"tone": {"a": {"words": 3}, "b": None}}, "min_words, max_words, any_of"),
        ({"tone": {"a": {"min_words": 0}, "b": None}}, "whole numbers"),
        ({"tone": {"a": {"min_words": 5, "max_words": 4}, "b": None}}, "below"),
        ({"tone": {"a": {"any_of": "fee"}, "b": None}}, "list of words"),
        ({str(i): ["a", "b"] for i in range(9)}, "512 combinations"),
    ],
)
def test_what_task_json_says_wrongly_is_named(content, said):
    with pytest.raises(UserError, match=said) as error:
        read(content, "data/task.json")
    assert "data/task.json" in str(error.value)


def test_worlds_have_lengths_where_the_spec_asks_for_them():
    assert sources.load("worlds:bank_1", examples_per_label=2, seed=0).attributes == ()
    task = sources.load("worlds:bank_1?attributes=length", examples_per_label=2, seed=0)
    short = [task.attributes[0].values[0].holds(example.text) for example in task.train]
    assert 0.2 < np.mean(short) < 0.8
    with pytest.raises(UserError, match="attributes=colour"):
        sources.load("worlds:bank_1?attributes=colour", examples_per_label=2, seed=0)


# --- In prompts ---


def task_with(*found: Attribute):
    return dataclasses.replace(tiny.world_task(), attributes=found)


def test_a_prompt_asks_for_its_cell_between_label_and_examples():
    t, task = FORM.tokenizer, task_with(LENGTH)
    label, cell = np.array([0, 1]), np.array([0, 1])
    strategy = np.full(2, STRATEGIES.index("imitate"))
    rng = np.random.default_rng(0)
    rows = render(FORM, task, label, strategy, rng, cell).prompts
    for b, phrase in enumerate(("length: short", "length: long")):
        ids = list(rows.tokens[b][rows.mask[b]])
        start = ids.index(t.marker("<attribute>"))
        assert ids[start + 1 : ids.index(t.marker("<example>"))] == t.encode(phrase)
    without = render(FORM, tiny.world_task(), label, strategy, np.random.default_rng(0)).prompts
    assert t.marker("<attribute>") not in without.tokens


def test_cells_are_asked_for_in_equal_shares_and_samples_know_theirs():
    task, policy = task_with(LENGTH, TONE), tiny.policy()
    written = write(
        policy.model,
        policy.variables,
        FORM,
        task,
        np.full(12, STRATEGIES.index("label_only")),
        seed=0,
        purpose="test",
        steps=(0,),
        samples=2,
        temperature=1.0,
    )
    assert written.cell.shape == (24,) and (np.bincount(written.cell) == 4).all()
    assert (written.cell[::2] == written.cell[1::2]).all()


# --- Adherence ---


def test_adherence_is_exact_where_values_have_tests_and_bayes_elsewhere():
    """Both halves by hand: words counted, and a softmax over the values' teacher-forced log-probabilities."""
    task = task_with(LENGTH, TONE)
    config = dataclasses.replace(tiny.policy().model.config)
    model = Transformer(config)
    variables = {"params": jax.tree.map(lambda leaf: 2 * leaf, tiny.fresh_params(config, 1))}
    texts = ["one two three", "one two three four", "a b", "a b c d e"]
    tokens, mask = FORM.pad_completions([FORM.answer(task.brief, text) for text in texts])
    label, cell = np.array([0, 0, 1, 1]), np.array([0, 0, 5, 5])  # short and polite; long and dry
    found = adherence(model, variables, FORM, task, texts, label, cell, tokens, mask, samples=2)
    exact = np.array([1.0, 0.0, 0.0, 1.0])
    loglikelihood = np.zeros((4, 3))
    for v, value in enumerate(TONE.values):
        rows = [
            FORM.prompt(task.brief, 0, task.labels[k], (), (), [f"tone: {value.name}"])[0] for k in label[::2]
        ]
        prompts = FORM.pad_prompts(rows, label[::2], np.zeros(2))
        loglikelihood[:, v] = np.asarray(
            group_logprobs(model, variables, prompts, tokens, mask).logprobs
        ).sum(-1)
    softmax = np.exp(loglikelihood - loglikelihood.max(1, keepdims=True))
    softmax /= softmax.sum(1, keepdims=True)
    asked = np.array([0, 0, 2, 2])
    np.testing.assert_allclose(found, (exact + softmax[np.arange(4), asked]) / 2, atol=1e-5)
    assert found.dtype == np.float32 and np.ptp(softmax[np.arange(4), asked]) > 1e-4


def test_a_world_that_is_asked_for_lengths_measures_them():
    world = worlds.stream_world("bank_1")
    border = worlds.length_of(world).values[0].max_words
    counts = [len(frame.tokens) for label in world.labels for frame in label.frames]
    assert min(counts) <= border < max(counts)
    assert attributes.MOST_CELLS >= 2
