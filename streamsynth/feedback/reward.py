"""The quality of samples: a task's judges, each weighed by its config weight and by what it proved worth."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Protocol

import numpy as np
from absl import logging

from streamsynth.errors import UserError
from streamsynth.feedback import judge as judge_lib
from streamsynth.feedback import prototypes
from streamsynth.feedback.encoder import Encoder
from streamsynth.feedback.scorers.records import Where
from streamsynth.feedback.scorers.scorer import Scorer, TaskScorer
from streamsynth.policy.transformer import Transformer
from streamsynth.pytrees import Array, Prompts
from streamsynth.runtime import arrays, hosts
from streamsynth.tasks.question_answer import wrongly_answered
from streamsynth.tasks.task import Example, Task


@dataclasses.dataclass(frozen=True)
class JudgeContext:
    """What judges are made from.

    task: with its examples.   model, base: the frozen base policy, its network and variables.
    prompts: K prompts, one a label, each showing that label's `shown` examples.
    held_back: examples that no prompt of the judge shows.
    encode: texts to tokens [N, T] and mask [N, T].
    chunk: positions whose logits exist at one time.
    shown: the examples that the prompts show; a judge that is fitted is fitted on these.
    encoder: of sentences, where a judge asks for one.
    """

    task: Task
    model: Transformer
    base: Any
    prompts: Prompts
    held_back: tuple[Example, ...]
    encode: Any
    chunk: int = 1024
    shown: tuple[Example, ...] = ()
    encoder: Encoder | None = None


class Judge(Protocol):
    """[N] float32 in [0, 1] from texts, the labels asked for [N], and the texts' tokens and mask [N, T].

    One that works on the host may answer for this process's share of the texts alone (`_shared`).
    """

    def __call__(self, texts: Sequence[str], label: np.ndarray, tokens: Array, mask: Array) -> np.ndarray: ...


def _shared(judge: Callable[[Sequence[str], np.ndarray], np.ndarray]) -> Judge:
    """A judge that reads texts on the host: each process those of its share, the others are NaN."""

    def on_share(texts: Sequence[str], label: np.ndarray, tokens: Array, mask: Array) -> np.ndarray:
        del tokens, mask
        own, verdicts = hosts.share(len(texts)), np.full(len(texts), np.nan, np.float32)
        verdicts[own] = judge(texts[own], label[own])
        return verdicts

    return on_share


def _verifier(context: JudgeContext) -> Judge | None:
    """The verifier of a world, or the user's own; None for a task without one."""
    if context.task.verifier is None:
        return None
    return _shared(lambda texts, label: judge_lib.verifier(context.task, texts, label))


def _posterior(context: JudgeContext) -> Judge:
    """The base policy's label posterior times the text's fluency, calibrated on the held-back examples."""
    c = context

    def loglikelihood(tokens: Array, mask: Array) -> Array:
        return judge_lib.label_loglikelihood(c.model, c.base, c.prompts, tokens, mask, chunk=c.chunk)

    label = np.array([c.task.labels.index(example.label) for example in c.held_back], np.int32)
    tokens, mask = c.encode([example.text for example in c.held_back])
    own = np.take_along_axis(arrays.fetch(loglikelihood(tokens, mask)), label[:, None], axis=1)[:, 0]
    per_token = own / mask.sum(-1)
    centre, scale = np.float32(per_token.mean()), np.float32(max(per_token.std(), 0.1))

    def judge(texts: Sequence[str], label: np.ndarray, tokens: Array, mask: Array) -> np.ndarray:
        return arrays.fetch(judge_lib.verdict(loglikelihood(tokens, mask), label, mask, centre, scale))

    return judge


def _encoder(context: JudgeContext) -> Judge:
    """p(label | text) by sentence vectors: how near the text is to the label's examples, and not to others'.

    It is blind to what lies far from all labels, and to how a text reads; gates and other judges are not.
    """
    labels, encoder = context.task.labels, context.encoder
    shown = np.array([labels.index(example.label) for example in context.shown])
    fitted = prototypes.fit(encoder.encode([e.text for e in context.shown]), shown, len(labels))

    return _shared(lambda texts, label: fitted.posterior(encoder.encode(texts))[np.arange(len(texts)), label])


# Secondary parts that are no scorers: adherence to the attributes asked for, and worth to a student.
ATTRIBUTE, UTILITY = "attribute", "utility"
JUDGES = {"verifier": _verifier, "posterior": _posterior, "encoder": _encoder}


