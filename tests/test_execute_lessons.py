"""What `make tutorials` writes into a lesson."""

from __future__ import annotations

from pathlib import Path

import execute_lessons
import nbformat
import pytest
from nbclient.exceptions import CellExecutionError

NOTICE = "import sys; print(\"Missing packages: ['ipywidgets']. Run\", file=sys.stderr)"


def write(path: Path, *cells: str) -> Path:
    """Write a notebook whose cells carry outputs and times of an earlier execution."""
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(cell) for cell in cells])
    for cell in notebook.cells:
        cell.outputs = [nbformat.v4.new_output("stream", text="of before\n")]
        cell.metadata["execution"] = {"iopub.status.busy": "2026-01-01T00:00:00Z"}
    nbformat.write(notebook, path)
    return path


def test_outputs_are_new_and_nothing_tells_when_they_were_made(tmp_path: Path) -> None:
    path = write(tmp_path / "lesson.ipynb", NOTICE, "print(6 * 7)")
    execute_lessons.main([str(path)])
    notice, product = nbformat.read(path, as_version=4).cells
    assert notice.outputs == []
    assert [output.text for output in product.outputs] == ["42\n"]
    assert "execution" not in product.metadata


def test_a_lesson_that_fails_stays_as_it_is(tmp_path: Path) -> None:
    path = write(tmp_path / "lesson.ipynb", "print(1)", "raise ValueError('no such room')")
    before = path.read_bytes()
    with pytest.raises(CellExecutionError, match="no such room"):
        execute_lessons.main([str(path)])
    assert path.read_bytes() == before
