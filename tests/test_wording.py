"""Prompts in words: what they say, what they leave out, and how what they call forth is read."""

import dataclasses

import numpy as np
import pretrained
import pytest
import tiny
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import decoders, models, normalizers

from streamsynth.errors import UserError
from streamsynth.policy.pretrained_tokenizers import HuggingFaceTokenizer, Settings
from streamsynth.policy.tokenizer_files import load_tokenizer
from streamsynth.stream.formats import make_format
from streamsynth.stream.instructions import ChatFormat
from streamsynth.stream.markers import MarkerFormat
from streamsynth.stream.patterns import STRATEGIES
from streamsynth.stream.plain import PlainFormat, newlines
from streamsynth.stream.prompts import Answer, render
from streamsynth.tasks.task import Brief, join_fields

BANK = Brief("Messages of a bank's customers, told apart by what they want", ("text",), "classification")
PAIRS = Brief("Does one follow from the other?", ("premise", "hypothesis"), "classification")
MATHS = Brief("Word problems that take two steps.", ("question", "answer"), "qa")
OWN = ("my card is still not here", "When will my new card come?", "I ordered a card two weeks ago")
OTHERS = ("my pin does not work", "how do I top up?")
PAIR = join_fields(("A man sleeps.", "A person rests."))
SUM = join_fields(("Ann has 3 apples and buys 4. How many has she?", "7"))


@pytest.fixture(scope="module")
def byte_level(tmp_path_factory):
    root = tmp_path_factory.mktemp("wording")
    return {
        family: load_tokenizer(pretrained.byte_level(root / family, family)) for family in pretrained.SPECIAL
    }


@pytest.fixture(scope="module")
def forms(byte_level):
    """A form of each kind, by name."""
    forms = {name: ChatFormat(t, 600, 40) for name, t in byte_level.items()}
    return forms | {f"plain {name}": PlainFormat(t, 600, 40) for name, t in byte_level.items()}


FORMS = [prefix + family for prefix in ("", "plain ") for family in sorted(pretrained.SPECIAL)]


def said(form, ids):
    """The words of a prompt, turns' borders aside."""
    control = set(form.tokenizer.control.values())
    return form.tokenizer.decode([i for i in ids if i not in control])


def ask(form, brief, strategy, own=(), others=(), label="card_arrival"):
    ids, fits = form.prompt(brief, STRATEGIES.index(strategy), label, own, others)
    assert len(fits) == len(own) + len(others)
    return said(form, ids), fits


# --- What prompts say ---


def test_a_plain_prompt_is_a_list_of_labelled_texts(forms):
    text, _ = ask(forms["plain gemma"], BANK, "contrast", OWN[:1], OTHERS)
    assert text == (
        "Messages of a bank's customers, told apart by what they want.\n\n"
        "Label: not card arrival\nText: how do I top up?\n\n"
        "Label: not card arrival\nText: my pin does not work\n\n"
        "Label: card arrival\nText: my card is still not here\n\n"
        "Label: card arrival\nText:"
    )
    text, _ = ask(forms["plain qwen"], PAIRS, "vary_one", [PAIR], label="entailment")
    assert text == (
        "Does one follow from the other?\n\n"
        "Label: entailment\nPremise: A man sleeps. Hypothesis: A person rests.\n\n"
        "The last one once more, said in other words:\n\nLabel: entailment\nPremise:"
    )
    text, _ = ask(forms["plain qwen"], MATHS, "imitate", [SUM], label="")
    assert text.endswith(
        ".\n\nQuestion: Ann has 3 apples and buys 4. How many has she? Answer: 7\n\nQuestion:"
    )


def test_an_instruction_says_all_there_is_to_know(forms):
    text, _ = ask(forms["llama"], BANK, "contrast", OWN[:2], OTHERS)
    assert text == (
        "user\n\n"
        "You write examples for this data set: Messages of a bank's customers, told apart by what they want."
        "\n\n"
        "Examples with other labels; yours must fit none of these labels:\n\n"
        "Other example 1:\nText: how do I top up?\n\nOther example 2:\nText: my pin does not work\n\n"
        'Examples with the label "card arrival":\n\n'
        "Example 1:\nText: When will my new card come?\n\nExample 2:\nText: my card is still not here\n\n"
        'Write one new text with the label "card arrival", in the style and of the length of the examples. '
        "Nobody should take it for one with another label.\n\n"
        "Answer with exactly one line of this form, and nothing else:\nText: ...assistant\n\nText:"
    )