@dataclasses.dataclass(frozen=True)
class Judgement:
    """What the judges say of N samples.

    parts: each judge's verdict before its weight, [N] float32 in [0, 1]; NaN where not asked or failed.
    secondary: the same of the secondary parts, NaN also where the sample was not accepted.
    quality: [N] float32 in [0, 1], the weighted mean of the parts; 0 where one is missing.
    scored: [N] bool, no judge with a weight failed on the sample.
    failed: for each scorer that was asked, samples it failed on, by reason.
    """

    parts: dict[str, np.ndarray]
    secondary: dict[str, np.ndarray]
    quality: np.ndarray
    scored: np.ndarray
    failed: dict[str, dict[str, int]]


@dataclasses.dataclass(frozen=True)
class Reward:
    """The judges of one task.

    judges: name -> (judge, AUC on held-back examples, weight).
    secondary: name -> (judge, weight), asked about accepted samples alone.
    accept: the quality from which a sample is accepted.
    """

    judges: dict[str, tuple[Judge | TaskScorer, float, float]]
    secondary: dict[str, tuple[Judge | TaskScorer, float]] = dataclasses.field(default_factory=dict)
    accept: float = 0.5

    def __call__(
        self,
        texts: Sequence[str],
        label: np.ndarray,
        tokens: Array,
        mask: Array,
        *,
        where: Where = (),
        passed: np.ndarray | None = None,
    ) -> Judgement:
        """Judges N samples.

        Without any judge that can be trusted the quality is 1: what passes the gates is all alike. A scorer
        costs time or money: it is not asked where it has no weight, nor about a sample that is lost already.
        Each process asks for its share of the samples.

        Args:
          texts, label, tokens, mask: N samples, the labels asked for [N], and tokens and mask [N, T].
          where: (purpose, *steps), which names the samples in the journals of scorers; () journals nothing.
          passed: [N] bool, the samples that passed the gates; all by default.
        """
        passed = np.ones(len(texts), bool) if passed is None else passed
        own = hosts.share(len(texts))
        scored = np.ones(len(texts), bool)
        found, secondary, failed = {}, {}, {}
        weighed = np.zeros(len(texts), np.float32)
        total = sum(weight for _, _, weight in self.judges.values())

        def ask(name: str, judge: Judge | TaskScorer, asked: np.ndarray) -> np.ndarray:
            if not isinstance(judge, TaskScorer):
                return judge(texts, label, tokens, mask)
            values, failed[name] = judge(texts, label, where, asked & _only(own, len(texts)))
            return values

        # Who answers without the device comes first: it may still be writing the next batch.
        for name in sorted(self.judges, key=lambda name: not isinstance(self.judges[name][0], TaskScorer)):
            judge, _, weight = self.judges[name]
            if isinstance(judge, TaskScorer) and not weight:
                continue
            asked = passed & scored
            found[name] = ask(name, judge, asked)
            scored &= np.isfinite(found[name]) | ~asked
        parts = {name: found[name] for name in self.judges if name in found}
        for name, part in parts.items():
            weighed += self.judges[name][2] * np.nan_to_num(part)
        quality = np.where(scored, weighed / total, 0.0) if total else np.ones(len(texts))
        accepted = passed & scored & (quality >= self.accept)
        for name, (judge, _) in self.secondary.items():
            secondary[name] = np.where(accepted, ask(name, judge, accepted), np.float32(np.nan))
        return _judgement(own, parts, secondary, quality.astype(np.float32), scored, failed)

    def weights(self) -> dict[str, float]:
        """By judge and secondary part."""
        return {
            **{name: weight for name, (_, _, weight) in self.judges.items()},
            **{name: weight for name, (_, weight) in self.secondary.items()},
        }

    def summary(self) -> dict[str, dict[str, float | None]]:
        """For the report: AUC and weight of each judge; a secondary part has no AUC, it is not measured."""
        return {
            **{name: {"auc": area, "weight": weight} for name, (_, area, weight) in self.judges.items()},
            **{name: {"auc": None, "weight": weight} for name, (_, weight) in self.secondary.items()},
        }


