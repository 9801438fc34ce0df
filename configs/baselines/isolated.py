"""Every task on its own: before each turn all that was learned is forgotten.

    streamsynth train --config=configs/baselines/isolated.py --workdir=runs/isolated

Parameters, optimizer, replay, archive, patterns, scheduler and the balance start anew. What the stream's
experience is worth is the difference to the quickstart, which is the same in everything else.

Arguments and hardware are the quickstart's: 2 CPU cores are enough.
"""

from streamsynth.config import base


def get_config(arg=""):
    config = base(__file__, "../quickstart.py", arg)
    config.stream.experience = "isolated"
    config.replay.share = 0.0  # there is no past to replay
    return config