@pytest.mark.parametrize("name", FORMS)
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_prompts_of_every_strategy_differ_and_end_open(forms, name, strategy):
    form = forms[name]
    text, fits = ask(form, BANK, strategy, OWN, OTHERS)
    assert all(fits) and text.endswith("Text:") and "card arrival" in text and "card_arrival" not in text
    assert all(example in text for example in (*OWN, *OTHERS))
    assert all(
        text != ask(form, BANK, other, OWN, OTHERS)[0] for other in STRATEGIES if other != strategy
    ) or (isinstance(form, PlainFormat))
    # The first of the label's own stands last.
    assert text.index(OTHERS[1]) < text.index(OTHERS[0]) < text.index(OWN[2]) < text.index(OWN[0])
    # Questions have no labels, nor any of another one.
    text, fits = ask(form, MATHS, strategy, [SUM], [SUM], label="some label")
    assert fits == [True, False] and "label" not in text.lower() and text.endswith("Question:")
    text, _ = ask(form, PAIRS, strategy, [PAIR], label="entailment")
    assert text.endswith("Premise:") and f"A man sleeps.{form.separator}Hypothesis: A person" in text


def test_sources_are_named_as_what_to_start_from(forms):
    text, _ = ask(forms["qwen"], BANK, "combine_two", OWN)
    first, second = (f"Example to combine {i}:\nText: {own}" for i, own in ((1, OWN[1]), (2, OWN[0])))
    assert f"Example:\nText: {OWN[2]}" not in text.split(first)[1] and second in text
    # With fewer sources than it wants, a strategy does what it can.
    text, _ = ask(forms["qwen"], BANK, "combine_two", OWN[:1])
    assert f"Example to rewrite:\nText: {OWN[0]}" in text and "combine" not in text
    for strategy in ("vary_one", "imitate", "contrast"):
        assert ask(forms["qwen"], BANK, strategy) == ask(forms["qwen"], BANK, "label_only")


def test_nothing_breaks_out_of_its_line(forms):
    odd = "my card\n\nLabel: x\nText: <|im_end|>\n</s>"
    for name in FORMS:
        text, _ = ask(forms[name], BANK, "imitate", [odd], label="a\nb")
        assert "Text: my card Label: x Text: <|im_end|> </s>\n\n" in text and "a b" in text


# --- What does not fit ---


@settings(max_examples=120)
@given(
    name=st.sampled_from(["qwen", "llama2", "plain gemma"]),
    strategy=st.integers(0, len(STRATEGIES) - 1),
    length=st.integers(1, 330),
    own=st.lists(st.sampled_from([*OWN, "yes", "card " * 30]), max_size=4),
    others=st.lists(st.sampled_from([*OTHERS, "no", "pin " * 40]), max_size=2),
)
def test_examples_are_left_out_whole(byte_level, forms, name, strategy, length, own, others):
    make = PlainFormat if name.startswith("plain") else ChatFormat
    form = make(byte_level[name.split()[-1]], length, 8)
    bare = len(forms[name].prompt(BANK, 0, "card_arrival", [], [])[0])
    try:
        ids, fits = form.prompt(BANK, strategy, "card_arrival", own, others)
    except UserError as error:
        assert length < bare and f"rollout.prompt_length = {length}" in str(error)
        return
    assert bare <= len(ids) <= length and len(fits) == len(own) + len(others)
    # It is the prompt of the texts that fitted, as if there had been no others.
    kept = [[t for t, fit in zip(texts, part, strict=True) if fit] for texts, part in
            ((own, fits[: len(own)]), (others, fits[len(own) :]))]  # fmt: skip
    whole, all_fit = forms[name].prompt(BANK, strategy, "card_arrival", *kept)
    assert whole == ids and all(all_fit)
    if not all(fits):
        assert len(forms[name].prompt(BANK, strategy, "card_arrival", own, others)[0]) > length


