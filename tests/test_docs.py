"""The pages of docs/ hold what they say: every row of their tables has tests, and every test that is named is there."""

from __future__ import annotations

import ast
import re
from collections import Counter

import pytest
from helpers.doc_tables import NAMED, ROOT, rows_of

# Columns of each page's tables, and fewest rows.
PAGES = {
    "faults.md": (3, 51),
    "engine_features.md": (4, 19),
    "logits_and_constraints.md": (3, 13),
    "image_features.md": (6, 28),
    "field_cases.md": (3, 40),
    "hostile_input.md": (3, 13),
}


def names_in(path: str) -> set[str]:
    """Return the names of the tests of a file, without importing it."""
    tree = ast.parse((ROOT / path).read_text(encoding="utf-8"))
    return {node.name for node in tree.body if isinstance(node, ast.FunctionDef) and node.name.startswith("test_")}


@pytest.mark.parametrize("page", PAGES)
def test_every_row_is_whole_and_names_its_tests(page: str) -> None:
    columns, fewest = PAGES[page]
    rows = rows_of(page)
    assert len(rows) >= fewest
    for row in rows:
        assert len(row) == columns, row
        assert all(row), row
        # Nothing but tests in the last cell: a name in another form would not be looked for.
        assert re.fullmatch(rf"{NAMED.pattern}(, {NAMED.pattern})*", row[-1]), row


@pytest.mark.parametrize("page", PAGES)
def test_every_test_that_is_named_is_there(page: str) -> None:
    named = {found for row in rows_of(page) for found in NAMED.findall(row[-1])}
    missing = {f"{path}::{name}" for path, name in named if not (ROOT / path).exists() or name not in names_in(path)}
    assert not missing


@pytest.mark.parametrize("page", PAGES)
def test_no_row_stands_twice(page: str) -> None:
    assert max(Counter(row[0] for row in rows_of(page)).values()) == 1
