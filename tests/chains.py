"""A policy that can propose attributes: a Markov chain, in which each token follows from the last one."""

from __future__ import annotations

from pathlib import Path

import jax
import named
import numpy as np
import pretrained
import tiny

from streamsynth.policy.families import family_config
from streamsynth.policy.huggingface.writing import save_model
from streamsynth.policy.tokenizer_files import load_tokenizer

NAMES, WORDS = (" form", " data"), (" card", " apples", " person", " bench", " park", " system")


def params(tokenizer, config):
    """Parameters of a network whose layers add nothing: embedding and head are a Markov chain.

    After " in", the end of a prompt for an attribute, come a name and a colon; after any colon words, some
    with commas between them, and the end. So it answers every prompt with a list of words.
    """

    def ids(*pieces):
        return [token for piece in pieces for token in tokenizer.encode(piece)]

    words, end = ids(*WORDS), tokenizer.stops[0]
    any_word = {word: 1 / len(words) for word in words}
    # By state: the tokens that lead to it, and the chances of the next one.
    states = [
        (ids(" in"), dict.fromkeys(ids(*NAMES), 1 / 2)),
        (ids(*NAMES), {ids(":")[0]: 1.0}),
        (words, {ids(",")[0]: 0.5, end: 0.3, **{word: 0.2 / len(words) for word in words}}),
        (None, any_word),  # every other token
    ]
    assert len(words) == 6 and len(ids(" in", ":", ",", *NAMES)) == 5
    embedding = np.zeros((config.vocab_size, config.width), np.float32)
    embedding[:, len(states) - 1] = 1
    head = np.full((config.vocab_size, config.width), -20.0, np.float32)
    for state, (tokens, chances) in enumerate(states):
        if tokens is not None:
            embedding[tokens] = np.eye(config.width)[state]
        head[list(chances), state] = np.log(list(chances.values()))
    tree = tiny.fresh_params(config)
    # The last norm makes a state of length 1 one of length sqrt(width).
    tree = {**tree, "embedding": embedding, "head": head / np.float32(config.width**0.5)}
    for i in range(config.layers):
        layer = tree[f"layers_{i}"]
        zeros = {name: jax.tree.map(np.zeros_like, layer[name]) for name in ("out", "down")}
        tree[f"layers_{i}"] = {**layer, **zeros}
    return tree


def network_of(tokenizer):
    return family_config("llama", tied_embeddings=False, vocab_size=tokenizer.vocab_size, **named.SHAPE)


def folder_of(root: Path) -> Path:
    """The chain as a Hugging Face folder."""
    tokenizer = load_tokenizer(pretrained.byte_level(root / "tokenizer", "llama"))
    network = network_of(tokenizer)
    save_model(
        root / "weights",
        network,
        params(tokenizer, network),
        files=tokenizer.files(),
        bos=tokenizer.bos,
        eos=tokenizer.stops,
        pad=tokenizer.pad,
        context=4096,
    )
    return root / "weights"
