"""The worlds by name, pretraining worlds without end, and both as tasks."""

from __future__ import annotations

import dataclasses
import hashlib

from streamsynth.errors import UserError
from streamsynth.tasks.attributes import Attribute, by_length
from streamsynth.tasks.task import Example, Task
from streamsynth.tasks.worlds.drawing import (
    DOMAINS,
    STREAM,
    TUNING,
    Difficulty,
    draw_pretrain_world,
    draw_reserved_world,
    stable_rng,
)
from streamsynth.tasks.worlds.grammar import World
from streamsynth.tasks.worlds.lexicon import LEXICON

DEFAULT_DIFFICULTY = Difficulty()
# Sentences that the corpus takes from one world before it goes on to the next.
_CORPUS_SENTENCES_PER_WORLD = 16


@dataclasses.dataclass(frozen=True)
class _Entry:
    """A named world: its domain, the reserved block its labels start from, and how many labels."""

    domain: str
    block: int
    labels: int


_STREAM_ENTRIES = {
    # Food: two domains that share the roles of food and people; each world has a block of its own.
    "restaurant_1": _Entry("restaurant", 0, 4),
    "restaurant_2": _Entry("restaurant", 1, 4),
    "restaurant_3": _Entry("restaurant", 2, 4),
    "market_1": _Entry("market", 0, 4),
    "market_2": _Entry("market", 1, 4),
    "market_3": _Entry("market", 2, 4),
    "bank_1": _Entry("bank", 0, 4),
    "shop_1": _Entry("shop", 0, 4),
    "post_1": _Entry("post", 0, 3),
    "school_1": _Entry("school", 0, 4),
    "health_1": _Entry("health", 0, 4),
    "weather_1": _Entry("weather", 0, 4),
    "film_1": _Entry("film", 0, 4),
    "travel_1": _Entry("travel", 0, 5),
    "hobby_1": _Entry("hobby", 0, 6),
    "home_1": _Entry("home", 0, 4),
    "garden_1": _Entry("garden", 0, 8),
    "music_1": _Entry("music", 0, 4),
}
# For choosing hyperparameters, never for reporting: their frames and their pairs of bearing categories are
# those of no stream world (up to 4 labels; with more they reach into a neighbouring block).
_TUNING_ENTRIES = {
    "tuning_bank": _Entry("bank", 1, 4),
    "tuning_film": _Entry("film", 1, 4),
    "tuning_home": _Entry("home", 1, 4),
    "tuning_hobby": _Entry("hobby", 2, 4),
    "tuning_music": _Entry("music", 1, 3),
    "tuning_weather": _Entry("weather", 1, 4),
}

STREAM_WORLDS: tuple[str, ...] = tuple(_STREAM_ENTRIES)
TUNING_WORLDS: tuple[str, ...] = tuple(_TUNING_ENTRIES)
# The first two end with the same task: what came before it is the only difference.
STREAMS: dict[str, tuple[str, ...]] = {
    "related": ("market_1", "restaurant_1", "market_2", "restaurant_2", "market_3", "restaurant_3"),
    "unrelated": ("bank_1", "weather_1", "film_1", "home_1", "music_1", "restaurant_3"),
    "tuning": TUNING_WORLDS,
}


def pretrain_world(seed: int, difficulty: Difficulty = DEFAULT_DIFFICULTY) -> World:
    """The pretraining world of a seed: any integer gives one, the same in every process.

    `labels` (3 to 8, where not given) and `cores_per_label` (the given number or one fewer) are drawn
    anew for each world. The words of a category are the same everywhere, so that they can be learned.
    """
    return draw_pretrain_world(seed, difficulty)


