"""A small policy where no weights are named: tokenizer and maximum likelihood on (prompt, text) pairs.

The pairs come from embedded worlds drawn without end, or from labelled files that the config names.
Both are disjoint from the stream. The result is cached under a hash of everything it follows from.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import pathlib
from collections.abc import Sequence
from typing import Any

import jax
from absl import logging
from jax.sharding import Mesh

from streamsynth.errors import Stopped, UserError
from streamsynth.keys import numpy_rng, purpose_key
from streamsynth.learner import lessons
from streamsynth.learner.lessons import Lesson, lesson_batch, task_lesson
from streamsynth.learner.optimizer import init_state, make_optimizer
from streamsynth.learner.supervised import supervised_step
from streamsynth.policy.families import choices, own_config
from streamsynth.policy.placement import variable_shardings
from streamsynth.policy.store import Policy, has_policy, load_policy, save_policy
from streamsynth.policy.tokenizer import MarkerTokenizer, train_tokenizer
from streamsynth.policy.transformer import Transformer, init_params, param_shapes
from streamsynth.runtime import hosts
from streamsynth.runtime import mesh as mesh_lib
from streamsynth.runtime.progress import Progress
from streamsynth.stream.markers import MarkerFormat
from streamsynth.stream.patterns import STRATEGIES
from streamsynth.stream.prompts import SHOWN, label_text
from streamsynth.tasks import sources, worlds
from streamsynth.tasks.splits import normalise
from streamsynth.tasks.task import Brief, Task

_WORLDS = "worlds"


def base_policy(config: Any, stream: Sequence[Task], *, cache_dir: str | os.PathLike[str]) -> Policy:
    """The base policy of a config: from the cache, or trained now and cached.

    Args:
      config: the whole config; `policy`, `pretrain`, `worlds`, `seed` and the lengths in `rollout`
        matter.
      stream: the tasks of the stream; none of their texts is trained on.
      cache_dir: where trained policies are kept.

    Raises:
      UserError: where a pretraining source is also in the stream.
    """
    tasks = _pretrain_tasks(config, stream)
    network = dataclasses.replace(own_config(config.policy, config.policy.vocab_size), lora=None)
    recipe = {
        "policy": dataclasses.asdict(network),
        "pretrain": config.pretrain.to_dict(),
        "lengths": [config.rollout.prompt_length, config.rollout.completion_length],
        "seed": config.seed,
        "worlds": worlds.content_hash(_difficulty(config)) if config.pretrain.sources == (_WORLDS,) else None,
        "texts": [_content_hash(task) for task in tasks],
        "strategies": list(SHOWN.items()),
        "lessons": lessons.mix(),
    }
    digest = hashlib.sha256(json.dumps(recipe, sort_keys=True).encode()).hexdigest()[:16]
    directory = pathlib.Path(cache_dir) / f"policy-{digest}"
    if has_policy(directory):
        logging.info("base policy %s: from the cache", digest)
        return _with_adapter(config, load_policy(directory))
    tokenizer = train_tokenizer(_corpus(config, tasks), config.policy.vocab_size, STRATEGIES)
    # With the vocabulary that the tokenizer really has.
    model = Transformer(dataclasses.replace(network, vocab_size=tokenizer.vocab_size))
    policy = Policy(model, _train(config, model, tokenizer, tasks), tokenizer, digest)
    save_policy(directory, policy)
    return _with_adapter(config, policy)


def _with_adapter(config: Any, policy: Policy) -> Policy:
    """The same policy in a network that takes the config's adapter: pretraining knows none."""
    lora = choices(config.policy)["lora"]
    return dataclasses.replace(policy, model=Transformer(dataclasses.replace(policy.model.config, lora=lora)))


def _train(config: Any, model: Transformer, tokenizer: MarkerTokenizer, tasks: Sequence[Task]) -> Any:
    c = config.pretrain
    form = MarkerFormat(tokenizer, config.rollout.prompt_length, config.rollout.completion_length)
    optimizer = make_optimizer(
        c.optimizer, c.steps, "pretrain.optimizer", master=model.config.param_dtype != "float32"
    )
    mesh = _mesh(config)
    shardings = variable_shardings(model.config, {"params": param_shapes(model.config)}, mesh)
    params = {"params": init_params(model.config, purpose_key(config.seed, "init"), shardings["params"])}
    opt_state = init_state(optimizer, model.config, params, mesh)
    rows = mesh_lib.rows_or_whole(c.prompts, mesh)
    logged = 0
    with mesh_lib.use(mesh), Progress(c.steps, "pretraining") as progress:
        for step in range(c.steps):
            rng = numpy_rng(config.seed, "pretrain", step)
            batch = jax.device_put(lesson_batch(form, _lessons(config, tasks, step), rng, c.samples), rows)
            params, opt_state, metrics = supervised_step(
                model, optimizer, params, {}, opt_state, batch, prompt_weight=c.prompt_weight
            )
            if (step + 1) % c.log_every == 0 or step + 1 == c.steps:
                done = (step + 1) - logged
                logged += done
                progress.advance(done, nll=float(metrics["nll/completion"]))
                if hosts.stop_heard():
                    raise Stopped(
                        "stopped by SIGTERM while pretraining, of which nothing is saved; the same command "
                        "starts it again.",
                        agreed=False,
                    )
    return params["params"]


