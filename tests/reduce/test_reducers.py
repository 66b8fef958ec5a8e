"""Each kind of pooling against plain torch: rows cut anywhere, many requests side by side."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from helpers.reference_pooling import DTYPES, pool
from hypothesis import given
from hypothesis import strategies as st

from torchrl_sglang_hidden.reduce.reducers import Ranges, reduce_rows, reducer_of
from torchrl_sglang_hidden.spec.hidden import POOLINGS, Pooling

kinds = st.sampled_from(POOLINGS)


def rows_of(num_rows: int, *shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Negative on average: a maximum that began with zeros would be seen."""
    rows = torch.randn(num_rows, *shape, generator=torch.Generator().manual_seed(seed)) - 3
    return rows.to(dtype)


def assert_pooled(found: torch.Tensor, rows: torch.Tensor, pooling: Pooling) -> None:
    assert found.dtype == torch.float32
    exact = pooling in ("last", "max")
    tolerance = {"rtol": 0.0, "atol": 0.0} if exact else {"rtol": 1e-5, "atol": 1e-5 * len(rows)}
    torch.testing.assert_close(found.double(), pool(rows.double(), pooling), **tolerance)


def test_every_kind_has_a_reducer_of_its_own() -> None:
    """A kind added to the names alone would be refused here, and by the type check."""
    assert len({type(reducer_of(pooling)) for pooling in POOLINGS}) == len(POOLINGS)
    with pytest.raises(AssertionError, match="median"):
        reducer_of("median")  # type: ignore[arg-type]


def test_kinds_that_share_running_values_make_and_merge_the_same() -> None:
    """A kept sum may go on as a mean: what one of them left in the prefix store the other takes."""
    by_running: dict[str, set[Any]] = {}
    for pooling in POOLINGS:
        kind = type(reducer_of(pooling))
        by_running.setdefault(kind.running, set()).add((kind.rows, kind.merge))
    assert {name: len(ways) for name, ways in by_running.items()} == dict.fromkeys(by_running, 1)


def test_every_kind_gives_another_result() -> None:
    """One that stood for another would be found."""
    rows_ND = rows_of(5, 8)
    found = [reducer_of(pooling).result(reducer_of(pooling).rows(rows_ND), 5) for pooling in POOLINGS]
    for index, value_D in enumerate(found):
        assert not any(torch.allclose(value_D, other_D) for other_D in found[:index])


@given(pooling=kinds, shape=st.sampled_from([(4,), (2, 4), (3, 2, 4)]), dtype=st.sampled_from(DTYPES), data=st.data())
def test_rows_cut_anywhere(pooling: Pooling, shape: Any, dtype: torch.dtype, data: st.DataObject) -> None:
    """Whole, in two runs of rows, and one row after another; with K layers, and with many requests side by side."""
    rows = rows_of(data.draw(st.integers(1, 9)), *shape, seed=data.draw(st.integers(0, 99)), dtype=dtype)
    reducer, count = reducer_of(pooling), len(rows)
    assert_pooled(reducer.result(reducer.rows(rows), count), rows, pooling)
    if count > 1:
        cut = data.draw(st.integers(1, count - 1))
        before, after = reducer.rows(rows[:cut]), reducer.rows(rows[cut:])
        copies = before.clone(), after.clone()
        assert_pooled(reducer.result(reducer.merge(before, after), count), rows, pooling)
        assert before.equal(copies[0])
        assert after.equal(copies[1])
        resumed = reducer.resume(reducer.result(before, cut), cut)
        assert_pooled(reducer.result(reducer.merge(resumed, after), count), rows, pooling)
    value = rows[0].float()
    for row in rows[1:]:
        value = reducer.merge(value, row.float())
    assert_pooled(reducer.result(value, count), rows, pooling)


@pytest.mark.parametrize("pooling", POOLINGS)
@pytest.mark.parametrize("ranges", [((0, 1),), ((2, 3),), ((1, 4),), ((0, 4),), ((0, 1), (3, 4)), ((0, 2), (3, 4))])
@pytest.mark.parametrize("dtype", DTYPES)
def test_ranges_of_rows(pooling: Pooling, ranges: Ranges, dtype: torch.dtype) -> None:
    """The result does not alias its input, which may be a CUDA graph's static buffer that the next step overwrites."""
    rows_ND = rows_of(4, 6, dtype=dtype)
    chosen_ND = torch.cat([rows_ND[start:stop] for start, stop in ranges])
    reducer = reducer_of(pooling)
    value_D = reduce_rows(rows_ND, ranges, reducer)
    rows_ND.fill_(7)
    assert_pooled(reducer.result(value_D, len(chosen_ND)), chosen_ND, pooling)


@pytest.mark.parametrize("pooling", ["mean", "max", "sum"])
def test_a_broken_row_shows(pooling: Pooling) -> None:
    rows_ND = rows_of(4, 2)
    rows_ND[1, 0] = torch.nan
    reducer = reducer_of(pooling)
    for value_D in (reducer.rows(rows_ND), reducer.merge(reducer.rows(rows_ND[:2]), reducer.rows(rows_ND[2:]))):
        assert value_D.isnan().tolist() == [True, False]


def test_a_long_sum_is_accumulated_in_float32() -> None:
    """A sum in a half dtype stops growing at 256 (bfloat16) or 2048 (float16)."""
    for dtype in (torch.bfloat16, torch.float16):
        assert reducer_of("sum").rows(torch.full((4096, 2), 1.5, dtype=dtype)).tolist() == [6144.0, 6144.0]
