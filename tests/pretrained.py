"""Small tokenizers of the kinds that come with pretrained weights, as folders."""

from __future__ import annotations

import json
from pathlib import Path

import tokenizers
from tokenizers import decoders, models, pre_tokenizers, processors, trainers

CORPUS = (
    "Write one new text with the label of the data set: examples, exactly this form, and nothing else.",
    "Text: my card has not arrived yet, and where is it?\nLabel: card arrival\n\n",
    "Premise: A man sleeps on the bench in a park.\nHypothesis: A person is resting outside.\n",
    "Question: How many apples does she have, if 3 of 12 are gone?\nAnswer: 9\n",
    "<|start|>user<|end|> <start_of_turn> [INST] <think> </s> system assistant model",
    "été, naïve, größer, 今日は, привет, 😀",
)
# As every family writes it: (special tokens, bos, eos, template).
LLAMA = """\
{%- set ns = namespace(first=true) -%}
{{- bos_token }}
{%- for m in messages %}
    {{- '<|start_header_id|>' + m['role'] + '<|end_header_id|>\\n\\n' + m['content'] | trim + '<|eot_id|>' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}
{%- endif %}
"""
QWEN = """\
{%- if messages[0].role != 'system' %}
    {{- '<|im_start|>system\\nYou are a helpful assistant.<|im_end|>\\n' }}
{%- endif %}
{%- for m in messages %}
    {%- if m.role == 'assistant' %}
        {{- '<|im_start|>assistant\\n' }}
        {%- generation %}{{- m.content + '<|im_end|>' }}{%- endgeneration %}
        {{- '\\n' }}
    {%- else %}
        {{- '<|im_start|>' + m.role + '\\n' + m.content + '<|im_end|>\\n' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
    {%- if enable_thinking is defined and enable_thinking is false %}
        {{- '<think>\\n\\n</think>\\n\\n' }}
    {%- endif %}
{%- endif %}
"""
GEMMA = """\
{{ bos_token }}
{%- if messages[0]['role'] == 'system' %}{{ raise_exception('no system role') }}{% endif %}
{%- for m in messages %}
    {%- set role = 'model' if m['role'] == 'assistant' else m['role'] %}
    {{- '<start_of_turn>' + role + '\\n' + (m['content'] | trim) + '<end_of_turn>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<start_of_turn>model\\n' }}{% endif %}
"""
LLAMA2 = """\
{% for m in messages %}{% if m.role == 'user' %}{{ bos_token + '[INST] ' + m.content | trim + ' [/INST]' }}
{%- else %}{{ ' ' + m.content | trim + ' ' + eos_token }}{% endif %}{% endfor %}
"""
SPECIAL = {
    "llama": (
        "<|begin_of_text|>",
        "<|eot_id|>",
        ["<|end_of_text|>", "<|start_header_id|>", "<|end_header_id|>"],
    ),
    "qwen": (None, "<|im_end|>", ["<|endoftext|>", "<|im_start|>"]),
    "gemma": ("<bos>", "<eos>", ["<start_of_turn>", "<end_of_turn>"]),
    "llama2": ("<s>", "</s>", []),
}
TEMPLATES = {"llama": LLAMA, "qwen": QWEN, "gemma": GEMMA, "llama2": LLAMA2}
# Added, but not as special ones.
PLAINLY_ADDED = {"qwen": ["<think>", "</think>", "<tool_call>"], "gemma": ["\n\n", "<h1>"]}


def byte_level(folder: Path, family: str, template: bool = True) -> Path:
    """A byte-level BPE with the special tokens of a family, and the files around it."""
    bos, eos, more = SPECIAL[family]
    tokenizer = tokenizers.Tokenizer(models.BPE())
    # Splits as Llama 3 does: at most three digits, words with the blank before them, newlines by themselves.
    pattern = tokenizers.Regex(
        r"(?i:'s|'t)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(pattern, "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=600, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    tokenizer.train_from_iterator(CORPUS * 4, trainer)
    tokenizer.add_special_tokens([token for token in (bos, eos, *more) if token])
    tokenizer.add_tokens(PLAINLY_ADDED.get(family, []))
    if bos:
        pair = (bos, tokenizer.token_to_id(bos))
        tokenizer.post_processor = processors.TemplateProcessing(f"{bos} $A", special_tokens=[pair])
    tokenizer.enable_truncation(8)
    tokenizer.enable_padding(length=8)
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": bos,
        "eos_token": {"__type": "AddedToken", "content": eos, "special": True},
        "clean_up_tokenization_spaces": False,
    }
    if template:
        config["chat_template"] = TEMPLATES[family]
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder


def control(family: str) -> list[str]:
    """The strings that are one token each, blanks aside."""
    bos, eos, more = SPECIAL[family]
    added = [token for token in PLAINLY_ADDED.get(family, []) if token.strip()]
    return [token for token in (bos, eos, *more, *added) if token]
