"""The embedded worlds: their languages are exact, kept apart, shared in words, and the same everywhere."""

import collections
import functools
import itertools
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from streamsynth.errors import UserError
from streamsynth.tasks import worlds
from streamsynth.tasks.worlds import drawing
from streamsynth.tasks.worlds.lexicon import LEXICON

NAMED = worlds.STREAM_WORLDS + worlds.TUNING_WORLDS
# A tail of the streams' block is in one of nine worlds of its domain: enough for all of them to occur.
PRETRAIN_SEEDS = range(600)


def bearing_pairs(world):
    first, second = drawing.DOMAINS[world.domain].bearing
    return {(*label.categories[first], *label.categories[second]) for label in world.labels}


def frames(world):
    return {(world.domain, frame) for label in world.labels for frame in label.frames}


def ends(some_frames):
    """The openers and the tails of frames."""
    return {frame.opener for frame in some_frames}, {frame.tail for frame in some_frames}


def parts_of_pairs(domain):
    """(opener, tail) -> the part that it belongs to, whichever core stands between them."""
    parts = {}
    for opener, tail in itertools.product(domain.openers, domain.tails):
        owners = {drawing.part_of(domain, drawing.Frame(opener, core, tail)) for core in domain.cores}
        (parts[opener, tail],) = owners
    return parts


def words_of(world):
    """Every word that a sentence of the world can hold."""
    found = set()
    for label in world.labels:
        for frame in label.frames:
            for token in frame.tokens:
                found.update(label.words[token[1:-1]] if token.startswith("{") else (token,))
    return found


def as_regular_expression(label):
    """The language of a label, written independently of `Label.accepts`."""
    alternatives = []
    for frame in label.frames:
        template = f"{frame.opener} {frame.core} {frame.tail}"
        alternatives.append(
            re.sub(r"\{(\w+)\}", lambda slot: f"(?:{'|'.join(label.words[slot[1]])})", template)
        )
    return re.compile("|".join(alternatives))


@pytest.fixture(scope="module")
def named_worlds():
    return {name: worlds.stream_world(name) for name in NAMED}


@pytest.fixture(scope="module")
def pretrain_worlds():
    return [worlds.pretrain_world(seed) for seed in PRETRAIN_SEEDS]


def test_the_lexicon_holds_plain_single_words():
    assert len(LEXICON) >= 60
    for name, words in LEXICON.items():
        assert 12 <= len(words) <= 16, name
        assert len(set(words)) == len(words), name
        assert all(re.fullmatch("[a-z]+", word) for word in (name, *words)), name


@pytest.mark.parametrize("domain", drawing.DOMAINS.values(), ids=lambda domain: domain.name)
def test_a_domain_is_consistent(domain):
    for role, categories in domain.roles.items():
        assert 3 <= len(categories) <= 6
        for one, other in itertools.combinations(categories, 2):
            assert not set(LEXICON[one]) & set(LEXICON[other]), (role, one, other)
    for core in domain.cores:
        assert {f"{{{role}}}" for role in domain.bearing} <= set(core.split()), core
    # Three for the streams, three for tuning, and two that are in pretraining's pairs alone.
    for texts in (domain.openers, domain.tails):
        assert len(set(texts)) == len(texts) == 8
    for opener, core, tail in itertools.product(domain.openers, domain.cores, domain.tails):
        for token in f"{opener} {core} {tail}".split():
            assert re.fullmatch("[a-z]+", token) or token[1:-1] in domain.roles, token


def test_there_are_enough_named_worlds_and_streams_of_them():
    assert len(worlds.STREAM_WORLDS) >= 16
    assert len(worlds.TUNING_WORLDS) >= 6
    assert len(set(NAMED)) == len(NAMED)
    related, unrelated, tuning = (worlds.STREAMS[name] for name in ("related", "unrelated", "tuning"))
    assert set(related) | set(unrelated) <= set(worlds.STREAM_WORLDS)
    assert set(tuning) <= set(worlds.TUNING_WORLDS)
    assert len(set(related)) == len(set(unrelated)) == len(set(tuning)) == 6
    domains = [worlds.stream_world(name).domain for name in unrelated]
    assert len(set(domains)) == 6
    roles = [set(drawing.DOMAINS[worlds.stream_world(name).domain].roles) for name in related]
    assert len(set.intersection(*roles)) >= 3
    assert related[-1] == unrelated[-1]


