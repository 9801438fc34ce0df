"""Chat formats: the tokens that transformers gives, whoever speaks kept to their own turn."""

import json

import pretrained
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from streamsynth.errors import UserError
from streamsynth.policy.chat import read_chat
from streamsynth.policy.tokenizer_files import load_tokenizer

FAMILIES = sorted(pretrained.SPECIAL)
STRINGS = sorted({s for name in FAMILIES for s in pretrained.control(name)})


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    root = tmp_path_factory.mktemp("chats")
    for family in FAMILIES:
        pretrained.byte_level(root / family, family)
    return root


@pytest.fixture(scope="module")
def chats(folder):
    tokenizers = {family: load_tokenizer(folder / family) for family in FAMILIES}
    return {family: (t, read_chat(t)) for family, t in tokenizers.items()}


def with_template(directory, template, family="qwen"):
    folder = pretrained.byte_level(directory, family, template=False)
    (folder / "chat_template.jinja").write_text(template)
    return load_tokenizer(folder)


@pytest.mark.parametrize("family", FAMILIES)
def test_prompts_have_the_tokens_that_transformers_gives_them(folder, chats, family):
    transformers = pytest.importorskip("transformers")
    theirs = transformers.AutoTokenizer.from_pretrained(folder / family)
    t, chat = chats[family]
    for asked in ("Where is it?", "one line\n\n- another: été 😀\n", "12345 {{ bos_token }}", "x" * 300):
        messages = [{"role": "user", "content": asked.strip()}]
        if family != "llama2":  # its open turn lacks the blank that all its answers begin with
            wanted = theirs.apply_chat_template(
                messages, add_generation_prompt=True, enable_thinking=False, return_dict=False
            )
            assert chat.prompt(t, asked.strip()) == wanted
        if family != "qwen":  # with answers that others gave it leaves out the empty thoughts
            messages += [{"role": "assistant", "content": "Text:"}]
            wanted = theirs.apply_chat_template(messages, continue_final_message=True, return_dict=False)
            assert chat.prompt(t, asked.strip(), "Text:") == wanted


@pytest.mark.parametrize(
    ("family", "end"),
    [("llama", "<|eot_id|>"), ("qwen", "<|im_end|>"), ("gemma", "<end_of_turn>"), ("llama2", "</s>")],
)
def test_an_answer_ends_with_the_end_of_its_turn(chats, family, end):
    t, chat = chats[family]
    assert chat.end == t.control[end]


@settings(max_examples=150)
@given(
    family=st.sampled_from(FAMILIES),
    asked=st.lists(st.one_of(st.sampled_from([*STRINGS, "\n"]), st.text(max_size=5)), max_size=6).map(
        "".join
    ),
)
def test_no_text_leaves_its_turn(chats, family, asked):
    t, chat = chats[family]
    control = set(t.control.values())

    def turns(text):
        return [i for i in chat.prompt(t, text, "Text:") if i in control]

    assert turns(asked) == turns("hello")


def test_there_is_no_clock_and_no_thinking(tmp_path):
    dated = (
        "{% if strftime_now is defined %}{{ strftime_now('%Y') }}{% else %}26 Jul 2024{% endif %}"
        "{{ enable_thinking }} {{ messages | tojson }}<|im_end|>"
    )
    t = with_template(tmp_path, dated)
    text = t.decode(read_chat(t).prompt(t, "<été>"))
    assert text == '26 Jul 2024False [{"role": "user", "content": "<été>"}]'


def test_a_template_without_control_tokens_is_one_text(tmp_path):
    t = with_template(
        tmp_path, "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
        "{% if add_generation_prompt %}assistant:{% endif %}"
    )  # fmt: skip
    chat = read_chat(t)
    assert chat.head == chat.tail == () and chat.end == t.eos
    assert chat.prompt(t, "hi", "Text:") == t.encode("user: hi\nassistant: Text:")


@pytest.mark.parametrize(
    ("template", "reason"),
    [
        ("{{ raise_exception('only with tools') }}", "only with tools"),
        ("{% for m in messages %}", "Unexpected end of template"),
        ("{{ messages[5].content }}", "has no element 5"),
        ("{{ 1 / 0 }}", "division by zero"),
        ("{{ 'a' + 1 }}", "can only concatenate"),
        ("{% macro again() %}{{ again() }}{% endmacro %}{{ again() }}", "recursion"),
        ("{% for i in range(1000000000) %}{% endfor %}", "Range too big"),
        ("{{ messages.append(1) }}", "unsafe|not safely callable"),
        ("{{ ''.__class__.__mro__ }}", "unsafe"),
        ("{{ strftime_now('%Y') }}", "'strftime_now' is undefined"),
    ],
)
def test_a_template_that_fails_is_named(tmp_path, template, reason):
    with pytest.raises(UserError, match=rf"chat_template\.jinja cannot be rendered \(.*({reason})") as caught:
        read_chat(with_template(tmp_path, template))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "template",
    [
        "hello",
        "{% for m in messages %}{{ m.content }}{{ m.content }}{% endfor %}",
        "{{ messages[0].content }}",
    ],
)
def test_a_template_that_does_not_say_what_is_said_is_named(tmp_path, template):
    with pytest.raises(UserError, match=r"chat_template\.jinja does not say once"):
        read_chat(with_template(tmp_path, template))


def test_the_template_of_a_configuration_is_named(tmp_path):
    folder = pretrained.byte_level(tmp_path, "qwen")
    config = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps(config | {"chat_template": "{{"}))
    with pytest.raises(UserError, match=r"tokenizer_config\.json cannot be rendered"):
        read_chat(load_tokenizer(folder))
