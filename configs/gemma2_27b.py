"""Gemma 2 27B over the stream of the paper's release: Yelp-5, Amazon-5, Yahoo-10, MNLI-3.

    streamsynth train --config=configs/gemma2_27b.py:weights=DIR,data=DIR --workdir=runs/gemma2_27b

`weights` is a Hugging Face folder of google/gemma-2-27b-it, and `data` the folder that
configs/paper_folders.py fills. Arguments: `tiny` (without weights: a small policy of the same family on
embedded worlds; with them: those weights, two tasks, a few steps), `seed=N`, `pod`.

A LoRA adapter of rank 64 in float32 on a bfloat16 network. Not measured: no such machine was at hand. The
tiny run takes under a minute on 2 CPU cores.

On a pod, `pod=v5p:4x4x4` trains the same adapter on 512 samples a step, prompts of 1536 and completions of
256 tokens. Compiled without a TPU and not run (`streamsynth compile
--config=configs/gemma2_27b.py:pod=v5p:4x4x4 --topology=v5p:4x4x4`), it fits: of 95 GiB of a chip the
rollout takes 18.1 and the update 10.0, each with the 2.6 that a run keeps. Published rates allow a rollout
in 1.39 s at best (memory) and an update in 2.58 s (FLOPs).
"""

from streamsynth.config import parse_arg
from streamsynth.presets import pretrained

PODS = {"v5p:4x4x4": dict(tensor=4, microbatches=4, rank=64)}


def get_config(arg=""):
    arg = parse_arg(arg, weights="", data="data", pod="", tiny=False, seed=0)
    return pretrained(arg, "gemma2", "gemma-2-27b-it", PODS)
