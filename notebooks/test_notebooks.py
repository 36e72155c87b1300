"""Every notebook runs from top to bottom, is its .py twin word for word, and holds the pictures that running it makes.

    make test-notebooks
"""
import os

import jupytext
import nbformat
import pytest
from build import HERE, run

TWINS = sorted(HERE.glob("[0-9]_*.py"))
LONGEST = 2 * 180                                # CPU seconds of each: three minutes of two cores, if they are free


def spent():
    """CPU seconds of the processes that were started and have ended: the notebooks' kernels."""
    times = os.times()
    return times.children_user + times.children_system


def written(twin):
    return nbformat.read(twin.with_suffix(".ipynb"), as_version=4)


def sources(notebook):
    return [(cell.cell_type, cell.source) for cell in notebook.cells]


def pictures(notebook):
    return [sum("image/png" in output.get("data", {}) for output in cell.get("outputs", []))
            for cell in notebook.cells]


@pytest.mark.parametrize("twin", TWINS, ids=lambda path: path.stem)
def test_twin_and_notebook_agree(twin):
    assert sources(written(twin)) == sources(jupytext.read(twin)), f"{twin.stem}.ipynb is not its .py: make notebooks"
    assert all(cell.execution_count for cell in written(twin).cells if cell.cell_type == "code"), "make notebooks"


def shown_code(notebook):
    """The parts of other files that the page shows."""
    return [output["data"]["text/markdown"] for cell in notebook.cells for output in cell.get("outputs", [])
            if "text/markdown" in output.get("data", {})]


@pytest.mark.parametrize("twin", TWINS, ids=lambda path: path.stem)
def test_notebook_runs_and_draws_what_is_committed(twin):
    """What is claimed is asserted in the notebooks themselves."""
    start = spent()
    made, committed = run(twin), written(twin)
    assert pictures(made) == pictures(committed)
    assert shown_code(made) == shown_code(committed), f"{twin.stem} shows code as it was: make notebooks"
    assert 0 < spent() - start < LONGEST
