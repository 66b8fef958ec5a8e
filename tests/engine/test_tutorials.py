"""The tutorials run, and carry the outputs of such a run."""

from __future__ import annotations

import re
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient
from nbformat import NotebookNode

TUTORIALS = Path(__file__).parents[2] / "tutorials"

# What a reader of each lesson must see.
LESSONS: dict[str, tuple[str, ...]] = {
    "101_first_rollout": (
        r"pools inside the server: True",
        r"'The capital of France is' -> ' Paris",
        r"hidden_states\.response +torch\.float32 +\(576,\)",
        r"pooled responses: +torch\.Size\(\[2, 576\]\)",
        r"tensor\(\[\[ 5, 12, 16\],",
        r"the head says ' Paris' at (-0\.\d{3})\d; the engine sampled it at \1",
        r"collected \(8, 1\) of kinds \['arithmetic', 'capitals'\]",
        r"The capital of Kenya is Nairobi\.",
        r"torch\.Size\(\[24, 1\]\)",
    ),
    "102_choosing_actions": (
        r"' left': 2049",
        r"The stairs lead to the roof\. You walk \.\.\. (up|down)\n",
        r"The lift is full\. You look \.\.\. (left|up)\n",
        r"logits \[B, A\]: \(3, 4\)  log-probs agree",
        r"' Paris' +1 tokens  log-prob +-0\.26",
        r"' a town called Nice' +4 tokens",
        r"tensor\(\[\[9\.9900e-01,",
        r'temperature_scale:\{"schedule":\{"linear":\[1\.5,0\.1,null\]\}\}',
        r"3\.2\d  'The capital of France is Paris\.'",
    ),
}
every_lesson = pytest.mark.parametrize("name", LESSONS)


def read(name: str) -> NotebookNode:
    return nbformat.read(TUTORIALS / f"{name}.ipynb", as_version=4)


def outputs(notebook: NotebookNode) -> list[NotebookNode]:
    return [output for cell in notebook.cells if cell.cell_type == "code" for output in cell.outputs]


def text_of(notebook: NotebookNode) -> str:
    return "\n".join(output.get("text") or output.get("data", {}).get("text/plain", "") for output in outputs(notebook))


def pictures_of(notebook: NotebookNode) -> list[str]:
    return [output.data["image/png"] for output in outputs(notebook) if "image/png" in output.get("data", {})]


def assert_shows_the_lesson(notebook: NotebookNode, name: str) -> None:
    text = text_of(notebook)
    assert [pattern for pattern in LESSONS[name] if not re.search(pattern, text)] == []
    (picture,) = pictures_of(notebook)
    assert len(picture) > 15_000
    # Ray, where it is installed, misses ipywidgets in every notebook.
    notices = [
        output for output in outputs(notebook) if "Missing packages: ['ipywidgets']" not in output.get("text", "")
    ]
    assert [output for output in notices if output.output_type == "error" or output.get("name") == "stderr"] == []


def test_there_is_no_lesson_that_no_test_runs() -> None:
    assert {path.stem for path in TUTORIALS.glob("*.ipynb")} == set(LESSONS)


@every_lesson
def test_it_runs(name: str, tmp_path: Path) -> None:
    notebook = read(name)
    for cell in notebook.cells:
        if cell.cell_type == "code":
            cell.outputs = []
    # Raises with the cell and its traceback where one fails.
    NotebookClient(notebook, timeout=300, kernel_name="python3", resources={"metadata": {"path": tmp_path}}).execute()
    assert_shows_the_lesson(notebook, name)
    assert list(tmp_path.iterdir()) == []


@every_lesson
def test_it_is_committed_with_its_outputs(name: str) -> None:
    notebook = read(name)
    nbformat.validate(notebook)
    assert_shows_the_lesson(notebook, name)
    assert notebook.cells[0].source.startswith(f"# {name[:3]}")
    assert "What you'll learn" in notebook.cells[0].source
    assert (TUTORIALS / f"{name}.ipynb").stat().st_size < 500_000


@every_lesson
def test_it_names_no_directory_of_the_machine_it_ran_on(name: str) -> None:
    found = re.findall(r"(?<![\w.<])/(?:[\w.-]+/)+[\w.-]*", text_of(read(name)))
    assert found == []
