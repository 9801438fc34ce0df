"""How worlds are drawn from the domains, and what is kept apart for the streams that are measured.

Every frame (opener, core, tail) belongs by a hash of its text to one *part*: "pretrain" (5 of 8), "stream"
(2 of 8) or "tuning" (1 of 8). Of the grid of bearing categories, 2 x 2 blocks along a hashed diagonal are
reserved: pretraining draws its labels outside the blocks, stream and tuning worlds inside them. So a policy
has met every word and most parts of a frame, but no frame and no combination of a stream world.
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
_PART_OF_BUCKET = (STREAM, STREAM, TUNING, PRETRAIN, PRETRAIN, PRETRAIN, PRETRAIN, PRETRAIN)
MIN_LABELS, MAX_LABELS = 3, 8
# How many openers and tails a world has to choose from at least: few, so that its labels share them.
_MIN_POOL = 4


@dataclasses.dataclass(frozen=True)
class Difficulty:
    """How hard a world is to learn.

    Attributes:
      labels: number of labels, 3 to 8; None leaves it to the world (pretraining draws it).
      frames_per_label: own frames of a label, at most as many as a domain has cores.
      words_per_category: only the first so many words of a category are used.
      odd_category_rate: how often a label departs from its world in the category of a role that is not
        bearing; in [0, 1]. Such a category alone gives labels away, so a low rate is harder.
    """

    labels: int | None = None
    frames_per_label: int = 6
    words_per_category: int = 12
    odd_category_rate: float = 0.2

    def __post_init__(self):
        limits = {
            "labels": (MIN_LABELS, MAX_LABELS),
            "frames_per_label": (1, min(len(domain.cores) for domain in DOMAINS.values())),
            "words_per_category": (2, min(len(words) for words in LEXICON.values())),
            "odd_category_rate": (0.0, 1.0),
        }
        for key, (low, high) in limits.items():
            value = getattr(self, key)
            if value is None and key == "labels":
                continue
            if not low <= value <= high:
                raise UserError(f"difficulty.{key} is {value}; give a number from {low} to {high}.")


def stable_rng(*parts: object) -> np.random.Generator:
    """A generator that depends on the text of its arguments alone, in every process and on every machine."""
    return np.random.default_rng(int.from_bytes(_digest(*parts)[:16], "big"))


def part_of(domain: Domain, frame: Frame) -> str:
    """Which worlds may use the frame: "pretrain", "stream" or "tuning"."""
    bucket = _digest("frame", domain.name, *frame.tokens)[0] % len(_PART_OF_BUCKET)
    return _PART_OF_BUCKET[bucket]


@functools.cache
def frames_by_core(domain_name: str, part: str) -> dict[str, tuple[Frame, ...]]:
    """The frames of one part of a domain, by core. A frame in which a role occurs in two of its three
    pieces would repeat itself ("our aunt ... to please our aunt") and is left out."""
    domain = DOMAINS[domain_name]
    frames: dict[str, list[Frame]] = {core: [] for core in domain.cores}
    for opener, core, tail in itertools.product(domain.openers, domain.cores, domain.tails):
        if _slots(core) & _slots(tail):
            continue
        frame = Frame(opener, core, tail)
        if part_of(domain, frame) == part:
            frames[core].append(frame)
    return {core: tuple(found) for core, found in frames.items()}


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
    """The pretraining world of a seed; how many labels (if not given) and frames it has is drawn too."""
    rng = stable_rng("pretrain", seed)
    drawn = dataclasses.replace(
        difficulty,
        labels=difficulty.labels or int(rng.integers(MIN_LABELS, MAX_LABELS + 1)),
        frames_per_label=int(
            rng.integers(max(1, difficulty.frames_per_label - 2), difficulty.frames_per_label + 1)
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
    usual = {
        role: categories[rng.integers(len(categories))]
        for role, categories in domain.roles.items()
        if role not in domain.bearing
    }
    frames = _deal_frames(domain, part, len(pairs), difficulty.frames_per_label, rng)
    labels = []
    for pair, own_frames in zip(pairs, frames, strict=True):
        categories = dict(zip(domain.bearing, pair, strict=True))
        for role, category in usual.items():
            choices = domain.roles[role]
            odd = rng.random() < difficulty.odd_category_rate
            categories[role] = choices[rng.integers(len(choices))] if odd else category
        count = difficulty.words_per_category
        words = {role: LEXICON[category][:count] for role, category in categories.items()}
        labels.append(Label(f"{pair[0]} and {pair[1]}", categories, words, own_frames))
    first, second = domain.bearing
    description = f"{domain.topic} told apart by {first} and {second}"
    return World(name, description, domain.name, tuple(labels))


def _deal_frames(
    domain: Domain, part: str, num_labels: int, per_label: int, rng: np.random.Generator
) -> list[tuple[Frame, ...]]:
    """Frames for each label: the same cores for all, each time with another opener or tail.

    So neither a core nor, in a small pool, an opener or a tail gives a label away.
    """
    by_core = frames_by_core(domain.name, part)
    shuffled = [domain.cores[i] for i in rng.permutation(len(domain.cores))]
    cores = [core for core in shuffled if len(by_core[core]) >= num_labels]
    if len(cores) < per_label:
        raise UserError(
            f"difficulty.frames_per_label is {per_label}, but the {part} part of the domain {domain.name!r} "
            f"has only {len(cores)} for each of {num_labels} labels; lower frames_per_label or labels."
        )
    openers = [domain.openers[i] for i in rng.permutation(len(domain.openers))]
    tails = [domain.tails[i] for i in rng.permutation(len(domain.tails))]
    dealt: list[list[Frame]] = [[] for _ in range(num_labels)]
    for core in cores[:per_label]:
        pool: list[Frame] = []
        for size in range(_MIN_POOL, max(len(openers), len(tails)) + 1):
            pool = [f for f in by_core[core] if f.opener in openers[:size] and f.tail in tails[:size]]
            if len(pool) >= num_labels:
                break
        for label, i in enumerate(rng.permutation(len(pool))[:num_labels]):
            dealt[label].append(pool[i])
    return [tuple(frames) for frames in dealt]


def _slots(text: str) -> set[str]:
    return {token for token in text.split() if is_slot(token)}


def _digest(*parts: object) -> bytes:
    return hashlib.sha256("\x1f".join(map(str, parts)).encode()).digest()
