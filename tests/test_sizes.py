"""What keeps a module readable: its length, the length of its functions, and a docstring that says its boundary."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

import torchrl_sglang_hidden

ROOT = Path(torchrl_sglang_hidden.__file__).parent
MAX_FILE_LINES = 400
# Without the docstring.
MAX_FUNCTION_LINES = 60


def length_of(function: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
    lines = (function.end_lineno or function.lineno) - function.lineno + 1
    if ast.get_docstring(function) is None:
        return lines
    docstring = function.body[0]
    return lines - ((docstring.end_lineno or docstring.lineno) - docstring.lineno + 1)


def faults(source: str) -> list[str]:
    """What is too long in a module, or missing."""
    tree, found = ast.parse(source), []
    if (lines := len(source.splitlines())) > MAX_FILE_LINES:
        found.append(f"{lines} lines")
    for node in ast.walk(tree):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)) and (size := length_of(node)) > MAX_FUNCTION_LINES:
            found.append(f"{node.name} has {size} lines")
    docstring = ast.get_docstring(tree) or ""
    # One sentence names the module; a paragraph says where it ends.
    if not docstring.rstrip().endswith("."):
        found.append("no docstring of whole sentences")
    return found


def modules() -> list[Path]:
    return sorted(ROOT.rglob("*.py"))


@pytest.mark.parametrize("path", modules(), ids=lambda path: str(path.relative_to(ROOT)))
def test_a_module_is_read_in_one_go(path: Path) -> None:
    assert faults(path.read_text()) == []


@pytest.mark.parametrize(
    ("source", "words"),
    [
        ('"""What it is."""\n' + "a = 1\n" * MAX_FILE_LINES, "401 lines"),
        ('"""What it is."""\ndef f():\n' + "    a = 1\n" * MAX_FUNCTION_LINES, "f has 61 lines"),
        ('"""What it is."""\nclass A:\n    async def f(self):\n' + "        a = 1\n" * 60, "f has 61 lines"),
        ("a = 1\n", "no docstring"),
        ('""""""\n', "no docstring"),
        ('"""Helpers"""\n', "no docstring"),
    ],
)
def test_the_check_goes_red(source: str, words: str) -> None:
    assert any(words in fault for fault in faults(source)), faults(source)


def test_the_check_does_not_count_a_docstring() -> None:
    long = '    """Do it.\n' + "\n    Because.\n" * 40 + '    """\n'
    assert faults('"""What it is."""\ndef f():\n' + long + "    a = 1\n" * (MAX_FUNCTION_LINES - 1)) == []
