"""Rows of many requests in pages: each request gets its own back, and pages are used again."""

from __future__ import annotations

import gc

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from torchrl_sglang_hidden.reduce import row_store
from torchrl_sglang_hidden.reduce.bounded import Bounded
from torchrl_sglang_hidden.reduce.row_store import RowStore, StoredRows, store_of

COLUMNS = ((2, torch.float32), (2, torch.int64))


def block_of(numbers: list[int]) -> list[torch.Tensor]:
    values = torch.tensor(numbers)[:, None].expand(-1, 2)
    return [values.float(), values + 100]


@settings(max_examples=40, deadline=None)
@given(data=st.data(), page_rows=st.integers(1, 3))
def test_every_request_gets_its_rows_in_order(data: st.DataObject, page_rows: int) -> None:
    """Requests come, skip steps and go, in any order."""
    store = RowStore(COLUMNS)
    store.page_rows = page_rows
    running: list[tuple[StoredRows, list[int]]] = []
    number = 0
    for _ in range(data.draw(st.integers(1, 25))):
        running += [(StoredRows(store), []) for _ in range(data.draw(st.integers(0, 3)))]
        block = list(range(number, number + len(running)))
        number += len(running)
        picks = [n for n in range(len(running)) if data.draw(st.integers(0, 3))]
        if picks:
            store.append(block_of(block), picks, [running[n][0] for n in picks])
        for n in picks:
            running[n][1].append(block[n])
        while running and data.draw(st.integers(0, 4)) == 0:
            rows, expected = running.pop(data.draw(st.integers(0, len(running) - 1)))
            if expected:
                values, ids = rows.join()
                assert values[:, 0].tolist() == [float(value) for value in expected]
                assert ids[:, 1].tolist() == [value + 100 for value in expected]
            del rows
    for rows, expected in running:
        assert not expected or rows.join()[0][:, 1].tolist() == expected


def test_what_is_joined_is_a_copy() -> None:
    store = RowStore(COLUMNS)
    rows, other = StoredRows(store), StoredRows(store)
    store.append(block_of([1, 2]), [0, 1], [rows, other])
    values, _ = rows.join()
    del rows
    store.append(block_of([7]), [0], [StoredRows(store)])
    assert (values.tolist(), values.untyped_storage().nbytes()) == ([[1.0, 1.0]], values.nbytes)


def test_pages_of_those_that_are_gone_are_used_again() -> None:
    store = RowStore(COLUMNS)
    pages = []
    for _ in range(50):
        owners = [StoredRows(store) for _ in range(30)]
        store.append(block_of(list(range(30))), list(range(30)), owners)
        pages.append(store.num_pages)
    assert set(pages) == {30}


def test_slabs_that_nobody_uses_are_given_back() -> None:
    store = RowStore(COLUMNS)
    one, many = StoredRows(store), [StoredRows(store) for _ in range(500)]
    store.append(block_of([1]), [0], [one])
    store.append(block_of(list(range(500))), list(range(500)), many)
    assert store.num_pages == 501, "15 of the first slab were free"
    del many
    gc.collect()
    store.append(block_of([1]), [0], [StoredRows(store)])
    assert store.num_pages == row_store.SLAB_PAGES


@pytest.mark.parametrize(("width", "page_rows"), [(1, 64), (256, 64), (257, 63), (50_000, 1), (10**9, 1)])
def test_wide_rows_have_small_pages(width: int, page_rows: int) -> None:
    """A page of a whole vocabulary's rows would be much larger than what most requests need."""
    assert RowStore(((width, torch.float32),)).page_rows == page_rows


def test_a_store_is_that_of_its_columns_and_goes_with_its_rows() -> None:
    block = block_of([1])
    store = store_of(block)
    assert store_of(block) is store
    assert store_of(block[:1]) is not store
    rows = StoredRows(store)
    number = id(store)
    del store
    assert id(store_of(block)) == number
    del rows
    gc.collect()
    assert tuple((t.shape[1], t.dtype) for t in block) not in row_store._STORES


def test_what_was_used_longest_ago_is_forgotten() -> None:
    kept: Bounded[str] = Bounded(5)
    for name, size in (("a", 2), ("b", 2), ("c", 1)):
        kept.put(name, name.upper(), size)
    assert kept.get("a") == "A"
    assert kept.put("d", "D", 2) == "D"
    assert [kept.get(name) for name in "abcd"] == ["A", None, "C", "D"]
    assert (kept.put("huge", "H", 6), kept.get("huge"), kept.size, len(kept)) == ("H", None, 5, 3)
    kept.put("a", "A2", 1)
    assert (kept.get("a"), kept.size) == ("A2", 4)
