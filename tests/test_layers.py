"""The house: imports point downwards only, files stay readable, and some modules never come in."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "streamsynth"

# Top to bottom. A module may import from its own row and from rows below.
LAYERS = (
    ("main",),
    ("api",),
    ("train", "synthesize", "compile"),
    ("turn",),
    ("tuning", "probe", "step", "programs", "side_programs"),
    ("assemble", "workdir", "weights"),
    ("pretrain",),
    ("evaluation",),
    ("learner",),
    ("stream",),
    ("feedback",),
    ("costs",),
    ("policy",),
    ("dataset",),
    ("tasks",),
    ("runtime",),
    ("validate",),
    ("config", "defaults", "presets"),
    ("pytrees", "errors", "keys"),
)
ROW = {name: row for row, names in enumerate(LAYERS) for name in names}

# Neither a dependency (torch, TensorFlow) nor a format (pickle) that the package may lean on.
BANNED = {"torch", "tensorflow", "transformers", "pickle", "cloudpickle", "dill", "joblib"}


def modules() -> list[Path]:
    return sorted(path for path in PACKAGE.rglob("*.py") if path != PACKAGE / "__init__.py")


def room(path: Path) -> str:
    """The module or folder right under the package that a file belongs to."""
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imported(tree: ast.AST) -> set[tuple[str, ...]]:
    """Dotted names of everything imported, inside functions too; a relative import starts with a dot."""
    names = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {tuple(alias.name.split(".")) for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            module = "." * node.level + (node.module or "")
            names |= {
                (*module.split("."), alias.name) if not node.level else (module,) for alias in node.names
            }
    return names


def misplaced(room_name: str, source: str) -> list[str]:
    """What is wrong with the imports of a file in `room_name`."""
    wrong = []
    for name in sorted(imported(ast.parse(source))):
        if name[0].startswith("."):
            wrong.append(f"relative import of {name[0]}")
        elif name[0] in BANNED:
            wrong.append(f"{name[0]} is banned")
        elif name[0] == "streamsynth" and len(name) > 1:
            if name[1] not in ROW:
                wrong.append(f"streamsynth.{name[1]} is in no layer")
            elif ROW[name[1]] < ROW[room_name]:
                wrong.append(f"{room_name} must not import streamsynth.{name[1]}, which lies above it")
    return wrong


@pytest.mark.parametrize("path", modules(), ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_point_downwards(path):
    assert room(path) in ROW, f"{room(path)} is in no layer: give it a row in LAYERS"
    assert misplaced(room(path), path.read_text(encoding="utf-8")) == []


@pytest.mark.parametrize(
    "source, wrong",
    [
        ("import jax\nfrom streamsynth.errors import UserError", 0),
        ("from streamsynth import errors", 0),
        ("from streamsynth import api", 1),
        ("def f():\n  import streamsynth.learner.update", 1),
        ("from streamsynth.attic import x", 1),
        ("from . import rollout", 1),
        ("from torch.nn import Linear", 1),
        ("import pickle", 1),
    ],
)
def test_the_check_itself(source, wrong):
    assert len(misplaced("policy", source)) == wrong


def test_files_can_be_read_in_one_sitting():
    folders = ("streamsynth", "configs", "tests", "benchmarks")
    sources = [path for folder in folders for path in (ROOT / folder).rglob("*.py")]
    lengths = {str(path.relative_to(ROOT)): path.read_text(encoding="utf-8").count("\n") for path in sources}
    assert {name: lines for name, lines in lengths.items() if lines > 400} == {}
