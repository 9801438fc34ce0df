"""The stream without replay: past tasks live on in the parameters and the patterns alone.

    streamsynth train --config=configs/baselines/sequential_no_replay.py --workdir=runs/sequential_no_replay

Arguments and hardware are the quickstart's: 2 CPU cores are enough.
"""

from streamsynth.config import base


def get_config(arg=""):
    config = base(__file__, "../quickstart.py", arg)
    config.replay.share = 0.0
    return config
