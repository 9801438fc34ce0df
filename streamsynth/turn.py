"""One turn: what is set at its beginning, and its steps. Write, judge, credit, update, remember."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from streamsynth import assemble as assemble_lib
from streamsynth.assemble import Setting
from streamsynth.dataset.rows import Row
from streamsynth.feedback import diversity
from streamsynth.keys import numpy_rng, purpose_key
from streamsynth.learner import balance
from streamsynth.learner.collect import Scored, Written, score, write
from streamsynth.learner.objective import Fresh
from streamsynth.learner.replaying import remember, replayed_batch, samples_of
from streamsynth.learner.state import RunState, TaskState, new_task
from streamsynth.learner.update import Assessment, assess, update
from streamsynth.policy.logprobs import sequence_logprobs
from streamsynth.probe import probe
from streamsynth.stream import patterns, scheduler
from streamsynth.stream.kept import Kept
from streamsynth.stream.patterns import STRATEGIES
from streamsynth.tasks.attributes import asked_for
from streamsynth.tasks.question_answer import fields_of
from streamsynth.tasks.task import Task
from streamsynth.tuning import example_features, split_examples, spread_out_rows, tune

_kept_of = jax.jit(diversity.kept)


def begin_turn(setting: Setting, state: RunState, kept: Kept) -> tuple[RunState, dict[str, float], list[Row]]:
    """The first step of a turn: nothing is learned by reward yet.

    The isolated learner forgets everything. Batches of the base policy give the diversity that is to be
    held. Then, in rounds, the policy writes (the phase `initialization`), and is tuned (`tuning`) to the
    examples and to a spread-out choice of all that was kept: many different texts, each of which the judges
    accepted, teach a language without narrowing it, which a few examples would. Last, KL's reference is set.

    Args and returns are as in `learn`.
    """
    config, turn, step = setting.config, int(state.turn), int(state.step)
    if config.stream.experience == "isolated" and turn:
        state = _forget(setting, state)
    state = assemble_lib.on_mesh(setting, state.replace(balance=balance.initial(config.balance.alpha, 0.0)))

    task = setting.tasks[turn]
    # What is tuned to comes of prompts that do not show what is held out to measure the tuning.
    asked = dataclasses.replace(task, examples=split_examples(task, config.supervised.held_out)[0])
    rows, features, quality, statistics, held_out, dropped = [], [], [], [], [], 0

    def written(params: Any, version: int, purpose: str, *steps: int) -> Assessment:
        """Writes a batch with the given parameters; what is kept of it goes into `rows`."""
        nonlocal state, dropped
        sampled = _sampled(setting, state.replace(params=params), asked, kept, purpose, *steps)
        dropped += sampled.written.dropped_examples
        state, keep = _remembered(setting, state, sampled, kept, version, purpose, *steps)
        rows.extend(_rows(setting.tasks[turn], sampled, keep, step, version, kept))
        features.append(np.asarray(sampled.scored.scores.features)[keep])
        quality.append(float(sampled.scored.scores.quality.mean()))
        return sampled.assessment

    # --- The diversity to hold ---
    # That of the base policy: held from turn to turn, a little would be lost each time.
    own = config.balance.target == "policy"
    measured = (state.params, int(state.policy_version)) if own else (setting.initial, 0)
    for batch in range(config.balance.batches):
        statistics.append(float(written(*measured, "measure", step, batch).metrics["diversity/statistic"]))
    found = float(np.mean(statistics))
    if config.balance.target == "examples":
        found = _statistic_of_examples(setting, turn)
    target = found + float(np.log(config.balance.factor))

    # --- Texts to tune to, and the tuning ---
    explored = config.supervised.batches if config.phases.initialization else 0
    chooses = config.phases.initialization and config.supervised.rows
    for round_ in range(config.supervised.rounds):
        for batch in range(explored):
            written(state.params, int(state.policy_version), "explore", step, round_, batch)
        if config.phases.tuning:
            chosen = spread_out_rows(setting, turn, rows, features) if chooses else []
            state, losses = tune(setting, state, chosen, round_)
            held_out += losses
    reference = state.params if config.learner.kl_reference == "turn" else setting.initial
    state = state.replace(
        reference=assemble_lib.copy(reference),
        balance=balance.initial(config.balance.alpha, target),
        turn_step=np.int32(1),
        step=np.int32(step + 1),
    )
    figures = {
        "reward/quality": float(np.mean(quality)),
        "diversity/statistic": float(np.mean(statistics)),
        "diversity/target": target,
        "kept": len(rows),
        "prompt/dropped_examples": dropped,
        "budget/samples": float(state.samples),
    }
    if held_out:
        figures |= {"supervised/held_out_before": held_out[0], "supervised/held_out": held_out[-1]}
    return assemble_lib.on_mesh(setting, state), figures, rows


def learn(setting: Setting, state: RunState, kept: Kept) -> tuple[RunState, dict[str, float], list[Row]]:
    """One step: write, score, credit, update, remember.

    Without the phase `reward` there is no update: a step then spends its samples on the data set alone.

    Args:
      setting: the fixed parts.
      state: before the step.
      kept: what is kept of this turn's task; what is kept now is added.

    Returns:
      The state after it, the step's figures, and the rows that were kept.
    """
    config, turn, step = setting.config, int(state.turn), int(state.step)
    seed = config.seed

    # --- Plan, write, feedback and credit ---
    plan, scheduled = scheduler.next(
        state.scheduler, turn, step, numpy_rng(seed, "scheduler", step), setting.scheduler
    )
    sampled = _sampled(setting, state, setting.tasks[turn], kept, "rollout", step)
    written, scored, assessment = sampled.written, sampled.scored, sampled.assessment

    # --- Update ---
    version, metrics = int(state.policy_version), {}
    if config.phases.reward:
        state, metrics = _updated(setting, state, sampled, plan)

    # --- Remember ---
    state, keep = _remembered(setting, state, sampled, kept, version, "reservoir", step)
    scores, quality = scored.scores, np.asarray(scored.scores.quality)
    state = state.replace(
        scheduler=scheduler.record(scheduled, turn, float(quality.mean()), setting.scheduler),
        balance=assessment.balance,
        turn_step=np.int32(state.turn_step + 1),
        step=np.int32(step + 1),
    )
    state, probed = probe(setting, state)
    groups = quality.reshape(-1, config.rollout.samples)
    figures = {
        "reward/quality": quality.mean(),
        **{f"reward/{name}": part.mean() for name, part in scores.parts.items()},
        **{
            f"reward/{name}_weighted": (scores.gate * part).mean() * setting.rewards[turn].judges[name][2]
            for name, part in scores.parts.items()
        },
        **{f"gate/{name}": share for name, share in scored.gates.shares().items()},
        **{f"reject/{name}": written.rejections.count(name) for name in set(written.rejections) - {""}},
        **assessment.metrics,
        **metrics,
        "group/dead": np.mean(groups.max(axis=1) == groups.min(axis=1)),
        "completion/truncated": 1.0 - written.rollouts.finished.mean(),
        "kept": keep.sum(),
        "prompt/dropped_examples": written.dropped_examples,
        **{f"scheduler/{setting.tasks[j].name}": n for j, n in enumerate(plan.replay_counts) if n},
        **probed,
        "budget/samples": state.samples,
    }
    figures = {name: float(value) for name, value in jax.device_get(figures).items()}
    if not plan.replay_counts.any():
        figures = {name: value for name, value in figures.items() if not name.startswith("replay/")}
    return state, figures, _rows(setting.tasks[turn], sampled, keep, step, version, kept)


# --- Parts of a step ---


@dataclasses.dataclass(frozen=True)
class _Sampled:
    """A batch of the turn's task: as written, as scored, and what it is worth to the learner."""

    written: Written
    scored: Scored
    assessment: Assessment


