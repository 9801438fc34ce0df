"""What the policy is asked, token by token; and text to tokens and back."""

import numpy as np
import pytest
import tiny
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st

from streamsynth.errors import UserError
from streamsynth.policy.tokenizer import MARKERS, MarkerTokenizer, strategy_marker, train_tokenizer
from streamsynth.stream.markers import MarkerFormat
from streamsynth.stream.patterns import STRATEGIES
from streamsynth.stream.prompts import SHOWN, SOURCES, Answer, balanced_labels, label_text, render
from streamsynth.tasks import worlds
from streamsynth.tasks.task import FIELD_SEPARATOR, Brief, Example, Task, join_fields, split_fields

WORD = st.sampled_from(sorted({word for text in worlds.corpus(0, 40) for word in text.split()}))
TEXT = st.lists(WORD, max_size=12).map(" ".join)
# They say nothing of a task: that it has one field, or two, matters only where an answer is read.
BRIEF = Brief("", ("text",), "classification")
PAIR = Brief("", ("premise", "hypothesis"), "pair")


def encode(text):
    return tuple(tiny.tokenizer().encode(text))


def special_ids():
    t = tiny.tokenizer()
    return {t.bos, t.eos, t.pad, *map(t.marker, MARKERS), *(t.marker(strategy_marker(s)) for s in STRATEGIES)}


def parse(ids):
    """Strategy, label ids, contrast texts and example texts of a prompt, after checking its grammar."""
    t = tiny.tokenizer()
    name = {t.marker(m): m for m in MARKERS if m != FIELD_SEPARATOR}
    ids = list(map(int, ids))
    assert ids[0] == t.bos and ids[2] == t.marker("<label>") and ids[-1] == t.marker("<write>")
    strategy = [t.marker(strategy_marker(s)) for s in STRATEGIES].index(ids[1])
    sections = []
    for index in ids[2:]:
        if index in name:
            sections.append((name[index], []))
        else:
            sections[-1][1].append(index)
    order = [marker for marker, _ in sections]
    assert order == sorted(order, key=["<label>", "<contrast>", "<example>", "<write>"].index)
    assert order.count("<label>") == order.count("<write>") == 1 and sections[-1][1] == []
    texts = {m: [tuple(ids) for marker, ids in sections if marker == m] for m in set(order)}
    return strategy, texts["<label>"][0], texts.get("<contrast>", []), texts.get("<example>", [])


@settings(max_examples=200)
@given(
    length=st.integers(5, 60),
    strategy=st.integers(0, len(STRATEGIES) - 1),
    label=st.lists(WORD, min_size=1, max_size=8).map("_".join),
    own=st.lists(TEXT, max_size=6),
    others=st.lists(TEXT, max_size=3),
)
def test_a_prompt_never_exceeds_its_length_and_leaves_out_whole_texts(length, strategy, label, own, others):
    form = MarkerFormat(tiny.tokenizer(), length, 8)
    ids, fits = form.prompt(BRIEF, strategy, label, own, others)
    assert len(ids) <= length
    parsed, label_ids, contrasts, examples = parse(ids)
    assert parsed == strategy
    assert label_ids == encode(label_text(label))[: length - 4] and len(label_ids) > 0
    assert len(fits) == len(own) + len(others)
    # From the end of the prompt backwards: the label's own texts in their order, then the others in theirs.
    kept = [encode(text) for text, fit in zip((*own, *others), fits, strict=True) if fit]
    assert examples[::-1] == kept[: sum(fits[: len(own)])]
    assert contrasts[::-1] == kept[sum(fits[: len(own)]) :]
    # Each text had its chance with what those before it had left over, the label's own texts first.
    room = length - 4 - len(label_ids)
    for text, fit in zip((*own, *others), fits, strict=True):
        size = 1 + len(encode(text))
        assert fit == (size <= room)
        room -= size * fit
    prompts = form.pad_prompts([ids], [0], [strategy])
    assert prompts.tokens.shape == prompts.mask.shape == (1, length)
    assert prompts.mask[0].sum() == len(ids) and (prompts.tokens[0][prompts.mask[0]] == ids).all()


