"""Question-answer tasks: what their answers look like, judged by the examples, and numbers in one form."""

from __future__ import annotations

import dataclasses
import functools
import re
from collections.abc import Sequence
from fractions import Fraction

from streamsynth.tasks.splits import normalise
from streamsynth.tasks.task import Example, Task, join_fields, split_fields

# The columns of a set, and the fields of its texts.
FIELDS = ("question", "answer")

# At most 30 digits on either side of the point: no honest answer is longer, and what is read stays small. A
# denominator of six digits gives at most 19 decimals, so that a number in its one form can be read again.
_WHOLE = r"\d{1,3}(?:,\d{3}){1,9}|\d{1,30}"
_NUMBER = re.compile(
    r"(?P<sign>[+-]?)(?:[$€£¥] ?)?(?P<inner>[+-]?)"
    rf"(?:(?P<numerator>{_WHOLE})/(?P<denominator>\d{{1,6}})|(?P<whole>{_WHOLE})?(?:\.(?P<decimals>\d{{0,30}}))?)"
    r" ?%?\.?",
    re.ASCII,
)
# Of the 6,759 training questions of gsm8k, svamp and asdiv, all but one hold a digit or one of these words.
_NUMBER_NAMED = re.compile(
    r"\d|\b(?:zero|one|two|three|four|five|six|seven|eight|nine|ten|eleven|twelve|thirteen|fourteen|fifteen|"
    r"sixteen|seventeen|eighteen|nineteen|twenty|thirty|forty|fifty|sixty|seventy|eighty|ninety|hundred|"
    r"thousand|million|half|third|quarter|once|twice|thrice|double|triple|dozen|pair|both)\b",
    re.IGNORECASE,
)
# An answer may have so many times the words of the longest example. On the answers of commonsense_qa that
# passes 99.4% with two examples, the worst of 200 draws.
_LONGEST = 3


def number(text: str) -> Fraction | None:
    """The exact value of a text that is one number and nothing else, or None.

    Numbers are written 18, -3, +3, 1,234.50, .5 or 1/2. A currency sign before the digits, a percent sign
    after them and a full stop at the end are left out, so "50%" is 50: that is how data sets answer "what
    percentage". A unit in words makes a text no number, as in "18 apples": which units mean the same is not
    ours to guess.
    """
    match = _NUMBER.fullmatch(text.strip().replace("\N{MINUS SIGN}", "-"))
    if match is None or (match["sign"] and match["inner"]):
        return None
    if match["numerator"]:
        if not int(match["denominator"]):
            return None
        value = Fraction(int(match["numerator"].replace(",", "")), int(match["denominator"]))
    elif match["whole"] or match["decimals"]:
        decimals = match["decimals"] or ""
        digits = (match["whole"] or "").replace(",", "") + decimals
        value = Fraction(int(digits), 10 ** len(decimals))
    else:
        return None
    return -value if "-" in (match["sign"], match["inner"]) else value


def normalise_number(text: str) -> str | None:
    """The one form of a number, or None for any other text. Equal numbers have equal forms.

    A decimal without needless zeros where one is exact, or else a fraction in lowest terms.

    >>> normalise_number("$1,234.50"), normalise_number("3.0"), normalise_number("4/6")
    ('1234.5', '3', '2/3')
    """
    value = number(text)
    if value is None:
        return None
    places = next((places for places in range(31) if 10**places % value.denominator == 0), None)
    if places is None:
        return f"{value.numerator}/{value.denominator}"
    digits = str(abs(value.numerator) * 10**places // value.denominator).zfill(places + 1)
    sign = "-" if value < 0 else ""
    return sign + (f"{digits[:-places]}.{digits[-places:]}" if places else digits)


@dataclasses.dataclass(frozen=True)
class AnswerForm:
    """What the answers of a task look like.

    Attributes:
      numeric: they are numbers.
      counted: they are numbers, and every question holds a number, in digits or English words.
      quoted: they are no numbers, and each stands in its question, as where that lists the choices.
      max_words: the most words an answer may have.
    """

    numeric: bool
    counted: bool
    quoted: bool
    max_words: int

    def accepts(self, question: str, answer: str) -> bool:
        """Whether an answer has this form; whether it is right is not asked."""
        if self.numeric:
            return number(answer) is not None and (not self.counted or _holds_number(question))
        return len(answer.split()) <= self.max_words and (not self.quoted or _holds(question, answer))


@functools.lru_cache(maxsize=64)
def answer_form(examples: tuple[Example, ...]) -> AnswerForm:
    """The form that all the examples' answers have."""
    pairs = [example.fields for example in examples]
    numeric = all(number(answer) is not None for _, answer in pairs)
    return AnswerForm(
        numeric=numeric,
        counted=numeric and all(_holds_number(question) for question, _ in pairs),
        quoted=not numeric and all(_holds(question, answer) for question, answer in pairs),
        max_words=_LONGEST * max(len(answer.split()) for _, answer in pairs),
    )


def _holds_number(question: str) -> bool:
    return _NUMBER_NAMED.search(question) is not None


def _holds(question: str, answer: str) -> bool:
    return f" {normalise(answer)} " in f" {normalise(question)} "


def fields_of(task: Task, text: str) -> tuple[str, ...] | None:
    """The fields of a text as the policy wrote it, with its answer `normalised`; None for another form."""
    fields = split_fields(text, len(task.fields))
    return fields and normalised(task, fields)


def normalised(task: Task, fields: tuple[str, ...]) -> tuple[str, ...]:
    """The fields of a text, with the answer in its one form where the task's answers are numbers."""
    if task.kind != "qa" or not answer_form(task.examples).numeric:
        return fields
    question, answer = fields
    return question, normalise_number(answer) or answer


def with_normalised_answers(task: Task) -> Task:
    """The task with all its answers in one form, where they are numbers."""
    parts = {
        part: tuple(
            dataclasses.replace(row, fields=normalised(task, row.fields)) for row in getattr(task, part)
        )
        for part in ("examples", "train", "test")
    }
    return dataclasses.replace(task, **parts)


def wrongly_answered(examples: Sequence[Example]) -> list[str]:
    """Each question with the answer of the next example that has another one, as the policy would write it.

    Where all answers are the same there is none.
    """
    texts = []
    for i, example in enumerate(examples):
        question, answer = example.fields
        others = (other.fields[1] for other in (*examples[i + 1 :], *examples[:i]))
        wrong = next((other for other in others if _differ(other, answer)), None)
        if wrong is not None:
            texts.append(join_fields((question, wrong)))
    return texts


def _differ(left: str, right: str) -> bool:
    return (normalise_number(left) or normalise(left)) != (normalise_number(right) or normalise(right))
