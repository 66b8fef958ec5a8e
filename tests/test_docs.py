"""docs/faults.md holds what it says: every fault has tests, and every test that it names is there."""

from __future__ import annotations

import ast
import re
from collections import Counter
from pathlib import Path

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "faults.md"
NAMED = re.compile(r"`(tests/(?:engine/)?test_\w+\.py)::(test_\w+)`")


def faults() -> list[list[str]]:
    """The rows of the page's tables: what TorchRL does, what this package does, and the tests that hold it."""
    lines = [line for line in PAGE.read_text(encoding="utf-8").splitlines() if line.startswith("|")]
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    return [row for row in rows if row[-1] != "held by" and set("".join(row)) != {"-"}]


def names_in(path: str) -> set[str]:
    """The names of the tests of a file, without importing it."""
    tree = ast.parse((ROOT / path).read_text(encoding="utf-8"))
    return {node.name for node in tree.body if isinstance(node, ast.FunctionDef) and node.name.startswith("test_")}


def test_every_row_is_whole_and_names_its_tests() -> None:
    rows = faults()
    assert len(rows) > 40
    for row in rows:
        assert len(row) == 3, row
        assert all(row), row
        # Nothing but tests in the last cell: a name in another form would not be looked for.
        assert re.fullmatch(rf"{NAMED.pattern}(, {NAMED.pattern})*", row[2]), row


def test_every_test_that_is_named_is_there() -> None:
    named = {found for row in faults() for found in NAMED.findall(row[2])}
    assert len(named) > 40
    missing = {f"{path}::{name}" for path, name in named if not (ROOT / path).exists() or name not in names_in(path)}
    assert not missing


def test_no_fault_stands_twice() -> None:
    assert max(Counter(row[0] for row in faults()).values()) == 1
