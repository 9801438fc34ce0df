"""Prompts alone: the base policy writes, in strategies drawn evenly, and nothing is learned.

    streamsynth train --config=configs/baselines/prompts_only.py --workdir=runs/prompts_only

As many batches are written as with learning, where some of them are written to tune to: those are steps here.

Arguments and hardware are the quickstart's: 2 CPU cores are enough.
"""

from streamsynth.config import base


def get_config(arg=""):
    config = base(__file__, "../quickstart.py", arg)
    config.phases.update(initialization=False, tuning=False, reward=False)
    config.learner.steps += config.supervised.rounds * config.supervised.batches
    config.patterns.floor = 1.0
    config.replay.share = 0.0
    return config
