"""The programs that run the network in a run of a config, by the shapes they are compiled for.

One list serves a reader at the start of a run and `streamsynth compile`: nothing in it holds an array.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh

from streamsynth.assemble import check_microbatches, scheduler_config
from streamsynth.costs import counts
from streamsynth.costs.counts import Batch, Costs
from streamsynth.feedback import judge
from streamsynth.learner.objective import Fresh, Replayed, objective_config
from streamsynth.learner.optimizer import make_optimizer
from streamsynth.learner.state import new_buffer
from streamsynth.learner.supervised import SupervisedBatch, supervised_step
from streamsynth.learner.update import update
from streamsynth.policy.logprobs import mean_hidden, sequence_logprobs
from streamsynth.policy.lora import init_adapter
from streamsynth.policy.placement import check_network, optimizer_shardings, variable_shardings
from streamsynth.policy.rollout import rollout
from streamsynth.policy.transformer import Transformer, TransformerConfig, param_shapes
from streamsynth.pytrees import Prompts
from streamsynth.runtime import mesh as mesh_lib


@dataclasses.dataclass(frozen=True)
class Program:
    """One compiled program.

    name: what it does.   shapes: the sizes it is compiled for, for readers.
    function: jitted; `function.lower(*args, **kwargs)` traces it.
    args, kwargs: `jax.ShapeDtypeStruct`s that say where they lie, and static values.
    costs: counted by hand.
    cache: bytes of keys and values that decoding keeps, over all devices together.
    beside: bytes on one device of what a run keeps there that is no argument of this program.
    """

    name: str
    shapes: str
    function: Callable[..., Any]
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    costs: Costs
    cache: int = 0
    beside: int = 0


@dataclasses.dataclass(frozen=True)
class Kept:
    """Trees of `jax.ShapeDtypeStruct`s of what a run keeps on the devices from its start to its end.

    trained: the collections that are trained.   frozen: the others.
    reference: the snapshot that KL refers to.   base: what the base policy's trained collections were.
    opt_state: the optimizer's state.   copies: of parameters and optimizer's state, for stopping early.
    replay: the tasks' buffers.
    """

    trained: Any
    frozen: Any
    reference: Any
    base: Any
    opt_state: Any
    copies: Any
    replay: Any

    @property
    def trained_parameters(self) -> int:
        return sum(leaf.size for leaf in jax.tree.leaves(self.trained))

    @property
    def parameters(self) -> int:
        return self.trained_parameters + sum(leaf.size for leaf in jax.tree.leaves(self.frozen))

    def bytes_by_part(self) -> dict[str, int]:
        """Bytes on one device, by field."""
        return {field.name: device_bytes(getattr(self, field.name)) for field in dataclasses.fields(self)}


def device_bytes(tree: Any) -> int:
    """Bytes that the arrays of a tree take on one device, each as its sharding says."""

    def one(leaf: Any) -> int:
        sharding = getattr(leaf, "sharding", None)
        shape = leaf.shape if sharding is None else sharding.shard_shape(leaf.shape)
        return int(np.prod(shape, dtype=np.int64)) * jnp.dtype(leaf.dtype).itemsize

    return sum(one(leaf) for leaf in jax.tree.leaves(tree))


def _placed(tree: Any, shardings: Any) -> Any:
    return jax.tree.map(
        lambda leaf, where: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=where), tree, shardings
    )


def make_kept(
    config: Any, network: TransformerConfig, mesh: Mesh
) -> tuple[Kept, optax.GradientTransformation]:
    """What a run of `config` keeps on the devices of `mesh`, and the optimizer.

    Raises:
      UserError: the mesh does not divide the network.
    """
    check_network(network, mesh)
    shapes = param_shapes(network)
    trained, frozen = {"params": shapes}, {}
    if network.lora is not None:
        adapter = jax.eval_shape(lambda: init_adapter(network.lora, shapes, jax.random.key(0)))
        trained, frozen = {"lora": adapter}, trained
    trained, frozen = (_placed(tree, variable_shardings(network, tree, mesh)) for tree in (trained, frozen))
    optimizer = make_optimizer(
        config.optimizer,
        max(config.learner.steps, 1) * len(config.stream.tasks),
        master=network.lora is None and network.param_dtype != "float32",
    )
    opt_state = jax.eval_shape(optimizer.init, trained)
    opt_state = _placed(opt_state, optimizer_shardings(network, opt_state, trained, mesh))
    stops_early = config.supervised.early_stop and config.supervised.held_out
    copies = (trained, opt_state) if stops_early else ()
    buffer = jax.eval_shape(lambda: new_buffer(config))
    lies = jax.tree.map(lambda leaf: mesh_lib.sharding("replay", mesh, leaf.shape), buffer)
    replay = [_placed(buffer, lies) for _ in config.stream.tasks]
    return Kept(trained, frozen, trained, trained, opt_state, copies, replay), optimizer


def declared(config: Any, network: TransformerConfig, mesh: Mesh) -> tuple[Program, ...]:
    """Every program of a run that runs the network, one for each shape; of examples alone: `side_programs`.

    Args:
      config: the run's.
      network: its policy's.
      mesh: of the run, of real devices or of a topology's.

    Raises:
      UserError: the mesh does not divide the network or a batch.
    """
    r, e = config.rollout, config.evaluation
    for count, key in ((r.prompts, "rollout.prompts"), (e.prompts, "evaluation.prompts")):
        mesh_lib.check_batch(count, key, mesh)
    check_microbatches(config, mesh)
    of = _Run(config, network, mesh, *make_kept(config, network, mesh))
    step, asked = of.sized(r.prompts, r.samples), of.sized(e.prompts, e.samples)
    rewarded = config.phases.reward and config.learner.steps
    found = [of.rollout("rollout", step)]
    if rewarded:
        found += [of.reference(step), of.update(step)]
    if config.phases.tuning and config.supervised.rounds:
        found.append(of.supervised())
    if asked != step:
        found.append(of.rollout("evaluation", asked))
    for length in r.buckets:
        short = dataclasses.replace(step, prompt_length=length)
        own = [of.rollout("rollout", short)]
        if rewarded:
            own += [of.reference(short), of.update(short)]
        if asked != step:
            own.append(of.rollout("evaluation", dataclasses.replace(asked, prompt_length=length)))
        found += [dataclasses.replace(one, name=f"{one.name} P={length}") for one in own]
    if config.feedback.judges.get("posterior", 0.0) > 0:
        found.append(of.judge(step))
    if config.feedback.features == "hidden":
        found.append(of.features(step))
    return tuple(found)


@dataclasses.dataclass(frozen=True)
class _Run:
    """What programs are made of: the network, what is kept, and batches split as the mesh divides them."""

    config: Any
    network: TransformerConfig
    mesh: Mesh
    kept: Kept
    optimizer: optax.GradientTransformation

    @property
    def model(self) -> Transformer:
        return Transformer(self.network)

    @property
    def microbatches(self) -> int:
        return self.config.learner.microbatches

    def beside(self, *arguments: str) -> int:
        """Bytes on one device of what is kept but for the parts that a program is given."""
        return sum(size for name, size in self.kept.bytes_by_part().items() if name not in arguments)

    def sized(self, prompts: int, samples: int) -> Batch:
        r = self.config.rollout
        return Batch(prompts, samples, r.prompt_length, r.completion_length)

    def rollout(self, name: str, batch: Batch) -> Program:
        policy = {**self.kept.frozen, **self.kept.trained}
        return Program(
            name=name,
            shapes=_named(batch),
            function=rollout,
            args=(self.model, policy, self._prompts(batch), self._keys(batch), _SCALAR),
            kwargs=dict(samples=batch.samples, length=batch.completion_length, stops=(1, 2)),
            costs=counts.rollout(self.network, batch),
            cache=counts.cache_bytes(self.network, batch),
            beside=self.beside("trained", "frozen"),
        )

    def reference(self, batch: Batch) -> Program:
        policy = {**self.kept.frozen, **self.kept.reference}
        return Program(
            name="reference",
            shapes=_named(batch),
            function=sequence_logprobs,
            args=(self.model, policy, self._prompts(batch), *self._texts(batch), _SCALAR),
            kwargs=dict(chunk=self.config.objective.chunk, microbatches=self.microbatches),
            costs=counts.logprobs(
                self.network, batch, self._positions(batch, self.microbatches), self.microbatches
            ),
            beside=self.beside("reference", "frozen"),
        )

    def update(self, batch: Batch) -> Program:
        extra = {"advantage": self._array("scores", jnp.float32, batch.completions)}
        fresh = Fresh(
            self._prompts(batch), *self._texts(batch), self._logprobs(batch), self._logprobs(batch), **extra
        )
        costs, shapes, replayed = self._gradient(batch), _named(batch), None
        count = scheduler_config(self.config).max_replayed
        if count:
            alone = self.sized(count, 1)
            flags = {name: self._array("scores", jnp.bool_, count) for name in ("elite", "valid")}
            replayed = Replayed(
                self._prompts(alone),
                *self._texts(alone),
                self._logprobs(alone),
                self._array("scores", jnp.float32, count),
                **flags,
            )
            costs, shapes = costs + self._gradient(alone), f"{shapes}, and {count} replayed"
        return Program(
            name="update",
            shapes=shapes,
            function=update,
            args=(
                self.model,
                self.optimizer,
                objective_config(self.config.objective, self.microbatches, bool(self.config.rollout.lag)),
                self.kept.trained,
                self.kept.frozen,
                self.kept.opt_state,
                fresh,
                replayed,
                _SCALAR,
            ),
            kwargs={},
            costs=costs + self._step(),
            beside=self.beside("trained", "frozen", "opt_state"),
        )

    def supervised(self) -> Program:
        s = self.config.supervised
        batch = self.sized(self.config.rollout.prompts, s.samples)
        positions = self._positions(batch, self.microbatches)
        if s.prompt_weight:
            prompts = self.sized(batch.prompts, 1)
            read = dataclasses.replace(prompts, completion_length=batch.prompt_length - 1)
            positions += self._positions(read, self.microbatches)
        costs = counts.gradient(self.network, batch, positions, self.microbatches)
        return Program(
            name="supervised",
            shapes=_named(batch),
            function=supervised_step,
            args=(
                self.model,
                self.optimizer,
                self.kept.trained,
                self.kept.frozen,
                self.kept.opt_state,
                SupervisedBatch(self._prompts(batch), *self._texts(batch)),
                _SCALAR,
            ),
            kwargs=dict(
                prompt_weight=s.prompt_weight,
                chunk=self.config.objective.chunk,
                microbatches=self.microbatches,
            ),
            costs=costs + self._step(),
            beside=self.beside("trained", "frozen", "opt_state"),
        )

    def judge(self, batch: Batch) -> Program:
        """The label posterior of the base policy, for one label: all texts are read after its prompt."""
        texts, parts = self.sized(1, batch.completions), judge.parts(batch.completions)
        read = dataclasses.replace(texts, prompts=parts, samples=-(-texts.samples // parts))
        return Program(
            name="judge",
            shapes=_named(texts),
            function=judge.label_loglikelihood,
            args=(self.model, self._base(), self._prompts(texts), *self._texts(texts)),
            kwargs=dict(chunk=self.config.objective.chunk),
            costs=counts.logprobs(self.network, read, self._positions(read, parts), parts),
            beside=self.beside("base", "frozen"),
        )

    def features(self, batch: Batch) -> Program:
        """Hidden states of the texts, which the base policy reads after an empty prompt of one token."""
        texts = dataclasses.replace(batch, prompts=1, samples=batch.completions, prompt_length=1)
        return Program(
            name="features",
            shapes=_named(texts),
            function=mean_hidden,
            args=(self.model, self._base(), self._prompts(texts), *self._texts(texts)),
            kwargs={},
            costs=counts.logprobs(self.network, texts, 0),
            beside=self.beside("base", "frozen"),
        )

    def _base(self) -> Any:
        """The frozen base policy: with an adapter, the network without it."""
        return self.kept.frozen or self.kept.base

    def _gradient(self, batch: Batch) -> Costs:
        positions = self._positions(batch, self.microbatches)
        return counts.gradient(self.network, batch, positions, self.microbatches)

    def _step(self) -> Costs:
        count = self.kept.trained_parameters
        return counts.optimizer_step(count, _bytes(self.kept.trained), _bytes(self.kept.opt_state))

    def _positions(self, batch: Batch, microbatches: int = 1) -> int:
        """Whose logits are computed: each device fills the last chunk of its part of each microbatch."""
        parts = microbatches * mesh_lib.shards(self.mesh)
        own = -(-batch.completions // parts) * batch.completion_length
        return parts * counts.chunk_positions(own, self.config.objective.chunk)

    def _array(self, row: str, dtype: Any, *shape: int) -> jax.ShapeDtypeStruct:
        """An array of a row of `runtime.mesh.ARRAYS`."""
        return jax.ShapeDtypeStruct(shape, dtype, sharding=mesh_lib.sharding(row, self.mesh, shape))

    def _prompts(self, batch: Batch) -> Prompts:
        shape = batch.prompts, batch.prompt_length
        return Prompts(
            tokens=self._array("prompts", jnp.int32, *shape),
            mask=self._array("prompts", jnp.bool_, *shape),
            label=self._array("prompts", jnp.int32, batch.prompts),
            strategy=self._array("prompts", jnp.int32, batch.prompts),
        )

    def _texts(self, batch: Batch) -> tuple[jax.ShapeDtypeStruct, jax.ShapeDtypeStruct]:
        shape = batch.completions, batch.completion_length
        return self._array("rollouts", jnp.int32, *shape), self._array("rollouts", jnp.bool_, *shape)

    def _logprobs(self, batch: Batch) -> jax.ShapeDtypeStruct:
        return self._array("rollouts", jnp.float32, batch.completions, batch.completion_length)

    def _keys(self, batch: Batch) -> jax.ShapeDtypeStruct:
        return self._array("keys", jax.eval_shape(jax.random.key, 0).dtype, batch.completions)


_SCALAR = jax.ShapeDtypeStruct((), jnp.float32)


def _named(batch: Batch) -> str:
    return f"B={batch.prompts} G={batch.samples} P={batch.prompt_length} T={batch.completion_length}"


def _bytes(tree: Any) -> int:
    """Bytes of all arrays of a tree, over all devices together."""
    return sum(leaf.size * jnp.dtype(leaf.dtype).itemsize for leaf in jax.tree.leaves(tree))
