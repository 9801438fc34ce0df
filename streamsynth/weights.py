"""Where the base policy of a run comes from: named weights, or a policy of our own from the cache."""

from __future__ import annotations

import os
import pathlib
import zlib
from collections.abc import Sequence
from typing import Any

from jax.sharding import Mesh

from streamsynth import pretrain
from streamsynth.errors import UserError
from streamsynth.learner.proposals import propose
from streamsynth.policy.families import choices
from streamsynth.policy.huggingface.architectures import read_config, read_context
from streamsynth.policy.placement import check_network
from streamsynth.policy.store import Policy, load_policy, named_weights, read_weights
from streamsynth.policy.tokenizer_files import load_tokenizer
from streamsynth.runtime import arrays, hosts
from streamsynth.runtime import mesh as mesh_lib
from streamsynth.stream.formats import make_format
from streamsynth.stream.prompts import PromptFormat
from streamsynth.stream.wording import WordedFormat
from streamsynth.tasks.attributes import Attribute
from streamsynth.tasks.task import Brief, Task


def weights_folder(config: Any) -> str | None:
    """The folder of the weights that `policy.init` names, or None for a policy of our own.

    Raises:
      UserError: it names something else.
    """
    kind, _, folder = config.policy.init.partition(":")
    if not config.policy.init:
        return None
    if kind != "hf" or not folder:
        raise UserError(
            f"policy.init = {config.policy.init!r} names no weights: give hf:DIR, or leave it empty for a "
            "policy of our own."
        )
    return folder


def base_policy(config: Any, tasks: Sequence[Task]) -> Policy | None:
    """The base policy of a config: of the named weights, or one of our own, pretrained now or before.

    Of a run's processes the first alone pretrains, or asks the cache; the others are given None.

    Raises:
      UserError: the weights cannot be read, or a pretraining source is also in the stream.
    """
    folder = weights_folder(config)
    if folder is None:
        if not hosts.first():
            return None
        with hosts.local():
            return pretrain.base_policy(config, tasks, cache_dir=cache_directory(config))
    return read_weights(folder, mesh_lib.make_mesh(config.mesh.to_dict()), **choices(config.policy))


def stored_policy(config: Any, directory: str | os.PathLike[str]) -> Policy:
    """The base policy of a run, from the folder that `save_policy` wrote.

    Raises:
      UserError: it is damaged, or the named weights are not those that the run began with.
    """
    was = named_weights(directory)
    if was is None:
        return load_policy(directory)
    if weights_folder(config) is None:
        raise UserError(
            f"{directory} belongs to a run that began with named weights ({was}), and policy.init is empty: "
            "point policy.init at those weights."
        )
    policy = base_policy(config, ())
    if policy.hash != was:
        raise UserError(
            f"{policy.origin} holds other weights ({policy.hash}) than those this run began with ({was}): "
            "point policy.init at those, or use a new --workdir."
        )
    return policy


def listing(folder: str) -> list[list[Any]]:
    """Names and sizes of the files of named weights, and the CRC-32 of the short ones; no tensor is read."""
    found = []
    for path in sorted(pathlib.Path(folder).iterdir()):
        if path.suffix in (".json", ".jinja", ".model", ".safetensors"):
            long = path.suffix == ".safetensors"
            found.append([path.name, path.stat().st_size, 0 if long else zlib.crc32(path.read_bytes())])
    return found


def check_weights(config: Any, folder: str, mesh: Mesh) -> PromptFormat:
    """What can be said of named weights without reading them; returns the format of their prompts."""
    if not pathlib.Path(folder).is_dir():
        raise UserError(
            f"policy.init = {config.policy.init!r}: there is no folder {folder}; name that of the weights, "
            "for the configs of pretrained policies as an argument, such as :weights=DIR,data=DIR."
        )
    r = config.rollout
    network = read_config(folder, **choices(config.policy))
    check_network(network, mesh)
    tokenizer = load_tokenizer(folder)
    form = make_format(config.policy.format, tokenizer, r.prompt_length, r.completion_length)
    context, wanted = read_context(folder), r.prompt_length + r.completion_length
    if wanted > context:
        raise UserError(
            f"rollout.prompt_length + rollout.completion_length = {wanted} is more than the {context} tokens "
            f"that the model in {folder} was made for (max_position_embeddings): lower one of them."
        )
    # A tokenizer may know control tokens beyond the embeddings, such as one for images, but none in use.
    asked, _ = form.prompt(Brief("", ("text",), "classification"), 0, "", (), ())
    used = [tokenizer.vocab_size - len(tokenizer.control) - 1, tokenizer.pad, *form.stops, *asked]
    if max(used) >= network.vocab_size:
        raise UserError(
            f"the tokenizer in {folder} uses the id {max(used)}, and its model has {network.vocab_size} "
            "embeddings (vocab_size): copy the tokenizer that belongs to the weights."
        )
    return form


def check_proposals(form: PromptFormat | None) -> None:
    """Whether attributes can be asked for in a format, None for the markers of a policy of our own.

    Raises:
      UserError: it has no words for that, or no room.
    """
    if not isinstance(form, WordedFormat):
        raise UserError(
            "stream.proposed_attributes is for named weights (policy.init), which are asked in words: set it "
            "to 0 for a policy of our own, and name attributes in task.json."
        )
    form.attribute_prompt(Brief("", ("text",), "classification"), (), ())


def propose_attributes(
    config: Any, tasks: Sequence[Task], policy: Policy
) -> dict[str, tuple[Attribute, ...]]:
    """What a base policy proposes for each of the tasks, by its name; see `proposals.propose`."""
    r = config.rollout
    mesh = mesh_lib.make_mesh(config.mesh.to_dict())
    policy = policy.on_mesh(mesh)
    with mesh_lib.use(mesh):
        return {
            task.name: propose(
                policy.model,
                policy.variables,
                make_format(config.policy.format, policy.tokenizer, r.prompt_length, r.completion_length),
                task,
                config.stream.proposed_attributes,
                seed=config.seed,
                prompts=r.prompts,
                samples=r.samples,
                temperature=r.temperature,
                place=arrays.Placement(mesh_lib.batch_sharding(mesh)),
            )
            for task in tasks
        }


def cache_directory(config: Any) -> pathlib.Path:
    """Where base policies are cached: `cache_dir`, or the user's cache folder."""
    if config.cache_dir:
        return pathlib.Path(config.cache_dir)
    home = os.environ.get("XDG_CACHE_HOME") or pathlib.Path.home() / ".cache"
    return pathlib.Path(home) / "streamsynth"
