"""The config's `worlds` group: it reaches the tasks of the stream, pretraining, and tasks named later."""

import types

import numpy as np
import pytest

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


def test_the_default_config_has_the_default_difficulty(configured):
    assert worlds.Difficulty(**configured().worlds) == worlds.Difficulty()
    for task in assemble.load_tasks(configured()):
        assert task.train == worlds.load_task(task.name).train


def test_an_override_changes_the_tasks_of_the_stream(configured):
    few = configured(words_per_category=5)
    for usual, narrow in zip(assemble.load_tasks(configured()), assemble.load_tasks(few), strict=True):
        assert usual.labels == narrow.labels
        assert words(narrow) < words(usual)
        # By the world that the task names, so that the verifier has narrowed with the texts.
        world = worlds.stream_world(narrow.name, worlds.Difficulty(words_per_category=5))
        assert all(world.verify(example.text, example.label) for example in narrow.test)
        assert not all(narrow.verifier(example.text, example.label) for example in usual.test)


def test_only_worlds_have_a_difficulty(tmp_path):
    (tmp_path / "train.csv").write_text(
        "text,label\n" + "".join(f"row {i},{'ab'[i % 2]}\n" for i in range(40))
    )
    hard = worlds.Difficulty(cores_per_label=5)
    plain, given = (
        sources.load(f"files:{tmp_path}", examples_per_label=2, seed=0, difficulty=difficulty)
        for difficulty in (None, hard)
    )
    assert plain.train == given.train


@pytest.mark.parametrize(
    "change", [{"cores_per_label": 2}, {"words_per_category": 6}, {"odd_category_rate": 0.5}]
)
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
        return set(" ".join(texts + pretrain._corpus(config, ())).split())

    words = {word for category in LEXICON.values() for word in category[:2]}
    for domain in DOMAINS.values():
        words.update(" ".join((*domain.openers, *domain.cores, *domain.tails)).split())
    assert seen(configured(words_per_category=2)) <= words
    assert not seen(configured()) <= words


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"cores_per_label": 0}, "worlds.cores_per_label is 0"),
        ({"cores_per_label": 8}, "worlds.cores_per_label is 8"),
        ({"words_per_category": 1}, "worlds.words_per_category is 1"),
        ({"odd_category_rate": -0.5}, "worlds.odd_category_rate is -0.5"),
    ],
)
def test_impossible_values_are_refused_before_anything_is_computed(configured, change, message):
    with pytest.raises(UserError, match=message):
        assemble.check(configured(**change))


def test_a_task_named_after_the_run_has_the_difficulty_of_the_run(configured):
    setting = types.SimpleNamespace(tasks=(), config=configured(words_per_category=2, cores_per_label=1))
    with pytest.raises(UserError, match="'film_1'.*too few"):
        synthesize._with_task(setting, "worlds:film_1")
