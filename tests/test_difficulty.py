"""Difficulty: what it does to a world; the config's `worlds` group reaches all tasks and pretraining."""

import collections
import itertools
import math
import types

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from streamsynth import assemble, pretrain, synthesize
from streamsynth.config import load
from streamsynth.errors import UserError
from streamsynth.tasks import sources, worlds
from streamsynth.tasks.worlds.drawing import DOMAINS
from streamsynth.tasks.worlds.lexicon import LEXICON

CONFIG = """
from streamsynth.defaults import default_config

def get_config():
    config = default_config()
    config.stream.tasks = ("worlds:bank_1", "worlds:music_1")
    config.policy.update(width=8, layers=1, heads=1, kv_heads=1, head_width=4, mlp_width=8)
    config.pretrain.update(steps=0, corpus_sentences=100)
    return config
"""


@pytest.fixture
def configured(tmp_path):
    """The config above with overrides, as the command reads them."""
    file = tmp_path / "config.py"
    file.write_text(CONFIG)
    return lambda **changes: load(str(file), {f"worlds.{key}": str(value) for key, value in changes.items()})


def words(task):
    return {word for example in task.train for word in example.text.split()}


def fillers(world):
    return {word for label in world.labels for own in label.words.values() for word in own}


def test_the_default_config_has_the_default_difficulty(configured):
    assert worlds.Difficulty(**configured().worlds) == worlds.Difficulty()
    for task in assemble.load_tasks(configured()):
        assert task.train == worlds.load_task(task.name).train


def test_an_override_changes_the_tasks_of_the_stream(configured):
    few = configured(words_per_category=5)
    for usual, narrow in zip(assemble.load_tasks(configured()), assemble.load_tasks(few), strict=True):
        assert usual.labels == narrow.labels
        # By the world that the task names, so that the verifier has narrowed with the texts.
        world = worlds.stream_world(narrow.name, worlds.Difficulty(words_per_category=5))
        left_out = fillers(worlds.stream_world(usual.name)) - fillers(world)
        assert words(usual) & left_out
        assert not words(narrow) & left_out
        assert all(world.verify(example.text, example.label) for example in narrow.test)
        assert not all(narrow.verifier(example.text, example.label) for example in usual.test)


def test_only_worlds_have_a_difficulty(tmp_path):
    (tmp_path / "train.csv").write_text(
        "text,label\n" + "".join(f"row {i},{'ab'[i % 2]}\n" for i in range(40))
    )
    easy = worlds.Difficulty(cores_per_label=2)
    plain, given = (
        sources.load(f"files:{tmp_path}", examples_per_label=2, seed=0, difficulty=difficulty)
        for difficulty in (None, easy)
    )
    assert plain.train == given.train


@pytest.mark.parametrize("change", [{"cores_per_label": 2}, {"words_per_category": 6}])
def test_pretraining_at_another_difficulty_is_another_policy(configured, tmp_path, change):
    usual, again, other = (
        pretrain.base_policy(config, (), cache_dir=tmp_path / "cache")
        for config in (configured(), configured(), configured(**change))
    )
    assert usual.hash == again.hash != other.hash
    assert len(list((tmp_path / "cache").iterdir())) == 2


def test_pretraining_meets_the_words_of_its_difficulty_only(configured):
    rng = np.random.default_rng(0)

    def seen(config):
        lessons = [lesson for step in range(20) for lesson in pretrain._lessons(config, (), step)]
        texts = [text for lesson in lessons for text in (*lesson.own(rng, 4), *lesson.others(rng, 4))]
        # The corpus ends with its sentences; names of labels, which are no texts, come before them.
        sentences = pretrain._corpus(config, ())[-config.pretrain.corpus_sentences :]
        return set(" ".join(texts + sentences).split())

    words = {word for category in LEXICON.values() for word in category[:2]}
    for domain in DOMAINS.values():
        words.update(" ".join((*domain.openers, *domain.cores, *domain.tails)).split())
    assert seen(configured(words_per_category=2)) <= words
    assert not seen(configured()) <= words


