"""What a run is made of and follows from its config: tasks, policy, judges, optimizer, mesh."""

from __future__ import annotations

import dataclasses
import pathlib
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh, NamedSharding

from streamsynth import pretrain, validate
from streamsynth.errors import UserError
from streamsynth.feedback.encoder import Encoder, check_encoder, load_encoder
from streamsynth.feedback.reward import JudgeContext, Reward, check_judges, make_reward
from streamsynth.feedback.scorers import specs as scorer_specs
from streamsynth.feedback.scorers.scorer import Scorer
from streamsynth.feedback.utility import UtilityConfig
from streamsynth.keys import purpose_key
from streamsynth.learner import rivals
from streamsynth.learner.choices import resolve
from streamsynth.learner.collect import Featurizer, example_features
from streamsynth.learner.objective import ObjectiveConfig, objective_config
from streamsynth.learner.optimizer import init_state, make_optimizer
from streamsynth.learner.state import RunState, new_buffer, new_state, remembered_shardings
from streamsynth.policy.families import own_config
from streamsynth.policy.lora import init_adapter, merge
from streamsynth.policy.placement import check_network, optimizer_shardings, variable_shardings
from streamsynth.policy.store import Policy
from streamsynth.runtime import arrays
from streamsynth.runtime import mesh as mesh_lib
from streamsynth.stream import patterns, scheduler
from streamsynth.stream.formats import make_format
from streamsynth.stream.patterns import STRATEGIES
from streamsynth.stream.prompts import SHOWN, PromptFormat
from streamsynth.tasks import sources, worlds
from streamsynth.tasks.task import Example, Task
from streamsynth.weights import check_proposals, check_weights, weights_folder


@dataclasses.dataclass(frozen=True)
class Setting:
    """The fixed parts of a run.

    `experience` is what the patterns of an earlier run had learned, where there was one. `place` puts a
    batch on the mesh, split along its first axis.

    examples: of each task, the features [M, D] and labels [M] of its examples.
    student: whose gain by each sample is its utility.
    initial: what is trained, before anything: all of the base policy's variables, or an adapter that changes
      nothing yet.   frozen: the other variables.
    encoder: of sentences, where features or a judge ask for one.
    """

    config: Any
    mesh: Mesh
    policy: Policy
    initial: Any
    frozen: Any
    form: PromptFormat
    tasks: tuple[Task, ...]
    rewards: tuple[Reward, ...]
    encoder: Encoder | None
    scorers: dict[str, Scorer]
    examples: tuple[tuple[np.ndarray, np.ndarray], ...]
    student: UtilityConfig
    featurize: Featurizer
    optimizer: optax.GradientTransformation
    objective: ObjectiveConfig
    rivals: rivals.RivalConfig
    scheduler: scheduler.Config
    patterns: patterns.Config
    experience: patterns.State | None
    place: Callable[[Any], Any]

    @property
    def model(self):
        return self.policy.model

    def variables(self, params: Any) -> dict[str, Any]:
        """What the network is applied with, for trained parameters such as a state's."""
        return {**self.frozen, **params}


def check(config: Any) -> None:
    """Whatever can be said of a config before its policy is there, so that mistakes do not wait for that.

    Raises:
      UserError: naming the key that does not fit.
    """
    validate.check(config)
    mesh = mesh_lib.make_mesh(config.mesh.to_dict())
    mesh_lib.check_batch(config.rollout.prompts, "rollout.prompts", mesh)
    mesh_lib.check_batch(config.evaluation.prompts, "evaluation.prompts", mesh)
    check_microbatches(config, mesh)
    sources = scorer_specs.sources(config)
    check_judges(config.feedback.judges.to_dict(), sources)
    rivals.check(config, resolve(config.objective))
    if _asks_for_encoder(config.feedback):
        check_encoder(config.feedback.encoder)
    patterns.Config(**config.patterns.to_dict())
    for name in config.evaluation.strategies:
        if name not in STRATEGIES:
            raise UserError(
                f"evaluation.strategies has {name!r}, which is none: choose among {', '.join(STRATEGIES)}."
            )
    worlds.Difficulty(**config.worlds.to_dict())
    _check_replay(config)
    make_optimizer(config.optimizer, 1)
    make_optimizer(config.pretrain.optimizer, 1, "pretrain.optimizer")
    if config.supervised.held_out >= config.stream.examples_per_label:
        raise UserError(
            f"supervised.held_out = {config.supervised.held_out} leaves none of the "
            f"stream.examples_per_label = {config.stream.examples_per_label} examples to tune to: lower it."
        )
    if config.supervised.early_stop and not config.supervised.held_out:
        raise UserError(
            f"supervised.early_stop = {config.supervised.early_stop} stops by the loss on held-out examples: "
            "set supervised.held_out to 1 or more."
        )
    network = own_config(config.policy, config.policy.vocab_size)
    folder = weights_folder(config)
    if folder is None:  # its tokenizer will say how many tokens there are
        check_network(network, mesh, vocabulary=False)
    form = None if folder is None else check_weights(config, folder, mesh)
    if folder is None and config.policy.format not in ("auto", "markers"):
        raise UserError(
            f'policy.format = "{config.policy.format}" is for named weights, and ours are trained on '
            'markers; set policy.init, or policy.format = "auto".'
        )
    if config.stream.proposed_attributes:
        check_proposals(form)
    pretrain.check_sources(config)


