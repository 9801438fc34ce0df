"""The families of decoders, by what their layers do differently."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from streamsynth.errors import UserError
from streamsynth.policy.lora import LoraConfig
from streamsynth.policy.transformer import TransformerConfig

_GEMMA = dict(activation="gelu_tanh", norm_offset=1.0, post_norms=True, scaled_embedding=True)

# What a family's `TransformerConfig` has that is not a matter of size.
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {},
    "qwen2": dict(attention_bias=True),
    "qwen3": dict(query_key_norm=True),
    "gemma2": dict(**_GEMMA, attention_softcap=50.0, logit_softcap=30.0),
    "gemma3": dict(**_GEMMA, query_key_norm=True, local_rope_theta=10_000.0),
}

# Which layers of a period see a window alone; families that are not named have none.
LOCAL_LAYERS = {"gemma2": (True, False), "gemma3": (True, True, True, True, True, False)}


def family_config(family: str, *, window: int = 0, **shape: Any) -> TransformerConfig:
    """The config of a network of a family.

    Args:
      family: a row of `FAMILIES`.
      window: of the layers in `LOCAL_LAYERS`; 0 lets them see everything.
      **shape: sizes and choices, named as in `TransformerConfig`.

    Raises:
      UserError: for an unknown family, a window in a family without local layers, or an impossible shape.
    """
    if family not in FAMILIES:
        raise UserError(f"policy.family = {family!r} is not known: choose one of {', '.join(FAMILIES)}.")
    if window and family not in LOCAL_LAYERS:
        raise UserError(
            f"policy.window = {window}, but the family {family} has no local layers: set it to 0."
        )
    windows = tuple(window if local else 0 for local in LOCAL_LAYERS[family]) if window else (0,)
    return TransformerConfig(family=family, windows=windows, **FAMILIES[family], **shape)


# Keys of the config group `policy` that give the shape of a network of our own.
_SHAPE = ("width", "layers", "heads", "kv_heads", "head_width", "mlp_width", "rope_theta", "norm_epsilon")
# Keys that are a matter of choice for any network, named weights or not.
_CHOICES = ("param_dtype", "compute_dtype", "logit_dtype", "scan_layers", "remat", "gather_to_sample")


def choices(group: Mapping[str, Any]) -> dict[str, Any]:
    """What the config group `policy` says of any network: dtypes, how layers are run, the adapter."""
    lora = group["lora"]
    adapter = LoraConfig(lora["rank"], lora["alpha"], tuple(lora["modules"])) if lora["rank"] else None
    return {"lora": adapter, **{name: group[name] for name in _CHOICES}}


def own_config(group: Mapping[str, Any], vocab_size: int) -> TransformerConfig:
    """The network of our own that the config group `policy` describes.

    Raises:
      UserError: naming the key that does not fit.
    """
    shape = {name: group[name] for name in _SHAPE}
    return family_config(
        group["family"], window=group["window"], vocab_size=vocab_size, **shape, **choices(group)
    )
