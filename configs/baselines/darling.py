"""DARLING (arXiv 2509.02534): quality times the share of its group that a text is different from.

    streamsynth train --config=configs/baselines/darling.py --workdir=runs/darling

Advantages are centred in the group and not scaled. Texts count as the same from a cosine of `rivals.same` on,
where the paper asks a trained classifier.

Arguments and hardware are the quickstart's: 2 CPU cores are enough.
"""

from streamsynth.config import base


def get_config(arg=""):
    config = base(__file__, "../quickstart.py", arg)
    config.learner.reward = "darling"
    config.objective.name = "dr_grpo"
    config.replay.share = 0.0
    return config