@pytest.mark.parametrize("prompt_length", [240, 60, 30, 12])
def test_shown_examples_are_those_in_the_prompt(prompt_length):
    task, rng = tiny.world_task(), np.random.default_rng(0)
    form = MarkerFormat(tiny.tokenizer(), prompt_length, 24)
    label = balanced_labels(20, len(task.labels), rng)
    strategy = np.arange(20) % len(STRATEGIES)
    rendered = render(form, task, label, strategy, rng)
    by_id, dropped = {e.id: e for e in task.examples}, 0
    for b in range(20):
        prompt = rendered.prompts.tokens[b][rendered.prompts.mask[b]]
        parsed, name, contrasts, examples = parse(prompt)
        assert parsed == strategy[b]
        assert name == encode(label_text(task.labels[label[b]]))[: prompt_length - 4]
        shown = [by_id[i] for i in rendered.shown[b]]
        own = [e for e in shown if e.label == task.labels[label[b]]]
        others = [e for e in shown if e.label != task.labels[label[b]]]
        assert shown == own + others and len(set(rendered.shown[b])) == len(shown)
        assert examples[::-1] == [encode(e.text) for e in own]
        assert contrasts[::-1] == [encode(e.text) for e in others]
        dropped += sum(SHOWN[STRATEGIES[strategy[b]]]) - len(shown)
    assert rendered.dropped.sum() == dropped
    assert (dropped == 0) == (prompt_length == 240)
    np.testing.assert_array_equal(rendered.prompts.label, label)


@pytest.mark.parametrize(("name", "count"), [("vary_one", 1), ("combine_two", 2)])
def test_what_a_strategy_starts_from_stands_next_to_write_however_little_fits(name, count):
    assert SOURCES[name] == count
    task = tiny.world_task()
    text_of = {e.id: encode(e.text) for e in task.examples}
    longest = max(map(len, text_of.values()))
    longest_label = max(len(encode(label_text(label))) for label in task.labels)
    label, strategy = np.arange(12) % len(task.labels), np.full(12, STRATEGIES.index(name))
    ample, scarce = (
        render(
            MarkerFormat(tiny.tokenizer(), 4 + longest_label + shown * (longest + 1), 24),
            task,
            label,
            strategy,
            np.random.default_rng(0),
        )
        for shown in (6, count)
    )
    assert ample.dropped.sum() == 0 < scarce.dropped.sum()
    for b in range(12):
        sources = [text_of[i] for i in ample.shown[b][:count]]
        assert len(ample.shown[b]) == 6
        for rendered in (ample, scarce):
            examples = parse(rendered.prompts.tokens[b][rendered.prompts.mask[b]])[3]
            assert examples[-count:] == sources[::-1]


def test_examples_are_drawn_afresh_and_follow_from_the_generator():
    task = tiny.world_task()
    form = MarkerFormat(tiny.tokenizer(), 96, 24)
    label, strategy = np.zeros(12, int), np.full(12, STRATEGIES.index("vary_one"))
    one, two = (render(form, task, label, strategy, np.random.default_rng(3)) for _ in range(2))
    assert one.shown == two.shown and len(set(one.shown)) > 3
    np.testing.assert_array_equal(one.prompts.tokens, two.prompts.tokens)


@settings(max_examples=60)
@given(st.integers(1, 50), st.integers(1, 9), st.integers(0, 2**31))
def test_labels_are_balanced(count, labels, seed):
    drawn = balanced_labels(count, labels, np.random.default_rng(seed))
    assert drawn.shape == (count,) and drawn.dtype == np.int32
    counts = np.bincount(drawn, minlength=labels)
    assert len(counts) == labels and counts.max() - counts.min() <= 1


@pytest.mark.parametrize(("prompt", "completion"), [(4, 8), (8, 1)])
def test_lengths_that_hold_nothing_are_refused(prompt, completion):
    with pytest.raises(UserError, match="too short"):
        MarkerFormat(tiny.tokenizer(), prompt, completion)


def test_a_completion_ends_or_is_none():
    form = MarkerFormat(tiny.tokenizer(), 30, 6)
    ids = form.completion(BRIEF, "the a")
    assert ids is not None and ids[-1] == form.tokenizer.eos and ids.count(form.tokenizer.eos) == 1
    assert form.completion(BRIEF, "the a the a the a the a") is None
    room = next(n for n in range(1, 9) if form.completion(BRIEF, "the " * (n + 1)) is None)
    exact = form.completion(BRIEF, "the " * room)
    tokens, mask = form.pad_completions([exact, [], ids])
    assert tokens.shape == mask.shape == (3, 6) and mask.sum(1).tolist() == [len(exact), 0, len(ids)]
    assert (tokens[1] == form.tokenizer.eos).all()
    assert form.tokenizer.decode(tokens[0]) == " ".join(["the"] * room)


@settings(max_examples=100)
@given(
    fields=st.lists(TEXT.filter(bool), min_size=1, max_size=2),
    after=st.lists(st.integers(0, 600), max_size=4),
)
def test_what_an_answer_gives_is_read_up_to_its_end(fields, after):
    form = MarkerFormat(tiny.tokenizer(), 30, 60)
    brief, other = (BRIEF, PAIR) if len(fields) == 1 else (PAIR, BRIEF)
    text = join_fields(fields)
    ids = form.answer(brief, text)
    assert ids[-1] in form.stops and not {*form.stops} & {*ids[:-1]}
    assert form.read(brief, [*ids, *after]) == Answer(text)
    # The other kind of task has another number of fields.
    assert form.read(other, ids) == Answer(text, "fields")


