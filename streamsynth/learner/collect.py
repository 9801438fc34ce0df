"""From a policy and a task to scored samples: prompts, rollout, texts, gates, judges, features."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from streamsynth.feedback import gates as gates_lib
from streamsynth.feedback.encoder import Encoder
from streamsynth.feedback.features import ngram_features, project_hidden
from streamsynth.feedback.reward import Reward
from streamsynth.feedback.scorers.records import Where
from streamsynth.keys import numpy_rng, purpose_key, sample_keys
from streamsynth.learner.pending import Pending
from streamsynth.policy.logprobs import mean_hidden
from streamsynth.policy.rollout import rollout
from streamsynth.policy.transformer import Transformer
from streamsynth.pytrees import Array, Prompts, Rollouts, Scores
from streamsynth.runtime import arrays, hosts
from streamsynth.stream import prompts as prompts_lib
from streamsynth.stream.prompts import Best, PromptFormat
from streamsynth.tasks.task import Task


@dataclasses.dataclass(frozen=True)
class Arrived:
    """A batch that is written, with its tokens and mask [N, T] and where they ended, [N], on the host."""

    pending: Pending
    tokens: np.ndarray
    mask: np.ndarray
    finished: np.ndarray


@dataclasses.dataclass(frozen=True)
class Written:
    """N samples of one task, as tokens and as texts.

    rejections: why a text does not parse, "" where it does.
    label, strategy, cell: [N] int32; the cell is an index into the task's `cells`.
    shown: for each of the B prompts the ids of the examples it shows.
    dropped_examples: examples that did not fit into their prompts.
    finished: [N] bool, that of the rollouts on the host.
    """

    rollouts: Rollouts
    texts: tuple[str, ...]
    rejections: tuple[str, ...]
    label: np.ndarray
    strategy: np.ndarray
    cell: np.ndarray
    shown: tuple[tuple[str, ...], ...]
    dropped_examples: int
    finished: np.ndarray


def dispatch(
    model: Transformer,
    variables: Any,
    form: PromptFormat,
    task: Task,
    strategy: np.ndarray,
    *,
    seed: int,
    purpose: str,
    steps: tuple[int, ...],
    samples: int,
    temperature: float,
    place: Callable[[Any], Any] = lambda tree: tree,
    best: Best = lambda label, cell: (),
    version: int = 0,
) -> Pending:
    """Sets the device to write G texts for each of B prompts of a task, and waits for nothing of them.

    Labels and cells come in equal shares.

    Args:
      model, variables, form: the policy and its prompt format.
      task: what to write for.
      strategy: [B] int32, the synthesis strategy of each prompt.
      seed, purpose, steps: what the random numbers follow from (see `keys`).
      samples: G.
      temperature: of sampling.
      place: puts a batch on the mesh; of several processes an `arrays.Placement`.
      best: the best kept texts of a label and cell.
      version: of the policy.
    """
    rng = numpy_rng(seed, purpose, *steps)
    batch = len(strategy)
    label = prompts_lib.balanced_labels(batch, len(task.labels), rng)
    cell = prompts_lib.balanced_labels(batch, len(task.cells), rng)
    # A process renders the prompts that its own devices read, and tells the others what they show.
    mine = set(place.held(batch).tolist()) if hosts.count() > 1 else None
    rendered = prompts_lib.render(form, task, label, strategy, rng, cell, best, mine)
    found = hosts.joined(
        f"prompts of {purpose} {steps}",
        {
            "shown": [(b, rendered.shown[b], int(rendered.dropped[b])) for b in mine or range(batch)],
            "longest": [int(rendered.prompts.mask.sum(axis=1).max())],
        },
    )
    shown = {b: (ids, dropped) for b, ids, dropped in found["shown"]}  # some are on several processes
    rollouts = rollout(
        model,
        variables,
        place(form.shortened(rendered.prompts, max(found["longest"]))),
        place(sample_keys(purpose_key(seed, purpose, *steps), batch, samples)),
        np.float32(temperature),
        samples=samples,
        length=form.completion_length,
        stops=form.stops,
    )
    return Pending(
        # As one that is restored lies: else the step that takes it up would compile everything again.
        rollouts=place(rollouts),
        label=label,
        strategy=np.asarray(strategy, np.int32),
        cell=cell,
        version=np.int32(version),
        shown=tuple(tuple(shown[b][0]) for b in range(batch)),
        dropped=int(sum(dropped for _, dropped in shown.values())),
    )


def arrive(pending: Pending) -> Arrived:
    """Waits until a batch is written.

    Of several processes' devices it takes a program to gather it: what is dispatched before keeps it waiting.
    """
    rollouts = pending.rollouts
    return Arrived(pending, *arrays.fetch((rollouts.tokens, rollouts.mask, rollouts.finished)))


def read(form: PromptFormat, task: Task, arrived: Arrived, what: str) -> Written:
    """What the samples say: each process reads its share of them and tells the others.

    `what` is the batch's name, for messages.
    """
    pending, tokens, mask = arrived.pending, arrived.tokens, arrived.mask
    own, samples = hosts.share(len(tokens)), len(tokens) // len(pending.label)
    answers = [form.read(task.brief, row[real]) for row, real in zip(tokens[own], mask[own], strict=True)]
    found = hosts.joined(
        f"texts of {what}",
        {
            "texts": [answer.text for answer in answers],
            "rejections": [answer.rejection for answer in answers],
        },
    )
    return Written(
        rollouts=pending.rollouts,
        texts=tuple(found["texts"]),
        rejections=tuple(found["rejections"]),
        label=np.repeat(pending.label, samples),
        strategy=np.repeat(pending.strategy, samples),
        cell=np.repeat(pending.cell, samples),
        shown=pending.shown,
        dropped_examples=pending.dropped,
        finished=arrived.finished,
    )


def write(
    model: Transformer,
    variables: Any,
    form: PromptFormat,
    task: Task,
    strategy: np.ndarray,
    *,
    purpose: str,
    steps: tuple[int, ...],
    **more: Any,
) -> Written:
    """Samples of a policy, read when they are there; arguments as in `dispatch`."""
    pending = dispatch(model, variables, form, task, strategy, purpose=purpose, steps=steps, **more)
    return read(form, task, arrive(pending), f"{purpose} {steps}")


@dataclasses.dataclass(frozen=True)
class Featurizer:
    """Feature vectors of texts, by `feedback.features`: "ngrams", "hidden" or "encoder".

    Hidden states are the frozen base policy's, averaged over the text, which it reads after an empty
    prompt so that they depend on the text alone. They, and the vectors of a sentence encoder, are projected
    to D dimensions.
    """

    kind: str
    width: int
    seed: int
    model: Transformer
    base: Any
    form: PromptFormat
    encoder: Encoder | None = None

    def __call__(self, texts: Sequence[str], tokens: Array, mask: Array) -> Any:
        """[N, D] float32 unit vectors of N texts, given also as tokens and mask [N, T]."""
        if self.kind in ("ngrams", "encoder"):
            mine = texts[hosts.share(len(texts))]
            return hosts.joined(f"features of {len(texts)} texts", {"features": self._own(mine)})["features"]
        key = purpose_key(self.seed, "projection")
        ids, none = np.array([self.form.neutral()], np.int32), np.zeros(1, np.int32)
        empty = Prompts(ids, np.ones(ids.shape, bool), none, none)  # no longer than it is
        hidden = mean_hidden(self.model, self.base, empty, tokens, mask)
        return project_hidden(hidden, self.width, key)

    def _own(self, texts: Sequence[str]) -> np.ndarray:
        """Of this process's texts alone."""
        if self.kind == "ngrams":
            return ngram_features(texts, self.width, self.seed)
        vectors = self.encoder.encode(texts)
        with hosts.local():
            return np.asarray(project_hidden(vectors, self.width, purpose_key(self.seed, "projection")))


