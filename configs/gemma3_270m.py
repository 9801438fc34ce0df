"""Gemma 3 270M over the stream of the paper's release: Yelp-5, Amazon-5, Yahoo-10, MNLI-3.

    streamsynth train --config=configs/gemma3_270m.py:weights=DIR,data=DIR --workdir=runs/gemma3_270m

`weights` is a Hugging Face folder of google/gemma-3-270m-it, and `data` the folder that
configs/paper_folders.py fills. Arguments: `tiny` (without weights: a small policy of the same family on
embedded worlds; with them: those weights, two tasks, a few steps), `seed=N`.

Trains the whole network, no adapter: float32 parameters, computed with in bfloat16. Meant for one
accelerator of 16 GB or more. Not measured: no accelerator of that size was at hand. The tiny run takes
under a minute on 2 CPU cores.
"""

from streamsynth.config import parse_arg
from streamsynth.presets import pretrained


def get_config(arg=""):
    arg = parse_arg(arg, weights="", data="data", tiny=False, seed=0)
    config = pretrained(arg, "gemma3", "gemma-3-270m-it")
    config.policy.lora.rank = 0
    config.policy.param_dtype = "float32"
    config.optimizer.learning_rate = 5e-6
    return config
