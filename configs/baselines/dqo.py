"""DQO (arXiv 2509.04784): quality plus what a text adds to the log-volume of its group, by GRPO.

    streamsynth train --config=configs/baselines/dqo.py --workdir=runs/dqo

Arguments and hardware are the quickstart's: 2 CPU cores are enough.
"""

from streamsynth.config import base


def get_config(arg=""):
    config = base(__file__, "../quickstart.py", arg)
    config.learner.reward = "dqo"
    config.objective.name = "grpo"
    config.replay.share = 0.0
    return config
