"""The embedded worlds: their languages are exact, kept apart, shared in words, and the same everywhere."""

import collections
import dataclasses
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
PRETRAIN_SEEDS = range(600)


def bearing_pairs(world):
    first, second = drawing.DOMAINS[world.domain].bearing
    return {(*label.categories[first], *label.categories[second]) for label in world.labels}


def frames(world):
    return {(world.domain, frame) for label in world.labels for frame in label.frames}


def frames_of(openers, cores, tails):
    """All combinations of the pieces, also those in which a role would occur in two pieces."""
    return {drawing.Frame(*pieces) for pieces in itertools.product(openers, cores, tails)}


def frames_by_part(domain):
    """part -> all frames of the domain that belong to it."""
    parts = collections.defaultdict(set)
    for frame in frames_of(domain.openers, domain.cores, domain.tails):
        parts[drawing.part_of(domain, frame)].add(frame)
    return parts


def pieces_of(some_frames):
    """The openers, the cores and the tails of frames."""
    return tuple({getattr(frame, kind) for frame in some_frames} for kind in ("opener", "core", "tail"))


def repeats_a_role(frame):
    opener, core, tail = (set(re.findall(r"{\w+}", text)) for text in (frame.opener, frame.core, frame.tail))
    return bool(opener & core or opener & tail or core & tail)


def pairs_of_pieces(frame):
    """The pairs that a frame has of its three pieces, each piece with its kind."""
    return itertools.combinations(dataclasses.asdict(frame).items(), 2)


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
    # One half for the streams, one for tuning.
    for texts, count in ((domain.openers, 8), (domain.cores, 12), (domain.tails, 8)):
        assert len(set(texts)) == len(texts) == count
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
    # All labels have the openers and tails of the reserved half, and each its choice of five of the cores.
    part = drawing.STREAM if name in worlds.STREAM_WORLDS else drawing.TUNING
    openers, cores, tails = pieces_of(frames_by_part(drawing.DOMAINS[world.domain])[part])
    choices = []
    for label in world.labels:
        choices.append(frozenset(frame.core for frame in label.frames))
        assert len(label.frames) == len(set(label.frames))
        possible = frames_of(openers, choices[-1], tails)
        assert set(label.frames) == {frame for frame in possible if not repeats_a_role(frame)}
    assert {len(own) for own in choices} == {5}
    assert set().union(*choices) == cores
    # With more labels than choices, none is taken twice before all are.
    assert len(set(choices)) == min(len(world.labels), 6)
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
    count = worlds.Difficulty().words_per_category
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
                # The first words of every category, without one twice.
                assert label.words[role] == tuple(word for name in own for word in LEXICON[name][:count])
                assert len(set(label.words[role])) == len(label.words[role]) == count * len(own)


def test_tuning_worlds_share_no_pair_with_stream_worlds(named_worlds):
    stream, tuning = (
        {(named_worlds[name].domain, pair) for name in names for pair in bearing_pairs(named_worlds[name])}
        for names in (worlds.STREAM_WORLDS, worlds.TUNING_WORLDS)
    )
    assert not stream & tuning


@pytest.mark.parametrize("domain", drawing.DOMAINS.values(), ids=lambda domain: domain.name)
def test_a_quarter_of_the_frames_and_a_third_of_the_pairs_are_reserved(domain):
    parts = frames_by_part(domain)
    sizes = {part: len(own) for part, own in parts.items()}
    assert sizes == {drawing.STREAM: 4 * 6 * 4, drawing.TUNING: 4 * 6 * 4, drawing.PRETRAIN: 576}
    # Half of the openers, cores and tails are the streams' and half tuning's. So each has all frames of its
    # halves, and any two pieces of a reserved frame are also in an open one.
    stream, tuning = (pieces_of(parts[part]) for part in (drawing.STREAM, drawing.TUNING))
    for one, other, texts in zip(stream, tuning, (domain.openers, domain.cores, domain.tails), strict=True):
        assert one | other == set(texts)
        assert len(one) == len(other) == len(texts) / 2
    first, second = (len(domain.roles[role]) for role in domain.bearing)
    pairs = set(itertools.chain(*drawing.reserved_blocks(domain.name)))
    assert 0.25 <= len(pairs) / (first * second) <= 0.4


def test_a_pretraining_world_has_four_openers_and_four_tails_and_one_more_core_than_a_label(pretrain_worlds):
    parts = {domain.name: frames_by_part(domain) for domain in drawing.DOMAINS.values()}
    sizes = set()
    for world in pretrain_worlds:
        openers, cores, tails = pieces_of([frame for label in world.labels for frame in label.frames])
        assert frames_of(openers, cores, tails) <= parts[world.domain][drawing.PRETRAIN]
        for label in world.labels:
            own = {frame.core for frame in label.frames}
            sizes.add((len(openers), len(cores), len(tails), len(own)))
            possible = frames_of(openers, own, tails)
            assert set(label.frames) == {frame for frame in possible if not repeats_a_role(frame)}
    assert sizes == {(4, 5, 4, 4), (4, 6, 4, 5)}


def test_every_pair_of_pieces_that_a_frame_can_have_is_met_in_pretraining():
    possible = {
        (domain.name, pair)
        for domain in drawing.DOMAINS.values()
        for frame in frames_of(domain.openers, domain.cores, domain.tails)
        if not repeats_a_role(frame)
        for pair in pairs_of_pieces(frame)
    }
    met = set()
    for seed in range(2500):  # enough for all of them
        world = worlds.pretrain_world(seed)
        met.update((domain, pair) for domain, frame in frames(world) for pair in pairs_of_pieces(frame))
    assert met == possible


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
        (lambda: worlds.Difficulty(cores_per_label=6), ["worlds.cores_per_label", "6", "1 to 5"]),
    ],
)
def test_a_mistake_is_one_clear_sentence(call, words):
    with pytest.raises(UserError) as caught:
        call()
    message = str(caught.value)
    assert "\n" not in message
    assert all(word in message for word in words), message
