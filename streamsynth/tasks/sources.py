"""Where tasks come from: `load("kind:NAME?key=value&key=value", ...)` and the table of kinds."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

from streamsynth.errors import UserError
from streamsynth.tasks import splits
from streamsynth.tasks.task import Task

if TYPE_CHECKING:
    from streamsynth.tasks.worlds import Difficulty

ON_BAD_ROW = ("error", "skip")


@dataclasses.dataclass(frozen=True)
class Request:
    """What is asked of a source.

    Attributes:
      location: the part of the spec between the kind and the options, such as a folder.
      options: the spec's options as text, only keys that the source knows.
      examples_per_label: size k of the label budget per label.
      seed: draws the examples (and, in worlds, all texts).
      on_bad_row: "error" or "skip".
      difficulty: of embedded worlds; None takes theirs.
    """

    location: str
    options: Mapping[str, str]
    examples_per_label: int
    seed: int
    on_bad_row: str
    difficulty: Difficulty | None


@dataclasses.dataclass(frozen=True)
class Source:
    """A kind of source: its reader, the options it knows, and the form of its specs for messages."""

    load: Callable[[Request], Task]
    options: tuple[str, ...]
    form: str


# The readers import what they need when they are called: a stream of embedded worlds never pays for TFDS.
def _worlds(request: Request) -> Task:
    from streamsynth.tasks import worlds

    attributes = request.options.get("attributes")
    if attributes not in (None, "length"):
        raise UserError(f"the option attributes={attributes} of a world must be length")
    return worlds.load_task(
        request.location,
        attributes=attributes is not None,
        examples_per_label=request.examples_per_label,
        seed=request.seed,
        difficulty=request.difficulty or worlds.Difficulty(),
    )


def _files(request: Request) -> Task:
    from streamsynth.tasks import files

    return files.load_task(
        request.location,
        **_common_options(request),
        verifier=request.options.get("verifier"),
        examples_per_label=request.examples_per_label,
        seed=request.seed,
        on_bad_row=request.on_bad_row,
    )


def _tfds(request: Request) -> Task:
    from streamsynth.tasks import tfds_source

    keys = ("text", "label", "question", "answer", "data_dir")
    named = {key: request.options[key] for key in keys if key in request.options}
    return tfds_source.load_task(
        request.location,
        **named,
        **_common_options(request),
        examples_per_label=request.examples_per_label,
        seed=request.seed,
        on_bad_row=request.on_bad_row,
    )


SOURCES: dict[str, Source] = {
    "worlds": Source(_worlds, ("attributes",), "worlds:NAME"),
    "files": Source(_files, ("name", "commonest", "test", "verifier"), "files:DIR"),
    "tfds": Source(
        _tfds,
        ("name", "commonest", "test", "text", "label", "question", "answer", "data_dir"),
        "tfds:NAME",
    ),
}


def load(
    spec: str,
    *,
    examples_per_label: int,
    seed: int,
    train_limit: int | None = None,
    test_limit: int | None = None,
    on_bad_row: str = "error",
    difficulty: Difficulty | None = None,
) -> Task:
    """Loads the task that a spec names.

    Args:
      spec: "worlds:NAME", "files:DIR" or "tfds:NAME[/CONFIG]", with options after "?". Options of files and
        tfds: `name` renames the task, `commonest=10` keeps the ten commonest labels, `test=validation`
        measures on the validation split (for choosing settings, so that the test set stays unseen). Of files
        besides: `verifier=package.module:function`, a test of the user's own for what is valid. Of tfds
        besides: `text` (one feature, or two with a comma), `label`, or `question` and `answer`; `data_dir`.
        Of worlds: `attributes=length`, which asks for short and for long texts alike.
      examples_per_label: k, the label budget per label.
      seed: the same spec and seed give the same task, in every process.
      train_limit: at most so many training rows; the examples stay among them.
      test_limit: at most so many test rows.
      on_bad_row: "error" stops at the first malformed row, "skip" leaves them out and counts them.
      difficulty: how hard an embedded world is; None takes the default. Other kinds have none.

    Raises:
      UserError: for anything in the spec, the arguments or the data that the user can mend.
    """
    if on_bad_row not in ON_BAD_ROW:
        raise UserError(f"on_bad_row must be one of {', '.join(ON_BAD_ROW)}, not {on_bad_row!r}")
    if examples_per_label < 1:
        raise UserError(f"examples_per_label must be at least 1, not {examples_per_label}")
    if seed < 0:
        raise UserError(f"seed must be 0 or more, not {seed}")
    kind, location, options = parse_spec(spec)
    task = SOURCES[kind].load(Request(location, options, examples_per_label, seed, on_bad_row, difficulty))
    train, test = task.train, task.test
    if train_limit is not None:
        if train_limit < len(task.examples):
            raise UserError(
                f"train_limit={train_limit} is fewer than the {len(task.examples)} examples of {task.name}: "
                "raise it, or lower examples_per_label"
            )
        train = splits.limit(train, train_limit, seed, always=task.examples)
    if test_limit is not None:
        if test_limit < 1:
            raise UserError(f"test_limit must be at least 1, not {test_limit}")
        test = splits.limit(test, test_limit, seed)
    return dataclasses.replace(task, train=train, test=test)


def parse_spec(spec: str) -> tuple[str, str, dict[str, str]]:
    """Splits "kind:location?key=value&key=value" into its parts and checks kind and keys.

    >>> parse_spec("files:my/folder?commonest=10&name=bank")
    ('files', 'my/folder', {'commonest': '10', 'name': 'bank'})
    """
    kind, colon, rest = spec.partition(":")
    if not colon or kind not in SOURCES:
        forms = ", ".join(source.form for source in SOURCES.values())
        raise UserError(f"the task {spec!r} has no known source: write one of {forms}")
    location, _, query = rest.partition("?")
    if not location:
        raise UserError(f"the task {spec!r} names nothing after the colon: write {SOURCES[kind].form}")
    known = SOURCES[kind].options
    options: dict[str, str] = {}
    for item in query.split("&") if query else ():
        key, equals, value = item.partition("=")
        if key not in known:
            takes = f"known are {', '.join(known)}" if known else f"{kind} takes none"
            raise UserError(f"the task {spec!r} has the unknown option {key!r}: {takes}")
        if not equals or not value:
            raise UserError(f"the option {key!r} of the task {spec!r} needs a value: write {key}=VALUE")
        if key in options:
            raise UserError(f"the task {spec!r} has the option {key!r} twice: keep one")
        options[key] = value
    return kind, location, options


def _common_options(request: Request) -> dict[str, str | int | None]:
    """The options that files and tfds share, with their types."""
    commonest = request.options.get("commonest")
    if commonest is not None and not (commonest.isascii() and commonest.isdigit() and int(commonest) >= 2):
        raise UserError(f"the option commonest={commonest} must be a whole number of labels, 2 or more")
    return {
        "name": request.options.get("name"),
        "commonest": None if commonest is None else int(commonest),
        "test": request.options.get("test", "test"),
    }
