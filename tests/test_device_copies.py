"""One helper of the server half copies from the host to the device: `reduce.device.on_device`.

Read from the syntax tree of `server/` and `reduce/`, so that no new line can forget it. Any other copy would hold up
the scheduler until the forward pass that was just launched has ended.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

import torchrl_sglang_hidden
from torchrl_sglang_hidden.reduce.device import on_device

ROOT = Path(torchrl_sglang_hidden.__file__).parent
FILES = sorted(path for package in ("server", "reduce") for path in (ROOT / package).rglob("*.py"))
HELPER = ROOT / "reduce/device.py"
# Functions that read host values, and copy them where a device is given.
OF_VALUES = {"tensor", "as_tensor", "asarray", "scalar_tensor", "from_numpy", "full_like"}


def copies_of(source: str) -> Iterator[str]:
    """Every call that may copy a host tensor or host values to a device."""
    for node in ast.walk(ast.parse(source)):
        if not isinstance(node, ast.Call) or not isinstance(node.func, ast.Attribute):
            continue
        name, keywords = node.func.attr, {keyword.arg for keyword in node.keywords}
        moves = (
            name in ("cuda", "pin_memory", "new_tensor")
            or (name == "to" and not (node.args and _is_dtype(node.args[0]) and "device" not in keywords))
            or (name in OF_VALUES and "device" in keywords)
        )
        if moves:
            yield f"line {node.lineno}: {ast.unparse(node)}"


def _is_dtype(node: ast.expr) -> bool:
    return isinstance(node, ast.Attribute) and (
        node.attr.endswith("dtype") or ast.unparse(node).startswith(("torch.float", "torch.int", "torch.bfloat"))
    )


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_host_tensors_reach_the_device_through_one_helper(path: Path) -> None:
    found = list(copies_of(path.read_text(encoding="utf-8")))
    assert bool(found) is (path == HELPER), found


@pytest.mark.parametrize(
    ("line", "copies"),
    [
        ("torch.tensor(ids, device=rows.device)", True),
        ("torch.as_tensor(ids, device=device)", True),
        ("rows.to(device)", True),
        ("rows.to(other)", True),
        ("rows.to(torch.float32, device=device)", True),
        ("rows.to(device=device, non_blocking=True)", True),
        ("rows.cuda()", True),
        ("rows.new_tensor(ids)", True),
        ("rows.pin_memory()", True),
        ("torch.tensor(ids)", False),
        ("torch.ones(3, device=device)", False),
        ("rows.to(torch.float32, copy=True)", False),
        ("rows.to(self.wanted.row_dtype)", False),
    ],
)
def test_the_reading_itself(line: str, copies: bool) -> None:
    assert bool(list(copies_of(line))) is copies


CPU = torch.device("cpu")


@pytest.mark.parametrize(
    ("values", "dtype"),
    [
        ([1, 2], torch.int64),
        ([0.5, 2.0], torch.float32),
        ([True, False], torch.bool),
        (np.array([[1, 2]], dtype=np.int32), torch.int32),
        (np.array([True, False]), torch.bool),
        (torch.tensor([1.5, 2.5], dtype=torch.bfloat16), torch.bfloat16),
    ],
)
def test_values_keep_their_dtype_and_none_of_their_memory(values: object, dtype: torch.dtype) -> None:
    found = on_device(values, CPU)  # type: ignore[arg-type]
    assert found.dtype == dtype
    assert found.tolist() == (values if isinstance(values, list) else values.tolist())  # type: ignore[attr-defined]
    if not isinstance(values, list):
        before = found.tolist()
        values[:] = values + values if dtype != torch.bool else ~values  # type: ignore[index, operator]
        assert found.tolist() == before, "a copy"


def test_an_empty_list_has_the_dtype_that_is_given() -> None:
    for empty in ([], np.array([], dtype=np.float64), torch.empty(0)):
        assert on_device(empty, CPU, torch.int64).dtype == torch.int64


def test_the_device_is_the_one_that_was_asked_for() -> None:
    assert on_device([1, 2], torch.device("meta")).device.type == "meta"
