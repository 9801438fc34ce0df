"""What the command does, for notebooks and scripts.

from streamsynth import api
config = api.load("configs/quickstart.py:tiny")
results = api.train(config, "/tmp/run")
rows = api.synthesize("/tmp/run", task="bank_1", rows=100, output="/tmp/rows")
"""

from __future__ import annotations

import json
import os
import pathlib
import subprocess
import time
from typing import Any

from ml_collections import ConfigDict

from streamsynth import assemble as assemble_lib
from streamsynth import config as config_lib
from streamsynth import synthesize as synthesize_lib
from streamsynth import train as train_lib
from streamsynth import validate
from streamsynth import weights as weights_lib
from streamsynth.defaults import default_config
from streamsynth.errors import UserError
from streamsynth.evaluation import report as report_lib
from streamsynth.feedback.scorers import specs as scorer_specs
from streamsynth.learner.proposals import with_proposed
from streamsynth.policy.huggingface.adapters import save_adapter
from streamsynth.policy.huggingface.architectures import check_whole
from streamsynth.policy.huggingface.writing import save_model
from streamsynth.policy.store import Policy, has_policy, save_policy
from streamsynth.runtime import hosts
from streamsynth.runtime import mesh as mesh_lib
from streamsynth.runtime.files import as_path, atomic_write, is_local
from streamsynth.stream import patterns
from streamsynth.tasks.task import Task
from streamsynth.workdir import Workdir

Path = str | os.PathLike[str]


def load(config: str, overrides: dict[str, str] | None = None) -> ConfigDict:
    """The config that `FILE[:arg]` names, with overrides by dotted key; see `config.load`."""
    return config_lib.load(config, overrides or {})


def train(config: ConfigDict, workdir: Path, init_from: Path | None = None) -> dict[str, Any]:
    """Trains over the stream and writes data sets and report; continues what is in the workdir.

    Args:
      config: resolved.
      workdir: the run's folder; new, or holding a run of the same config or of a prefix of its stream. Here
        and elsewhere a local one or a bucket's (gs://BUCKET/NAME).
      init_from: a run whose policy and pattern statistics a new stream starts from.

    Returns:
      What report/results.json holds.

    Raises:
      UserError: naming the key, file or folder and the mend.
    """
    start = time.monotonic()
    assemble_lib.check(config)
    hosts.watch(config.hosts.stall_seconds)
    scorer_specs.probe(config)
    place = Workdir(workdir, config.checkpoint.keep, config.checkpoint.asynchronous)
    # Asked by the process that writes, before it does: to the others the folder may look half written.
    begun = hosts.from_first("what the workdir holds", lambda: _begun(place, config, init_from))
    tasks = _tasks(config)
    if begun:
        policy = weights_lib.stored_policy(config, place.policy)
        place.write_config(config)
    else:
        if init_from is None:
            policy = weights_lib.base_policy(config, tasks)
        else:
            policy, learned = _experience(init_from, config)
        # The policy comes last: where it is, the rest is, and a kill in between starts over.
        place.write_config(config)
        if init_from is not None:
            place.write_experience(learned)
        if policy is not None:
            save_policy(place.policy, policy)
        hosts.wait("the policy is written")
        if policy is None:  # pretrained by the first process alone
            policy = weights_lib.stored_policy(config, place.policy)
    tasks = _with_attributes(config, place, tasks, policy)
    pretrained = time.monotonic()
    setting, state = train_lib.train(config, place, tasks, policy)
    trained = time.monotonic()
    summary = synthesize_lib.summarise(setting, state, place)
    summary["seconds"] = {
        "pretrain": pretrained - start,
        "stream": trained - pretrained,
        "summary": time.monotonic() - trained,
    }
    summary["commit"] = hosts.from_first("the commit", _commit)
    place.write("summary.json", json.dumps(summary, indent=1, ensure_ascii=False) + "\n")
    return hosts.from_first("the report", lambda: report_lib.write(place.path))


def _begun(place: Workdir, config: ConfigDict, init_from: Path | None) -> bool:
    """Whether there is a run to go on with.

    Raises:
      UserError: as `Workdir.check`, or there is one that began otherwise.
    """
    place.check(config)
    if not has_policy(place.policy):
        return False
    if init_from is not None and place.experience() is None:
        raise UserError(f"{place.path} holds a run that began without --init_from: leave it out.")
    return True


def synthesize(workdir: Path, task: str, rows: int, output: Path) -> dict[str, Any]:
    """Writes a data set for a task with the policy of a run.

    Args:
      workdir: the run's.
      task: name of a task of its stream, or the spec of any task. For one that is not of the stream no
        attributes are proposed: it has those that it names itself.
      rows: how many rows are wanted, all labels together.
      output: folder for train.jsonl, task.json and the card.

    Returns:
      The summary of `dataset.export`, with "asked" and "written".
    """
    setting, state, place = _finished(workdir)
    return synthesize_lib.synthesize(setting, state, place, task, rows, as_path(output))


def evaluate(workdir: Path) -> dict[str, dict[str, Any]]:
    """Evaluates the latest policy of a run on every task, prints the figures and returns them by task."""
    setting, state, _ = _finished(workdir)
    cells = {}
    for index, task in enumerate(setting.tasks):
        with mesh_lib.use(setting.mesh):
            cells[task.name] = cell = train_lib.evaluate_task(setting, state.params, index)
        if not hosts.first():
            continue
        valid = "" if cell["valid"] is None else f", valid {cell['valid']:.3f}"
        if cell["score"] == "accuracy":
            print(f"{task.name}: student {cell['accuracy']:.3f} on {cell['rows']} rows{valid}")
        else:
            print(f"{task.name}: validity {cell['validity']:.3f}, gates {cell['gate_pass']:.3f}{valid}")
    return cells


