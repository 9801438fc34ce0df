"""Tuning alone: the policy is tuned to examples and kept texts, and then writes without updates by reward.

    streamsynth train --config=configs/baselines/supervised_only.py --workdir=runs/supervised_only

Arguments and hardware are the quickstart's: 2 CPU cores are enough.
"""

from streamsynth.config import base


def get_config(arg=""):
    config = base(__file__, "../quickstart.py", arg)
    config.phases.reward = False
    config.replay.share = 0.0
    return config