def _mesh(config: Any) -> Mesh:
    """The mesh of the config; with several processes, each of which sees but a part of it, one device."""
    if jax.process_count() == 1:
        return mesh_lib.make_mesh(config.mesh.to_dict())
    return mesh_lib.make_mesh(dict.fromkeys(mesh_lib.AXES, 1), jax.local_devices()[:1])


def _lessons(config: Any, tasks: Sequence[Task], step: int) -> list[Lesson]:
    """The B lessons of one step, labels and worlds drawn afresh."""
    c = config.pretrain
    rng = numpy_rng(config.seed, "lessons", step)
    if tasks:
        drawn = [tasks[i] for i in rng.integers(len(tasks), size=c.prompts)]
        return [
            task_lesson(task.brief, task.labels[rng.integers(len(task.labels))], task.train, task.attributes)
            for task in drawn
        ]
    # Two lessons a world: drawing a world costs as much as writing forty of its sentences.
    seeds = rng.integers(2**31, size=-(-c.prompts // 2))
    drawn = [worlds.pretrain_world(int(seed), _difficulty(config)) for seed in seeds]
    return [_world_lesson(world, int(rng.integers(len(world.labels)))) for world in drawn * 2][: c.prompts]


def _world_lesson(world: worlds.World, label: int) -> Lesson:
    other = [k for k in range(len(world.labels)) if k != label]
    return Lesson(
        Brief(world.description, ("text",), "classification"),
        world.labels[label].name,
        lambda rng, n: [world.sample(rng, label) for _ in range(n)],
        lambda rng, n: [world.sample(rng, other[rng.integers(len(other))]) for _ in range(n)],
        (worlds.length_of(world),),
    )


def check_sources(config: Any) -> None:
    """Raises UserError where a task of the stream, one appended later too, is among what is pretrained on."""
    if _WORLDS in config.pretrain.sources and len(config.pretrain.sources) > 1:
        raise UserError("pretrain.sources names worlds beside others: name either it alone or the others.")
    used = {spec.split("?")[0].rstrip("/") for spec in config.stream.tasks}
    for spec in config.pretrain.sources:
        if spec.split("?")[0].rstrip("/") in used:
            raise UserError(
                f"pretrain.sources names {spec!r}, which is also in stream.tasks: take it out of one of them."
            )


def _pretrain_tasks(config: Any, stream: Sequence[Task]) -> list[Task]:
    """The labelled files to pretrain on, less the texts of the stream; none for the worlds."""
    specs = tuple(config.pretrain.sources)
    if specs == (_WORLDS,):
        return []
    check_sources(config)
    theirs = {
        normalise(task.identity(example.text)) for task in stream for example in (*task.train, *task.test)
    }
    tasks = [
        sources.load(spec, examples_per_label=1, seed=config.seed, on_bad_row=config.stream.on_bad_row)
        for spec in specs
    ]
    return [
        dataclasses.replace(
            task, train=tuple(e for e in task.train if normalise(task.identity(e.text)) not in theirs)
        )
        for task in tasks
    ]


def _corpus(config: Any, tasks: Sequence[Task]) -> list[str]:
    """What the tokenizer is trained on: texts, and label names as prompts write them."""
    if tasks:
        names = [label_text(label) for task in tasks for label in task.labels]
        return names + [field for task in tasks for example in task.train for field in example.fields]
    count = config.pretrain.corpus_sentences
    drawn = (worlds.pretrain_world(seed, _difficulty(config)) for seed in range(count // 20))
    names = [label_text(label.name) for world in drawn for label in world.labels]
    return names + worlds.corpus(config.seed, count, _difficulty(config))


def _difficulty(config: Any) -> worlds.Difficulty:
    return worlds.Difficulty(**config.worlds.to_dict())


def _content_hash(task: Task) -> str:
    digest = hashlib.sha256()
    for example in task.train:
        digest.update(f"{example.label}\t{example.text}\n".encode())
    return digest.hexdigest()[:16]
