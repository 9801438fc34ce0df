"""Whether texts have the attributes asked for: exactly where a value has a test, else as the policy sees it.

A value without a test is judged as labels are: p(value | text) is proportional to the frozen base policy's
probability of the text after a prompt that asks for its label and that value (Bayes, equal priors).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from streamsynth.policy.logprobs import sequence_logprobs
from streamsynth.policy.transformer import Transformer
from streamsynth.pytrees import Array
from streamsynth.runtime import arrays
from streamsynth.stream.patterns import STRATEGIES
from streamsynth.stream.prompts import PromptFormat
from streamsynth.tasks.attributes import Attribute
from streamsynth.tasks.task import Task


def adherence(
    model: Transformer,
    base: Any,
    form: PromptFormat,
    task: Task,
    texts: Sequence[str],
    label: np.ndarray,
    cell: np.ndarray,
    tokens: Array,
    mask: Array,
    *,
    samples: int,
    chunk: int = 1024,
    microbatches: int = 1,
) -> np.ndarray:
    """[N] float32 in [0, 1]: how much of its cell each text has, the mean over the task's attributes.

    Args:
      model, base: the frozen base policy, its network and variables.
      form: of its prompts.
      task: with at least one attribute.
      texts: N texts, the G of a prompt after one another.
      label, cell: [N] int, what each was asked for.
      tokens, mask: [N, T], the texts.
      samples: G.
      chunk: positions whose logits exist at one time on a device.
      microbatches: parts in which the texts are read, one after another.
    """
    cells = task.cells
    found = []
    for place, attribute in enumerate(task.attributes):
        asked = np.array([attribute.values.index(cells[c][place]) for c in cell])
        if all(value.tested for value in attribute.values):
            values = [attribute.values[v] for v in asked]
            found.append([float(value.holds(text)) for value, text in zip(values, texts, strict=True)])
            continue
        given = (label[::samples], tokens, mask, chunk, microbatches)
        read = [
            _loglikelihood(model, base, form, task, attribute, v, *given)
            for v in range(len(attribute.values))
        ]
        table = np.stack(read, axis=1)
        likely = np.exp(table - table.max(axis=1, keepdims=True))
        posterior = likely / likely.sum(axis=1, keepdims=True)
        found.append(posterior[np.arange(len(asked)), asked])
    return np.mean(found, axis=0, dtype=np.float32)


def _loglikelihood(
    model: Transformer,
    base: Any,
    form: PromptFormat,
    task: Task,
    attribute: Attribute,
    value: int,
    label: np.ndarray,
    tokens: Array,
    mask: Array,
    chunk: int,
    microbatches: int,
) -> np.ndarray:
    """log p_base(text | its label and this value), [N] float32, from the labels [B] of the groups."""
    strategy = STRATEGIES.index("label_only")
    wanted = [f"{attribute.name}: {attribute.values[value].name}"]
    rows = [form.prompt(task.brief, strategy, task.labels[k], (), (), wanted)[0] for k in label]
    prompts = form.pad_prompts(rows, label, np.full(len(rows), strategy))
    sizes = dict(chunk=chunk, microbatches=microbatches)
    logprobs = sequence_logprobs(model, base, prompts, tokens, mask, np.float32(1), **sizes)
    return arrays.fetch(logprobs).sum(-1)
