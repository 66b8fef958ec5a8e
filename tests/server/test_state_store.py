"""Rows kept as they are, in pages that requests share one after another."""

from __future__ import annotations

from pathlib import Path

import psutil
import pytest
import torch

from torchrl_sglang_hidden.server import state_store
from torchrl_sglang_hidden.server.state_store import PAGE, StateBudget, StatePages, StateStore, StateStoreFullError

K, D = 2, 3
PAGE_BYTES = PAGE * K * D * 4


def store_of(pages: int = 100) -> StateStore:
    return StateStore(K, D, torch.float32, StateBudget(pages * PAGE_BYTES))


def rows_of(*numbers: float) -> torch.Tensor:
    return torch.tensor(numbers, dtype=torch.float32)[:, None, None].expand(-1, K, D).contiguous()


def read(store: StateStore, pages: StatePages, start: int, stop: int) -> list[float]:
    return store.read(pages.places(start, stop))[:, 0, 0].tolist()


def test_requests_share_a_matrix_and_not_rows() -> None:
    store = store_of()
    one, two = StatePages(store, None), StatePages(store, None)
    for index in range(2 * PAGE):
        store.write(rows_of(index, -index, 99), [one.place(index), two.place(index), 0])
    assert read(store, one, 0, 2 * PAGE) == list(range(2 * PAGE))
    assert read(store, two, PAGE - 1, PAGE + 2) == [-(PAGE - 1), -PAGE, -(PAGE + 1)]


def test_only_the_last_rows_are_kept_where_no_more_are_needed() -> None:
    store = store_of(pages=1)
    pages = StatePages(store, 3)
    for index in range(10 * PAGE):
        store.write(rows_of(index), [pages.place(index)])
    assert read(store, pages, 10 * PAGE - 3, 10 * PAGE) == [10 * PAGE - 3, 10 * PAGE - 2, 10 * PAGE - 1]


def test_pages_are_used_again() -> None:
    store = store_of(pages=3)
    for _ in range(20):
        pages = StatePages(store, None)
        store.write(rows_of(*range(2 * PAGE)), pages.places(0, 2 * PAGE))
        assert read(store, pages, 0, 2 * PAGE) == list(range(2 * PAGE))
        del pages


def test_a_store_without_room_says_so() -> None:
    store = store_of(pages=3)
    pages = StatePages(store, None)
    with pytest.raises(StateStoreFullError, match=r"full \(0 MiB, half of .*\); ask for fewer rows at a time"):
        pages.places(0, 4 * PAGE)
    del pages
    assert len(StatePages(store, None).places(0, PAGE)) == PAGE, "what was taken came back"


def test_stores_share_a_budget() -> None:
    budget = StateBudget(3 * PAGE_BYTES)
    one, two = (StateStore(K, D, torch.float32, budget) for _ in range(2))
    held = StatePages(one, None)
    held.places(0, 2 * PAGE)
    with pytest.raises(StateStoreFullError):
        StatePages(two, None).places(0, 2 * PAGE)
    del held
    assert len(StatePages(two, None).places(0, 2 * PAGE)) == 2 * PAGE, "an idle store gives its memory back"


def test_pages_that_were_given_back_still_count() -> None:
    """They were written to, and stay in memory for the next request of their kind."""
    budget = StateBudget(3 * PAGE_BYTES)
    store = StateStore(K, D, torch.float32, budget)
    for _ in range(5):
        StatePages(store, None).places(0, 2 * PAGE)
        assert budget.bytes == 2 * PAGE_BYTES


def test_a_containers_limit_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(state_store, "_CGROUP", tmp_path)
    of_machine = state_store.available_bytes()
    (tmp_path / "memory.max").write_text("1000000\n")
    (tmp_path / "memory.current").write_text("400000\n")
    assert state_store.available_bytes() == 600000
    (tmp_path / "memory.max").write_text("max\n")
    assert state_store.available_bytes() > of_machine / 2


def test_memory_is_touched_only_where_rows_were_written() -> None:
    """The matrix is as large as may ever be needed: half of the machine's memory."""
    process = psutil.Process()
    before = process.memory_info().rss
    store = StateStore(1, 1024, torch.float32, StateBudget())
    store.write(torch.ones(1, 1, 1024), [StatePages(store, None).place(0)])
    assert process.memory_info().rss - before < 64 * 2**20


def test_a_matrix_that_cannot_be_made_is_said_when_a_row_is_placed() -> None:
    store = StateStore(1, 1024, torch.float32, StateBudget(2**60))
    with pytest.raises(StateStoreFullError, match=r"cannot have 1099511627776 MiB of memory .*; ask for fewer rows"):
        StatePages(store, None).place(0)


def test_rows_of_a_request_that_kept_none_are_none() -> None:
    assert store_of().read([]).shape == (0, K, D)
