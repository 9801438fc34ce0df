"""Which tensors of a Hugging Face folder make which parameter of the network."""

from __future__ import annotations

import dataclasses

from streamsynth.policy.transformer import TransformerConfig, layer_place

# Module of a layer -> module of a Hugging Face layer.
PROJECTIONS = {
    "query": "self_attn.q_proj",
    "key": "self_attn.k_proj",
    "value": "self_attn.v_proj",
    "out": "self_attn.o_proj",
    "gate": "mlp.gate_proj",
    "up": "mlp.up_proj",
    "down": "mlp.down_proj",
}
# With norms after attention and MLP, `post_attention_layernorm` is what its name says; without, it is the
# norm before the MLP.
_NORMS = {"attention_norm": "input_layernorm", "mlp_norm": "post_attention_layernorm"}
_NORMS_WITH_POST = {
    "attention_norm": "input_layernorm",
    "attention_post_norm": "post_attention_layernorm",
    "mlp_norm": "pre_feedforward_layernorm",
    "mlp_post_norm": "post_feedforward_layernorm",
}
_HEAD_NORMS = {"query_norm": "self_attn.q_norm", "key_norm": "self_attn.k_norm"}

EMBEDDING, FINAL_NORM, HEAD = "model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"

# Where models that also see keep their language model, by the releases that wrote them, and the rest.
_LANGUAGE_MODEL = ("language_model.", "model.language_model.")
_VISION = ("vision_tower.", "model.vision_tower.", "multi_modal_projector.", "model.multi_modal_projector.")


@dataclasses.dataclass(frozen=True)
class Source:
    """What a parameter is made of.

    names: of the tensors, in the order of the parameter's leading axis where it is stacked.
    shape: of each tensor as the file has it.
    transposed: the file has [out, in] where the network has [in, out].
    stacked: the parameter has a leading axis, a row for each name; else there is one name.
    """

    names: tuple[str, ...]
    shape: tuple[int, ...]
    transposed: bool = False
    stacked: bool = False

    @property
    def param_shape(self) -> tuple[int, ...]:
        """The parameter's own shape."""
        own = self.shape[::-1] if self.transposed else self.shape
        return (len(self.names), *own) if self.stacked else own


def sources(config: TransformerConfig) -> dict[tuple[str, ...], Source]:
    """Every parameter of the network by its path, and what it is made of."""
    found = {
        ("embedding",): Source((EMBEDDING,), (config.vocab_size, config.width)),
        ("final_norm", "scale"): Source((FINAL_NORM,), (config.width,)),
    }
    if not config.tied_embeddings:
        found["head",] = Source((HEAD,), (config.vocab_size, config.width))
    parts = _layer_parts(config)
    rows: dict[tuple[str, ...], list[int]] = {}
    for layer in range(config.layers):
        place, _ = layer_place(config, layer)
        rows.setdefault(place, []).append(layer)
    for place, layers in rows.items():
        stacked = layer_place(config, layers[0])[1] is not None
        for path, (name, shape) in parts.items():
            names = tuple(f"model.layers.{layer}.{name}" for layer in layers)
            found[*place, *path] = Source(names, shape, path[-1] == "kernel", stacked)
    return found


def plain_name(name: str) -> str | None:
    """The name of a language model's tensor as if the model were nothing else, or None for its vision."""
    if name.startswith(_VISION):
        return None
    prefix = next((prefix for prefix in _LANGUAGE_MODEL if name.startswith(prefix)), "")
    plain = name.removeprefix(prefix)
    # One of the layouts leaves out the inner "model.".
    return f"model.{plain}" if prefix and not plain.startswith(("model.", "lm_head.")) else plain


def projection_shape(config: TransformerConfig, module: str) -> tuple[int, int]:
    """[out, in] of a projection."""
    heads, kv_heads = config.heads * config.head_width, config.kv_heads * config.head_width
    return {
        "query": (heads, config.width),
        "key": (kv_heads, config.width),
        "value": (kv_heads, config.width),
        "out": (config.width, heads),
        "gate": (config.mlp_width, config.width),
        "up": (config.mlp_width, config.width),
        "down": (config.width, config.mlp_width),
    }[module]


def _layer_parts(config: TransformerConfig) -> dict[tuple[str, str], tuple[str, tuple[int, ...]]]:
    """Path within a layer -> name and shape of the tensor within a Hugging Face layer."""
    parts: dict[tuple[str, str], tuple[str, tuple[int, ...]]] = {}
    for module, name in PROJECTIONS.items():
        shape = projection_shape(config, module)
        parts[module, "kernel"] = (f"{name}.weight", shape)
        if config.attention_bias and module in ("query", "key", "value"):
            parts[module, "bias"] = (f"{name}.bias", shape[:1])
    for module, name in (_NORMS_WITH_POST if config.post_norms else _NORMS).items():
        parts[module, "scale"] = (f"{name}.weight", (config.width,))
    if config.query_key_norm:
        for module, name in _HEAD_NORMS.items():
            parts[module, "scale"] = (f"{name}.weight", (config.head_width,))
    return parts