def _sampled(
    setting: Setting, state: RunState, asked: Task, kept: Kept, purpose: str, *steps: int
) -> _Sampled:
    """Writes and judges one batch, in strategies drawn from what was learned of them.

    `asked` is the turn's task with the examples that prompts may show.
    """
    config, turn = setting.config, int(state.turn)
    r, f, b = config.rollout, config.feedback, config.balance
    strategy = patterns.draw(
        state.patterns,
        turn,
        numpy_rng(config.seed, f"{purpose}/patterns", *steps),
        r.prompts,
        setting.patterns,
    )
    written = write(
        setting.model,
        setting.variables(state.params),
        setting.form,
        asked,
        strategy,
        seed=config.seed,
        purpose=purpose,
        steps=steps,
        samples=r.samples,
        temperature=r.temperature,
        place=setting.place,
        best=kept.best,
    )
    scored = score(setting.tasks[turn], written, setting.rewards[turn], setting.featurize, kept.seen, f)
    assessment = assess(
        state.tasks[turn].archive,
        setting.place(dataclasses.replace(scored.scores, parts={})),
        setting.place(written.label),
        state.spread,
        state.balance,
        samples=r.samples,
        floor=f.floor,
        power=f.power,
        eta=b.eta,
        alpha_max=b.alpha_max,
        weighted=b.weighted,
        neutral=b.neutral,
        remembered=b.archive,
        reward=config.learner.reward,
        choices=setting.objective.choices,
        constants=setting.rivals,
        elsewhere=_elsewhere(state.tasks[:turn], f.width, b.others) if b.others else None,
    )
    return _Sampled(written, scored, assessment)