def num_cores(label):
    return len({frame.core for frame in label.frames})


def test_difficulty_narrows_cores_words_and_labels():
    easy = worlds.Difficulty(labels=8, cores_per_label=2, words_per_category=5)
    for world in (worlds.stream_world("garden_1", easy), worlds.stream_world("bank_1", easy)):
        assert len(world.labels) == 8
        for label in world.labels:
            assert num_cores(label) == 2
            assert all(len(label.words[role]) == 5 * len(own) for role, own in label.categories.items())
    drawn = [worlds.pretrain_world(seed, easy) for seed in range(30)]
    assert {len(world.labels) for world in drawn} == {8}
    assert {num_cores(label) for world in drawn for label in world.labels} == {1, 2}


@settings(max_examples=60)
@given(st.integers(0, 10**6), st.integers(3, 8), st.integers(1, 5))
def test_labels_have_cores_of_their_own_as_long_as_there_are_choices(seed, labels, cores):
    world = worlds.pretrain_world(seed, worlds.Difficulty(labels=labels, cores_per_label=cores))
    counts = {num_cores(label) for label in world.labels}
    assert len(counts) == 1
    own = counts.pop()
    assert max(1, cores - 1) <= own <= cores
    choices = collections.Counter(frozenset(label.frames) for label in world.labels)
    assert len(choices) == min(labels, math.comb(own + 1, own))
    assert max(choices.values()) - min(choices.values()) <= 1


def test_the_most_cores_fit_every_named_world():
    # With eight labels every choice of five out of six cores occurs.
    most = worlds.Difficulty(labels=8, cores_per_label=5)
    for name in worlds.STREAM_WORLDS + worlds.TUNING_WORLDS:
        labels = worlds.stream_world(name, most).labels
        assert {num_cores(label) for label in labels} == {5}
        assert len({frozenset(frame.core for frame in label.frames) for label in labels}) == 6


def test_language_size_counts_the_sentences():
    world = worlds.stream_world("market_1", worlds.Difficulty(words_per_category=2, cores_per_label=1))
    for index, label in enumerate(world.labels):
        sentences = set()
        for frame in label.frames:
            choices = [
                label.words[token[1:-1]] if token.startswith("{") else (token,) for token in frame.tokens
            ]
            sentences.update(" ".join(tokens) for tokens in itertools.product(*choices))
        assert len(sentences) == world.language_size(index)
        assert all(world.verify(sentence, label.name) for sentence in sentences)
        rng = np.random.default_rng(index)
        drawn = {label.sample(rng) for _ in range(40_000 if len(sentences) < 1000 else 1000)}
        # Uniform over frames, so within 40,000 draws all of a few hundred sentences turn up.
        assert drawn == sentences if len(sentences) < 1000 else drawn < sentences


def test_the_content_hash_tells_difficulties_apart():
    changes = ({}, {"cores_per_label": 2}, {"words_per_category": 7}, {"labels": 4})
    assert len({worlds.content_hash(worlds.Difficulty(**change)) for change in changes}) == len(changes)
    assert worlds.content_hash() == worlds.content_hash(worlds.Difficulty())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"cores_per_label": 0}, "worlds.cores_per_label is 0"),
        ({"cores_per_label": 6}, "worlds.cores_per_label is 6"),
        ({"words_per_category": 1}, "worlds.words_per_category is 1"),
        ({"words_per_category": 13}, "worlds.words_per_category is 13"),
    ],
)
def test_impossible_values_are_refused_before_anything_is_computed(configured, change, message):
    with pytest.raises(UserError, match=message):
        assemble.check(configured(**change))


def test_a_task_named_after_the_run_has_the_difficulty_of_the_run(configured):
    setting = types.SimpleNamespace(tasks=(), config=configured(words_per_category=2, cores_per_label=1))
    with pytest.raises(UserError, match="'hobby_1'.*too few"):
        synthesize._with_task(setting, "worlds:hobby_1")