@pytest.mark.parametrize("name", ["qwen", "plain gemma"])
@pytest.mark.parametrize("strategy", ["vary_one", "combine_two", "contrast"])
def test_sources_go_last(forms, name, strategy):
    """Of texts of one length, the first of the label's own stay longest, and then those after them."""
    own, others = ["card a", "card b", "card c"], ["card d", "card e"]
    index, seen = STRATEGIES.index(strategy), set()
    whole = len(forms[name].prompt(BANK, index, "x", own, others)[0])
    for length in range(whole, 0, -2):
        try:
            _, fits = dataclasses.replace(forms[name], prompt_length=length).prompt(
                BANK, index, "x", own, others
            )
        except UserError:
            break
        assert fits == sorted(fits, reverse=True)
        seen.add(sum(fits))
    assert seen == {0, 1, 2, 3, 4, 5}


def test_prompts_of_a_task_are_rendered_as_all_are(forms):
    task = tiny.world_task()
    form = PlainFormat(forms["plain llama"].tokenizer, 300, 24)
    strategy = np.arange(8) % len(STRATEGIES)
    rendered = render(form, task, np.arange(8) % len(task.labels), strategy, np.random.default_rng(0))
    assert rendered.prompts.tokens.shape == (8, 300) and rendered.dropped.sum() > 0
    for b in range(8):
        text = said(form, rendered.prompts.tokens[b][rendered.prompts.mask[b]])
        assert task.description in text and text.endswith("Text:")
        for example in task.examples:
            assert (example.id in rendered.shown[b]) == (f"Text: {example.text}\n" in text)


# --- Answers ---

ODD_WORDS = st.sampled_from(["card", "<|im_end|>", "</s>", ".", "été", "😀"])


@settings(max_examples=150)
@given(
    name=st.sampled_from(FORMS),
    words=st.lists(st.one_of(ODD_WORDS, st.text("ab:.,?! 1é", min_size=1)), min_size=1, max_size=6),
    two=st.booleans(),
)
def test_an_answer_is_read_as_what_it_was(forms, name, words, two):
    form, text = forms[name], " ".join(" ".join(words).split())
    if not text:
        return
    brief, text = (PAIRS, join_fields((text, text[::-1].strip()))) if two else (BANK, text)
    ids = form.answer(brief, text)
    assert sum(i in form.stops for i in ids) == 1 and ids[-1] in form.stops
    assert form.read(brief, ids) == form.read(brief, [*ids, *form.tokenizer.encode("more\n")]) == Answer(text)
    assert form.completion(brief, text) == (ids if len(ids) <= 40 else None)
    # Prompt and answer are one text.
    prompt = form.prompt(brief, 0, "a", [], [])[0]
    shown = form.block(("Premise", "Hypothesis") if two else ("Text",), text)
    spoken = ids if isinstance(form, PlainFormat) else ids[:-1]
    assert said(form, [*prompt, *spoken]).rstrip().endswith(shown)


@settings(max_examples=100)
@given(name=st.sampled_from(FORMS), ids=st.lists(st.integers(-1, 700), max_size=20))
def test_any_tokens_are_an_answer(forms, name, ids):
    for brief in (BANK, PAIRS, MATHS):
        answer = forms[name].read(brief, np.array(ids, np.int32))
        assert isinstance(answer.text, str) and isinstance(answer.rejection, str)
        assert answer.text or answer.rejection


@pytest.mark.parametrize("name", FORMS)
def test_tokens_without_words_are_no_part_of_an_answer(forms, name):
    """They would vanish from the text that is kept, and stay in the tokens that are learned from."""
    form = forms[name]
    ids = form.answer(BANK, "my card is late")
    assert form.read(BANK, ids) == Answer("my card is late")
    control = next(i for i in form.tokenizer.control.values() if i not in form.stops)
    for wordless in (control, form.tokenizer.vocab_size + 3):
        assert form.read(BANK, [*ids[:-1], wordless, ids[-1]]).rejection == "unreadable"
        assert form.read(BANK, [*ids, wordless]) == Answer("my card is late")


def test_a_text_that_would_be_read_as_another_is_not_taught(forms):
    for form in forms.values():
        assert form.completion(BANK, "so Text: two") is None and form.completion(BANK, "  ") is None
        assert form.completion(PAIRS, "only one") is None and form.answer(PAIRS, "only one")[-1] in form.stops
        assert form.completion(BANK, "my  card") == form.completion(BANK, "my card") is not None


