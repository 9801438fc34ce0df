"""Six real classification sets as a stream, by a policy trained from scratch on other sets.

    streamsynth train --config=configs/real_text.py:data=DIR --workdir=runs/real_text

DIR holds one folder a set (`train.jsonl`, ... see the README). The policy is pretrained on sets that are
not in the stream; every text that also stands in a stream set is left out of them.

On 2 CPU cores it took 61 minutes beside other jobs (53 minutes of processor time). The policy writes words,
no sentences, and its rows teach a student far less than the examples alone do: see the README's table.
"""

from streamsynth.config import parse_arg
from streamsynth.defaults import default_config, optimizer

STREAM = ("trec6", "snips", "ag_news", "sst2", "subj", "banking77?commonest=10")
PRETRAIN = (
    "atis",
    "biomedical20",
    "clickbait",
    "clinc150",
    "cr",
    "mpqa",
    "newsgroups20_mini",
    "search_snippets",
    "sms_spam",
    "stackoverflow20",
    "tweet_emotion",
    "tweet_irony",
    "tweet_sentiment",
    "uci_amazon",
    "uci_imdb",
    "uci_yelp",
)


def get_config(arg=""):
    arg = parse_arg(arg, data="data", tiny=False, seed=0)
    config = default_config()
    config.seed = arg.seed
    config.stream.tasks = tuple(f"files:{arg.data}/{name}" for name in STREAM)
    config.stream.examples_per_label = 16
    config.pretrain.sources = tuple(f"files:{arg.data}/{name}" for name in PRETRAIN)
    config.policy.update(
        vocab_size=4096, width=160, layers=4, heads=4, kv_heads=2, head_width=40, mlp_width=432
    )
    config.rollout.update(prompts=16, samples=8, prompt_length=176, completion_length=44)
    config.pretrain.update(steps=800, prompts=16, samples=2)
    config.pretrain.optimizer = optimizer(name="muon", learning_rate=8e-3, warmup=50, schedule="cosine")
    config.feedback.judges.update(verifier=0.0, posterior=1.0)
    config.feedback.accept = 0.3
    config.supervised.update(batches=4, rows=48)
    config.evaluation.update(prompts=60, samples=8, rows_per_label=40)
    config.learner.steps = 12
    if arg.tiny:
        config.stream.tasks = config.stream.tasks[:2]
        config.stream.test_limit = 100
        config.stream.train_limit = 200
        config.pretrain.sources = config.pretrain.sources[-3:]
        config.pretrain.update(steps=10, prompts=4)
        config.policy.update(
            vocab_size=700, width=32, layers=1, heads=2, kv_heads=1, head_width=16, mlp_width=48
        )
        config.rollout.update(prompts=5, samples=4, prompt_length=64, completion_length=24)
        config.evaluation.update(prompts=10, samples=4, rows_per_label=8, diversity_texts=32, best_of=2)
        config.learner.steps = 3
        config.balance.batches = 1
        config.supervised.update(batches=1, rows=8, steps=2)
    return config
