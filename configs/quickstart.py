"""The embedded stream, from nothing to the report.

    streamsynth train --config=configs/quickstart.py --workdir=runs/quickstart

Pretrains a policy of half a million parameters on embedded worlds drawn without end, then takes it through a
stream of five related worlds that it has not seen. Arguments: `tiny`, `seed=N`, `stream=NAME` (related,
unrelated, tuning; tuning worlds are for choosing settings and are never reported).

On 2 CPU cores it takes 8 minutes and 2.0 GB. Over seeds 1 to 3 (benchmarks/learning.py) each task's own turn
raised the share of valid texts from 0.27-0.76 to 0.84-0.95, with the Vendi score at 0.84-1.21 and distinct-2
at 0.83-1.11 of the base policy's.
"""

from streamsynth.config import parse_arg
from streamsynth.defaults import default_config
from streamsynth.tasks.worlds import STREAMS


def get_config(arg=""):
    arg = parse_arg(arg, tiny=False, seed=0, stream="related")
    config = default_config()
    config.seed = arg.seed
    config.stream.tasks = tuple(f"worlds:{name}" for name in STREAMS[arg.stream][:5])
    if arg.tiny:
        make_tiny(config)
    return config


def make_tiny(config):
    """Every part of a run in under a minute, most of it compilation; the policy learns to write in no world.

    The exact verifier would accept none of its texts, so that the posterior alone judges them here.
    """
    config.stream.tasks = config.stream.tasks[:2]
    config.stream.test_limit = 100
    config.pretrain.steps = 100
    config.pretrain.prompts = 8
    config.pretrain.samples = 2
    config.pretrain.corpus_sentences = 2000
    config.pretrain.optimizer.update(name="adamw", learning_rate=1e-2, warmup=10)
    config.policy.width = 32
    config.policy.layers = 1
    config.policy.mlp_width = 64
    config.policy.head_width = 8
    config.feedback.judges.verifier = 0.0
    config.feedback.judges.posterior = 1.0
    config.feedback.accept = 0.1
    config.feedback.width = 32
    config.learner.steps = 3
    config.rollout.prompts = 5
    config.rollout.samples = 4
    config.rollout.prompt_length = 48
    config.replay.capacity = 64
    config.scheduler.probe_every = 2
    config.evaluation.prompts = 5  # as many prompts and samples as in training: one program less to compile
    config.evaluation.samples = 4
    config.evaluation.batches = 2
    config.evaluation.rows_per_label = 8
    config.evaluation.diversity_texts = 32
    config.evaluation.best_of = 2
    config.evaluation.student.width = 2048
    config.evaluation.student.steps = 50
    config.balance.batches = 1
    config.supervised.update(batches=1, rows=8, steps=2)
    config.checkpoint.every = 2
