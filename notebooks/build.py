"""Run the .py twins and write what they show as .ipynb:  make notebooks  [python notebooks/build.py 1_the_method ...]

A notebook's text and code live in its twin (percent format); the .ipynb is made, never edited.
"""
import sys
import time
from pathlib import Path

import jupytext
import nbformat
from nbclient import NotebookClient

HERE = Path(__file__).resolve().parent


def run(twin):
    """-> the notebook of a twin with the outputs of its cells. Raises CellExecutionError where a claim fails."""
    notebook = jupytext.read(twin)
    NotebookClient(notebook, timeout=600, kernel_name="python3", record_timing=False,
                   resources={"metadata": {"path": HERE}}).execute()
    for index, cell in enumerate(notebook.cells):
        cell.id, cell.metadata = f"cell-{index}", {}             # the same at every build, so that only outputs differ
    notebook.metadata = {"kernelspec": {"name": "python3", "display_name": "Python 3", "language": "python"},
                         "language_info": {"name": "python"}}
    return notebook


if __name__ == "__main__":
    for twin in [HERE / f"{name}.py" for name in sys.argv[1:]] or sorted(HERE.glob("[0-9]_*.py")):
        start = time.perf_counter()
        made = twin.with_suffix(".ipynb")
        nbformat.write(run(twin), made)
        print(f"{made.name}: {time.perf_counter() - start:.0f} s, {made.stat().st_size / 1e6:.2f} MB")
