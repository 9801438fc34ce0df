"""Attributes that a policy proposes: how it is asked, how it is read, what is chosen."""

from __future__ import annotations

import dataclasses

import chains
import pretrained
import pytest
import tiny
from hypothesis import given
from hypothesis import strategies as st

from streamsynth.dataset import card
from streamsynth.dataset.export import select
from streamsynth.errors import UserError
from streamsynth.learner.proposals import choose, parse, propose
from streamsynth.policy.tokenizer_files import load_tokenizer
from streamsynth.policy.transformer import Transformer
from streamsynth.stream.instructions import ChatFormat
from streamsynth.stream.plain import PlainFormat
from streamsynth.tasks.attributes import MOST_CELLS, Attribute, Value, cells
from streamsynth.tasks.task import Brief, Example, Task

EXAMPLES = tuple(
    Example(f"train:{i}", (f"text number {i}",), label) for i, label in enumerate(("card_arrival", "pin") * 3)
)
TASK = Task("bank", "Messages of a bank's customers.", ("card_arrival", "pin"), EXAMPLES, EXAMPLES, EXAMPLES)
QUESTIONS = dataclasses.replace(TASK, labels=("question",), fields=("question", "answer"), kind="qa")


def attribute(name, *values):
    return Attribute(name, tuple(map(Value, values)), proposed=True)


# --- What is read ---


@pytest.mark.parametrize(
    ("text", "read"),
    [
        (" tone: polite, angry", attribute("tone", "polite", "angry")),
        ("Tone: Polite,  Matter-of-fact , dry.\n", attribute("tone", "polite", "matter-of-fact", "dry")),
        ("point of view: customer's, and a clerk's", attribute("point of view", "customer's", "a clerk's")),
        ("size: 1, 2, 3, 4, 5", attribute("size", *"12345")),
        ("été: größer, naïve", attribute("été", "größer", "naïve")),
        ("", None),
        ("tone", None),
        ("tone: polite", None),  # one value
        ("size: 1, 2, 3, 4, 5, 6", None),
        ("tone: polite, Polite", None),
        ("tone: polite, tone", None),
        ("tone: polite,, angry", None),
        ("tone: polite, angry, ...", None),
        ("the general tone here: polite, angry", None),  # four words
        ("tone: polite, as angry as anybody", None),
        (f"tone: polite, {'a' * 41}", None),
        ("tone: formality: high, low", None),
        ("tone: polite, angry\nlength: short, long", None),
        ("**tone**: polite, angry", None),
        ("tone: polite; angry, dry", None),
        ("topic: card arrival, fees", None),  # a label
        ("Label: fees, transfers", None),
        ("pin: forgotten, blocked", None),
        ("text: short, long", None),  # the field
        ("tone: polite, \ufffd", None),
        ("tone: polite, a\x00b", None),
    ],
)  # fmt: skip
def test_a_line_is_an_attribute_or_nothing(text, read):
    assert parse(text, TASK) == read


def test_questions_have_no_labels_to_avoid():
    assert parse("form: question, order", QUESTIONS) == attribute("form", "question", "order")
    assert parse("form: question, order", dataclasses.replace(TASK, labels=("question", "x"))) is None
    assert parse("answer: short, long", QUESTIONS) is None


WORDS = st.sampled_from(
    [
        "tone",
        "Polite",
        "angry",
        "pin",
        "card arrival",
        "text",
        "and",
        "9",
        "é",
        "İ",
        "-",
        ".",
        "<field>",
        "\x85",
    ]
)
LINES = st.builds(
    "{}:{}{}".format,
    st.lists(WORDS, max_size=4).map(" ".join),
    st.lists(st.lists(WORDS, max_size=3).map(" ".join), max_size=7).map(", ".join),
    st.sampled_from(["", ".", "\n", ", "]),
)


