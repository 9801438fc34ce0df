"""What a run is made of and follows from its config: tasks, policy, judges, optimizer, mesh."""

from __future__ import annotations

import dataclasses
import os
import pathlib
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
import optax
from jax.sharding import Mesh

from streamsynth.errors import UserError
from streamsynth.feedback.reward import JudgeContext, Reward, make_reward
from streamsynth.learner.collect import Featurizer
from streamsynth.learner.objective import ObjectiveConfig
from streamsynth.learner.optimizer import make_optimizer
from streamsynth.learner.state import RunState, new_state
from streamsynth.policy.store import Policy
from streamsynth.policy.transformer import logical_axes
from streamsynth.runtime import mesh as mesh_lib
from streamsynth.stream import patterns, scheduler
from streamsynth.stream.patterns import STRATEGIES
from streamsynth.stream.prompts import SHOWN, PromptFormat, TaskTokens, tokenise
from streamsynth.tasks import sources
from streamsynth.tasks.task import Task

FEATURES = ("ngrams", "hidden")


@dataclasses.dataclass(frozen=True)
class Setting:
    """The fixed parts of a run. `place` puts a batch on the mesh, split along its first axis."""

    config: Any
    mesh: Mesh
    policy: Policy
    form: PromptFormat
    tasks: tuple[Task, ...]
    tokens: tuple[TaskTokens, ...]
    rewards: tuple[Reward, ...]
    featurize: Featurizer
    optimizer: optax.GradientTransformation
    objective: ObjectiveConfig
    scheduler: scheduler.Config
    patterns: patterns.Config
    place: Callable[[Any], Any]

    @property
    def model(self):
        return self.policy.model


def load_tasks(config: Any) -> tuple[Task, ...]:
    """The tasks of the stream.

    Raises:
      UserError: the stream is empty, two tasks share a name, or a source refuses.
    """
    s = config.stream
    if not s.tasks:
        raise UserError("stream.tasks is empty: name at least one task, such as worlds:bank_1.")
    tasks = tuple(
        sources.load(
            spec,
            examples_per_label=s.examples_per_label,
            seed=config.seed,
            train_limit=s.train_limit or None,
            test_limit=s.test_limit or None,
            on_bad_row=s.on_bad_row,
        )
        for spec in s.tasks
    )
    names = [task.name for task in tasks]
    for name in names:
        if names.count(name) > 1:
            raise UserError(
                f"stream.tasks has two tasks named {name!r}: add ?name=OTHER to one of the specs."
            )
    return tasks


def assemble(config: Any, tasks: Sequence[Task], policy: Policy) -> Setting:
    """Builds and checks every fixed part; judges are measured here.

    Raises:
      UserError: naming the key that does not fit.
    """
    r, f = config.rollout, config.feedback
    mesh = mesh_lib.make_mesh(config.mesh.to_dict())
    mesh_lib.check_batch(r.prompts, "rollout.prompts", mesh)
    mesh_lib.check_batch(config.evaluation.prompts, "evaluation.prompts", mesh)
    if f.features not in FEATURES:
        raise UserError(
            f"feedback.features = {f.features!r} is not known: choose one of {', '.join(FEATURES)}."
        )
    if r.temperature <= 0:
        raise UserError(f"rollout.temperature = {r.temperature} must be above 0.")
    form = PromptFormat(policy.tokenizer, r.prompt_length, r.completion_length)
    tokens = tuple(tokenise(task, policy.tokenizer) for task in tasks)
    axes = logical_axes(policy.model.config)
    shardings = mesh_lib.param_shardings(policy.params, axes, mesh)
    policy = dataclasses.replace(policy, params=jax.device_put(policy.params, shardings))
    batch = mesh_lib.batch_sharding(mesh)
    with mesh_lib.use(mesh):
        rewards = tuple(
            make_reward(judge_context(policy, form, task, t), f.judges.to_dict())
            for task, t in zip(tasks, tokens, strict=True)
        )
    return Setting(
        config=config,
        mesh=mesh,
        policy=policy,
        form=form,
        tasks=tuple(tasks),
        tokens=tokens,
        rewards=rewards,
        featurize=Featurizer(f.features, f.width, config.seed, policy.model, policy.params, form),
        optimizer=make_optimizer(config.optimizer, config.learner.steps * len(tasks)),
        objective=ObjectiveConfig(**config.objective.to_dict()),
        scheduler=scheduler.Config(
            **config.scheduler.to_dict(), samples=r.prompts * r.samples, share=config.replay.share
        ),
        patterns=patterns.Config(**config.patterns.to_dict()),
        place=lambda tree: jax.device_put(tree, batch),
    )


def judge_context(policy: Policy, form: PromptFormat, task: Task, tokens: TaskTokens) -> JudgeContext:
    """The judges' share of the label budget: some examples stand in prompts, the others measure."""
    shown = min(SHOWN["imitate"][0], max(1, len(tokens.examples[0]) // 2))
    prompts = [
        form.prompt(STRATEGIES.index("imitate"), name, examples[:shown], ())[0]
        for name, examples in zip(tokens.names, tokens.examples, strict=True)
    ]
    count = len(prompts)

    def encode(texts):
        # A text that is too long is cut: the judge reads what the policy could have written of it.
        ids = [[*policy.tokenizer.encode(text), policy.tokenizer.eos] for text in texts]
        return form.pad_completions([row[: form.completion_length] for row in ids])

    return JudgeContext(
        task=task,
        model=policy.model,
        base=policy.params,
        prompts=form.pad_prompts(prompts, np.arange(count), np.zeros(count)),
        held_back=tuple(e for label in task.labels for e in task.examples_of(label)[shown:]),
        encode=encode,
    )


def first_state(setting: Setting) -> RunState:
    """The state before anything, placed on the mesh. The parameters are copies: updates give theirs away."""
    params = copy(setting.policy.params)
    opt_state = jax.jit(setting.optimizer.init)(params)
    labels = tuple(len(task.labels) for task in setting.tasks)
    state = new_state(setting.config, labels, params, opt_state)
    return state.replace(reference=copy(setting.policy.params))


def copy(tree: Any) -> Any:
    """The same arrays in buffers of their own."""
    return jax.tree.map(lambda leaf: leaf.copy(), tree)


def cache_directory(config: Any) -> pathlib.Path:
    """Where base policies are cached: `cache_dir`, or the user's cache folder."""
    if config.cache_dir:
        return pathlib.Path(config.cache_dir)
    home = os.environ.get("XDG_CACHE_HOME") or pathlib.Path.home() / ".cache"
    return pathlib.Path(home) / "streamsynth"
