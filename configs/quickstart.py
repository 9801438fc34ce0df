"""The embedded stream, from nothing to the report."""

from streamsynth.config import parse_arg
from streamsynth.defaults import default_config
from streamsynth.tasks.worlds import STREAMS


def get_config(arg=""):
    arg = parse_arg(arg, tiny=False, seed=0, stream="related")
    config = default_config()
    config.seed = arg.seed
    config.stream.tasks = tuple(f"worlds:{name}" for name in STREAMS[arg.stream][:5])
    if arg.tiny:
        config.stream.tasks = config.stream.tasks[:2]
        config.pretrain.steps = 20
        config.pretrain.corpus_sentences = 2000
        config.policy.width = 32
        config.policy.layers = 1
        config.policy.mlp_width = 64
        config.policy.head_width = 8
        config.learner.steps = 3
        config.rollout.prompts = 4
        config.rollout.samples = 4
        config.rollout.prompt_length = 48
        config.evaluation.prompts = 10
        config.evaluation.samples = 4
        config.evaluation.rows_per_label = 8
        config.evaluation.diversity_texts = 32
        config.evaluation.best_of = 2
        config.balance.batches = 1
        config.feedback.judges.posterior = 0.5
        config.checkpoint.every = 2
    return config
