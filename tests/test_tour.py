"""launch/tour.ipynb: it runs, and its stored outputs and its calls fit this repository."""

import ast
import inspect
import os
import re

import nbformat
import pytest
from nbclient import NotebookClient

import sit_jax
from sit_jax.api import Run
from tests.commands import ROOT

TOUR = ROOT / "launch" / "tour.ipynb"
FIGURES = 6


@pytest.fixture
def notebook():
    return nbformat.read(TOUR, as_version=4)


def code_cells(notebook):
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def outputs(notebook):
    return [output for cell in code_cells(notebook) for output in cell.outputs]


def figures(notebook):
    return [output for output in outputs(notebook) if "image/png" in output.get("data", {})]


def texts(notebook):
    """Return everything that the outputs say in words."""
    for output in outputs(notebook):
        yield output.get("text", "")
        yield output.get("data", {}).get("text/plain", "")


def calls(notebook):
    """Return (object, method, keywords) of each call of sit_jax or run, in Markdown too."""
    sources = [cell.source for cell in code_cells(notebook)]
    for cell in notebook.cells:
        if cell.cell_type == "markdown":
            sources += re.findall(r"```python\n(.*?)```", cell.source, re.DOTALL)
    for source in sources:
        for node in ast.walk(ast.parse(source)):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
                owner = node.func.value
                if isinstance(owner, ast.Name) and owner.id in ("sit_jax", "run"):
                    keywords = [keyword.arg for keyword in node.keywords if keyword.arg]
                    yield owner.id, node.func.attr, keywords


def test_the_stored_notebook_is_valid_and_was_run_from_top_to_bottom(notebook):
    nbformat.validate(notebook)
    assert (notebook.nbformat, notebook.nbformat_minor) == (4, 5)  # 4.5 has the ids of cells
    assert notebook.metadata.kernelspec.name == "python3"
    cells = code_cells(notebook)
    assert [cell.execution_count for cell in cells] == [*range(1, len(cells) + 1)]
    assert all(cell.outputs for cell in cells[1:])  # the first one only imports
    assert len(figures(notebook)) == FIGURES
    assert not [output for output in outputs(notebook) if output.output_type == "error"]
    assert not [output for output in outputs(notebook) if output.get("name") == "stderr"]
    assert "step 1800/1800" in "".join(texts(notebook))  # of the config's own length
    assert TOUR.stat().st_size < 600_000


def test_the_stored_notebook_names_no_path_of_a_machine(notebook):
    words = "\n".join([*texts(notebook), *(cell.source for cell in notebook.cells)])
    assert not re.search(r"/(home|root|tmp|work|Users)/", words)


def test_the_notebook_calls_what_exists(notebook):
    named_calls = list(calls(notebook))
    assert {("sit_jax", "load"), ("run", "sample"), ("run", "log_prob")} <= {
        (owner, method) for owner, method, _ in named_calls
    }
    owners = {"sit_jax": sit_jax, "run": Run}
    for owner, method, keywords in named_calls:
        assert callable(getattr(owners[owner], method, None)), f"{owner}.{method}"
        parameters = inspect.signature(getattr(owners[owner], method)).parameters
        takes_options = any(p.kind is p.VAR_KEYWORD for p in parameters.values())
        unknown = [name for name in keywords if name not in parameters]
        assert takes_options or not unknown, f"{owner}.{method} takes no {unknown}"


@pytest.mark.slow
@pytest.mark.parametrize("folder", [ROOT, TOUR.parent], ids=["root", "launch"])
def test_the_notebook_runs(notebook, folder, tmp_path, monkeypatch):
    monkeypatch.setenv("TOUR_STEPS", "40")
    monkeypatch.setenv("TOUR_WORKDIR", str(tmp_path / "run"))
    monkeypatch.setenv("JAX_PLATFORMS", os.environ.get("JAX_PLATFORMS", "cpu"))
    for cell in code_cells(notebook):
        cell.outputs, cell.execution_count = [], None
    resources = {"metadata": {"path": str(folder)}}
    NotebookClient(notebook, timeout=600, kernel_name="python3", resources=resources).execute()
    assert all(cell.execution_count for cell in code_cells(notebook))
    assert not [output for output in outputs(notebook) if output.output_type == "error"]
    assert len(figures(notebook)) == FIGURES
    assert (tmp_path / "run" / "checkpoints" / "40").is_dir()