def check_microbatches(config: Any, mesh: Mesh) -> None:
    """Raises UserError unless each microbatch has whole groups, and some for every device."""
    count, prompts, parts = config.learner.microbatches, config.rollout.prompts, mesh_lib.shards(mesh)
    if prompts % (count * parts):
        raise UserError(
            f"learner.microbatches = {count} does not divide rollout.prompts = {prompts} into parts of a "
            f"multiple of mesh.data x mesh.fsdp = {parts} prompts: change one of them."
        )


def _check_replay(config: Any) -> None:
    """Whether what a step replays fits into a buffer."""
    c, asked = config.replay, scheduler_config(config).max_replayed
    if c.elite_share + c.leverage_share > 1:
        raise UserError(
            f"replay.elite_share = {c.elite_share} and replay.leverage_share = {c.leverage_share} are "
            "together more than 1, the whole buffer: lower one of them."
        )
    capacity = jax.eval_shape(lambda: new_buffer(config)).capacity
    if asked > capacity:
        bound = f"replay.capacity = {c.capacity}"
        if capacity < c.capacity:
            bound = f"replay.megabytes = {c.megabytes}, room for {capacity} samples,"
        raise UserError(
            f"{bound} is less than the {asked} samples a step that replay.share asks for: raise the one or "
            "lower the other."
        )


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
            difficulty=worlds.Difficulty(**config.worlds.to_dict()),
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


def assemble(
    config: Any,
    tasks: Sequence[Task],
    policy: Policy,
    experience: patterns.State | None = None,
    scores: pathlib.Path | None = None,
) -> Setting:
    """Builds every fixed part; judges are measured here.

    Args:
      config: that passed `check`.
      tasks: of the stream.
      policy: the base policy.
      experience: of the patterns, from an earlier run.
      scores: the folder of the scorers' journals; None keeps none.

    Raises:
      UserError: naming the key that does not fit.
    """
    r, f = config.rollout, config.feedback
    mesh = mesh_lib.make_mesh(config.mesh.to_dict())
    form = make_format(
        config.policy.format, policy.tokenizer, r.prompt_length, r.completion_length, tuple(r.buckets)
    )
    network = policy.model.config
    policy = policy.on_mesh(mesh)
    if network.lora is None:
        initial, frozen = policy.variables, {}
    else:
        initial, frozen = _fresh_adapter(config, policy, mesh), policy.variables
    batch = mesh_lib.batch_sharding(mesh)
    encoder = load_encoder(f.encoder) if _asks_for_encoder(f) else None
    scorers = scorer_specs.make_scorers(config, scores)
    featurize = Featurizer(f.features, f.width, config.seed, policy.model, policy.variables, form, encoder)
    with mesh_lib.use(mesh):
        rewards = tuple(
            task_reward(judge_context(policy, form, task, config.objective.chunk, encoder), f, scorers)
            for task in tasks
        )
        featurize = Featurizer(
            f.features, f.width, config.seed, policy.model, policy.variables, form, encoder
        )
        examples = tuple(example_features(form, featurize, task) for task in tasks)
    return Setting(
        config=config,
        mesh=mesh,
        policy=policy,
        initial=initial,
        frozen=frozen,
        form=form,
        tasks=tuple(tasks),
        rewards=rewards,
        encoder=encoder,
        scorers=scorers,
        examples=examples,
        student=_student(f.utility),
        featurize=featurize,
        optimizer=make_optimizer(
            config.optimizer,
            config.learner.steps * len(tasks),
            master=network.lora is None and network.param_dtype != "float32",
        ),
        objective=objective_config(config.objective, config.learner.microbatches, bool(r.lag)),
        rivals=rivals.RivalConfig(**config.rivals.to_dict()),
        scheduler=scheduler_config(config),
        patterns=patterns.Config(**config.patterns.to_dict(), samples=r.prompts * r.samples),
        experience=experience,
        place=arrays.Placement(batch),
    )