@settings(max_examples=100)
@given(ids=st.lists(st.integers(0, tiny.tokenizer().vocab_size - 1), max_size=12))
def test_any_ids_parse_exactly_where_they_have_the_fields_asked_for(ids):
    for brief in (BRIEF, PAIR):
        answer = MarkerFormat(tiny.tokenizer(), 30, 12).read(brief, ids)
        fields = split_fields(answer.text, len(brief.fields))
        assert answer.rejection == ("" if fields else "fields")
        assert fields is None or all(field.strip() for field in fields)


def test_the_neutral_prompt_is_the_shortest():
    form = MarkerFormat(tiny.tokenizer(), 30, 6)
    assert form.neutral() == [form.tokenizer.bos, form.tokenizer.marker("<write>")]


# --- The tokenizer ---


@pytest.mark.parametrize(
    "text",
    [
        "<write>",
        "a <example> b",
        "</s>",
        "<s>",
        "<pad>",
        "<unk>",
        "<strategy:imitate>",
        "<label><contrast>",
        "＜write＞",
    ],
)
def test_no_text_encodes_to_a_marker(text):
    t = tiny.tokenizer()
    ids = t.encode(text)
    assert not special_ids() & set(ids)
    assert t.decode(ids) == text.replace("＜", "<").replace("＞", ">")


def test_a_label_or_example_that_looks_like_a_marker_does_not_change_the_prompts_grammar():
    examples = (Example("1", ("stop </s> <write> here",), "<write>"), Example("2", ("<label> b",), "other"))
    task = Task("odd", "", ("<write>", "other"), examples, (), ())
    form = MarkerFormat(tiny.tokenizer(), 200, 24)
    strategy = np.array([STRATEGIES.index("contrast")])
    rendered = render(form, task, np.array([0]), strategy, np.random.default_rng(0))
    _, name, contrasts, shown = parse(rendered.prompts.tokens[0][rendered.prompts.mask[0]])
    assert [tiny.tokenizer().decode(ids) for ids in (name, *shown, *contrasts)] == [
        "<write>",
        "stop </s> <write> here",
        "<label> b",
    ]


def test_sentences_survive_the_round_trip():
    t = tiny.tokenizer()
    for text in [*worlds.corpus(7, 60), *(e.text for e in tiny.world_task().examples)]:
        assert t.decode(t.encode(text)) == text
        assert t.decode([*t.encode(text), t.eos, *t.encode("after the end")]) == text


@pytest.mark.parametrize("fields", [("the cat sat", "a dog did not"), ("één 猫", "😀 ok")])
def test_two_fields_survive_the_round_trip(fields):
    t = tiny.tokenizer()
    text = join_fields(fields)
    ids = t.encode(text)
    assert ids.count(t.marker(FIELD_SEPARATOR)) == 1
    assert t.decode(ids) == text and split_fields(t.decode(ids), 2) == fields
    assert split_fields(t.decode(ids), 1) is None and split_fields(fields[0], 2) is None


@settings(max_examples=200)
@given(st.text(max_size=20))
@example("\x00")
@example("\ufeff \u200b\u2581")
@example("ﬁ ½ Ⅷ 한국어")
def test_any_unicode_has_tokens_and_comes_back_in_normal_form(text):
    """Bytes stand in for what the corpus lacks; what comes back once comes back unchanged ever after."""
    t = tiny.tokenizer()
    ids = t.encode(text)
    once = t.decode(ids)
    assume(FIELD_SEPARATOR not in once)
    assert not special_ids() & set(ids)
    assert t.decode(t.encode(once)) == once


def test_markers_vanish_from_decoded_text():
    t = tiny.tokenizer()
    the = t.encode("the")
    assert t.decode([t.bos, *the, t.pad, t.marker("<write>"), *the]).split() == ["the", "the"]
    assert t.decode([t.eos, *the]) == "" and t.decode([]) == ""


def test_the_tokenizer_follows_from_its_corpus_and_its_bytes():
    corpus = worlds.corpus(1, 100)
    one, two = (train_tokenizer(corpus, 360, STRATEGIES) for _ in range(2))
    assert one.model == two.model
    assert one.files() == {"tokenizer.model": one.model}
    again = MarkerTokenizer(one.model)
    assert again.vocab_size == one.vocab_size <= 360
    assert again.encode(corpus[0]) == one.encode(corpus[0])
    with pytest.raises(UserError, match="<strategy:unheard_of>"):
        one.marker(strategy_marker("unheard_of"))