def example_features(form: PromptFormat, featurize: Featurizer, task: Task) -> tuple[np.ndarray, np.ndarray]:
    """The features [M, D] and labels [M] of a task's examples."""
    texts = [example.text for example in task.examples]
    label = np.array([task.labels.index(example.label) for example in task.examples], np.int32)
    tokens, mask = form.pad_completions([form.answer(task.brief, text) for text in texts])
    return arrays.fetch(featurize(texts, tokens, mask)), label


@dataclasses.dataclass(frozen=True)
class Scored:
    """Scores of N samples, the gates each one met, and by scorer and reason how many it failed on."""

    scores: Scores
    gates: gates_lib.Gates
    failed: dict[str, dict[str, int]]

    @property
    def quality(self) -> float:
        """The mean over the samples that were scored; NaN for none."""
        return mean_known(np.where(self.scores.scored, self.scores.quality, np.nan))

    def with_secondary(self, name: str, part: np.ndarray, accept: float) -> Scored:
        """With one more secondary part, [N], of the samples with at least the quality `accept`."""
        s = self.scores
        accepted = s.scored & (np.asarray(s.quality) >= accept)
        secondary = {**s.secondary, name: np.where(accepted, part, np.float32(np.nan))}
        return dataclasses.replace(self, scores=s.replace(secondary=secondary))

    def figures(self, weights: Mapping[str, float]) -> dict[str, float]:
        """For the metrics: the quality, and each part before and after its weight.

        Before it a part is the mean over the samples that it has a value for, after it the sum of what it
        gave to samples that passed, over all.
        """
        s = self.scores
        named = {"reward/quality": self.quality}
        for name, part in {**s.parts, **s.secondary}.items():
            named[f"reward/{name}"] = mean_known(part)
            named[f"reward/{name}_weighted"] = float((s.gate * np.nan_to_num(part)).mean() * weights[name])
        return named | failures([self.failed])