@pytest.mark.parametrize("name", NAMED)
def test_a_verifier_accepts_its_own_label_only(name, named_worlds):
    world = named_worlds[name]
    rng = np.random.default_rng(0)
    for index, label in enumerate(world.labels):
        sentences = [world.sample(rng, index) for _ in range(200)]
        for other in world.labels:
            accepted = np.mean([world.verify(sentence, other.name) for sentence in sentences])
            assert accepted == 1 if other is label else accepted <= 0.01, (label.name, other.name)
        # Rich enough for thousands of different valid sentences.
        assert world.language_size(index) >= 5000
        assert len(set(sentences)) >= 190


@pytest.mark.parametrize("name", NAMED)
def test_only_combinations_tell_labels_apart(name, named_worlds):
    world = named_worlds[name]
    assert 3 <= len(world.labels) <= 8
    assert len(bearing_pairs(world)) == len(world.labels)
    # All labels have the openers and tails of the reserved block, and each its own choice of cores.
    part = drawing.STREAM if name in worlds.STREAM_WORLDS else drawing.TUNING
    block = {pair for pair, owner in parts_of_pairs(drawing.DOMAINS[world.domain]).items() if owner == part}
    for label in world.labels:
        assert set(itertools.product(*ends(label.frames))) == block
    assert len({frozenset(label.frames) for label in world.labels}) == len(world.labels)
    cores = [{frame.core for frame in label.frames} for label in world.labels]
    assert {len(own) for own in cores} == {4}
    assert len(set.union(*cores)) <= 6
    bearing = drawing.DOMAINS[world.domain].bearing
    for label in world.labels:
        others = [other for other in world.labels if other is not label]
        shared = [
            any(other.categories[role] == label.categories[role] for other in others) for role in bearing
        ]
        assert any(shared)
        if len(world.labels) in (4, 8):
            assert all(shared)
        for frame in label.frames:
            assert set(bearing) <= set(frame.roles)


def test_pretraining_never_sees_what_is_reserved(named_worlds, pretrain_worlds):
    open_pairs = {(world.domain, pair) for world in pretrain_worlds for pair in bearing_pairs(world)}
    kept_pairs = {(world.domain, pair) for world in named_worlds.values() for pair in bearing_pairs(world)}
    assert not open_pairs & kept_pairs
    open_frames = set().union(*map(frames, pretrain_worlds))
    stream_frames = set().union(*(frames(named_worlds[name]) for name in worlds.STREAM_WORLDS))
    tuning_frames = set().union(*(frames(named_worlds[name]) for name in worlds.TUNING_WORLDS))
    assert not open_frames & stream_frames
    assert not open_frames & tuning_frames
    assert not stream_frames & tuning_frames
    # Nor do they only by chance: every frame of a world is of the world's part.
    for name, world in named_worlds.items():
        part = drawing.STREAM if name in worlds.STREAM_WORLDS else drawing.TUNING
        assert {drawing.part_of(drawing.DOMAINS[domain], frame) for domain, frame in frames(world)} == {part}
    for world in pretrain_worlds:
        domain = drawing.DOMAINS[world.domain]
        assert {drawing.part_of(domain, frame) for _, frame in frames(world)} == {drawing.PRETRAIN}
        assert not bearing_pairs(world) & set(itertools.chain(*drawing.reserved_blocks(world.domain)))
    # But words, openers, cores and tails are all met in pretraining: only combinations are new.
    known = set().union(*map(words_of, pretrain_worlds))
    assert set().union(*map(words_of, named_worlds.values())) <= known
    for part in ("opener", "core", "tail"):
        met, needed = (
            {(domain, getattr(frame, part)) for domain, frame in found}
            for found in (open_frames, stream_frames | tuning_frames)
        )
        assert needed <= met


