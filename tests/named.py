"""Named weights that tests make: a random network of a family, and a tokenizer with a chat format."""

from __future__ import annotations

import json
from pathlib import Path

import pretrained
import tiny

from streamsynth.policy.families import LOCAL_LAYERS, family_config
from streamsynth.policy.huggingface.writing import save_model
from streamsynth.policy.tokenizer_files import load_tokenizer

TEMPLATES = {"llama": "llama", "qwen2": "qwen", "qwen3": "qwen", "gemma2": "gemma", "gemma3": "gemma"}
SHAPE = dict(width=32, layers=2, heads=2, kv_heads=1, head_width=16, mlp_width=48)


def weights(folder: Path, family: str, seed: int = 0) -> Path:
    """A Hugging Face folder of a family."""
    tokens = pretrained.byte_level(folder.with_name(folder.name + "-tokenizer"), TEMPLATES[family])
    tokenizer = load_tokenizer(tokens)
    # A few rows more than the tokenizer knows, as many published embeddings have.
    size = tokenizer.vocab_size + 5
    window = 16 if family in LOCAL_LAYERS else 0
    config = family_config(family, window=window, vocab_size=size, **SHAPE)
    save_model(
        folder,
        config,
        tiny.fresh_params(config, seed),
        files=tokenizer.files(),
        bos=tokenizer.bos,
        eos=tokenizer.stops,
        pad=tokenizer.pad,
        context=4096,
    )
    return folder


def data(folder: Path) -> Path:
    """A folder of the first two sets of the paper's stream, a few rows each."""
    for name in ("yelp5", "amazon5"):
        (folder / name).mkdir(parents=True)
        for part, count in (("train", 100), ("test", 20)):
            rows = [
                {
                    "text": f"{part} {name} number {i} was worth {i % 5 + 1} of 5",
                    "label": f"{i % 5 + 1} stars",
                }
                for i in range(count)
            ]
            lines = "".join(json.dumps(row) + "\n" for row in rows)
            (folder / name / f"{part}.jsonl").write_text(lines)
        card = {"name": name, "description": "Reviews, by how many stars they give."}
        (folder / name / "task.json").write_text(json.dumps(card))
    return folder
