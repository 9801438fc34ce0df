"""Quality alone: our learner with nothing paid for diversity, and tuned to what is kept as it comes.

    streamsynth train --config=configs/baselines/quality_only.py --workdir=runs/quality_only

Arguments and hardware are the quickstart's: 2 CPU cores are enough.
"""

from streamsynth.config import base


def get_config(arg=""):
    config = base(__file__, "../quickstart.py", arg)
    config.learner.reward = "quality"
    config.supervised.select = "first"
    config.dataset.select = "best"
    return config
