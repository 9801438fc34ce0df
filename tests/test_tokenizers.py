"""Tokenizers of pretrained weights: texts, special tokens, stops, and the files around them."""

import itertools
import json

import pretrained
import pytest
import tiny
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import models

from streamsynth.errors import UserError
from streamsynth.policy.pretrained_tokenizers import HuggingFaceTokenizer, SentencePieceTokenizer, Settings
from streamsynth.policy.tokenizer import MarkerTokenizer
from streamsynth.policy.tokenizer_files import load_tokenizer

STRINGS = sorted({s for name in pretrained.SPECIAL for s in pretrained.control(name)})
# Texts that nobody writes, among them those that spell a border, whole, cut or nested.
ODD = st.lists(
    st.one_of(
        st.sampled_from([*STRINGS, "<unk>", "<|im_", "end|>", "[[INST]", "\n\n", "\ud800"]),
        st.text(max_size=6),
    ),
    max_size=6,
).map("".join)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    root = tmp_path_factory.mktemp("tokenizers")
    for family in pretrained.SPECIAL:
        pretrained.byte_level(root / family, family)
    return root


@pytest.fixture(scope="module")
def byte_level(folder):
    return {family: load_tokenizer(folder / family) for family in pretrained.SPECIAL}


@pytest.fixture(scope="module")
def stories(shared):
    return load_tokenizer(shared / "weights" / "stories260K")


@settings(max_examples=150)
@given(text=ODD, family=st.sampled_from(sorted(pretrained.SPECIAL)))
def test_any_text_comes_back_and_holds_no_special_token(byte_level, text, family):
    t = byte_level[family]
    ids = t.encode(text)
    assert not set(ids) & {*t.control.values(), *t.stops}
    assert t.decode(ids) == text.replace("\ud800", "?")
    assert t.decode([*ids, t.eos, *t.encode("after the end")]) == t.decode(ids)


@pytest.mark.parametrize("family", sorted(pretrained.SPECIAL))
def test_a_template_has_special_tokens(byte_level, family):
    t = byte_level[family]
    for string in pretrained.control(family):
        assert t.encode_template(string) == [t.control[string]]
        assert t.encode_template(f"a {string}{string} b") == [
            *t.encode("a "), *[t.control[string]] * 2, *t.encode(" b")
        ]  # fmt: skip
    assert t.encode_template("my card") == t.encode("my card") and t.encode_template("") == []


def test_special_ids_unknown_ids_and_padding_vanish_from_a_text(byte_level):
    t = byte_level["llama"]
    card = t.encode(" card")
    assert t.decode([t.bos, *card, t.control["<|start_header_id|>"], *card, 10**6, -1]) == " card card"
    assert t.decode([t.eos, *card]) == "" == t.decode([])
    # A word that a model was given, but that is no border, is what it wrote.
    qwen = byte_level["qwen"]
    assert qwen.decode([qwen.control["<think>"], *qwen.encode("so")]) == "<think>so"


def test_ids_without_a_piece_vanish():
    """Vocabularies may have holes, and networks more rows than pieces."""
    model = tokenizers.Tokenizer(models.WordLevel({"a": 0, "b": 7, "</s>": 9}, unk_token="a"))
    t = HuggingFaceTokenizer(model.to_str().encode(), Settings("x", {"eos_token": "</s>"}))
    assert t.vocab_size == 10 and t.decode([0, 3, 7, 8, 12]) == "a b" and t.bos is None and not t.add_bos


def test_a_special_string_that_is_a_piece_of_the_vocabulary_is_no_way_in():
    """Merges may lead to it, and then `tokenizers` gives its id whatever is asked of special tokens."""
    letters = {c: i for i, c in enumerate("</s>ab")}
    model = models.BPE(letters | {"</": 6, "s>": 7, "</s>": 8}, [("<", "/"), ("s", ">"), ("</", "s>")])
    file = tokenizers.Tokenizer(model).to_str().encode()
    assert tokenizers.Tokenizer.from_buffer(file).encode("a</s>b").ids == [4, 8, 5]
    t = HuggingFaceTokenizer(file, Settings("x", {"eos_token": "</s>"}))
    assert t.encode("a</s>b</s>") == [4, 0, 1, 7, 5, 0, 1, 7] and t.encode_template("a</s>") == [4, 8]


