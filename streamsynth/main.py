"""The command `streamsynth`.

    streamsynth train --config=FILE[:arg,key=value] --workdir=DIR [--config.some.key=value ...]
    streamsynth synthesize --workdir=DIR --task=TASK --rows=1000 --output=DIR
    streamsynth evaluate --workdir=DIR
    streamsynth report --workdir=DIR
    streamsynth export --workdir=DIR --output=DIR [--adapter]
    streamsynth compile --config=FILE[:arg,key=value] --topology=v5e:16x16 [--json] [--only=PROGRAM,...]

On several hosts the same command starts on each of them, with `--distributed` where JAX detects who they are
(Cloud TPU, Slurm, Open MPI), or with `--coordinator=HOST:PORT --processes=N --process_id=I`.

What the user can mend ends with exit code 2 and one sentence on standard error. A run that SIGTERM stopped
has saved and ends with exit code 75: the same command continues it.
"""

from __future__ import annotations

import argparse
import contextlib
import sys
from collections.abc import Sequence

from streamsynth.errors import Stopped, UserError


class _Parser(argparse.ArgumentParser):
    """Says a mistake in one sentence, as every other mistake is said, instead of exiting itself."""

    def error(self, message: str):
        raise UserError(f"{message}; see {self.prog} --help.")


def main(argv: Sequence[str]) -> int:
    """Carries out one command line (without the program's name) and returns its exit code."""
    try:
        argv, overrides = _split_overrides(argv)
        arguments = vars(_parser().parse_args(argv))
        verb = arguments.pop("verb")
        if overrides and verb not in ("train", "compile"):
            raise UserError(
                f"--config.{next(iter(overrides))}: {verb} takes no config; it uses the workdir's."
            )
        with _processes(arguments):
            _VERBS[verb](arguments, overrides)
    except Stopped as stopped:
        from streamsynth.runtime import hosts

        print(f"streamsynth: {stopped}", file=sys.stderr)
        return hosts.STOPPED
    except UserError as error:
        print(f"streamsynth: error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(
            "streamsynth: interrupted; the same command continues from the last checkpoint.", file=sys.stderr
        )
        return 130
    return 0


def run() -> None:
    """The entry point of the command."""
    sys.exit(main(sys.argv[1:]))


def _processes(arguments: dict) -> contextlib.AbstractContextManager:
    """Takes the flags that name the processes of a run out of the arguments; within it they are joined."""
    detected = arguments.pop("distributed", False)
    names = ("coordinator", "processes", "process_id")
    flags = {name: arguments.pop(name, None) for name in names}
    missing = [name for name in names if flags[name] is None]
    if not detected and len(missing) == len(names):
        return contextlib.nullcontext()
    if not detected and missing:
        raise UserError(
            f"--{missing[0]} is not given: name the processes by --coordinator, --processes and "
            "--process_id, or by --distributed alone."
        )
    if detected and len(missing) < len(names):
        raise UserError("--distributed detects the processes: leave it out, or --coordinator and the others.")
    from streamsynth.runtime import hosts

    return hosts.together(**flags)


# What the verbs do is imported where it is done, so that --help and a typing mistake need no JAX.


def _train(arguments: dict, overrides: dict[str, str]) -> None:
    from streamsynth import config

    resolved = config.load(arguments["config"], overrides)  # before JAX is imported: mistakes come at once

    from streamsynth import api
    from streamsynth.runtime import hosts

    with hosts.stop_on_sigterm():
        api.train(resolved, arguments["workdir"], init_from=arguments["init_from"])


def _synthesize(arguments: dict, overrides: dict[str, str]) -> None:
    from streamsynth import api

    del overrides
    workdir = arguments.pop("workdir")
    api.synthesize(workdir, **arguments)


def _evaluate(arguments: dict, overrides: dict[str, str]) -> None:
    from streamsynth import api

    del overrides
    api.evaluate(arguments["workdir"])


def _report(arguments: dict, overrides: dict[str, str]) -> None:
    from streamsynth import api

    del overrides
    api.report(arguments["workdir"])


def _export(arguments: dict, overrides: dict[str, str]) -> None:
    from streamsynth import api

    del overrides
    api.export(**arguments)


