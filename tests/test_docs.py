"""docs/faults.md holds what it says: every fault has a test, and every test that it names is there."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "faults.md"
NAMED = re.compile(r"`(tests/[\w/]+\.py)::(test_\w+)`")


def faults() -> list[tuple[str, str, str]]:
    """The rows of the page's tables: what torchrl does or needs, what this package does, and what holds it."""
    rows = []
    for line in PAGE.read_text().splitlines():
        if line.startswith("|"):
            cells = [cell.strip().replace("\\|", "|") for cell in re.split(r"(?<!\\)\|", line)[1:-1]]
            assert len(cells) == 3, line
            rows.append(tuple(cells))
    return [row for row in rows if not set(row[0]) <= set("-: ") and row[2] != "held by"]  # type: ignore[misc]
