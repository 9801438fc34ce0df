"""Gemma 2 9B over the stream of the paper's release: Yelp-5, Amazon-5, Yahoo-10, MNLI-3.

    streamsynth train --config=configs/gemma2_9b.py:weights=DIR,data=DIR --workdir=runs/gemma2_9b

`weights` is a Hugging Face folder of google/gemma-2-9b-it, and `data` the folder that
configs/paper_folders.py fills. Arguments: `tiny` (without weights: a small policy of the same family on
embedded worlds; with them: those weights, two tasks, a few steps), `seed=N`, `pod`.

A LoRA adapter of rank 64. Meant for one host of eight accelerators, such as TPU v5e-8. Not measured: no
such host was at hand, and whether it fits has not been tried. The tiny run takes under a minute on 2 CPU
cores.

On a pod, `pod=v5e:16x16` or `pod=v5p:4x4x4` trains the whole network, with float32 copies of its bfloat16
parameters in the optimizer, on 512 samples a step, prompts of 1536 and completions of 256 tokens. Compiled
without a TPU and not run (`streamsynth compile --config=configs/gemma2_9b.py:pod=v5e:16x16
--topology=v5e:16x16`, and v5p:4x4x4 alike), both fit: of 15.75 GiB of a chip of v5e the update takes 8.4
and the rollout 6.0, with the 0.6 that a run keeps; of 95 GiB of a chip of v5p 10.0 and 9.3, with 2.4.
Published rates allow a rollout in 1.54 s at best on v5e:16x16 and in 0.54 s on v5p:4x4x4 (memory), and an
update in 0.67 s and 1.15 s (FLOPs).
"""

from streamsynth.config import parse_arg
from streamsynth.presets import pretrained

PODS = {"v5e:16x16": dict(tensor=4, microbatches=1), "v5p:4x4x4": dict(tensor=4, microbatches=4)}


def get_config(arg=""):
    arg = parse_arg(arg, weights="", data="data", pod="", tiny=False, seed=0)
    return pretrained(arg, "gemma2", "gemma-2-9b-it", PODS)
