"""Executes the lessons, and keeps what they show.

    python tools/execute_lessons.py                                     # all of them
    python tools/execute_lessons.py tutorials/101_first_rollout.ipynb   # one

`jupyter-execute` does nearly the same, but it writes the time of every cell into the notebook, and what libraries
say of the notebook's own environment: an execution that shows nothing new would still change every lesson.
"""

from __future__ import annotations

import re
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import nbformat
from nbclient import NotebookClient
from nbformat import NotebookNode
from rich.console import Console

TUTORIALS = Path(__file__).parents[1] / "tutorials"
# Ray, where it is installed, misses ipywidgets in every notebook; no lesson uses its widgets.
NOT_THE_LESSONS = re.compile(r"Missing packages: \['ipywidgets'\]")


def execute(path: Path) -> NotebookNode:
    """Execute one lesson in a kernel of its own.

    Args:
        path: the notebook.

    Returns:
        The notebook with its new outputs.

    Raises:
        nbclient.exceptions.CellExecutionError: if a cell raises, with the cell and its traceback.
    """
    notebook: NotebookNode = nbformat.read(path, as_version=4)
    where = {"metadata": {"path": path.parent}}
    NotebookClient(notebook, timeout=None, record_timing=False, kernel_name="python3", resources=where).execute()
    for cell in notebook.cells:
        cell.metadata.pop("execution", None)
        if cell.cell_type == "code":
            cell.outputs = [output for output in cell.outputs if not NOT_THE_LESSONS.search(output.get("text", ""))]
    return notebook


def main(arguments: Sequence[str]) -> None:
    """Execute lessons one after the other, and write each to its file once it ended well.

    Args:
        arguments: the notebooks; all lessons if there are none.
    """
    console = Console()
    for path in [Path(name) for name in arguments] or sorted(TUTORIALS.glob("*.ipynb")):
        start = time.monotonic()
        with console.status(path.stem):
            notebook = execute(path)
        nbformat.write(notebook, path)
        console.print(f"{path.stem}: {time.monotonic() - start:.0f} s")


if __name__ == "__main__":
    main(sys.argv[1:])