def _fresh_adapter(config: Any, policy: Policy, mesh: Mesh) -> dict[str, Any]:
    """The adapter before anything, made where its shards lie."""
    network = policy.model.config
    shapes = jax.eval_shape(lambda: policy.params)

    def init(key: jax.Array) -> dict[str, Any]:
        return {"lora": init_adapter(network.lora, shapes, key)}

    key = purpose_key(config.seed, "adapter")
    shardings = variable_shardings(network, jax.eval_shape(init, key), mesh)
    return jax.jit(init, out_shardings=shardings)(key)


def _asks_for_encoder(feedback: Any) -> bool:
    return feedback.features == "encoder" or feedback.judges.get("encoder", 0.0) > 0


def _student(keys: Any) -> UtilityConfig:
    return UtilityConfig(**{name: value for name, value in keys.items() if name != "form"})


def task_reward(context: JudgeContext, feedback: Any, scorers: dict[str, Scorer]) -> Reward:
    """The judges of one task, by the group `feedback` of the config."""
    f = feedback
    return make_reward(context, f.judges.to_dict(), scorers, f.secondary.to_dict(), f.accept)


def scheduler_config(config: Any) -> scheduler.Config:
    """The scheduler's constants, by the groups `scheduler`, `replay` and `rollout` of the config."""
    keys, share = config.scheduler.to_dict(), config.replay.share
    if config.stream.experience == "isolated":  # it has no past to replay or to probe
        keys, share = keys | {"probe_every": 0}, 0.0
    return scheduler.Config(**keys, samples=config.rollout.prompts * config.rollout.samples, share=share)


def judges_share(task: Task) -> tuple[list[list[Example]], tuple[Example, ...]]:
    """For each label the examples that stand in the judges' prompts, and those that measure the judges."""
    examples = [task.examples_of(label) for label in task.labels]
    count = min(SHOWN["imitate"][0], max(1, len(examples[0]) // 2))
    shown = [list(own[:count]) for own in examples]
    read = {e.text for own in shown for e in own}  # a text may be among the examples twice
    return shown, tuple(e for own in examples for e in own[count:] if e.text not in read)


def judge_context(
    policy: Policy, form: PromptFormat, task: Task, chunk: int = 1024, encoder: Encoder | None = None
) -> JudgeContext:
    """The judges' share of the label budget: some examples stand in prompts, the others measure."""
    by_label, held_back = judges_share(task)
    prompts = [
        form.prompt(task.brief, STRATEGIES.index("imitate"), label, [e.text for e in own], ())[0]
        for label, own in zip(task.labels, by_label, strict=True)
    ]
    labels = len(prompts)

    def encode(texts):
        # A text that is too long is cut: the judge reads what the policy could have written of it.
        return form.pad_completions([form.answer(task.brief, text) for text in texts])

    return JudgeContext(
        task=task,
        model=policy.model,
        base=policy.variables,
        prompts=form.pad_prompts(prompts, np.arange(labels), np.zeros(labels)),
        held_back=held_back,
        encode=encode,
        chunk=chunk,
        shown=tuple(e for own in by_label for e in own),
        encoder=encoder,
    )


def first_state(setting: Setting) -> RunState:
    """The state before anything, placed on the mesh. The parameters are copies: updates give theirs away."""
    params = copy(setting.initial)
    opt_state = init_state(setting.optimizer, setting.model.config, params, setting.mesh)
    labels = tuple(len(task.labels) for task in setting.tasks)
    state = new_state(setting.config, labels, params, opt_state, setting.experience)
    return on_mesh(setting, state.replace(reference=copy(setting.initial)))


def trained(setting: Setting, state: RunState) -> Any:
    """The parameters of a state's policy as one network, an adapter merged into it."""
    if "lora" not in state.params:
        return state.params["params"]
    return merge(setting.model.config.lora, setting.policy.params, state.params["lora"])


def on_mesh(setting: Setting, state: RunState) -> RunState:
    """The state with all that programs work on lying where they give it back.

    Otherwise the second step would meet another placement than the first and compile everything again.
    """

    def place(leaf: Any, sharding: NamedSharding) -> jax.Array:
        placed = isinstance(leaf, jax.Array) and isinstance(leaf.sharding, NamedSharding)
        return leaf if placed else arrays.put(leaf, sharding)

    of_optimizer = optimizer_shardings(setting.model.config, state.opt_state, state.params, setting.mesh)
    shardings = {"opt_state": of_optimizer, **remembered_shardings(state, setting.mesh)}
    return state.replace(
        **{name: jax.tree.map(place, getattr(state, name), own) for name, own in shardings.items()}
    )


@jax.jit
def copy(tree: Any) -> Any:
    """The same arrays in buffers of their own."""
    return jax.tree.map(jnp.copy, tree)
