"""launch/tour.ipynb: it runs, and the outputs that it is stored with are of this project only."""

import json
import os
import re

import nbformat
import pytest
from nbclient import NotebookClient

from tests.commands import ROOT

TOUR = ROOT / "launch" / "tour.ipynb"


def cells(notebook):
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def figures(notebook):
    outputs = [output for cell in cells(notebook) for output in cell.outputs]
    return [output for output in outputs if "image/png" in output.get("data", {})]


def test_the_stored_notebook_is_valid_and_was_run_from_top_to_bottom():
    notebook = nbformat.read(TOUR, as_version=4)
    nbformat.validate(notebook)
    assert [cell.execution_count for cell in cells(notebook)] == [
        *range(1, len(cells(notebook)) + 1)
    ]
    assert len(figures(notebook)) == 6
    outputs = [output for cell in cells(notebook) for output in cell.outputs]
    assert not [output for output in outputs if output.output_type == "error"]
    assert not [output for output in outputs if output.get("name") == "stderr"]


def test_the_stored_notebook_names_no_path_of_a_machine():
    text = "".join(
        json.dumps({key: value for key, value in output.items() if key != "data"})
        for cell in cells(nbformat.read(TOUR, as_version=4))
        for output in cell.outputs
    )
    assert "step 1800/1800" in text  # the texts of its outputs
    assert not re.search(r"/(home|root|tmp|work|Users)/", text)


@pytest.mark.slow
def test_the_notebook_runs(tmp_path, monkeypatch):
    monkeypatch.setenv("TOUR_STEPS", "40")
    monkeypatch.setenv("TOUR_WORKDIR", str(tmp_path / "run"))
    monkeypatch.setenv("JAX_PLATFORMS", os.environ.get("JAX_PLATFORMS", "cpu"))
    notebook = nbformat.read(TOUR, as_version=4)
    for cell in cells(notebook):
        cell.outputs = []
    folder = {"metadata": {"path": str(TOUR.parent)}}  # started as from launch/
    NotebookClient(notebook, timeout=600, kernel_name="python3", resources=folder).execute()
    assert len(figures(notebook)) == 6
    assert (tmp_path / "run" / "checkpoints" / "40").is_dir()
