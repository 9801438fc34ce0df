"""MMR-GRPO (arXiv 2601.09085): rewards by maximal marginal relevance in the group, then GRPO.

    streamsynth train --config=configs/baselines/mmr_grpo.py --workdir=runs/mmr_grpo

Arguments and hardware are the quickstart's: 2 CPU cores are enough.
"""

from streamsynth.config import base


def get_config(arg=""):
    config = base(__file__, "../quickstart.py", arg)
    config.learner.reward = "mmr"
    config.objective.name = "grpo"
    config.replay.share = 0.0
    return config