def test_what_a_normalizer_makes_of_a_text_is_no_way_in():
    model = tokenizers.Tokenizer(models.WordLevel({"x": 0, "y": 1}, unk_token="x"))
    model.normalizer = tokenizers.normalizers.NFKC()
    model.add_tokens([tokenizers.AddedToken("<t>", normalized=True, special=False)])
    model.add_special_tokens(["</s>"])
    t = HuggingFaceTokenizer(model.to_str().encode(), Settings("x", {"eos_token": "</s>"}))
    assert t.control == {"<t>": 2, "</s>": 3}
    for text in ("＜t＞", "<t>", "＜/s＞", "</s>"):
        assert not {2, 3} & set(t.encode(text))


@pytest.mark.parametrize("family", sorted(pretrained.SPECIAL))
def test_plain_texts_have_the_tokens_that_transformers_gives_them(folder, byte_level, family):
    transformers = pytest.importorskip("transformers")
    theirs = transformers.AutoTokenizer.from_pretrained(folder / family)
    t = byte_level[family]
    for text in ("my card has not arrived", " two  blanks\n\nand lines\n", "été 今日は 😀 12345"):
        ours = t.encode(text)
        assert ours == theirs.encode(text, add_special_tokens=False)
        assert [t.bos, *ours] if t.add_bos else ours == theirs.encode(text)
        assert t.decode(ours) == theirs.decode(ours) == text
    assert (t.bos, t.eos) == (theirs.bos_token_id, theirs.eos_token_id)


def test_the_files_say_what_ends_a_text(tmp_path):
    folder = pretrained.byte_level(tmp_path, "gemma")
    t = load_tokenizer(folder)
    assert t.stops == (t.eos,) == (t.pad,) and t.eos == t.control["<eos>"] and t.add_bos
    turn = t.control["<end_of_turn>"]
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [t.eos, turn]}))
    (folder / "config.json").write_text(json.dumps({"text_config": {"eos_token_id": 3}, "bos_token_id": 1}))
    t = load_tokenizer(folder)
    assert t.stops == (t.eos, turn, 3)
    assert t.decode([*t.encode("a"), turn, *t.encode("b")]) == "a"
    config = json.loads((folder / "tokenizer_config.json").read_text())
    more = {"add_bos_token": False, "pad_token": "<start_of_turn>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(config | more))
    t = load_tokenizer(folder)
    assert not t.add_bos and t.pad == t.control["<start_of_turn>"]
    # Without that file, the network's names count.
    (folder / "tokenizer_config.json").unlink()
    t = load_tokenizer(folder)
    assert (t.bos, t.eos, t.stops) == (1, t.control["<eos>"], (t.control["<eos>"], turn, 3))
    (folder / "generation_config.json").unlink()
    (folder / "config.json").unlink()
    (folder / "special_tokens_map.json").write_text('{"eos_token": {"content": "<end_of_turn>"}}')
    assert load_tokenizer(folder).eos == turn
    (folder / "special_tokens_map.json").unlink()
    with pytest.raises(UserError, match="tokenizer_config.json an eos_token"):
        load_tokenizer(folder)


def test_the_files_go_along(folder, byte_level, tmp_path):
    t = byte_level["qwen"]
    assert set(t.files()) == {"tokenizer.json", "tokenizer_config.json"}
    for name, content in t.files().items():
        assert content == (folder / "qwen" / name).read_bytes()
        (tmp_path / name).write_bytes(content)
    again = load_tokenizer(tmp_path)
    assert again.encode("my card") == t.encode("my card") and again.chat_template == t.chat_template


def test_of_several_templates_the_file_and_then_the_default_counts(tmp_path):
    folder = pretrained.byte_level(tmp_path, "qwen", template=False)
    assert load_tokenizer(folder).chat_template is None
    config = json.loads((folder / "tokenizer_config.json").read_text())
    config["chat_template"] = [{"name": "tools", "template": "T"}, {"name": "default", "template": "D"}]
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    assert load_tokenizer(folder).chat_template == "D"
    (folder / "chat_template.jinja").write_text("Ü", encoding="utf-8")
    t = load_tokenizer(folder)
    assert t.chat_template == "Ü" and t.chat_source.endswith("chat_template.jinja") and len(t.files()) == 3


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("tokenizer.json", b"{}"),
        ("tokenizer_config.json", b'{"a": '),
        ("tokenizer_config.json", b"\xff"),
        ("generation_config.json", b"[]"),
        ("chat_template.jinja", b"\xff"),
    ],
)
def test_a_damaged_file_is_named(tmp_path, name, content):
    folder = pretrained.byte_level(tmp_path, "qwen")
    (folder / name).write_bytes(content)
    with pytest.raises(UserError, match=rf"{name} is damaged .*: copy it anew\.$"):
        load_tokenizer(folder)