def _updated(
    setting: Setting, state: RunState, sampled: _Sampled, plan: scheduler.Plan
) -> tuple[RunState, dict[str, Any]]:
    """The state after an update on a batch and on what `plan` replays, and the update's figures."""
    config = setting.config
    rollouts, assessment = sampled.written.rollouts, sampled.assessment
    temperature = np.float32(config.rollout.temperature)
    fresh = Fresh(
        prompts=rollouts.prompts,
        tokens=rollouts.tokens,
        mask=rollouts.mask & assessment.counted[:, None],
        behaviour=rollouts.logprobs,
        reference=sequence_logprobs(
            setting.model,
            setting.variables(state.reference),
            rollouts.prompts,
            rollouts.tokens,
            rollouts.mask,
            temperature,
            chunk=config.objective.chunk,
        ),
        advantage=assessment.advantage,
    )
    replayed = None
    if setting.scheduler.max_replayed:  # in the first turn a batch of none: one program serves all turns
        replayed, state = replayed_batch(
            state,
            plan.replay_counts,
            setting.scheduler.max_replayed,
            purpose_key(config.seed, "replay", int(state.step)),
            elite=config.replay.elite,
            decay=config.replay.baseline_decay,
            neutral=config.balance.neutral,
            diverse=config.learner.reward == "credit",
        )
    params, opt_state, metrics = update(
        setting.model,
        setting.optimizer,
        setting.objective,
        state.params,
        setting.frozen,
        state.opt_state,
        fresh,
        replayed,
        temperature,
    )
    version = np.int32(state.policy_version + 1)
    return state.replace(params=params, opt_state=opt_state, policy_version=version), metrics


def _elsewhere(past: Sequence[TaskState], width: int, others: float) -> np.ndarray:
    """[D, D] float32: what past tasks kept, as it counts under every label of this turn's task."""
    kept = [np.asarray(_kept_of(task.archive)) for task in past]
    return others * np.sum([np.zeros((width, width), np.float32), *kept], axis=0)


def _remembered(
    setting: Setting,
    state: RunState,
    sampled: _Sampled,
    kept: Kept,
    version: int,
    purpose: str,
    *steps: int,
) -> tuple[RunState, np.ndarray]:
    """The state with a batch in its buffer, archive and statistics, and which samples were kept, [N] bool.

    `version` is the writing policy's.
    """
    config, turn = setting.config, int(state.turn)
    written, scores, assessment = sampled.written, sampled.scored.scores, sampled.assessment
    quality = np.asarray(scores.quality)
    identities = [setting.tasks[turn].identity(text) for text in written.texts]
    keep = _kept(identities, quality, config.feedback.accept, kept)
    task = remember(
        state.tasks[turn],
        samples_of(written, scores, assessment.weight, keep, version),
        keep,
        purpose_key(config.seed, purpose, *steps),
        config.replay.baseline_decay,
        config.balance.decay,
    )
    state = state.replace(
        tasks=(*state.tasks[:turn], task, *state.tasks[turn + 1 :]),
        patterns=patterns.record(state.patterns, turn, written.strategy, quality, setting.patterns),
        spread=assessment.spread,
        samples=np.int64(state.samples + len(keep)),
    )
    return state, keep


def _kept(texts: Sequence[str], quality: np.ndarray, accept: float, kept: Kept) -> np.ndarray:
    """[N] bool: good enough, and no near-duplicate of a kept text, those of this batch included."""
    keep = np.zeros(len(texts), bool)
    for i in np.flatnonzero(quality >= accept):
        if not kept.seen(texts[i]):
            kept.add(texts[i])
            keep[i] = True
    return keep


def _rows(task: Task, sampled: _Sampled, keep: np.ndarray, step: int, version: int, kept: Kept) -> list[Row]:
    """The rows of the samples with `keep`, which join what later prompts may show."""
    written, scores, credit = sampled.written, sampled.scored.scores, np.asarray(sampled.assessment.credit)
    group = len(written.label) // len(written.shown)
    rows = [
        Row(
            fields=fields_of(task, written.texts[i]),
            label=task.labels[written.label[i]],
            pattern=STRATEGIES[written.strategy[i]],
            step=step,
            policy_version=version,
            examples=written.shown[i // group],
            scores={
                "quality": float(scores.quality[i]),
                **{name: float(part[i]) for name, part in scores.parts.items()},
                "diversity": float(credit[i]),
            },
            attributes=asked_for(task.attributes, task.cells[written.cell[i]]),
        )
        for i in np.flatnonzero(keep)
    ]
    for row in rows:
        kept.remember(row)
    return rows


def _statistic_of_examples(setting: Setting, turn: int) -> float:
    features, label = example_features(setting, turn)
    found, valid = diversity.statistic(
        jnp.asarray(features), jnp.ones(len(label)), jnp.asarray(label), len(setting.tasks[turn].labels)
    )
    return balance.target_from(found, valid)


def _forget(setting: Setting, state: RunState) -> RunState:
    """The isolated learner at the start of a turn: nothing is left of what was learned before it."""
    fresh = assemble_lib.first_state(setting)
    return fresh.replace(
        turn=state.turn,
        step=state.step,
        policy_version=state.policy_version,
        samples=state.samples,
        tasks=tuple(
            new_task(setting.config, len(task.labels)).replace(kept=old.kept)
            for task, old in zip(setting.tasks, state.tasks, strict=True)
        ),
        transfer=state.transfer,
        journals=state.journals,
    )
