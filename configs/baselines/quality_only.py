"""Quality alone: our learner with nothing paid for diversity, and tuned to what is kept as it comes.

    streamsynth train --config=configs/baselines/quality_only.py --workdir=runs/quality_only

Arguments and hardware are the quickstart's: 2 CPU cores are enough. Measured on the tuning worlds, means over
five seeds (benchmarks/balance.py): validity from 0.36 to 0.86, at 0.79 of the base policy's Vendi score and
0.74 of its distinct-2; students reach 0.72 where those on as many base rows reach 0.60.
"""

from streamsynth.config import base


def get_config(arg=""):
    config = base(__file__, "../quickstart.py", arg)
    config.learner.reward = "quality"
    config.supervised.select = "first"
    config.dataset.select = "best"
    return config
