"""Every key of a config, with its default and its meaning."""

from __future__ import annotations

from ml_collections import ConfigDict


def default_config() -> ConfigDict:
    """The config that files under configs/ start from and change."""
    return ConfigDict(
        dict(
            seed=0,
            mesh=dict(data=-1, fsdp=1, tensor=1),  # devices along each axis; -1 takes what is left
            policy=dict(
                init="",  # "hf:DIR": weights, tokenizer and shape of a Hugging Face folder; empty: our own
                format="auto",  # of prompts: "markers" (our own policies), "plain", "chat"
                # Precision, and how layers are run.
                param_dtype="float32",
                compute_dtype="float32",
                logit_dtype="float32",
                scan_layers=False,
                remat=False,
                gather_to_sample=False,  # along mesh.fsdp, once a rollout and not once a token
                lora=dict(  # trains adapters of this rank and nothing else; 0 trains the whole network
                    rank=0,
                    alpha=16.0,
                    modules=("query", "key", "value", "out", "gate", "up", "down"),
                ),
                # The shape of a policy of our own; with `init` the folder's config.json gives it.
                family="llama",  # or "qwen2", "qwen3", "gemma2", "gemma3"
                vocab_size=2400,  # at most; the tokenizer takes fewer where its corpus is small
                width=96,
                layers=3,
                heads=4,
                kv_heads=2,
                head_width=24,
                mlp_width=256,
                rope_theta=10_000.0,
                norm_epsilon=1e-6,
                window=0,  # of the layers that Gemma's families restrict; 0 restricts none
            ),
            worlds=dict(  # how hard the embedded worlds are, in pretraining and in the stream
                cores_per_label=5,  # of a label; each makes up to sixteen frames
                words_per_category=8,
            ),
            pretrain=dict(
                sources=("worlds",),  # or files: and tfds: specs, disjoint from stream.tasks
                corpus_sentences=20_000,  # for the tokenizer, where the sources are worlds
                steps=950,
                prompts=20,  # B
                samples=2,  # G targets a prompt
                prompt_weight=0.5,  # of the likelihood of the examples that the prompts show
                log_every=20,
                optimizer=optimizer(name="muon", learning_rate=8e-3, warmup=50, schedule="cosine"),
            ),
            rollout=dict(
                prompts=16,  # B
                samples=8,  # G
                prompt_length=112,  # P, in tokens
                buckets=(),  # rising lengths below P: a batch is padded to the first that its prompts fit
                completion_length=24,  # T
                temperature=0.65,
                lag=0,  # 1: a batch is written while the one before is judged, by a policy one update older
                best_kept=16,  # of each label and cell, what the strategy "imitate_best" may show
            ),
            stream=dict(
                tasks=("worlds:market_1",),
                experience="sequential",  # or "isolated": everything is reset before each turn
                examples_per_label=8,  # k, the label budget
                proposed_attributes=0,  # that the base policy proposes for each task that names none itself
                train_limit=0,  # rows of real training data (for the anchor alone); 0 takes all
                test_limit=0,
                on_bad_row="error",  # or "skip": leave malformed rows out and count them
            ),
            feedback=dict(
                # Weights, before each is scaled by its measured worth; and those of named scorers.
                judges=dict(verifier=1.0, posterior=0.0, encoder=0.0),
                # Weights, against that of quality, of what counts among accepted samples alone: having the
                # attributes that were asked for, what a text does for a student, and scorers named here.
                secondary=dict(attribute=0.5, utility=0.25),
                utility=dict(  # of a student that is trained on the batch and validated on the examples
                    form="exact",  # the metagradient; or "first_order", its cheap form
                    steps=30,
                    learning_rate=2.0,
                    momentum=0.9,
                    ridge=0.01,
                ),
                # "NAME=module:function", called as f(texts) or f(texts, labels=...) for scores in [0, 1] in a
                # process of its own; or "NAME=openai:MODEL@https://host/v1", a judge over HTTP. NAME then has
                # a weight in `judges` or in `secondary`.
                scorers=(),
                features="ngrams",  # or "hidden": the base policy's hidden states; or "encoder"
                encoder="",  # of sentences: "minilm" (a wheel, see the README) or the folder of one
                width=256,  # D
                ridge=0.1,  # lambda of the archive
                floor=0.0,  # of r(q), the quality below which novelty is not paid
                power=1.0,  # of r(q)
                accept=0.5,  # quality from which a row is kept
                min_words=2,
                max_words=60,
            ),
            scorers=dict(  # of all that feedback.scorers names
                timeout_seconds=60.0,  # of one request
                retries=2,  # of what may pass by itself: exceptions, timeouts, a busy server
                backoff_seconds=1.0,  # before the first of them; doubled each time, or as Retry-After asks
                max_requests=20_000,  # of each scorer in a whole run; what comes after has no score
                batch_size=16,  # texts in a function's request; a judge over HTTP gets one
                concurrency=4,  # requests at one time to a judge over HTTP
                key_variable="",  # the environment variable that holds the judge's key; empty: none is sent
                scale=10.0,  # the highest mark that a judge over HTTP gives
                max_tokens=8,  # of its answer
            ),
            balance=dict(
                alpha=2.0,  # where the weight of diversity, against that of quality, starts in each turn
                eta=5.0,  # step of the dual ascent
                alpha_max=8.0,  # less gives more quality and less diversity
                target="base",  # whose diversity is held; or "policy" (at the turn's start), "examples"
                factor=1.1,  # of the effective number of different texts (the statistic is its logarithm)
                weighted=False,  # measure diversity over all that passes the gates; True weighs by quality
                neutral=True,  # pay novelty that quality does not explain; False: plain credit
                batches=4,  # that measure the target; what is kept of them is tuned to
                archive=0.0,  # how much a kept text counts when fresh ones are credited; 0: the batch alone
                others=0.0,  # how much a kept text of a past task counts then, under every label
                decay=1.0,  # what is left of a kept text in its archive after each later batch of its task
            ),
            phases=dict(  # of a turn
                initialization=True,  # writing, gating and choosing spread-out texts to tune to
                tuning=True,  # maximum likelihood on the examples, and on those texts
                reward=True,  # updates by reward; without them the steps only write and keep
            ),
            learner=dict(
                steps=8,  # by reward, a turn
                microbatches=1,  # of rollout.prompts, differentiated one after another to save memory
                kl_reference="turn",  # the policy at the turn's start; or "base"
                reward="credit",  # ours; or "quality", "shared", "darling", "dqo", "mmr", "release"
            ),
            rivals=dict(  # constants of the other rewards: see learner/rivals.py
                same=0.7,  # cosine of features from which DARLING takes two texts for the same
                least_distinct=0.1,
                dqo_alpha=1.0,
                release_label=0.1,
                release_attribute=0.1,
                release_quality=0.5,
                release_diversity=0.3,
                release_slope=3.0,
            ),
            objective=dict(
                name="streamsynth",  # or "rloo", "grpo", "dr_grpo", "dapo": see learner/choices.py
                clip_low=0.0,  # 0 takes the objective's own, for ours 0.2
                clip_high=0.0,  # likewise, for ours 0.28
                kl_weight=0.25,
                entropy_weight=0.0,
                replay_weight=0.25,  # replay.share: a replayed sample then counts as much as a fresh one
                replay_cap=2.0,
                drift_limit=2.0,
                cloning_weight=0.0,
                chunk=1024,  # positions whose logits exist at one time on a device
            ),
            optimizer=optimizer(learning_rate=4e-4),
            supervised=dict(  # how a turn starts: tuning to the examples and to what is kept of a first go
                rounds=2,  # of writing, choosing and tuning
                batches=12,  # that are written in a round
                rows=64,  # a label, of those kept; 0 tunes to the examples alone
                select="spread_out",  # which of them: greedily by log-volume; or "first", as they came
                steps=20,  # a round
                held_out=0,  # examples a label that are not tuned to but measure the tuning
                measure_every=5,  # steps, with early_stop
                early_stop=0,  # measurements without a gain after which a round ends; 0 tunes all its steps
                samples=4,  # G targets a prompt
                prompt_weight=0.0,
            ),
            replay=dict(
                capacity=512,  # samples a task; 0 remembers none
                megabytes=64.0,  # a task, at most: the capacity is what fits
                elite_share=0.25,  # of the capacity: the samples of best quality
                leverage_share=0.25,  # those that add most to the archive; the rest is a uniform draw
                share=0.25,  # of the fresh samples, once grown
                elite=0.99,  # quality from which a sample is one to imitate
                baseline_decay=0.9,
            ),
            scheduler=dict(
                strategy="progress",
                ramp=2,
                floor=0.05,
                progress=1.0,
                forgetting=1.0,  # since a task's best probe
                probe_every=4,  # steps by reward: a batch of the past task that waited longest; 0: none
                optimism=0.1,
                staleness=10,
                fast=0.7,
                slow=0.95,
            ),
            patterns=dict(  # which strategies the prompts ask for
                choice="softmax",  # or "thompson", "ucb"
                floor=0.25,  # share of the prompts that is spread evenly over all strategies
                temperature=0.05,  # "softmax": in units of reward
                bonus=3.0,  # "ucb": standard deviations
                prior=64.0,  # samples that what other tasks say is worth, and that 0 is worth to them
                noise=0.5,  # standard deviation of a reward, before any is seen
                task_decay=0.9,  # of a task's statistics, with each of its batches
                shared_decay=0.99,  # of the shared ones, with each batch
            ),
            dataset=dict(
                per_label=0,  # rows a label in the data set; 0 takes what is balanced
                select="spread_out",  # which: by the log-volume they add; or "best", by quality
                near_duplicate=0.8,
            ),
            evaluation=dict(
                # What the policy is asked for when it is measured: not by the label's name alone.
                strategies=("imitate", "vary_one", "combine_two", "contrast"),
                prompts=40,  # a multiple of the number of strategies spreads them evenly
                samples=8,
                batches=1,
                temperature=0.65,
                rows_per_label=40,  # that the student is trained on
                diversity_texts=128,  # n at which diversity is measured
                best_of=4,
                student=dict(
                    width=16384, hidden=0, steps=300, batch_size=128, learning_rate=0.03, weight_decay=0.1
                ),
            ),
            checkpoint=dict(
                every=50,  # steps
                keep=2,  # the last ones; from 2 on, a damaged one costs no run
                asynchronous=True,  # steps go on while a checkpoint is written
            ),
            hosts=dict(  # of a run of several processes
                stall_seconds=600.0,  # without progress, after which each prints where its threads are
            ),
            cache_dir="",  # of base policies; empty takes the user's cache folder
        )
    ).lock()


def optimizer(**changes) -> ConfigDict:
    """An optimizer's keys; see `learner/optimizer.py` for the names."""
    keys = dict(
        name="adamw",
        learning_rate=5e-4,
        schedule="constant",
        warmup=5,
        clip_norm=1.0,
        b1=0.9,
        b2=0.95,
        weight_decay=0.0,
    )
    return ConfigDict({**keys, **changes})
