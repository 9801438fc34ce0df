"""Best of n: the base policy writes, and of what the judges accept the most spread-out rows are taken.

    streamsynth train --config=configs/baselines/best_of_n.py --workdir=runs/best_of_n

Nothing is learned. A label's rows are chosen greedily by the log-volume that sqrt(quality) times their n-gram
features add; as many as the evaluation's student is trained on. As many batches are written as with learning.

Arguments and hardware are the quickstart's: 2 CPU cores are enough. Measured on the tuning worlds, means over
five seeds (benchmarks/balance.py): students on its data sets reach 0.85, on as many base rows 0.60.
"""

from streamsynth.config import base


def get_config(arg=""):
    config = base(__file__, "../quickstart.py", arg)
    config.phases.update(initialization=False, tuning=False, reward=False)
    config.learner.steps += config.supervised.rounds * config.supervised.batches
    config.patterns.floor = 1.0
    config.replay.share = 0.0
    config.dataset.update(select="spread_out", per_label=config.evaluation.rows_per_label)
    return config