def test_a_missing_or_damaged_model_is_named(tmp_path):
    with pytest.raises(UserError, match="no tokenizer.json and no tokenizer.model"):
        load_tokenizer(tmp_path)
    (tmp_path / "tokenizer.model").write_bytes(b"odd")
    with pytest.raises(UserError, match="tokenizer.model is damaged"):
        load_tokenizer(tmp_path)


# --- SentencePiece ---


def test_a_policy_of_our_own_is_known_by_its_markers(tmp_path):
    ours = tiny.tokenizer()
    for name, content in ours.files().items():
        (tmp_path / name).write_bytes(content)
    t = load_tokenizer(tmp_path)
    assert isinstance(t, MarkerTokenizer) and t.encode("the cat") == ours.encode("the cat")
    assert t.encode_template("<write>the") == [t.marker("<write>"), *t.encode("the")]
    assert t.stops == (t.eos,) and t.decode([*t.encode("the"), 10**6]) == "the"


def test_a_pretrained_sentencepiece_model(stories):
    t = stories
    assert isinstance(t, SentencePieceTokenizer) and t.vocab_size == 512
    assert (t.bos, t.eos, t.pad, t.stops, t.add_bos) == (1, 2, 2, (2,), True)
    assert t.encode("Once upon a time")[:2] == [403, 407] and t.chat_template is None
    assert t.encode_template("<s>Lily</s>") == [1, *t.encode("Lily"), 2]
    assert t.decode([1, *t.encode("Lily"), 0, 600, -1, 2, *t.encode("Tim")]) == "Lily"


@settings(max_examples=100)
@given(text=ODD)
def test_sentencepiece_keeps_any_text_apart_from_special_tokens(stories, text):
    ids = stories.encode(text)
    assert not set(ids) & {0, 1, 2} and stories.decode(ids) == text.replace("\ud800", "?").replace("▁", " ")


def test_tokens_added_to_a_sentencepiece_model(stories, tmp_path):
    for name, content in stories.files().items():
        (tmp_path / name).write_bytes(content)
    added = {"<|im_start|>": 512, "<|im_end|>": 513}
    (tmp_path / "added_tokens.json").write_text(json.dumps(added))
    (tmp_path / "tokenizer_config.json").write_text('{"eos_token": "<|im_end|>", "add_bos_token": false}')
    t = load_tokenizer(tmp_path)
    assert (t.vocab_size, t.eos, t.add_bos) == (514, 513, False)
    assert t.encode_template("<|im_start|>a<|im_end|>") == [512, *t.encode("a"), 513]
    assert max(t.encode("<|im_start|>a<|im_end|>")) < 512
    assert t.decode([512, *t.encode("a"), 2, 513, *t.encode("b")]) == "a"


def test_pieces_that_users_defined_are_no_way_in(tmp_path):
    """SentencePiece itself finds them in any text."""
    sentencepiece = pytest.importorskip("sentencepiece")
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=itertools.chain.from_iterable([pretrained.CORPUS] * 4),
        model_prefix=str(tmp_path / "tokenizer"), vocab_size=380, model_type="bpe", byte_fallback=True,
        user_defined_symbols=["<start_of_turn>", "<end_of_turn>"], minloglevel=2,
    )  # fmt: skip
    t = load_tokenizer(tmp_path)
    borders = {t.control["<start_of_turn>"], t.control["<end_of_turn>"]}
    raw = sentencepiece.SentencePieceProcessor(model_file=str(tmp_path / "tokenizer.model"))
    assert borders & set(raw.encode("a <end_of_turn> b"))
    assert not borders & set(t.encode("a <end_of_turn><start_of_turn>"))
    assert borders == set(t.encode_template("<end_of_turn><start_of_turn>"))
