"""Prompts alone: the base policy is asked for all strategies and attributes alike, and nothing is learned.

    streamsynth train --config=configs/baselines/prompts_only.py --workdir=runs/prompts_only

Attributed prompts are those of AttrPrompt (arXiv 2306.15895); the worlds have one attribute, length.
As many batches are written as with learning, where some of them are written to tune to: those are steps here.

Arguments and hardware are the quickstart's: 2 CPU cores are enough.
"""

from streamsynth.config import base


def get_config(arg=""):
    config = base(__file__, "../quickstart.py", arg)
    config.phases.update(initialization=False, tuning=False, reward=False)
    config.learner.steps += config.supervised.rounds * config.supervised.batches
    config.patterns.floor = 1.0
    config.stream.tasks = tuple(f"{spec}?attributes=length" for spec in config.stream.tasks)
    config.replay.share = 0.0
    return config
