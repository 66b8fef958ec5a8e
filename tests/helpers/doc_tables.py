"""The tables of docs/, whose last column names the tests that hold the row."""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).parents[2]
NAMED = re.compile(r"`(tests/(?:\w+/)?test_\w+\.py)::(test_\w+)`")


def rows_of(page: str) -> list[list[str]]:
    """Return the rows of the page's tables. The last cell of a row names the tests that hold it."""
    text = (ROOT / "docs" / page).read_text(encoding="utf-8")
    lines = [line for line in text.splitlines() if line.startswith("|")]
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    return [row for row in rows if row[-1] != "held by" and set("".join(row)) != {"-"}]