@given(st.one_of(st.text(), LINES, st.text("ab:, .\n-", max_size=30)))
def test_whatever_is_read_can_be_asked_for(text):
    for task in (TASK, QUESTIONS):
        found = parse(text, task)
        if found is None:
            continue
        values = [value.name for value in found.values]
        assert found.proposed and 2 <= len(values) <= 5 and len({found.name, *values}) == len(values) + 1
        for phrase in (found.name, *values):
            assert 1 <= len(phrase.split()) <= 3 and phrase == " ".join(phrase.split())
            assert not set(phrase) & set(':;,."\n<>')
        assert task.kind == "qa" or not {"card arrival", "pin"} & {found.name, *values}
        # What was read reads the same again.
        assert parse(f"{found.name}: {', '.join(values)}", task) == found


# --- What is chosen ---


def test_the_names_proposed_most_often_come_first_with_their_commonest_values():
    tone, cool = attribute("tone", "polite", "angry"), attribute("tone", "cool", "warm")
    turned, size, age = (
        attribute("tone", "angry", "polite"),
        attribute("size", "1", "2"),
        attribute("age", "1", "2"),
    )
    assert choose([age, cool, tone, turned, size, size], 3) == (tone, size, age)
    assert choose([age, cool, tone, turned, size, size], 1) == (tone,)
    assert choose([size, age], 5) == (size, age) and choose([age, size], 5) == (age, size)
    assert choose([], 2) == () and choose([size], 0) == ()


def test_what_would_make_too_many_cells_is_passed_over():
    five = [attribute(name, *"abcde") for name in "xyzw"]
    three, two = attribute("v", *"abc"), attribute("u", *"ab")
    assert choose([*five[:2], *five], 4) == tuple(five[:3])  # 125 cells, and four times five would be 625
    assert choose([*five[:2], *five, three, two], 6) == (*five[:3], two)


@given(
    st.lists(
        st.builds(
            lambda name, count: attribute(name, *"abcde"[:count]),
            st.sampled_from("xyzwvu"),
            st.integers(2, 5),
        ),
        max_size=20,
    ),
    st.integers(0, 5),
)
def test_a_choice_has_different_names_and_few_cells(proposals, count):
    chosen = choose(proposals, count)
    assert len(chosen) <= count and set(chosen) <= set(proposals)
    assert len({one.name for one in chosen}) == len(chosen)
    assert len(cells(chosen)) <= MOST_CELLS
    assert bool(chosen) == bool(proposals and count)


# --- How it is asked ---


@pytest.fixture(scope="module")
def tokenizers(tmp_path_factory):
    folder = tmp_path_factory.mktemp("proposals")
    return {
        family: load_tokenizer(pretrained.byte_level(folder / family, family))
        for family in pretrained.SPECIAL
    }


def said(form, ids):
    """The words of a prompt, turns' borders aside."""
    control = set(form.tokenizer.control.values())
    return form.tokenizer.decode([i for i in ids if i not in control])


def test_a_plain_prompt_shows_how_it_is_done_and_ends_open(tokenizers):
    form = PlainFormat(tokenizers["llama"], 600, 40)
    ids = form.attribute_prompt(TASK.brief, TASK.labels, ["my card\nis late", "where is it?"])
    worked, own = said(form, ids).rsplit("\n\n", 1)
    assert ids[0] == form.tokenizer.bos
    assert own == (
        "Messages of a bank's customers.\nLabels: card arrival; pin\n"
        "Text: my card is late\nText: where is it?\nThey also differ in"
    )
    lines = [line for line in worked.split("\n") if line.startswith("They also differ in")]
    # What it shows is what is taken.
    assert len(lines) == 2 and all(parse(line.removeprefix("They also differ in"), TASK) for line in lines)
    assert form.spoken(form.tokenizer.encode(" tone: polite, angry\n\nMore")) == " tone: polite, angry"


@pytest.mark.parametrize("family", sorted(pretrained.SPECIAL))
def test_an_instruction_asks_for_one_line(tokenizers, family):
    form = ChatFormat(tokenizers[family], 600, 40)
    text = said(form, form.attribute_prompt(TASK.brief, TASK.labels, ["my card is late", "where is it?"]))
    assert (
        "Here is a data set: Messages of a bank's customers.\n\n"
        "Its texts are told apart by these labels: card arrival; pin.\n\n"
        "Some of its texts:\n\nExample 1:\nText: my card is late\n\nExample 2:\nText: where is it?\n\n"
        "Name one way in which such texts differ, beside their label, and two to five values of it"
    ) in text
    assert "nothing else:\nThey also differ in name: value, value, value" in text
    assert text.endswith("They also differ in")


