"""Which balance of quality and diversity: a sweep over the weight of diversity and what holds it.

    python configs/sweep_balance.py          # prints one command a line, for one machine or for many
    python configs/sweep_balance.py tiny     # the same, tiny

Every run is the quickstart with a few keys changed; `sweep` names them. Take the runs' figures from
report/results.json of their workdirs.
"""

import itertools
import shlex
import sys
from pathlib import Path

from streamsynth import config as config_lib

QUICKSTART = Path(__file__).with_name("quickstart.py")


def get_config(arg=""):
    """The config that all runs start from: the quickstart, with its own arguments."""
    return config_lib.load(f"{QUICKSTART}:{arg}").unlock()


def sweep(add):
    """Calls `add(name, overrides)` once for every run.

    First what holds diversity: nothing, fixed weights, and a weight found by dual ascent with a gentler or a
    firmer hand. Then how much diversity is asked for, against how far the policy may move.
    """
    add("none", {"balance.alpha": 0.0, "balance.eta": 0.0})
    for alpha in (0.25, 0.5, 1.0, 2.0):
        add(f"fixed_{alpha}", {"balance.alpha": alpha, "balance.eta": 0.0})
    for eta in (1.0, 5.0, 15.0):
        add(f"ascent_{eta}", {"balance.eta": eta})
    for factor, kl in itertools.product((0.9, 0.95, 1.0), (0.05, 0.1, 0.25)):
        add(f"target_{factor}_kl_{kl}", {"balance.factor": factor, "objective.kl_weight": kl})


def commands(arg="", folder="runs/sweep_balance"):
    """The command of every run, in the order of `sweep`."""
    lines = []

    def add(name, overrides):
        words = ["streamsynth", "train", f"--config={Path(__file__).as_posix()}" + (f":{arg}" if arg else "")]
        words += [f"--workdir={folder}/{name}"]
        words += [f"--config.{key}={value}" for key, value in overrides.items()]
        lines.append(shlex.join(words))

    sweep(add)
    return lines


if __name__ == "__main__":
    print("\n".join(commands(*sys.argv[1:])))