def test_only_bearing_roles_depend_on_the_label(named_worlds, pretrain_worlds):
    for world in (*named_worlds.values(), *pretrain_worlds):
        domain = drawing.DOMAINS[world.domain]
        for label in world.labels:
            assert label.categories.keys() == label.words.keys() == domain.roles.keys()
            for role, categories in domain.roles.items():
                own = label.categories[role]
                if role in domain.bearing:
                    assert len(own) == 1 and own[0] in categories
                else:
                    assert own == categories
                # The first eight words of every category, without one twice.
                assert label.words[role] == tuple(word for name in own for word in LEXICON[name][:8])
                assert len(set(label.words[role])) == len(label.words[role]) == 8 * len(own)


def test_tuning_worlds_share_no_pair_with_stream_worlds(named_worlds):
    stream, tuning = (
        {(named_worlds[name].domain, pair) for name in names for pair in bearing_pairs(named_worlds[name])}
        for names in (worlds.STREAM_WORLDS, worlds.TUNING_WORLDS)
    )
    assert not stream & tuning


@pytest.mark.parametrize("domain", drawing.DOMAINS.values(), ids=lambda domain: domain.name)
def test_two_blocks_of_frames_and_a_third_of_the_pairs_are_reserved(domain):
    parts = parts_of_pairs(domain)
    shares = collections.Counter(parts.values())
    assert shares == {drawing.STREAM: 9, drawing.TUNING: 9, drawing.PRETRAIN: 46}
    # Every opener and every tail is also open, and none is in both blocks. So each block is three by three.
    for position, texts in enumerate((domain.openers, domain.tails)):
        found = collections.Counter(
            frozenset(part for pair, part in parts.items() if pair[position] == text) for text in texts
        )
        assert found == {
            frozenset((drawing.PRETRAIN, drawing.STREAM)): 3,
            frozenset((drawing.PRETRAIN, drawing.TUNING)): 3,
            frozenset((drawing.PRETRAIN,)): 2,
        }
    first, second = (len(domain.roles[role]) for role in domain.bearing)
    pairs = set(itertools.chain(*drawing.reserved_blocks(domain.name)))
    assert 0.25 <= len(pairs) / (first * second) <= 0.4


def test_a_pretraining_world_has_three_openers_and_two_or_three_tails_of_open_pairs(pretrain_worlds):
    parts = {domain.name: parts_of_pairs(domain) for domain in drawing.DOMAINS.values()}
    sizes = set()
    for world in pretrain_worlds:
        openers, tails = ends([frame for label in world.labels for frame in label.frames])
        sizes.add((len(openers), len(tails)))
        pairs = itertools.product(openers, tails)
        assert {parts[world.domain][pair] for pair in pairs} == {drawing.PRETRAIN}
    assert sizes == {(3, 2), (3, 3)}


def test_pretraining_worlds_are_drawn_without_end(pretrain_worlds):
    assert {world.domain for world in pretrain_worlds} == set(drawing.DOMAINS)
    assert {len(world.labels) for world in pretrain_worlds} == set(range(3, 9))
    assert len({repr(world.labels) for world in pretrain_worlds}) == len(pretrain_worlds)
    assert worlds.pretrain_world(7) == pretrain_worlds[7]
    assert worlds.pretrain_world(2**62).labels


@functools.cache
def world_with_oracle(seed):
    """A pretraining world, its words, and its languages as expressions, which take long to compile."""
    world = worlds.pretrain_world(seed)
    expressions = {label.name: as_regular_expression(label) for label in world.labels}
    return world, sorted(words_of(world)), expressions


@settings(max_examples=200, deadline=None)
@given(st.data())
def test_the_verifier_agrees_with_a_regular_expression_on_changed_sentences(data):
    world, known, expressions = world_with_oracle(data.draw(st.integers(0, 11)))
    rng = np.random.default_rng(data.draw(st.integers(0, 10**6)))
    index = data.draw(st.integers(0, len(world.labels) - 1))
    tokens = world.sample(rng, index).split()
    position = data.draw(st.integers(0, len(tokens) - 1))
    changes = {
        "replace": [*tokens[:position], data.draw(st.sampled_from(known)), *tokens[position + 1 :]],
        "drop": [*tokens[:position], *tokens[position + 1 :]],
        "insert": [*tokens[:position], data.draw(st.sampled_from(known)), *tokens[position:]],
        "cut": tokens[:position],
    }
    changed = " ".join(changes[data.draw(st.sampled_from(sorted(changes)))])
    for name, expression in expressions.items():
        assert world.verify(changed, name) == (expression.fullmatch(changed) is not None)