def _judgement(
    own: slice,
    parts: dict[str, np.ndarray],
    secondary: dict[str, np.ndarray],
    quality: np.ndarray,
    scored: np.ndarray,
    failed: dict[str, dict[str, int]],
) -> Judgement:
    """What all processes found, from what this one did of its `own` samples."""
    found = hosts.joined(
        f"judgement of {len(scored)} samples",
        {
            "quality": quality[own],
            "scored": scored[own],
            **{f"part {name}": part[own] for name, part in parts.items()},
            **{f"secondary {name}": part[own] for name, part in secondary.items()},
            "failed": [failed],
        },
    )
    counts = {name: sum((Counter(one[name]) for one in found["failed"]), Counter()) for name in failed}
    return Judgement(
        parts={name: found[f"part {name}"] for name in parts},
        secondary={name: found[f"secondary {name}"] for name in secondary},
        quality=found["quality"],
        scored=found["scored"],
        failed={name: dict(sorted(reasons.items())) for name, reasons in counts.items()},
    )


def _only(own: slice, size: int) -> np.ndarray:
    """[size] bool, true in the slice."""
    mine = np.zeros(size, bool)
    mine[own] = True
    return mine


def check_judges(weights: dict[str, float], scorers: Iterable[str] = ()) -> None:
    """Raises UserError for a judge that does not exist, or a negative weight."""
    known = (*JUDGES, *scorers)
    for name, weight in weights.items():
        if name not in known:
            raise UserError(f"feedback.judges.{name} is not a judge: choose among {', '.join(known)}.")
        if weight < 0:
            raise UserError(f"feedback.judges.{name} = {weight} is negative: give 0 or more.")


def make_reward(
    context: JudgeContext,
    weights: dict[str, float],
    scorers: Mapping[str, Scorer] | None = None,
    secondary: Mapping[str, float] | None = None,
    accept: float = 0.5,
) -> Reward:
    """Makes the judges that have a weight, and measures each before it is trusted.

    A judge's AUC at telling held-back texts of a label from texts of the others (see `measure`) scales its
    weight by 2 AUC - 1; at chance it is 0, with a warning.

    Args:
      context: of the task.
      weights: by judge, from the config; 0 leaves a judge out.
      scorers: by name, those that `weights` and `secondary` name.
      secondary: weights of scorers that are not measured, from the config; 0 leaves one out.
      accept: the quality from which a sample is accepted.

    Raises:
      UserError: for an unknown judge or a negative weight, or where no example is held back.
    """
    scorers = scorers or {}
    check_judges(weights, scorers)
    judges = {}
    for name, weight in weights.items():
        if not weight:
            continue
        judge = TaskScorer(scorers[name], context.task) if name in scorers else JUDGES[name](context)
        if judge is None:
            continue
        if not context.held_back:
            raise UserError(
                f"{context.task.name} has no example left to measure the judge {name} by: set "
                "stream.examples_per_label to 2 or more."
            )
        area = measure(context, judge)
        trusted = weight * judge_lib.trust(area)
        if trusted == 0:
            logging.warning(
                "%s: judge %s is at chance on held-back examples (AUC %.2f); its weight is 0.",
                context.task.name, name, area,
            )  # fmt: skip
        judges[name] = (judge, area, trusted)
    parts = {
        name: (TaskScorer(scorers[name], context.task), weight)
        for name, weight in (secondary or {}).items()
        if weight and name in scorers
    }
    return Reward(judges, parts, accept)


def measure(context: JudgeContext, judge: Judge | TaskScorer) -> float:
    """The judge's AUC: held-back examples under their own label against the same texts under the others.

    Questions have one label only: there, each held-back question with its answer is ranked against each with
    the answer of another one. A judge that knows what reads well, but not what is right, is at chance. So is
    a scorer that fails on all of them; texts that it fails on are left out.
    """
    task = context.task

    def verdicts(texts: Sequence[str], label: np.ndarray, asked_for: int) -> np.ndarray:
        own = hosts.share(len(texts))
        if isinstance(judge, TaskScorer):
            where = (f"measure/{task.name}", asked_for)
            found = judge(texts, label, where, _only(own, len(texts)))[0]
        else:
            found = judge(texts, label, *context.encode(texts))
        return hosts.joined(f"verdicts for {task.name}", {"found": found[own]})["found"]

    if task.kind == "qa":
        right = [example.text for example in context.held_back]
        texts = [*right, *wrongly_answered(context.held_back)]
        found = verdicts(texts, np.zeros(len(texts), np.int32), 0)
        own = np.arange(len(texts)) < len(right)
    else:
        texts = [example.text for example in context.held_back]
        truth = np.array([task.labels.index(example.label) for example in context.held_back])
        labels = range(len(task.labels))
        found = np.stack([verdicts(texts, np.full(len(texts), k, np.int32), k) for k in labels], axis=1)
        own = np.arange(len(task.labels))[None, :] == truth[:, None]
    known = np.isfinite(found)
    return judge_lib.auc(found[own & known], found[~own & known])
