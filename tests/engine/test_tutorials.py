"""The tutorials run, and carry the outputs of such a run."""

from __future__ import annotations

import re
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient
from nbformat import NotebookNode

TUTORIALS = Path(__file__).parents[2] / "tutorials"
FIRST_ROLLOUT = TUTORIALS / "101_first_rollout.ipynb"

# What a reader of the first lesson must see.
FIRST_ROLLOUT_OUTPUTS = (
    r"pools inside the server: True",
    r"'The capital of France is' -> ' Paris",
    r"hidden_states\.response +torch\.float32 +\(576,\)",
    r"pooled responses: +torch\.Size\(\[2, 576\]\)",
    r"tensor\(\[\[ 5, 12, 16\],",
    r"the head says ' Paris' at (-0\.\d{3})\d; the engine sampled it at \1",
    r"collected \(8, 1\) of kinds \['arithmetic', 'capitals'\]",
    r"The capital of Kenya is Nairobi\.",
    r"torch\.Size\(\[24, 1\]\)",
)


def outputs(notebook: NotebookNode) -> list[NotebookNode]:
    return [output for cell in notebook.cells if cell.cell_type == "code" for output in cell.outputs]


def text_of(notebook: NotebookNode) -> str:
    return "\n".join(output.get("text") or output.get("data", {}).get("text/plain", "") for output in outputs(notebook))


def pictures_of(notebook: NotebookNode) -> list[str]:
    return [output.data["image/png"] for output in outputs(notebook) if "image/png" in output.get("data", {})]


def assert_shows_the_lesson(notebook: NotebookNode) -> None:
    text = text_of(notebook)
    assert [pattern for pattern in FIRST_ROLLOUT_OUTPUTS if not re.search(pattern, text)] == []
    (picture,) = pictures_of(notebook)
    assert len(picture) > 20_000
    # Ray, where it is installed, misses ipywidgets in every notebook.
    notices = [
        output for output in outputs(notebook) if "Missing packages: ['ipywidgets']" not in output.get("text", "")
    ]
    assert [output for output in notices if output.output_type == "error" or output.get("name") == "stderr"] == []


@pytest.fixture
def notebook() -> NotebookNode:
    return nbformat.read(FIRST_ROLLOUT, as_version=4)


def test_there_is_no_lesson_that_no_test_runs() -> None:
    assert list(TUTORIALS.glob("*.ipynb")) == [FIRST_ROLLOUT]


def test_first_rollout_runs(notebook: NotebookNode, tmp_path: Path) -> None:
    for cell in notebook.cells:
        if cell.cell_type == "code":
            cell.outputs = []
    # Raises with the cell and its traceback where one fails.
    NotebookClient(notebook, timeout=300, kernel_name="python3", resources={"metadata": {"path": tmp_path}}).execute()
    assert_shows_the_lesson(notebook)
    assert list(tmp_path.iterdir()) == []


def test_first_rollout_is_committed_with_its_outputs(notebook: NotebookNode) -> None:
    nbformat.validate(notebook)
    assert_shows_the_lesson(notebook)
    assert notebook.cells[0].source.startswith("# 101")
    assert "What you'll learn" in notebook.cells[0].source
    assert FIRST_ROLLOUT.stat().st_size < 500_000


def test_first_rollout_names_no_directory_of_the_machine_it_ran_on(notebook: NotebookNode) -> None:
    found = re.findall(r"(?<![\w.<])/(?:[\w.-]+/)+[\w.-]*", text_of(notebook))
    assert found == []