@pytest.mark.parametrize("make", [PlainFormat, ChatFormat])
def test_questions_are_shown_without_their_label(tokenizers, make):
    form = make(tokenizers["qwen"], 600, 40)
    text = said(form, form.attribute_prompt(QUESTIONS.brief, QUESTIONS.labels, ["Why? <field> So."]))
    assert f"Question: Why?{form.separator}Answer: So." in text
    assert "label" not in text.rsplit("\n\nMessages", 1)[-1].lower()


@pytest.mark.parametrize("make", [PlainFormat, ChatFormat])
def test_what_does_not_fit_is_left_out_whole_texts_first(tokenizers, make):
    form = make(tokenizers["gemma"], 2000, 40)
    labels, texts = ("one", "two", "three"), ("first text", "second text")
    brief = Brief("", ("text",), "classification")
    whole = len(form.attribute_prompt(brief, labels, texts))
    bare = len(form.attribute_prompt(brief, (), ()))
    seen = []
    for length in range(whole, bare - 1, -1):
        ids = dataclasses.replace(form, prompt_length=length).attribute_prompt(brief, labels, texts)
        assert len(ids) <= length
        if not seen or ids != seen[-1]:
            seen.append(ids)
    fewer = [(3, 2), (3, 1), (3, 0), (2, 0), (1, 0), (0, 0)]
    assert seen == [form.attribute_prompt(brief, labels[:k], texts[:t]) for k, t in fewer]
    with pytest.raises(
        UserError, match=f"rollout.prompt_length = {bare - 1} is too short.*give {bare} or more"
    ):
        dataclasses.replace(form, prompt_length=bare - 1).attribute_prompt(brief, labels, texts)


# --- A policy that can ---


def asked(form, task=TASK, count=2, **changes):
    config = chains.network_of(form.tokenizer)
    keys = dict(seed=0, prompts=4, samples=4, temperature=1.0) | changes
    variables = {"params": chains.params(form.tokenizer, config)}
    return propose(Transformer(config), variables, form, task, count, **keys)


def test_a_policy_proposes_what_it_writes(tokenizers, quick_xla):
    form = PlainFormat(tokenizers["llama"], 512, 24)
    found = asked(form)
    assert sorted(one.name for one in found) == ["data", "form"]
    known = {word.strip() for word in chains.WORDS}
    for one in found:
        assert one.proposed and {word for value in one.values for word in value.name.split()} <= known
    assert found == asked(form) != asked(form, seed=1)
    assert asked(form, count=1) == found[:1]


def test_too_few_proposals_are_told_and_lived_with(tokenizers, quick_xla, caplog):
    form = PlainFormat(tokenizers["llama"], 512, 24)
    with caplog.at_level("WARNING"):
        assert len(asked(form)) == 2 and not caplog.records
        assert len(asked(form, count=3)) == 2
    assert "bank goes on with 2 of the 3 attributes that stream.proposed_attributes asks for" in caplog.text
    # Cut after "form: card," there would be half a list.
    caplog.clear()
    assert asked(dataclasses.replace(form, completion_length=3)) == ()
    assert "0 of the 2 attributes" in caplog.text and "0 of the policy's 16 completions" in caplog.text


# --- What is told of them ---


def test_a_card_names_attributes_and_where_they_are_from():
    task = dataclasses.replace(
        tiny.world_task(),
        attributes=(attribute("tone", "polite", "angry"), Attribute("size", (Value("1"), Value("2")))),
    )
    text = card.render(task, [], select(task, [])[1], {})
    assert "| tone | polite, angry | proposed by the policy |" in text
    assert "| size | 1, 2 | from the task |" in text and "| attributes | " in text
    without = card.render(tiny.world_task(), [], select(task, [])[1], {})
    assert "ttributes" not in without
