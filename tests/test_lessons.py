"""What maximum likelihood learns from: prompts that show some texts, and targets that they do not show."""

import itertools

import numpy as np
import pytest
import tiny

from streamsynth.learner import lessons as lessons_lib
from streamsynth.learner.lessons import Lesson, lesson_batch, task_lesson
from streamsynth.stream.markers import MarkerFormat
from streamsynth.stream.patterns import STRATEGIES
from streamsynth.stream.prompts import SHOWN, SOURCES
from streamsynth.tasks.task import Brief, Example, Task

FORM = MarkerFormat(tiny.tokenizer(), 240, 48)
BRIEF = Brief("", ("text",), "classification")


def lessons_of(task: Task) -> list[Lesson]:
    """One lesson a label, from the task's examples alone."""
    return [task_lesson(task.brief, label, task.examples) for label in task.labels]


def texts_after(marker, ids):
    """The texts that stand behind a marker in a prompt."""
    t = tiny.tokenizer()
    ends = {t.marker(m) for m in ("<label>", "<contrast>", "<example>", "<write>")}
    starts = [i for i, index in enumerate(ids) if index == t.marker(marker)]
    return [t.decode(list(itertools.takewhile(lambda i: i not in ends, ids[i + 1 :]))) for i in starts]


def read(batch, samples):
    """(strategy, label, examples shown, contrasts shown, targets) of every prompt; "" for an empty row."""
    t, p = tiny.tokenizer(), batch.prompts
    rows = []
    for b in range(len(p.tokens)):
        ids = [int(i) for i in p.tokens[b][p.mask[b]]]
        targets = []
        for n in range(b * samples, (b + 1) * samples):
            target = batch.tokens[n][batch.mask[n]]
            assert len(target) == 0 or target[-1] == t.eos
            targets.append(t.decode(target))
        label = texts_after("<label>", ids)[0]
        rows.append(
            (
                STRATEGIES[p.strategy[b]],
                label,
                texts_after("<example>", ids),
                texts_after("<contrast>", ids),
                targets,
            )
        )
    return rows


def test_prompts_show_what_their_strategy_says_and_never_a_target():
    task = tiny.world_task(examples_per_label=20)
    lessons = lessons_of(task) * 30
    rows = read(lesson_batch(FORM, lessons, np.random.default_rng(0), 3), 3)
    label_of = {e.text: e.label for e in task.examples}
    assert {row[0] for row in rows} == set(STRATEGIES)
    for (strategy, label, own, others, targets), lesson in zip(rows, lessons, strict=True):
        assert label == lesson.label.replace("_", " ")
        assert (len(own), len(others)) == SHOWN[strategy]
        assert {label_of[text] for text in (*own, *targets)} == {lesson.label}
        assert lesson.label not in {label_of[text] for text in others}
        assert len(set(targets)) == 3 and not set(own) & set(targets)


def test_targets_come_first_where_texts_are_few():
    def rows_of(*texts):
        lesson = task_lesson(BRIEF, "a", [Example(str(i), (text,), "a") for i, text in enumerate(texts)])
        return read(lesson_batch(FORM, [lesson] * 12, np.random.default_rng(1), 2), 2)

    for _, _, own, others, targets in rows_of("only one"):
        assert (own, others, targets) == ([], [], ["only one"] * 2)
    for strategy, _, own, _, targets in rows_of("one", "two"):
        assert len(set(targets) | set(own)) == 2 and not set(own) & set(targets)
        assert len(own) == min(1, SHOWN[strategy][0])
    # The same text twice: it is a target, so it is not shown.
    for _, _, own, _, targets in rows_of("again", "again", "again"):
        assert (own, targets) == ([], ["again"] * 2)


def test_no_text_and_texts_that_are_too_long_leave_empty_rows():
    long = task_lesson(BRIEF, "a", [Example("1", ("the " * 60,), "a")])
    none = task_lesson(BRIEF, "a", [Example("1", ("a text",), "b")])
    batch = lesson_batch(FORM, [long, none], np.random.default_rng(0), 2)
    assert batch.tokens.shape == (4, 48) and not batch.mask.any()


def only(monkeypatch, strategy):
    """All lessons are given in this strategy."""
    monkeypatch.setattr(lessons_lib, "_CHANCE", {name: float(name == strategy) for name in STRATEGIES})


@pytest.mark.parametrize("strategy", ["vary_one", "combine_two"])
def test_targets_of_likeness_are_like_their_sources(monkeypatch, strategy):
    """Over many draws they share more words with the sources than usual, but not with what else is shown."""

    def overlaps(name):
        """With a source, and with another example."""
        only(monkeypatch, name)
        task = tiny.world_task(examples_per_label=60)
        rows = read(lesson_batch(FORM, lessons_of(task) * 30, np.random.default_rng(2), 2), 2)
        assert {row[0] for row in rows} == {name}
        shares = [
            [len({*text.split()} & {*target.split()}) / len({*target.split()}) for text in own]
            for _, _, own, _, targets in rows
            for target in targets
        ]
        count = SOURCES[strategy]
        # The sources stand last.
        return np.mean(shares, 0)[-count:].mean(), np.mean(shares, 0)[:-count].mean()

    (source, other), (usual_source, usual_other) = overlaps(strategy), overlaps("imitate")
    assert source > 1.2 * usual_source
    assert other < 1.05 * usual_other


@pytest.mark.parametrize(
    ("strategy", "target"),
    [("vary_one", "we buy red tea here"), ("combine_two", "we buy red cars slowly")],
)
def test_the_target_is_the_candidate_most_like_the_sources_and_no_other_text_counts(
    monkeypatch, strategy, target
):
    only(monkeypatch, strategy)
    shown = ["we buy red tea now", "they sell old cars slowly", *(f"a dog has {n} bones" for n in range(4))]
    candidates = [
        "a dog has many bones",
        "we buy red cars slowly",
        "we buy red tea here",
        "nothing like any other",
    ]
    lesson = Lesson(BRIEF, "a", lambda rng, n: [*shown, *candidates][:n], lambda rng, n: [])
    ((_, _, own, _, targets),) = read(lesson_batch(FORM, [lesson], np.random.default_rng(0), 1), 1)
    assert own == shown[::-1]
    assert targets == [target]


def test_the_best_of_every_run_of_candidates():
    pool = ["a b", "x y", "a b c", "x a", "q r", "a x"]
    assert lessons_lib._most_alike(["a b c"], pool, 2) == ["a b c", "x a"]
    assert lessons_lib._most_alike(["a b c"], pool, 9) == pool
    assert lessons_lib._most_alike([], ["one", "two"], 1) == ["one"]


def test_a_batch_follows_from_its_generator():
    lessons = lessons_of(tiny.world_task())
    one, two, other = (lesson_batch(FORM, lessons, np.random.default_rng(seed), 2) for seed in (3, 3, 4))
    np.testing.assert_array_equal(one.tokens, two.tokens)
    np.testing.assert_array_equal(one.prompts.tokens, two.prompts.tokens)
    assert (one.tokens != other.tokens).any()


def test_a_source_without_end_serves_too():
    counter = itertools.count()
    lesson = Lesson(
        BRIEF,
        "some_label",
        lambda rng, n: [f"a {next(counter)}" for _ in range(n)],
        lambda rng, n: ["the other"] * n,
    )
    for strategy, label, own, others, targets in read(
        lesson_batch(FORM, [lesson] * 20, np.random.default_rng(5), 4), 4
    ):
        assert label == "some label" and (len(own), len(others)) == SHOWN[strategy]
        assert len(set(targets) | set(own)) == 4 + len(own)
