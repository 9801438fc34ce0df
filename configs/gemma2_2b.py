"""Gemma 2 2B over the stream of the paper's release: Yelp-5, Amazon-5, Yahoo-10, MNLI-3.

    streamsynth train --config=configs/gemma2_2b.py:weights=DIR,data=DIR --workdir=runs/gemma2_2b

`weights` is a Hugging Face folder of google/gemma-2-2b-it, and `data` the folder that
configs/paper_folders.py fills. Arguments: `tiny` (without weights: a small policy of the same family on
embedded worlds; with them: those weights, two tasks, a few steps), `seed=N`, `pod`.

A LoRA adapter of rank 64. Meant for one host of eight accelerators, such as TPU v5e-8. Not measured: no
such host was at hand, and whether it fits has not been tried. The tiny run takes under a minute on 2 CPU
cores.

On a pod, `pod=v5e:4x4` trains the whole network, with float32 copies of its bfloat16 parameters in the
optimizer, on 512 samples a step, prompts of 1536 and completions of 256 tokens. Parameters, snapshots and
the optimizer's state take 2.8 of 15.75 GiB of a chip of v5e:4x4, by count, and the update 8.1 GiB with all
that a run keeps beside it, compiled without a TPU and not run. The other programs have not been compiled:
`streamsynth compile --config=configs/gemma2_2b.py:pod=v5e:4x4 --topology=v5e:4x4`.
"""

from streamsynth.config import parse_arg
from streamsynth.presets import pretrained

PODS = {"v5e:4x4": dict(tensor=4, microbatches=8)}


def get_config(arg=""):
    arg = parse_arg(arg, weights="", data="data", pod="", tiny=False, seed=0)
    return pretrained(arg, "gemma2", "gemma-2-2b-it", PODS)
