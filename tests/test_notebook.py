"""The notebook, executed from its first cell to its last."""

from __future__ import annotations

import json

import pytest
from runs import ROOT

PATH = ROOT / "notebooks" / "quickstart.ipynb"


def test_the_notebook_is_stored_without_outputs():
    cells = json.loads(PATH.read_text())["cells"]
    code = [cell for cell in cells if cell["cell_type"] == "code"]
    assert len(code) >= 5
    assert all(not cell["outputs"] and cell["execution_count"] is None for cell in code)
    assert "pip install" in "".join(code[0]["source"])
    assert 'find_spec("streamsynth") is None' in "".join(code[0]["source"])


@pytest.mark.slow  # trains the tiny quickstart in a process of its own
def test_the_notebook_runs(tmp_path, monkeypatch):
    nbformat = pytest.importorskip("nbformat")
    nbclient = pytest.importorskip("nbclient")
    monkeypatch.setenv("STREAMSYNTH_WORKDIR", str(tmp_path / "run"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    notebook = nbformat.read(PATH, as_version=4)
    folder = str(PATH.parent)
    nbclient.NotebookClient(notebook, timeout=600, resources={"metadata": {"path": folder}}).execute()
    shown = [output for cell in notebook.cells for output in cell.get("outputs", ())]
    kinds = [kind for output in shown for kind in output.get("data", ())]
    assert kinds.count("image/svg+xml") >= 2
    assert "text/markdown" in kinds
    [table] = [output["data"]["text/html"] for output in shown if "text/html" in output.get("data", ())]
    assert table.count("<tr>") >= 5
    assert (tmp_path / "run" / "report" / "index.html").is_file()
    assert not (PATH.parent / "runs").exists()
