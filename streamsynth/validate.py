"""Whether the values of a config can be computed with: asked before anything is, and said by key.

What depends on more than one value of the config (a mesh that does not fit the devices, heads that do not
divide) is checked where it is built.
"""

from __future__ import annotations

import itertools
import math
from typing import Any

from ml_collections import ConfigDict

from streamsynth.config import OPEN_GROUPS, flatten
from streamsynth.defaults import default_config
from streamsynth.errors import UserError

_INFINITY = math.inf
_LARGEST_SEED = 2**32 - 1  # of a JAX key without 64-bit numbers

# (least, most) and the keys that lie between them, both included.
_RANGES: dict[tuple[float, float], tuple[str, ...]] = {
    (0, _LARGEST_SEED): ("seed",),
    (0, 1): (
        "balance.archive",
        "balance.decay",
        "balance.others",
        "dataset.near_duplicate",
        "feedback.floor",
        "patterns.floor",
        "patterns.shared_decay",
        "patterns.task_decay",
        "replay.baseline_decay",
        "replay.elite",
        "rivals.least_distinct",
        "rollout.lag",
        "rivals.same",
        "replay.elite_share",
        "replay.leverage_share",
    ),
    (0, _INFINITY): (
        "balance.alpha",
        "balance.alpha_max",
        "balance.eta",
        "dataset.per_label",
        "evaluation.student.hidden",
        "evaluation.student.weight_decay",
        "feedback.judges.*",
        "feedback.min_words",
        "feedback.secondary.*",
        "feedback.utility.ridge",
        "learner.steps",
        "objective.clip_high",
        "objective.cloning_weight",
        "objective.drift_limit",
        "objective.entropy_weight",
        "objective.kl_weight",
        "objective.replay_weight",
        "optimizer.learning_rate",
        "optimizer.warmup",
        "optimizer.weight_decay",
        "policy.lora.rank",
        "policy.window",
        "pretrain.optimizer.learning_rate",
        "pretrain.optimizer.warmup",
        "pretrain.optimizer.weight_decay",
        "pretrain.prompt_weight",
        "pretrain.steps",
        "replay.capacity",
        "replay.share",
        "rivals.dqo_alpha",
        "rivals.release_*",
        "scheduler.probe_every",
        "scorers.backoff_seconds",
        "scorers.retries",
        "stream.proposed_attributes",
        "stream.test_limit",
        "stream.train_limit",
        "supervised.batches",
        "supervised.early_stop",
        "supervised.held_out",
        "supervised.prompt_weight",
        "supervised.rounds",
        "supervised.rows",
        "supervised.steps",
    ),
    (1, _INFINITY): (
        "balance.batches",
        "checkpoint.every",
        "checkpoint.keep",
        "evaluation.batches",
        "evaluation.best_of",
        "evaluation.diversity_texts",
        "evaluation.prompts",
        "evaluation.rows_per_label",
        "evaluation.samples",
        "evaluation.student.batch_size",
        "evaluation.student.steps",
        "evaluation.student.width",
        "feedback.max_words",
        "feedback.utility.steps",
        "feedback.width",
        "learner.microbatches",
        "objective.chunk",
        "policy.heads",
        "policy.kv_heads",
        "policy.layers",
        "policy.mlp_width",
        "policy.width",
        "pretrain.corpus_sentences",
        "pretrain.log_every",
        "pretrain.prompts",
        "pretrain.samples",
        "rollout.best_kept",
        "rollout.prompts",
        "scheduler.ramp",
        "scheduler.staleness",
        "scorers.batch_size",
        "scorers.concurrency",
        "scorers.max_requests",
        "scorers.max_tokens",
        "stream.examples_per_label",
        "supervised.measure_every",
        "supervised.samples",
    ),
    (2, _INFINITY): (
        "policy.head_width",  # rotary positions turn pairs
        "rollout.completion_length",  # a token and the end
        "rollout.samples",  # each is compared with the others of its prompt
    ),
    (5, _INFINITY): ("rollout.prompt_length",),  # four markers and a token of the label
    (300, _INFINITY): ("policy.vocab_size",),  # 256 bytes, the markers and some pieces
}

# (bound, bound) and the keys that lie strictly between them.
_OPEN_RANGES: dict[tuple[float, float], tuple[str, ...]] = {
    (0, _INFINITY): (
        "balance.factor",  # its logarithm is taken
        "evaluation.student.learning_rate",
        "evaluation.temperature",
        "feedback.accept",  # at 0 even what the gates reject would be kept
        "feedback.power",
        "feedback.ridge",
        "feedback.utility.learning_rate",
        "objective.replay_cap",
        "optimizer.clip_norm",
        "patterns.bonus",
        "patterns.noise",
        "patterns.prior",
        "patterns.temperature",
        "policy.lora.alpha",
        "policy.norm_epsilon",
        "policy.rope_theta",
        "pretrain.optimizer.clip_norm",
        "replay.megabytes",
        "rollout.temperature",
        "scorers.scale",
        "scorers.timeout_seconds",
        "hosts.stall_seconds",
    ),
}