def stream_world(name: str, difficulty: Difficulty = DEFAULT_DIFFICULTY) -> World:
    """A stream or tuning world by name. UserError for an unknown name."""
    entries = _STREAM_ENTRIES | _TUNING_ENTRIES
    if name not in entries:
        raise UserError(f"There is no world named {name!r}; the worlds are {', '.join(entries)}.")
    entry = entries[name]
    part = STREAM if name in _STREAM_ENTRIES else TUNING
    return draw_reserved_world(name, entry.domain, part, entry.block, entry.labels, difficulty)


def load_task(
    name: str,
    *,
    examples_per_label: int = 8,
    seed: int = 0,
    train_per_label: int = 200,
    test_per_label: int = 100,
    difficulty: Difficulty = DEFAULT_DIFFICULTY,
    attributes: bool = False,
) -> Task:
    """A stream or tuning world as a task: see `world_task`, and `length_of` for its attributes if wanted.

    Raises:
      UserError: the name is unknown.
    """
    world = stream_world(name, difficulty)
    task = world_task(
        world,
        examples_per_label=examples_per_label,
        seed=seed,
        train_per_label=train_per_label,
        test_per_label=test_per_label,
    )
    return dataclasses.replace(task, attributes=(length_of(world),)) if attributes else task


def world_task(
    world: World, *, examples_per_label: int, seed: int, train_per_label: int, test_per_label: int
) -> Task:
    """A world as a task. No text occurs twice, within a split or across splits.

    The splits follow from the world's name and the seed. Test texts are drawn first, then train, then
    examples, label by label: with other sizes of the later splits the earlier ones stay as they are, and
    8 examples are the first 8 of 16.

    Raises:
      UserError: a label has fewer sentences than twice the number asked for.
    """
    splits: dict[str, list[Example]] = {"test": [], "train": [], "examples": []}
    sizes = {"test": test_per_label, "train": train_per_label, "examples": examples_per_label}
    taken: set[str] = set()
    for index, label in enumerate(world.labels):
        wanted = sum(sizes.values())
        # Distinct sentences are found by drawing again, which is only quick while most are free.
        if label.language_size() < 2 * wanted:
            raise UserError(
                f"World {world.name!r}: label {label.name!r} has {label.language_size()} sentences, too few "
                f"for {wanted} different ones (examples_per_label + train_per_label + test_per_label); "
                "ask for fewer, or raise worlds.words_per_category."
            )
        rng = stable_rng("splits", world.name, index, seed)
        for split, size in sizes.items():
            for number in range(size):
                text = label.sample(rng)
                while text in taken:
                    text = label.sample(rng)
                taken.add(text)
                splits[split].append(Example(f"{world.name}/{split}/{index}-{number}", (text,), label.name))
    return Task(
        name=world.name,
        description=world.description,
        labels=world.label_names,
        verifier=world.verify,
        **{split: tuple(found) for split, found in splits.items()},
    )


def length_of(world: World) -> Attribute:
    """The attribute "length" of a world's texts: whether they have more words than half of its frames."""
    return by_length([" ".join(frame.tokens) for label in world.labels for frame in label.frames])


def corpus(seed: int, count: int, difficulty: Difficulty = DEFAULT_DIFFICULTY) -> list[str]:
    """`count` sentences of pretraining worlds, for instance to train a tokenizer on."""
    rng = stable_rng("corpus", seed)
    sentences: list[str] = []
    while len(sentences) < count:
        world = pretrain_world(int(rng.integers(2**62)), difficulty)
        for _ in range(min(_CORPUS_SENTENCES_PER_WORLD, count - len(sentences))):
            sentences.append(world.sample(rng, int(rng.integers(len(world.labels)))))
    return sentences


def content_hash(difficulty: Difficulty = DEFAULT_DIFFICULTY) -> str:
    """A name for what this package says at a difficulty, for caches of what was trained on it.

    It covers the words and domains, and the drawing code by what it does: sentences of pretraining worlds.
    """
    content = (LEXICON, tuple(DOMAINS.values()), difficulty, corpus(0, 500, difficulty))
    return hashlib.sha256(repr(content).encode()).hexdigest()
