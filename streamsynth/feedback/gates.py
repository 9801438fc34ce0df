"""Gates: what a sample must pass before it is worth anything.

A gate looks at one sample and at what was there before the batch. Samples of a batch do not gate one
another, since that would bias the diversity credit, and no gate sees a test text.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence

import numpy as np

from streamsynth.errors import UserError
from streamsynth.feedback.features import words
from streamsynth.tasks.question_answer import answer_form
from streamsynth.tasks.task import FIELD_SEPARATOR, Task, split_fields

# In the order in which a rejection is attributed; "answer" is a gate of question-answer tasks alone.
GATES = ("finished", "parses", "answer", "length", "not_copied", "not_seen")
# A shorter example, such as "thank you", may stand inside an honest text; then only equality is a copy.
MIN_CONTAINED_WORDS = 4


@dataclasses.dataclass(frozen=True)
class Gates:
    """Which samples passed which gate.

    Attributes:
      by_name: for each of the `GATES` that the task's kind has, [N] bool, judged independently of the others.
      passed: [N] bool, all gates passed.
    """

    by_name: dict[str, np.ndarray]
    passed: np.ndarray

    def shares(self) -> dict[str, float]:
        """The share of samples that pass each gate by itself, and under "all" that pass every gate."""
        num_samples = max(len(self.passed), 1)
        counts = {name: passes.sum() for name, passes in self.by_name.items()} | {"all": self.passed.sum()}
        return {name: float(count) / num_samples for name, count in counts.items()}

    def rejections(self) -> dict[str, int]:
        """How many samples each gate was the first to reject; with those that passed they add up to N."""
        standing = np.ones_like(self.passed)
        counts = {}
        for name, passes in self.by_name.items():
            counts[name] = int((standing & ~passes).sum())
            standing &= passes
        return counts


def check(
    texts: Sequence[str],
    finished: Sequence[bool] | np.ndarray,
    rejections: Sequence[str],
    *,
    task: Task,
    min_words: int,
    max_words: int,
    seen: Callable[[str], bool],
) -> Gates:
    """Puts N samples through all gates.

    Args:
      texts: N decoded completions.
      finished: [N], whether the end-of-text token came in time.
      rejections: N names of what is wrong with a text's form, "" where it parsed into the task's fields.
      task: its examples are what may not be copied. A copy has the words of one, or contains them in a row;
        where the task has questions and answers, the words of its question, whatever the answer.
      min_words: the fewest words a text may have, all fields together.
      max_words: the most.
      seen: whether a text (its `Task.identity`) is a near-duplicate of what was kept before this batch.

    Raises:
      UserError: no number of words lies between the two limits.
    """
    if not 0 <= min_words <= max_words:
        raise UserError(
            f"no text can have at least {min_words} and at most {max_words} words: set min_words <= max_words"
        )
    num_words = np.array([len(_words(text)) for text in texts], np.int64)
    known = [_words(task.identity(example.text)) for example in task.examples]
    equal = {_phrase(example) for example in known}
    contained = [_phrase(example) for example in known if len(example) >= MIN_CONTAINED_WORDS]

    def copied(text: str) -> bool:
        whole, identity = _phrase(_words(text)), _phrase(_words(task.identity(text)))
        return identity in equal or any(example in whole for example in contained)

    by_name = {
        "finished": np.asarray(finished, bool),
        "parses": np.array([not rejection for rejection in rejections], bool),
        "length": (min_words <= num_words) & (num_words <= max_words),
        "not_copied": np.array([not copied(text) for text in texts], bool),
        "not_seen": np.array([not seen(task.identity(text)) for text in texts], bool),
    }
    if task.kind == "qa":
        form, fields = answer_form(task.examples), [split_fields(text, 2) for text in texts]
        by_name["answer"] = np.array([parts is not None and form.accepts(*parts) for parts in fields], bool)
    by_name = {name: by_name[name] for name in GATES if name in by_name}
    return Gates(by_name=by_name, passed=np.logical_and.reduce(list(by_name.values())))


def _words(text: str) -> list[str]:
    # A copy stays one when the model moves the border between two fields.
    return words(text.replace(FIELD_SEPARATOR, " "))


def _phrase(spoken: list[str]) -> str:
    """Words as one string with spaces around each, so that "art" is not found in "party"."""
    return f" {' '.join(spoken)} "
