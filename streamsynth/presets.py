"""What the configs of pretrained policies share: a stream like the paper's release, and sane settings for it.

The settings are starting points that nobody has tuned or measured at these sizes.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ml_collections import ConfigDict

from streamsynth.defaults import default_config
from streamsynth.errors import UserError

# The tasks of the paper's release, as folders (see configs/paper_folders.py).
PAPER_STREAM = ("yelp5", "amazon5", "yahoo10", "mnli3")


def pretrained(
    arg: ConfigDict, family: str, model: str, pods: Mapping[str, Mapping[str, Any]] | None = None
) -> ConfigDict:
    """The config of a policy from named weights: a LoRA adapter in float32 on a bfloat16 base.

    Args:
      arg: of the config file, with `weights` (a folder; "" takes the one that is named as the model), `data`
        (the folder of the stream's folders), `tiny` and `seed`; and `pod`, a key of `pods` or "", where there
        are any.
      family: of the weights; the tiny run without weights has a small policy of its own of it.
      model: the weights' name on the Hugging Face hub, without the organisation.
      pods: by topology, the arguments of `on_pod`.

    Raises:
      UserError: there is no such pod.
    """
    config = default_config()
    config.seed = arg.seed
    config.mesh.update(data=1, fsdp=-1, tensor=1)
    config.policy.init = "" if arg.tiny and not arg.weights else f"hf:{arg.weights or model}"
    config.policy.family = family
    config.policy.update(param_dtype="bfloat16", compute_dtype="bfloat16", scan_layers=True, remat=True)
    config.policy.lora.update(rank=64, alpha=64.0)
    config.stream.tasks = tuple(f"files:{arg.data}/{name}" for name in PAPER_STREAM)
    # The sets are large: the anchor "all real data" and the test take what a student can be trained on here.
    config.stream.update(examples_per_label=16, train_limit=20_000, test_limit=5_000)
    config.rollout.update(prompts=16, samples=8, prompt_length=1536, completion_length=192, temperature=0.85)
    config.feedback.update(judges=dict(verifier=0.0, posterior=1.0), features="hidden", width=256)
    config.feedback.update(accept=0.3, min_words=4, max_words=160)
    config.supervised.update(rounds=2, batches=6, rows=64, steps=20, samples=2, held_out=4)
    config.learner.update(steps=30, kl_reference="turn")
    config.optimizer.update(learning_rate=5e-5, warmup=5)
    config.objective.chunk = 256
    config.evaluation.update(prompts=64, samples=8, temperature=0.85)
    config.checkpoint.every = 10
    if arg.get("pod"):
        if arg.pod not in pods:
            raise UserError(f"the argument pod={arg.pod} is not known: choose one of {', '.join(pods)}.")
        on_pod(config, **pods[arg.pod])
    if arg.tiny:
        make_tiny(config)
    return config


def on_pod(config: ConfigDict, *, tensor: int, microbatches: int, rank: int = 0) -> None:
    """512 samples a step on a pod: the whole network is trained, or with a rank an adapter.

    Parameters are bfloat16, and the optimizer moves float32 copies of them.

    Args:
      config: to change.
      tensor: devices along mesh.tensor; all others lie along mesh.fsdp. While a batch is written each device
        holds its part along tensor whole.
      microbatches: in which a batch is differentiated.
      rank: of the adapter.
    """
    config.mesh.update(data=1, fsdp=-1, tensor=tensor)
    config.policy.gather_to_sample = True
    config.policy.lora.rank = rank
    config.rollout.update(prompts=64, samples=8, prompt_length=1536, completion_length=256)
    # As many as in training: one program less.
    config.evaluation.update(prompts=64, samples=8)
    config.learner.microbatches = microbatches
    if not rank:
        config.optimizer.learning_rate = 2e-6


def make_tiny(config: ConfigDict) -> None:
    """Every part of a run in under a minute, most of it compilation.

    Without weights a small untrained policy of the config's family takes their place, and embedded worlds the
    stream's; it is in float32, which a CPU computes fastest.
    """
    p = config.policy
    p.update(param_dtype="float32", compute_dtype="float32", scan_layers=False, remat=False)
    p.lora.update(rank=min(p.lora.rank, 4), alpha=8.0)
    # As few layers as show what is the family's own: of Gemma 2 a local and a global one.
    layers = 2 if p.family == "gemma2" else 1
    p.update(vocab_size=700, width=32, layers=layers, heads=2, kv_heads=1, head_width=16, mlp_width=48)
    p.window = 16 if p.family.startswith("gemma") else 0
    if not p.init:
        config.stream.tasks = ("worlds:market_1", "worlds:restaurant_1")
    else:
        config.stream.tasks = config.stream.tasks[:2]
    config.stream.update(examples_per_label=8, train_limit=200, test_limit=100)
    config.mesh.update(data=-1, fsdp=1, tensor=1)
    config.pretrain.update(steps=0, prompts=4, corpus_sentences=1000)
    config.rollout.update(prompts=4, samples=2, prompt_length=512 if p.init else 64, completion_length=24)
    config.feedback.update(accept=0.1, width=32, min_words=1)
    config.supervised.update(rounds=1, batches=1, rows=4, steps=2, held_out=2)
    config.learner.update(steps=1, microbatches=1)
    config.replay.update(capacity=16, share=0.0)  # the quickstart's tiny run replays
    config.balance.batches = 1
    # As many prompts and samples as in training: one program less to compile.
    config.evaluation.update(prompts=4, samples=2, rows_per_label=4, diversity_texts=16, best_of=1)
    config.evaluation.student.update(width=2048, steps=50)
