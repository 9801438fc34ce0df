"""Which texts are near-duplicates of what was kept: word-bigram Jaccard similarity, exact and incremental."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable

from streamsynth.errors import UserError
from streamsynth.tasks.splits import normalise

# How many of its rare bigrams a text must share with another before the two are compared: fewer means more
# comparisons, more means longer lists to go through. On texts from templates 3 was the fastest of 1 to 4.
_SHARED = 3
# Stands before the first and after the last word, and is itself no word.
_EDGE = ""


def bigrams(text: str) -> frozenset[str]:
    """The bigrams of a text's normalised words and its edges: n + 1 of them for n different words."""
    words = normalise(text).split(" ")
    return frozenset(f"{left} {right}" for left, right in zip([_EDGE, *words], [*words, _EDGE], strict=True))


def jaccard(left: frozenset[str], right: frozenset[str]) -> float:
    """|intersection| / |union| of two non-empty sets."""
    shared = len(left & right)
    return shared / (len(left) + len(right) - shared)


class NearDuplicates:
    """An index of texts that tells whether a new one has a Jaccard similarity >= threshold to any of them.

    Of n different words, a text has the similarity (n - 1) / (n + 3) to itself with one word exchanged, and
    n / (n + 3) to itself with one more word: at the threshold 0.8 these are near-duplicates from 17 and 12
    words on.

    The answer is exact. A text x with similarity >= t to y shares at least c = ceil(t |x|) bigrams with y, so
    among any |x| - c + s bigrams of x at least s <= c are y's. Only texts that hold s of x's |x| - c + s
    *rarest* bigrams are compared.
    """

    def __init__(self, threshold: float = 0.8, texts: Iterable[str] = ()):
        """An index of `texts`, equal to an empty one after `add` for each."""
        if not 0 < threshold <= 1:
            raise UserError(f"the near-duplicate threshold must be above 0 and at most 1, not {threshold}")
        self.threshold = threshold
        self._texts: list[frozenset[str]] = []
        self._holders: dict[str, list[int]] = defaultdict(list)  # bigram -> texts that hold it
        for text in texts:
            self.add(text)

    def __len__(self) -> int:
        return len(self._texts)

    def seen(self, text: str) -> bool:
        """Whether the text is a near-duplicate of an added one."""
        own = bigrams(text)
        # The slack keeps a product such as 0.8 * 5, if it comes out above 4, from excluding an exact tie.
        needed = max(math.ceil(self.threshold * len(own) - 1e-9), 1)
        shared = min(_SHARED, needed)
        holders = sorted((self._holders.get(bigram, ()) for bigram in own), key=len)
        at_least: list[set[int]] = [set() for _ in range(shared)]  # [k]: texts that were in more than k lists
        for texts in holders[: len(own) - needed + shared]:
            for k in reversed(range(1, shared)):
                at_least[k].update(at_least[k - 1].intersection(texts))
            at_least[0].update(texts)
        return any(jaccard(own, self._texts[i]) >= self.threshold for i in at_least[-1])

    def add(self, text: str) -> None:
        """Adds a text, whether or not it was seen."""
        own = bigrams(text)
        for bigram in own:
            self._holders[bigram].append(len(self._texts))
        self._texts.append(own)
