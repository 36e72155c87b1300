"""Run the .py twins and write what they show as .ipynb:  make notebooks  [python notebooks/build.py 1_the_method ...]

A notebook's text and code live in its twin (percent format); the .ipynb is made, never edited.
"""
import base64
import io
import re
import sys
import time
from pathlib import Path

import jupytext
import nbformat
from nbclient import NotebookClient
from PIL import Image

HERE = Path(__file__).resolve().parent
WIDEST = 950                                     # pixels of a picture: a page of 9 inches and its margin
ANSWER = re.compile(r"<details>.*?```python\n(.*?)```", re.S)    # the code of an exercise's answer


def run(twin):
    """-> the notebook of a twin with the outputs of its cells. Raises CellExecutionError where a claim fails.

    The answers to the exercises, folded away in the text, are run too, after all cells.
    """
    notebook = jupytext.read(twin)
    cells, texts = len(notebook.cells), [cell.source for cell in notebook.cells]
    notebook.cells += [nbformat.v4.new_code_cell(code) for code in ANSWER.findall("\n".join(texts))]
    NotebookClient(notebook, timeout=600, kernel_name="python3", record_timing=False,
                   coalesce_streams=True, resources={"metadata": {"path": HERE}}).execute()
    del notebook.cells[cells:]
    for index, cell in enumerate(notebook.cells):
        cell.id, cell.metadata = f"cell-{index}", {}             # the same at every build, so that only outputs differ
        for output in cell.get("outputs", []):
            if "image/png" in output.get("data", {}):
                output["data"] = {"image/png": small(output["data"]["image/png"])}
    notebook.metadata = {"kernelspec": {"name": "python3", "display_name": "Python 3", "language": "python"},
                         "language_info": {"name": "python"}}
    return notebook


def small(png):
    """A picture (base64) at page width in 256 colours: a third of the bytes."""
    image = Image.open(io.BytesIO(base64.b64decode(png))).convert("RGB")
    image.thumbnail((WIDEST, 10 * WIDEST), Image.Resampling.LANCZOS)
    palette = dict(method=Image.Quantize.MAXCOVERAGE, kmeans=2)  # keeps rare colours: thin lines, markers
    image.quantize(256, **palette).save(file := io.BytesIO(), format="png", optimize=True)
    return base64.b64encode(file.getvalue()).decode()


if __name__ == "__main__":
    for twin in [HERE / f"{name}.py" for name in sys.argv[1:]] or sorted(HERE.glob("[0-9]_*.py")):
        start, made = time.perf_counter(), twin.with_suffix(".ipynb")
        nbformat.write(run(twin), made)
        print(f"{made.name}: {time.perf_counter() - start:.0f} s, {made.stat().st_size / 1e6:.2f} MB")
