"""How worlds are drawn from the domains, and what is kept apart for the streams that are measured.

A label's frames are all combinations of its world's openers, cores of its own and its world's tails, so
that whoever has seen the parts in its examples can write every frame. Each domain's openers, cores and tails
are halved by hash. Frames whose three parts are all from the first half belong to the streams, those all
from the second half to tuning; pretraining has the mixed ones, among them every pair of parts. Of the grid
of bearing categories, 2 x 2 blocks along a hashed diagonal are reserved: pretraining draws its labels
outside the blocks, stream and tuning worlds inside them. So a policy has met every word and any two parts
of a frame together, but no frame and no combination of categories of a stream world.
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
_GROUP = 4  # openers, and tails, that a world has: half of a domain's
MIN_LABELS, MAX_LABELS = 3, 8
# How many of its world's cores a label lacks: which ones makes its set of frames its own.
_SPARE_CORES = 1


@dataclasses.dataclass(frozen=True)
class Difficulty:
    """How hard a world is to learn.

    Attributes:
      labels: number of labels, 3 to 8; None leaves it to the world (pretraining draws it).
      cores_per_label: cores of a label; its frames are these with the world's openers and tails. Labels
        have different cores as long as there are choices: one more than they have cores.
      words_per_category: only the first so many words of a category are used. A role that is not bearing
        takes those of all its categories.
    """

    labels: int | None = None
    cores_per_label: int = 5
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
    """Which worlds may use the frame: "pretrain", "stream" or "tuning"."""
    for part, pieces in _halves(domain.name).items():
        if all(own in kept for own, kept in zip((frame.opener, frame.core, frame.tail), pieces, strict=True)):
            return part
    return PRETRAIN


@functools.cache
def _halves(domain_name: str) -> dict[str, tuple[tuple[str, ...], ...]]:
    """The openers, cores and tails of each reserved part, in an order by hash."""
    domain = DOMAINS[domain_name]
    halves: dict[str, list[tuple[str, ...]]] = {STREAM: [], TUNING: []}
    for kind in ("openers", "cores", "tails"):
        texts = sorted(getattr(domain, kind), key=lambda text: _digest(kind, domain_name, text))
        halves[STREAM].append(tuple(texts[: len(texts) // 2]))
        halves[TUNING].append(tuple(texts[len(texts) // 2 :]))
    return {part: tuple(pieces) for part, pieces in halves.items()}


def _deal_pieces(domain: Domain, part: str, rng: np.random.Generator) -> tuple[tuple[str, ...], ...]:
    """The openers, the cores and the tails of a world, no three of which make a frame of another part.

    A pretraining world has one kind of piece from the second half alone, which makes no stream frame,
    another kind from the first half alone, which makes no tuning frame, and the third from anywhere.
    """
    halves = _halves(domain.name)
    if part != PRETRAIN:
        return halves[part]
    sources = [halves[TUNING], halves[STREAM], (domain.openers, domain.cores, domain.tails)]
    return tuple(sources[source][kind] for kind, source in enumerate(rng.permutation(3)))


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
    openers, cores, tails = _deal_pieces(domain, part, rng)
    openers = tuple(openers[i] for i in rng.permutation(len(openers))[:_GROUP])
    tails = tuple(tails[i] for i in rng.permutation(len(tails))[:_GROUP])
    fitting = _fitting_cores(cores, tails)
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


def _fitting_cores(cores: tuple[str, ...], tails: tuple[str, ...]) -> list[str]:
    """The cores that make a frame with at least one of the tails."""
    return [core for core in cores if any(not _slots(core) & _slots(tail) for tail in tails)]


@functools.cache
def _most_cores() -> int:
    """How many cores a label can have in every domain, whichever pieces its world has."""
    fitting = (
        _fitting_cores(cores, tails)
        for domain in DOMAINS.values()
        for _, cores, _ in _halves(domain.name).values()
        for tails in itertools.combinations(domain.tails, _GROUP)
    )
    return min(map(len, fitting)) - _SPARE_CORES


@functools.cache
def _slots(text: str) -> frozenset[str]:
    return frozenset(token for token in text.split() if is_slot(token))


def _digest(*parts: object) -> bytes:
    return hashlib.sha256("\x1f".join(map(str, parts)).encode()).digest()
