"""Verifiers of the user's own: `verifier=package.module:function` in the spec of a task from files."""

from __future__ import annotations

import dataclasses
import importlib
from collections.abc import Callable

import numpy as np

from streamsynth.errors import UserError
from streamsynth.tasks.question_answer import fields_of
from streamsynth.tasks.task import Task


def with_verifier(task: Task, spec: str) -> Task:
    """The task with the verifier that a spec names.

    Args:
      task: of kind "qa", whose function gets (question, answer), the answer as data sets hold it; or a
        classification task, whose function gets (text, label).
      spec: "package.module:function", where Python finds it.

    Raises:
      UserError: nothing can be imported under that name. The task's verifier raises it, too, where the
        function fails or says neither True nor False.
    """
    function = _function(spec)

    def verifier(text: str, label: str) -> bool:
        arguments = fields_of(task, text) if task.kind == "qa" else (text, label)
        if arguments is None:  # not the form of a question and its answer
            return False
        try:
            verdict = function(*arguments)
        except Exception as error:
            raise UserError(
                f"the verifier {spec} of the task {task.name} failed on {arguments!r} "
                f"({type(error).__name__}: {error}): mend it, so that it says False of what is not valid"
            ) from error
        if not isinstance(verdict, (bool, np.bool_)):
            raise UserError(
                f"the verifier {spec} of the task {task.name} said {verdict!r} of {arguments!r}: let it "
                "return True or False"
            )
        return bool(verdict)

    return dataclasses.replace(task, verifier=verifier)


def _function(spec: str) -> Callable[..., bool]:
    module_name, _, name = spec.partition(":")
    if not all(part.isidentifier() for part in (*module_name.split("."), name)):
        raise UserError(f"the option verifier={spec} must have the form package.module:function")
    try:
        module = importlib.import_module(module_name)
    except Exception as error:  # whatever the module does when it is imported
        raise UserError(
            f"the option verifier={spec}: cannot import {module_name} ({type(error).__name__}: {error}): "
            "check the name, and that its folder is on PYTHONPATH"
        ) from error
    function = getattr(module, name, None)
    if not callable(function):
        raise UserError(f"the option verifier={spec}: {module_name} has no function {name!r}")
    return function