def _compile(arguments: dict, overrides: dict[str, str]) -> None:
    import json
    import os

    from streamsynth import config

    flag = arguments["config"]
    resolved = config.load(flag, overrides)
    # Before JAX is imported. No device is used, be there one or not, nor asked for what slice it belongs to.
    os.environ.update(JAX_PLATFORMS="cpu", TPU_SKIP_MDS_QUERY="1", ALLOW_MULTIPLE_LIBTPU_LOAD="1")
    os.environ["JAX_SKIP_CUDA_CONSTRAINTS_CHECK"] = "1"  # compiling takes none of CUDA's libraries

    from streamsynth.compile import compile_run
    from streamsynth.costs import report

    only = tuple(filter(None, arguments["only"].split(",")))
    found = compile_run(resolved, arguments["topology"], flag, only)
    print(json.dumps(found, indent=1) if arguments["json"] else report.text(found))


_VERBS = {
    "train": _train,
    "synthesize": _synthesize,
    "evaluate": _evaluate,
    "report": _report,
    "export": _export,
    "compile": _compile,
}


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="streamsynth",
        allow_abbrev=False,
        description="Trains a language model over a stream of tasks to write synthetic training data.",
    )
    verbs = parser.add_subparsers(dest="verb", required=True, metavar="{" + ",".join(_VERBS) + "}")

    def add(verb: str, description: str, workdir: bool = True) -> argparse.ArgumentParser:
        sub = verbs.add_parser(verb, help=description, description=description, allow_abbrev=False)
        if workdir:
            sub.add_argument("--workdir", required=True, metavar="DIR", help="the folder of the run")
        return sub

    def add_processes(sub: argparse.ArgumentParser) -> None:
        several = sub.add_argument_group("on several hosts", "start the same command on each of them")
        several.add_argument(
            "--distributed", action="store_true", help="on a Cloud TPU slice, or under Slurm or Open MPI"
        )
        several.add_argument(
            "--coordinator", metavar="HOST:PORT", help="elsewhere: of process 0, a free port"
        )
        several.add_argument("--processes", type=_positive, metavar="N", help="how many there are")
        several.add_argument("--process_id", type=_natural, metavar="I", help="which one this is, from 0")

    def add_config(sub: argparse.ArgumentParser) -> None:
        sub.add_argument(
            "--config",
            required=True,
            metavar="FILE[:ARG]",
            help="a Python file with get_config(arg), and its argument, such as tiny,seed=3; any key of it "
            "is overridden with --config.some.key=value",
        )

    train = add("train", "Trains over the stream of a config; on a workdir that has a run, continues it.")
    add_config(train)
    train.add_argument(
        "--init_from", metavar="DIR", help="a finished run whose experience a new stream starts with"
    )
    add_processes(train)
    synthesize = add("synthesize", "Writes a data set for a task with a trained policy.")
    synthesize.add_argument("--task", required=True, help="a task of the run, or a spec such as files:DIR")
    synthesize.add_argument("--rows", required=True, type=_positive, help="how many rows to write")
    synthesize.add_argument(
        "--output", required=True, metavar="DIR", help="the folder for train.jsonl and its card"
    )
    add_processes(synthesize)
    add_processes(add("evaluate", "Evaluates the policy of a run on every task of its stream."))
    add("report", "Writes the report of a run anew.")
    export = add("export", "Writes the trained policy as a Hugging Face folder.")
    export.add_argument("--output", required=True, metavar="DIR", help="the folder for model and tokenizer")
    export.add_argument(
        "--adapter", action="store_true", help="write the LoRA adapter alone, as PEFT keeps it"
    )
    described = "Compiles the programs of a config for TPUs or GPUs, without any, and says whether they fit."
    compiled = add("compile", described, workdir=False)
    add_config(compiled)
    compiled.add_argument("--topology", required=True, metavar="SLICE", help="such as v5e:16x16, or h100:8")
    compiled.add_argument("--json", action="store_true", help="print the report as JSON")
    compiled.add_argument(
        "--only", default="", metavar="PROGRAM,...", help="of the run's programs, these alone"
    )
    return parser


def _natural(text: str) -> int:
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number, 0 or more")
    return int(text)


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) == 0:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number above 0")
    return int(text)


def _split_overrides(argv: Sequence[str]) -> tuple[list[str], dict[str, str]]:
    """Takes `--config.key=value` and `--config.key value` out of a command line."""
    rest, overrides = [], {}
    words = iter(argv)
    for word in words:
        if not word.startswith("--config."):
            rest.append(word)
            continue
        key, equals, value = word.removeprefix("--config.").partition("=")
        if not equals:
            value = next(words, None)
            if value is None or value.startswith("--"):
                raise UserError(f"--config.{key} needs a value: --config.{key}=VALUE.")
        if key in overrides:
            raise UserError(f"--config.{key} is given twice; leave one out.")
        overrides[key] = value
    return rest, overrides


if __name__ == "__main__":
    run()
