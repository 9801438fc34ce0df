"""Gemma 2 2B over the stream of the paper's release: Yelp-5, Amazon-5, Yahoo-10, MNLI-3.

    streamsynth train --config=configs/gemma2_2b.py:weights=DIR,data=DIR --workdir=runs/gemma2_2b

`weights` is a Hugging Face folder of google/gemma-2-2b-it, and `data` the folder that
configs/paper_folders.py fills. Arguments: `tiny` (without weights: a small policy of the same family on
embedded worlds; with them: those weights, two tasks, a few steps), `seed=N`, `pod`.

A LoRA adapter of rank 64. Meant for one host of eight accelerators, such as TPU v5e-8. Not measured: no
such host was at hand. Compiled for eight H100 and not run (`streamsynth compile --config=configs/gemma2_2b.py
--topology=h100:8`), it fits: 9.9 of 59.3 GiB. The tiny run takes under a minute on 2 CPU cores.

On a pod, `pod=v5e:4x4` trains the whole network, with float32 copies of its bfloat16 parameters in the
optimizer, on 512 samples a step, prompts of 1536 and completions of 256 tokens. Compiled without a TPU and
not run (`streamsynth compile --config=configs/gemma2_2b.py:pod=v5e:4x4 --topology=v5e:4x4`), it fits: of
15.75 GiB of a chip the update takes 8.1, tuning 6.6 and the rollout 6.5, each with the 2.8 that a run
keeps. Published rates allow a rollout in 0.89 s at best (memory) and an update in 2.80 s (FLOPs).
"""

from streamsynth.config import parse_arg
from streamsynth.presets import pretrained

PODS = {"v5e:4x4": dict(tensor=4, microbatches=8)}


def get_config(arg=""):
    arg = parse_arg(arg, weights="", data="data", pod="", tiny=False, seed=0)
    return pretrained(arg, "gemma2", "gemma-2-2b-it", PODS)