@settings(max_examples=50, deadline=None)
@given(st.integers(0, 50), st.integers(0, 10**6), st.data())
def test_a_foreign_word_anywhere_is_rejected(seed, draw, data):
    world = worlds.pretrain_world(seed)
    tokens = world.sample(np.random.default_rng(draw), 0).split()
    tokens[data.draw(st.integers(0, len(tokens) - 1))] = "qwerty"
    assert not any(world.verify(" ".join(tokens), name) for name in world.label_names)


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


def test_a_task_has_disjoint_splits_of_the_sizes_asked_for():
    task = worlds.load_task("travel_1", examples_per_label=4, train_per_label=50, test_per_label=20)
    world = worlds.stream_world("travel_1")
    assert task.labels == world.label_names
    assert len(task.labels) == 5
    texts = [example.text for split in (task.examples, task.train, task.test) for example in split]
    assert len(set(texts)) == len(texts) == 5 * (4 + 50 + 20)
    ids = [example.id for split in (task.examples, task.train, task.test) for example in split]
    assert len(set(ids)) == len(ids)
    for label in task.labels:
        for split, size in ((task.examples, 4), (task.train, 50), (task.test, 20)):
            own = [example for example in split if example.label == label]
            assert len(own) == size
            assert all(task.verifier(example.text, label) for example in own)


def test_splits_follow_from_the_seed_and_more_examples_only_add():
    few = worlds.load_task("bank_1", examples_per_label=4)
    many = worlds.load_task("bank_1", examples_per_label=8)
    other = worlds.load_task("bank_1", examples_per_label=8, seed=1)
    assert few.test == many.test
    assert few.train == many.train
    assert few.examples_of(few.labels[1]) == many.examples_of(many.labels[1])[:4]
    assert {example.text for example in other.examples} != {example.text for example in many.examples}


def test_everything_is_the_same_in_another_process():
    program = (
        "from streamsynth.tasks import worlds\n"
        "print(worlds.content_hash())\n"
        "print(*(worlds.load_task(n, seed=3).examples for n in worlds.STREAMS['unrelated']))\n"
    )
    outputs = [
        subprocess.run(
            [sys.executable, "-c", program],
            cwd=Path(__file__).parent.parent,
            env={**os.environ, "PYTHONHASHSEED": hash_seed},
            check=True,
            capture_output=True,
            text=True,
        ).stdout
        for hash_seed in ("1", "2")
    ]
    assert outputs[0] == outputs[1]
    assert outputs[0].startswith(worlds.content_hash())


def test_the_corpus_holds_the_vocabulary_of_pretraining():
    sentences = worlds.corpus(0, 2000)
    assert len(sentences) == 2000
    assert sentences == worlds.corpus(0, 2000)
    assert sentences[:100] == worlds.corpus(0, 100)
    assert sentences != worlds.corpus(1, 2000)
    assert all(re.fullmatch(r"[a-z]+( [a-z]+)*", sentence) for sentence in sentences)
    assert len(set(" ".join(sentences).split())) > 900


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: worlds.load_task("bnak_1"), ["bnak_1", "bank_1", "tuning_film"]),
        (lambda: worlds.load_task("bank_1", train_per_label=10**7), ["bank_1", "train_per_label"]),
        (
            lambda: worlds.load_task(
                "hobby_1", difficulty=worlds.Difficulty(words_per_category=2, cores_per_label=1)
            ),
            ["hobby_1", "too few", "raise worlds.words_per_category"],
        ),
        (lambda: worlds.Difficulty(labels=9), ["worlds.labels", "9", "3 to 8"]),
        (lambda: worlds.Difficulty(words_per_category=13), ["worlds.words_per_category", "13", "2 to 12"]),
        (lambda: worlds.Difficulty(cores_per_label=8), ["worlds.cores_per_label", "8", "1 to 7"]),
    ],
)
def test_a_mistake_is_one_clear_sentence(call, words):
    with pytest.raises(UserError) as caught:
        call()
    message = str(caught.value)
    assert "\n" not in message
    assert all(word in message for word in words), message