# [0, 1): decays that must forget, and a clip that must leave something.
_BELOW_ONE = (
    "feedback.utility.momentum",
    "objective.clip_low",
    "optimizer.b1",
    "optimizer.b2",
    "pretrain.optimizer.b1",
    "pretrain.optimizer.b2",
    "scheduler.fast",
    "scheduler.slow",
)

_CHOICES = {
    "stream.experience": ("sequential", "isolated"),
    "stream.on_bad_row": ("error", "skip"),
    "dataset.select": ("best", "spread_out"),
    "supervised.select": ("spread_out", "first"),
    "balance.target": ("base", "policy", "examples"),
    "learner.kl_reference": ("turn", "base"),
    "patterns.choice": ("softmax", "thompson", "ucb"),
    "feedback.features": ("ngrams", "hidden", "encoder"),
    "feedback.utility.form": ("exact", "first_order"),
    "policy.format": ("auto", "markers", "plain", "chat"),
}


def check(config: ConfigDict) -> None:
    """Raises UserError where a key is missing, unknown, of another type than its default, or out of range."""
    values = flatten(config)
    _check_keys(values)
    for key, value in values.items():
        if isinstance(value, float) and not math.isfinite(value):
            raise UserError(f"{key} = {value} is no number to compute with: give a finite one.")
    for (least, most), keys in _RANGES.items():
        for key in _named(keys, values):
            if not least <= values[key] <= most:
                bounds = f"{least} or more" if most == _INFINITY else f"a value from {least} to {most}"
                raise UserError(f"{key} = {values[key]} is out of range: give {bounds}.")
    for (least, most), keys in _OPEN_RANGES.items():
        for key in keys:
            if not least < values[key] < most:
                raise UserError(f"{key} = {values[key]} is out of range: give a value above {least}.")
    for key in _BELOW_ONE:
        if not 0 <= values[key] < 1:
            raise UserError(f"{key} = {values[key]} is out of range: give a value from 0 to below 1.")
    for key, choices in _CHOICES.items():
        if values[key] not in choices:
            raise UserError(f"{key} = {values[key]!r} is not known: choose one of {', '.join(choices)}.")
    if config.feedback.max_words < config.feedback.min_words:
        raise UserError(
            f"feedback.max_words = {config.feedback.max_words} is below feedback.min_words = "
            f"{config.feedback.min_words}: no text would pass."
        )
    _check_buckets(config.rollout)


def _check_buckets(rollout: Any) -> None:
    """Whether the lengths that prompts may be padded to rise from 1 or more to below the full one."""
    lengths = (0, *rollout.buckets, rollout.prompt_length)
    whole = all(type(length) is int for length in lengths)
    if not whole or any(longer <= shorter for shorter, longer in itertools.pairwise(lengths)):
        raise UserError(
            f"rollout.buckets = {tuple(rollout.buckets)} must be whole numbers that rise from 1 or more to "
            f"below rollout.prompt_length = {rollout.prompt_length}: give such lengths, or none."
        )


def _check_keys(values: dict[str, Any]) -> None:
    """The keys are those of the default config, and every value is of the type of its default."""
    defaults = flatten(default_config())
    start = "start from defaults.default_config() and change what differs."
    for key, default in defaults.items():
        if key not in values:
            if _in_open_group(key):
                continue
            raise UserError(f"The config lacks the key {key}: {start}")
        if isinstance(default, float) and type(values[key]) is int:
            continue
        if type(values[key]) is not type(default):
            raise UserError(
                f"{key} = {values[key]!r} must be of type {type(default).__name__}, like {default!r}."
            )
    for key, value in values.items():
        if _in_open_group(key):
            if type(value) not in (int, float) and value != {}:
                raise UserError(f"{key} = {value!r} must be a number, the weight of the judge.")
        elif key not in defaults:
            raise UserError(f"The config key {key} is not known: {start}")
    for key in ("stream.tasks", "pretrain.sources"):
        if not values[key] or not all(isinstance(spec, str) for spec in values[key]):
            raise UserError(f"{key} = {values[key]!r} must be specs, at least one, such as worlds:bank_1.")


def _in_open_group(key: str) -> bool:
    """Whether it is one of OPEN_GROUPS, which stands by itself where it is empty, or in one."""
    return key.startswith(tuple(f"{group}." for group in OPEN_GROUPS)) or key in OPEN_GROUPS


def _named(keys: tuple[str, ...], values: dict[str, Any]) -> list[str]:
    """The keys, with `group.*` replaced by all keys of the group."""
    named = []
    for key in keys:
        group = key.removesuffix("*")
        named += [key] if group == key else [other for other in values if other.startswith(group)]
    return named
