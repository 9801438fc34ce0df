"""Tiny sentence encoders of random weights, and what transformers computes with them.

Only `expected` needs transformers and torch, so this imports without them.
"""

from __future__ import annotations

import json
import pathlib
from collections.abc import Sequence

import numpy as np
import tokenizers
from safetensors.numpy import save_file
from tokenizers import models, normalizers, pre_tokenizers, processors

SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
LETTERS = "abcdefghijklmnopqrstuvwxyz"
WORDS = ("the", "bank", "card", "river", "is", "lost", "my", "cat", "sat", "on", "mat", "?", ".", "[", "]")
POSITIONS = 40
TEXTS = (
    "The bank is lost.",
    "my card is lost",
    "The cat sat on the mat.",
    "",
    "RIVER bank? the zebra",
    "on the river " * 6 + ".",
    "my cat is on my bank card " * 9,  # too long
    "naïve 河",
)
SHAPE = dict(
    model_type="bert",
    hidden_act="gelu",
    hidden_size=16,
    num_hidden_layers=2,
    num_attention_heads=4,
    intermediate_size=24,
    max_position_embeddings=POSITIONS,
    type_vocab_size=2,
    layer_norm_eps=1e-12,
    pad_token_id=0,
)


def tokenizer() -> tokenizers.Tokenizer:
    """Word pieces: a few words, and letters for the rest."""
    pieces = [*SPECIAL, *WORDS, *LETTERS, *(f"##{letter}" for letter in LETTERS)]
    ids = {piece: i for i, piece in enumerate(pieces)}
    made = tokenizers.Tokenizer(models.WordPiece(ids, unk_token="[UNK]"))
    made.add_special_tokens(list(SPECIAL))
    made.normalizer = normalizers.BertNormalizer()
    made.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    made.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", ids["[CLS]"]), ("[SEP]", ids["[SEP]"])]
    )
    # As in released folders: every text would have the same length, and lose what the network can read.
    made.enable_truncation(8)
    made.enable_padding(length=8)
    return made


def write(folder: pathlib.Path, seed: int, prefix: str = "", **changes) -> None:
    """A folder of random weights; `prefix` stands before all names, `changes` are fields of config.json."""
    words = tokenizer()
    shape = {**SHAPE, "vocab_size": words.get_vocab_size(), **changes}
    width, inner = shape["hidden_size"], shape["intermediate_size"]
    rng = np.random.default_rng(seed)

    def normal(*size: int) -> np.ndarray:
        return rng.normal(size=size).astype(np.float32) * np.float32(0.4)

    def dense(name: str, out: int, into: int) -> dict[str, np.ndarray]:
        return {f"{name}.weight": normal(out, into), f"{name}.bias": normal(out)}

    def norm(name: str) -> dict[str, np.ndarray]:
        return {f"{name}.weight": 1 + normal(width), f"{name}.bias": normal(width)}

    tensors = {
        "embeddings.word_embeddings.weight": normal(shape["vocab_size"], width),
        "embeddings.position_embeddings.weight": normal(shape["max_position_embeddings"], width),
        "embeddings.token_type_embeddings.weight": normal(shape["type_vocab_size"], width),
        **norm("embeddings.LayerNorm"),
    }
    for layer in (f"encoder.layer.{i}" for i in range(shape["num_hidden_layers"])):
        for part in ("self.query", "self.key", "self.value", "output.dense"):
            tensors |= dense(f"{layer}.attention.{part}", width, width)
        tensors |= dense(f"{layer}.intermediate.dense", inner, width)
        tensors |= dense(f"{layer}.output.dense", width, inner)
        tensors |= norm(f"{layer}.attention.output.LayerNorm") | norm(f"{layer}.output.LayerNorm")
    folder.mkdir(parents=True, exist_ok=True)
    words.save(str(folder / "tokenizer.json"))
    (folder / "config.json").write_text(json.dumps(shape, indent=2) + "\n")
    named = {prefix + name: tensor for name, tensor in tensors.items()}
    save_file(named, folder / "model.safetensors", metadata={"format": "pt"})


def expected(folder: pathlib.Path, texts: Sequence[str], length: int | None = None) -> np.ndarray:
    """[N, H] float32: transformers' last layer, averaged over each text's tokens; `length` cuts them."""
    import torch
    import transformers

    words = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    words.no_padding()
    network = transformers.BertModel.from_pretrained(folder, add_pooling_layer=False).eval()
    words.enable_truncation(length or network.config.max_position_embeddings)
    vectors = []
    with torch.no_grad():
        for text in texts:
            hidden = network(torch.tensor([words.encode(text).ids])).last_hidden_state[0]
            vectors.append(torch.nn.functional.normalize(hidden.mean(0), dim=0).numpy())
    return np.stack(vectors)
