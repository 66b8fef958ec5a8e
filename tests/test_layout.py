"""How the tests themselves are laid out: what several files share is in helpers/, and no file grows without end."""

from __future__ import annotations

import ast
import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

import torchrl_sglang_hidden

TESTS = Path(__file__).parent
PACKAGE = Path(torchrl_sglang_hidden.__file__).parent
MAX_LINES = 600
FILES = sorted(TESTS.rglob("*.py"))
TEST_MODULES = {path.stem for path in FILES if path.stem.startswith("test_") or path.stem == "conftest"}


def imported_tests(source: str) -> Iterator[str]:
    """Yield the test modules that a file imports, under any path and in functions too."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names = [node.module or "", *(alias.name for alias in node.names)]
        else:
            continue
        yield from (name for name in names if not TEST_MODULES.isdisjoint(name.split(".")))


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(TESTS)))
def test_no_file_imports_a_test_file(path: Path) -> None:
    assert list(imported_tests(path.read_text())) == []


@pytest.mark.parametrize(
    "source",
    [
        "import test_layout",
        "from test_layout import FILES",
        "from . import test_layout",
        "from .test_layout import FILES",
        "import tests.conftest as shared",
        "def f():\n    from engine.test_chat import x",
    ],
)
def test_the_check_of_imports_goes_red(source: str) -> None:
    assert list(imported_tests(source))


def test_directories_are_those_of_the_package() -> None:
    """Beside them stand the tests on real servers, and what several files share."""
    found = {path.parent.relative_to(TESTS).as_posix() for path in FILES} - {".", "engine", "helpers"}
    assert found == {path.parent.name for path in PACKAGE.glob("*/__init__.py")}


def test_base_names_are_unique() -> None:
    """pytest imports a test file by its base name, and the groups of several processes have it too."""
    counts = Counter(path.name for path in FILES if path.stem.startswith("test_"))
    assert [name for name, count in counts.items() if count > 1] == []


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(TESTS)))
def test_no_file_is_too_long(path: Path) -> None:
    assert len(path.read_text().splitlines()) <= MAX_LINES, "split it by subject"


def test_the_readme_names_files_that_are_there() -> None:
    named = re.findall(r"(?:tests/)?\b([a-z_]+/\w+\.py|test_\w+\.py)\b", (TESTS / "README.md").read_text())
    assert len(named) > 20
    assert [name for name in named if not any((root / name).exists() for root in (TESTS, TESTS.parent))] == []


def test_the_groups_that_begin_early_are_there() -> None:
    named = re.findall(r'^    "(test_\w+)",$', (TESTS / "conftest.py").read_text(), re.MULTILINE)
    assert len(named) > 5
    assert [name for name in named if not (TESTS / "engine" / f"{name}.py").exists()] == []