def report(workdir: Path) -> dict[str, Any]:
    """Writes the report of a run anew and returns what results.json holds."""
    return report_lib.write(workdir)


def results(workdir: Path) -> dict[str, Any]:
    """What report/results.json of a run holds."""
    path = as_path(workdir) / "report" / "results.json"
    if not path.is_file():
        raise UserError(f"{path} does not exist: run `streamsynth report --workdir={workdir}` first.")
    return json.loads(path.read_text())


def export(workdir: Path, output: Path, adapter: bool = False) -> None:
    """Writes the latest policy of a run as a Hugging Face folder that other programs load.

    Args:
      workdir: the run's.
      output: the folder.
      adapter: of a policy that was trained with LoRA, the adapter alone, as PEFT keeps it; otherwise the
        whole model, with the adapter merged into it.

    Raises:
      UserError: there is a model in the folder already, no adapter by itself, or the folder is not local.
    """
    if not is_local(output):
        raise UserError(f"--output={output}: a model goes to a local folder; copy it from there.")
    setting, state, _ = _finished(workdir)
    policy, network, output = setting.policy, setting.model.config, pathlib.Path(output)
    tokenizer = policy.tokenizer
    if adapter:
        if network.lora is None or not policy.origin:
            raise UserError(
                f"{workdir} has no adapter on named weights (policy.init, policy.lora.rank): export the "
                "whole model, without --adapter."
            )
        check_whole(policy.origin)
        save_adapter(output, network, state.params["lora"], base=policy.origin)
        for name, content in tokenizer.files().items():
            atomic_write(output / name, content)
        return
    r = setting.config.rollout
    save_model(
        output,
        network,
        assemble_lib.trained(setting, state),
        files=tokenizer.files(),
        bos=tokenizer.bos,
        eos=tokenizer.stops,
        pad=tokenizer.pad,
        context=policy.context or r.prompt_length + r.completion_length,
    )


def _with_attributes(
    config: ConfigDict, place: Workdir, tasks: tuple[Task, ...], policy: Policy
) -> tuple[Task, ...]:
    """The tasks with the attributes that the base policy proposes for those that name none.

    Proposals are written down before they are used, so that whatever reads the run later has the same ones.
    """
    if not config.stream.proposed_attributes:
        return tasks
    proposed = place.attributes()
    missing = [task for task in tasks if not task.attributes and task.name not in proposed]
    if missing:
        proposed |= weights_lib.propose_attributes(config, missing, policy)
        place.write_attributes(proposed)
    return with_proposed(tasks, proposed)


def _tasks(config: ConfigDict) -> tuple[Task, ...]:
    """The tasks of the stream, which all processes have the same.

    Raises:
      UserError: as `assemble.load_tasks`, or a process has other ones, another config or other weights.
    """
    # One before the others: TFDS prepares a set that is not there yet.
    tasks = hosts.first_before_others("the tasks are loaded", lambda: assemble_lib.load_tasks(config))
    if hosts.count() > 1:
        # Not where files lie: that may differ from host to host.
        places = ("cache_dir", "policy.init", "stream.tasks", "feedback.encoder")
        keys = {key: value for key, value in config_lib.flatten(config).items() if key not in places}
        folder = weights_lib.weights_folder(config)
        hosts.agree(
            {
                **{f"config.{key}": repr(value) for key, value in keys.items()},
                **{f"data set {task.name}": task.checksum for task in tasks},
                "folder of weights": weights_lib.listing(folder) if folder else None,
            }
        )
    return tasks


def _finished(workdir: Path) -> tuple[Any, Any, Workdir]:
    """The fixed parts and the latest state of a run."""
    place = Workdir(workdir)
    config = place.config()
    validate.check(config)
    try:
        mesh_lib.make_mesh(config.mesh.to_dict())
    except UserError:  # a run may be read on other devices than it was trained on
        config.mesh = default_config().mesh
    assemble_lib.check(config)
    hosts.watch(config.hosts.stall_seconds)
    if place.checkpoints.latest_step() is None:
        raise UserError(f"{place.path} has no checkpoint yet: run `streamsynth train` on it first.")
    tasks = _tasks(config)[: place.tasks_in_checkpoint()]
    tasks = with_proposed(tasks, place.attributes())
    policy = weights_lib.stored_policy(config, place.policy)
    setting = assemble_lib.assemble(config, tasks, policy, place.experience(), place.scores)
    return setting, place.restore(assemble_lib.first_state(setting), setting.mesh), place


def _experience(init_from: Path, config: ConfigDict) -> tuple[Policy, patterns.State]:
    """The last policy of another run, as the base policy of this one, and its patterns."""
    setting, state, place = _finished(init_from)
    for key, was in place.config().policy.items():
        if key != "init" and config.policy[key] != was:  # named weights may have moved
            raise UserError(
                f"--init_from={init_from} has policy.{key} = {was}, and this config {config.policy[key]}: "
                "make them equal."
            )
    policy = setting.policy
    digest = f"{policy.hash}+{int(state.policy_version)}"
    params = assemble_lib.trained(setting, state)
    merged = Policy(policy.model, params, policy.tokenizer, digest, context=policy.context)
    return merged, state.patterns


def _commit() -> str | None:
    """The commit of the code, where it is a git checkout."""
    folder = pathlib.Path(__file__).parent
    try:
        asked = subprocess.run(
            ["git", "rev-parse", "HEAD"], cwd=folder, capture_output=True, text=True, check=False
        )
    except OSError:  # no git
        return None
    return asked.stdout.strip() or None
