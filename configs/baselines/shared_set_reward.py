"""One reward for all: every sample of a batch is paid the mean quality and the log-volume of the batch.

    streamsynth train --config=configs/baselines/shared_set_reward.py --workdir=runs/shared_set_reward

It is compared with its running mean over earlier batches. The value is that which our credit shares out among
the samples, so that the difference to the quickstart without replay is what exact credit is worth.

Arguments and hardware are the quickstart's: 2 CPU cores are enough.
"""

from streamsynth.config import base


def get_config(arg=""):
    config = base(__file__, "../quickstart.py", arg)
    config.learner.reward = "shared"
    config.replay.share = 0.0
    return config
