"""The reward of StreamSynth's public release: label, attributes, quality and the batch's diversity, by GRPO.

    streamsynth train --config=configs/baselines/public_release.py --workdir=runs/public_release

The release draws 4 samples a prompt at temperature 0.85 and trains adapters on 8B models at a learning rate
of 3e-6. Here only the reward and the objective are its own, so that they are what is compared; the
attribute of the worlds is the length of a text.

Arguments and hardware are the quickstart's: 2 CPU cores are enough.
"""

from streamsynth.config import base


def get_config(arg=""):
    config = base(__file__, "../quickstart.py", arg)
    config.stream.tasks = tuple(f"{spec}?attributes=length" for spec in config.stream.tasks)
    config.learner.reward = "release"
    config.objective.name = "grpo"
    config.replay.share = 0.0
    return config