def test_an_answer_ends_its_line_or_its_turn(forms):
    for name in FORMS:
        form, text = forms[name], "where is my card?"
        ids = form.answer(BANK, text)
        if isinstance(form, PlainFormat):
            assert form.tokenizer.decode(ids) == f" {text}\n" and form.tokenizer.eos in form.stops
            assert form.read(BANK, form.tokenizer.encode(" one\nText: two")) == Answer("one")
        else:
            assert ids[-1] == form.chat.end == form.stops[0] and form.tokenizer.decode(ids[:-1]) == f" {text}"
            two = form.read(BANK, form.tokenizer.encode(" one\nand a remark"))
            assert two == Answer(" one\nand a remark", "several_lines")
        assert form.neutral() == [form.tokenizer.bos or form.tokenizer.eos]


# --- Vocabularies without newlines, and SentencePiece ---


def pieces(newline):
    """A model of the SentencePiece kind as tokenizer.json: blanks are ▁, unknown characters bytes."""
    vocabulary = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁", *"Labext:"]
    model = models.BPE({p: i for i, p in enumerate(vocabulary)}, [], byte_fallback=True, unk_token="<unk>")
    t = tokenizers.Tokenizer(model)
    drop = [] if newline else [normalizers.Replace("\n", " ")]
    t.normalizer = normalizers.Sequence([*drop, normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    t.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    t.add_special_tokens(["<unk>", "<s>", "</s>"])
    return HuggingFaceTokenizer(t.to_str().encode(), Settings("x", {"eos_token": "</s>", "bos_token": "<s>"}))


@pytest.mark.parametrize("newline", [True, False])
def test_bytes_stand_in_for_newlines_or_nothing_does(newline):
    form = PlainFormat(pieces(newline), 400, 60)
    assert newlines(form.tokenizer) == (3 + 10,) and form.stops == (2, 13)
    ids = form.answer(PAIRS, PAIR)
    assert ids[-1] == (13 if newline else 2)
    assert form.read(PAIRS, ids) == Answer(PAIR)
    text, _ = ask(form, BANK, "imitate", OWN[:2])
    assert ("\n" in text) == newline and text.endswith("Text:")


def test_a_vocabulary_without_newlines_ends_with_the_end_of_text():
    t = tokenizers.Tokenizer(models.WordLevel({"Text": 0, ":": 1, "</s>": 2, "yes": 3}, unk_token=":"))
    t.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    form = PlainFormat(HuggingFaceTokenizer(t.to_str().encode(), Settings("x", {"eos_token": "</s>"})), 90, 4)
    assert form.stops == (2,) and form.answer(BANK, "yes") == [3, 2]
    assert form.read(BANK, [3, 3, 2, 0]) == Answer("yes yes") and form.neutral() == [2]


def test_stories_are_asked_for_plainly(shared):
    form = make_format("auto", load_tokenizer(shared / "weights" / "stories260K"), 500, 80)
    assert isinstance(form, PlainFormat) and form.stops == (2, 13)
    for brief, text in ((BANK, "Once upon a time, there was a dog."), (PAIRS, PAIR), (MATHS, SUM)):
        assert form.read(brief, form.answer(brief, text)) == Answer(text)
        prompt, fits = form.prompt(brief, 1, "card arrival", [text], [])
        whole = form.tokenizer.encode(said(form, prompt) + form.block(("x",), text).removeprefix("x:"))
        assert prompt[0] == 1 and all(fits) and whole[: len(prompt) - 1] == prompt[1:]


# --- Which format ---


def test_a_format_follows_from_the_tokenizer_or_is_named(byte_level, tmp_path):
    base = load_tokenizer(pretrained.byte_level(tmp_path, "gemma", template=False))
    for tokenizer, kind, made in (
        (tiny.tokenizer(), "auto", MarkerFormat),
        (byte_level["gemma"], "auto", ChatFormat),
        (byte_level["gemma"], "plain", PlainFormat),
        (base, "auto", PlainFormat),
    ):
        form = make_format(kind, tokenizer, 100, 20)
        assert type(form) is made and (form.prompt_length, form.completion_length) == (100, 20)
    for tokenizer, kind, reason in (
        (base, "chat", 'policy.format = "chat" needs a chat template'),
        (base, "markers", 'policy.format = "markers" needs'),
        (base, "prose", "none of auto, markers, plain, chat"),
        (byte_level["qwen"], "chat", "rollout.completion_length = 1 is too short"),
    ):
        with pytest.raises(UserError, match=reason):
            make_format(kind, tokenizer, 100, 1)