def scores_of(scores: Scores, i: int) -> dict[str, float]:
    """For the row of sample i: its quality, and the parts that it has."""
    parts = {name: float(part[i]) for name, part in {**scores.parts, **scores.secondary}.items()}
    return {
        "quality": float(scores.quality[i]),
        **{name: part for name, part in parts.items() if np.isfinite(part)},
    }


def mean_known(values: Sequence[float] | np.ndarray) -> float:
    """The mean of what is not NaN; NaN for nothing."""
    values = np.asarray(values)
    known = values[np.isfinite(values)]
    return float(known.mean()) if len(known) else float("nan")


def failures(batches: Sequence[Mapping[str, Mapping[str, int]]]) -> dict[str, int]:
    """For the metrics: how many texts each scorer failed on, in all and by reason."""
    counts: Counter[str] = Counter()
    for batch in batches:
        for name, reasons in batch.items():
            counts[f"scorer/{name}/failed"] += sum(reasons.values())
            counts.update({f"scorer/{name}/failed/{reason}": count for reason, count in reasons.items()})
    return dict(counts)


def gated(task: Task, written: Written, seen: Callable[[str], bool], config: Any) -> gates_lib.Gates:
    """What the gates say of N samples, each process of its share; arguments as in `score`."""
    own = hosts.share(len(written.texts))
    gates = gates_lib.check(
        written.texts[own],
        written.finished[own],
        written.rejections[own],
        task=task,
        min_words=config.min_words,
        max_words=config.max_words,
        seen=seen,
    )
    by_name = hosts.joined(f"gates of {task.name}", gates.by_name)
    return gates_lib.Gates(by_name, np.logical_and.reduce(list(by_name.values())))


def score(
    task: Task,
    written: Written,
    reward: Reward,
    featurize: Featurizer,
    seen: Callable[[str], bool],
    config: Any,
    where: Where = (),
) -> Scored:
    """Gates first, then the judges, then features: all functions of the sample and of earlier state alone.

    Args:
      task: what the samples were written for.
      written: N samples.
      reward: the task's judges.
      featurize: texts to vectors.
      seen: whether a text (its `Task.identity`) is a near-duplicate of what was kept before this batch.
      config: the group `feedback`.
      where: (purpose, *steps), the samples' place in the journals of scorers.
    """
    gates = gated(task, written, seen, config)
    judged = reward(
        written.texts,
        written.label,
        written.rollouts.tokens,
        written.rollouts.mask,
        where=where,
        passed=gates.passed,
    )
    gate = gates.passed.astype(np.float32)
    scores = Scores(
        gate=gate,
        quality=gate * judged.quality,
        features=featurize(written.texts, written.rollouts.tokens, written.rollouts.mask),
        parts=judged.parts,
        scored=judged.scored,
        secondary=judged.secondary,
    )
    return Scored(scores, gates, judged.failed)
