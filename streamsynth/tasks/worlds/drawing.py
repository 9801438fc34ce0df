"""How worlds are drawn from the domains, and what is kept apart for the streams that are measured.

A label's frames are all combinations of its world's openers, cores of its own and its world's tails, so
that whoever has seen the parts in its examples can write every frame. Of the pairs of an opener and a
tail, a block of three by three belongs to the streams and another one to tuning; pretraining has all
others. Of the grid of bearing categories, 2 x 2 blocks along a hashed diagonal are reserved: pretraining
draws its labels outside the blocks, stream and tuning worlds inside them. So a policy has met every word
and every part of a frame, but no frame and no combination of categories of a stream world.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import itertools

import numpy as np

from streamsynth.errors import UserError
from streamsynth.tasks.worlds.domains_leisure import LEISURE
from streamsynth.tasks.worlds.domains_town import TOWN
from streamsynth.tasks.worlds.grammar import Domain, Frame, Label, World, is_slot
from streamsynth.tasks.worlds.lexicon import LEXICON

DOMAINS: dict[str, Domain] = {domain.name: domain for domain in (*TOWN, *LEISURE)}
PRETRAIN, STREAM, TUNING = "pretrain", "stream", "tuning"
_GROUP = 3  # openers, and tails, that a world has
MIN_LABELS, MAX_LABELS = 3, 8
# How many of its world's cores a label lacks: which ones makes its set of frames its own.
_SPARE_CORES = 2


@dataclasses.dataclass(frozen=True)
class Difficulty:
    """How hard a world is to learn.

    Attributes:
      labels: number of labels, 3 to 8; None leaves it to the world (pretraining draws it).
      cores_per_label: cores of a label; its frames are these with the world's openers and tails. Labels
        have different cores as long as there are choices: 3 for one core, 6 for two, 10 for three.
      words_per_category: only the first so many words of a category are used. A role that is not bearing
        takes those of all its categories.
    """

    labels: int | None = None
    cores_per_label: int = 4
    words_per_category: int = 8

    def __post_init__(self):
        limits = {
            "labels": (MIN_LABELS, MAX_LABELS),
            "cores_per_label": (1, _most_cores()),
            "words_per_category": (2, min(len(words) for words in LEXICON.values())),
        }
        for key, (low, high) in limits.items():
            value = getattr(self, key)
            if value is None and key == "labels":
                continue
            if not low <= value <= high:
                raise UserError(f"worlds.{key} is {value}; give a number from {low} to {high}.")


def stable_rng(*parts: object) -> np.random.Generator:
    """A generator that depends on the text of its arguments alone, in every process and on every machine."""
    return np.random.default_rng(int.from_bytes(_digest(*parts)[:16], "big"))


def part_of(domain: Domain, frame: Frame) -> str:
    """Which worlds may use the frame: "pretrain", "stream" or "tuning". Its opener and its tail decide."""
    return _part_of_pair(domain.name, frame.opener, frame.tail)


def _part_of_pair(domain_name: str, opener: str, tail: str) -> str:
    for part, (openers, tails) in _reserved_texts(domain_name).items():
        if opener in openers and tail in tails:
            return part
    return PRETRAIN


@functools.cache
def _reserved_texts(domain_name: str) -> dict[str, tuple[tuple[str, ...], tuple[str, ...]]]:
    """The openers and the tails of the worlds of each reserved part, in an order by hash."""
    domain = DOMAINS[domain_name]
    openers = sorted(domain.openers, key=lambda text: _digest("openers", domain_name, text))
    tails = sorted(domain.tails, key=lambda text: _digest("tails", domain_name, text))
    return {
        part: (tuple(openers[start : start + _GROUP]), tuple(tails[start : start + _GROUP]))
        for part, start in ((STREAM, 0), (TUNING, _GROUP))
    }


def _deal_ends(
    domain: Domain, part: str, rng: np.random.Generator
) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """The openers and the tails of a world, no pair of which belongs to another part."""
    if part != PRETRAIN:
        return _reserved_texts(domain.name)[part]
    openers = tuple(domain.openers[i] for i in rng.permutation(len(domain.openers))[:_GROUP])
    open_tails = [
        tail
        for tail in domain.tails
        if all(_part_of_pair(domain.name, opener, tail) == PRETRAIN for opener in openers)
    ]
    return openers, tuple(open_tails[i] for i in rng.permutation(len(open_tails))[:_GROUP])


@functools.cache
def reserved_blocks(domain_name: str) -> tuple[tuple[tuple[str, str], ...], ...]:
    """The 2 x 2 blocks of (first, second) bearing categories that pretraining never sees.

    Both roles' categories are put into an order by hash; block b takes the rows and columns 2b, 2b + 1.
    With 4 x 6 categories that is a third of all pairs, and every category also occurs outside the blocks.
    """
    domain = DOMAINS[domain_name]
    rows, columns = (
        sorted(domain.roles[role], key=lambda category: _digest("order", domain_name, role, category))
        for role in domain.bearing
    )
    return tuple(
        tuple(itertools.product(rows[start : start + 2], columns[start : start + 2]))
        for start in range(0, min(len(rows), len(columns)) // 2 * 2, 2)
    )


@functools.cache
def _open_grids(domain_name: str, width: int) -> tuple[tuple[tuple[str, str], ...], ...]:
    """All 2 x width and width x 2 grids of bearing categories that hold no reserved pair."""
    domain = DOMAINS[domain_name]
    reserved = set(itertools.chain(*reserved_blocks(domain_name)))
    first, second = (domain.roles[role] for role in domain.bearing)
    grids = []
    for height_width in {(2, width), (width, 2)}:
        for rows in itertools.combinations(first, height_width[0]):
            for columns in itertools.combinations(second, height_width[1]):
                grid = tuple(itertools.product(rows, columns))
                if not reserved.intersection(grid):
                    grids.append(grid)
    return tuple(sorted(grids))


def draw_pretrain_world(seed: int, difficulty: Difficulty) -> World:
    """The pretraining world of a seed; how many labels (if not given) and cores it has is drawn too."""
    rng = stable_rng("pretrain", seed)
    drawn = dataclasses.replace(
        difficulty,
        labels=difficulty.labels or int(rng.integers(MIN_LABELS, MAX_LABELS + 1)),
        cores_per_label=int(
            rng.integers(max(1, difficulty.cores_per_label - 1), difficulty.cores_per_label + 1)
        ),
    )
    # A domain with few bearing categories has no open grid for 7 or 8 labels.
    width = (drawn.labels + 1) // 2
    domains = [domain for domain in DOMAINS.values() if _open_grids(domain.name, width)]
    domain = domains[rng.integers(len(domains))]
    grids = _open_grids(domain.name, width)
    grid = grids[rng.integers(len(grids))]
    pairs = [grid[i] for i in sorted(rng.permutation(len(grid))[: drawn.labels])]
    return _draw(f"pretrain_{domain.name}_{seed}", domain, PRETRAIN, pairs, drawn, rng)


def draw_reserved_world(
    name: str, domain_name: str, part: str, first_block: int, labels: int, difficulty: Difficulty
) -> World:
    """A stream or tuning world: labels from reserved pairs, frames from the part that is kept for it.

    Up to 4 labels come from one 2 x 2 block, the first of them `first_block`; more take the next block too.
    """
    rng = stable_rng(part, name)
    domain = DOMAINS[domain_name]
    blocks = reserved_blocks(domain_name)
    wanted = difficulty.labels or labels
    used = -(-wanted // 4)
    pairs = []
    for i in range(used):
        block = blocks[(first_block + i) % len(blocks)]
        count = wanted // used + (i < wanted % used)
        # Cells in their order: any first two share the row, so that no label stands alone.
        pairs.extend(block[:count])
    return _draw(name, domain, part, pairs, difficulty, rng)


def _draw(
    name: str,
    domain: Domain,
    part: str,
    pairs: list[tuple[str, str]],
    difficulty: Difficulty,
    rng: np.random.Generator,
) -> World:
    frames = _deal_frames(domain, part, len(pairs), difficulty.cores_per_label, rng)
    labels = []
    for pair, own_frames in zip(pairs, frames, strict=True):
        # A role that is not bearing takes any word of its categories, in every label alike.
        categories = domain.roles | {
            role: (category,) for role, category in zip(domain.bearing, pair, strict=True)
        }
        count = difficulty.words_per_category
        words = {
            role: tuple(word for name in names for word in LEXICON[name][:count])
            for role, names in categories.items()
        }
        labels.append(Label(f"{pair[0]} and {pair[1]}", categories, words, own_frames))
    first, second = domain.bearing
    description = f"{domain.topic} told apart by {first} and {second}"
    return World(name, description, domain.name, tuple(labels))


def _deal_frames(
    domain: Domain, part: str, num_labels: int, num_cores: int, rng: np.random.Generator
) -> list[tuple[Frame, ...]]:
    """Frames for each label: the world's openers and tails, and cores of its own choice from a small pool.

    A frame in which a role occurs in two of its pieces would repeat itself ("our aunt ... to please our
    aunt") and is left out.
    """
    openers, tails = _deal_ends(domain, part, rng)
    fitting = _fitting_cores(domain, tails)
    pool = [fitting[i] for i in rng.permutation(len(fitting))[: num_cores + _SPARE_CORES]]
    choices = list(itertools.combinations(pool, num_cores))
    order = rng.permutation(len(choices))
    dealt = []
    for label in range(num_labels):
        # No choice is dealt twice before all have been dealt.
        cores = choices[order[label % len(choices)]]
        dealt.append(
            tuple(
                Frame(opener, core, tail)
                for opener, core, tail in itertools.product(openers, cores, tails)
                if not _slots(core) & _slots(tail)
            )
        )
    return dealt


def _fitting_cores(domain: Domain, tails: tuple[str, ...]) -> list[str]:
    """The cores that make a frame with at least one of the tails."""
    return [core for core in domain.cores if any(not _slots(core) & _slots(tail) for tail in tails)]


@functools.cache
def _most_cores() -> int:
    """How many cores a label can have in every domain, whichever tails its world has."""
    fitting = (
        _fitting_cores(domain, tails)
        for domain in DOMAINS.values()
        for tails in itertools.combinations(domain.tails, 2)
    )
    return min(map(len, fitting)) - _SPARE_CORES


@functools.cache
def _slots(text: str) -> frozenset[str]:
    return frozenset(token for token in text.split() if is_slot(token))


def _digest(*parts: object) -> bytes:
    return hashlib.sha256("\x1f".join(map(str, parts)).encode()).digest()
