"""Keeps hidden rows as they are, on the host, for requests that want every token's state or spans of the response.

One matrix for all requests, in pages: a step's rows are written with one indexed copy however many requests they belong
to, and read with another when a request finishes. Pages are given back when the request is forgotten, so that a long
request keeps no other's rows.

The matrix is as large as may ever be needed and costs memory only where it was written to: the operating system gives
pages out when they are first touched. It is written and read in the finisher's thread alone, and pages are handed out
in the scheduler's: a page that changes hands is written again only behind the last read, as jobs are done in order.

Logits have a store of their own (`reduce.row_store`). Users choose how wide their rows are, and a matrix for each width
would keep all memory that it ever touched; but their bytes are limited for each request, so that they need no budget.

Knows nothing of SGLang or of requests.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from weakref import WeakSet

import psutil
import torch

from torchrl_sglang_hidden.reduce.device import on_device

__all__ = ["PAGE", "StateBudget", "StatePages", "StateStore", "StateStoreFullError"]

# Rows of one page: a request keeps at most so many that it does not use.
PAGE = 64

_CPU = torch.device("cpu")
_CGROUP = Path("/sys/fs/cgroup")


class StateStoreFullError(Exception):
    """The host has no room for more rows. Costs the request that wanted them."""


class StateBudget:
    """The bytes that all stores of a process may use: half of what was free when the first one was made."""

    def __init__(self, max_bytes: int | None = None) -> None:
        self.max_bytes = available_bytes() // 2 if max_bytes is None else max_bytes
        self.bytes = 0
        self.stores: WeakSet[StateStore] = WeakSet()

    def drop_idle(self) -> None:
        """Take the memory of stores that nobody uses."""
        for store in list(self.stores):
            store.drop_if_idle()


def available_bytes() -> int:
    """Return how much memory this process may still take: of the machine's, and of its container's."""
    found = int(psutil.virtual_memory().available)
    with suppress(OSError, ValueError):  # no such file without control groups, and "max" without a limit
        limit, used = (int((_CGROUP / name).read_text()) for name in ("memory.max", "memory.current"))
        found = min(found, limit - used)
    return max(found, 0)


class StatePages:
    """One request's pages.

    Args:
        store: where they are.
        most: rows that are kept: the last ones of all that are written; None for all of them.
    """

    __slots__ = ("_most", "_pages", "_store")

    def __init__(self, store: StateStore, most: int | None) -> None:
        self._store, self._most = store, most
        self._pages: list[int] = []

    def __del__(self) -> None:
        self._store.give_back(self._pages)

    def places(self, start: int, stop: int) -> list[int]:
        """Return where the request's rows ``start … stop-1`` stand in the store.

        Raises:
            StateStoreFullError: there is no room for them.
        """
        return [self.place(index) for index in range(start, stop)]

    def place(self, index: int) -> int:
        """Return where one row of the request stands in the store.

        Raises:
            StateStoreFullError: there is no room for it.
        """
        if self._most is not None:
            index %= self._most
        page, row = divmod(index, PAGE)
        while page >= len(self._pages):
            self._pages.append(self._store.take_page())
        return self._pages[page] * PAGE + row


class StateStore:
    """The rows of all requests that want the same number of layers in the same dtype.

    Args:
        depth: K.
        hidden_size: D.
        dtype: of the rows.
        budget: shared with other stores.
    """

    def __init__(self, depth: int, hidden_size: int, dtype: torch.dtype, budget: StateBudget) -> None:
        self._shape = (depth, hidden_size)
        self._dtype = dtype
        self._budget = budget
        self._page_bytes = PAGE * depth * hidden_size * dtype.itemsize
        # Row 0 is of the first page, which nobody gets: rows that nobody reads are written there.
        self._used = 1
        self._most_pages = self._used + budget.max_bytes // self._page_bytes
        self._free: list[int] = []
        # Filled by whichever thread forgets a request, emptied in the scheduler's.
        self._given_back: deque[list[int]] = deque()
        self._rows: torch.Tensor | None = None
        budget.stores.add(self)

    def take_page(self) -> int:
        """Hand out a page.

        Raises:
            StateStoreFullError: there is none left.
        """
        self._collect()
        if self._free:
            return self._free.pop()
        if self._budget.bytes + self._page_bytes > self._budget.max_bytes:
            self._budget.drop_idle()
        if self._budget.bytes + self._page_bytes > self._budget.max_bytes:
            raise StateStoreFullError(
                f"the server's memory for token states is full ({self._budget.max_bytes / 2**20:.0f} MiB, half of what "
                "was free at the first such request); ask for fewer rows at a time, fewer tokens or fewer layers"
            )
        if self._rows is None:
            self._rows = self._allocate()
        # Charged once: a page that was written to stays in memory when it is given back.
        self._budget.bytes += self._page_bytes
        self._used += 1
        return self._used - 1

    def _collect(self) -> None:
        while self._given_back:
            self._free += self._given_back.popleft()

    def drop_if_idle(self) -> None:
        """Give the memory back where no request has a page: rows of another shape need it."""
        self._collect()
        if len(self._free) == self._used - 1:
            self._budget.bytes -= self._page_bytes * len(self._free)
            self._rows, self._free, self._used = None, [], 1

    def _allocate(self) -> torch.Tensor:
        try:
            return torch.empty(self._most_pages * PAGE, self._shape[0] * self._shape[1], dtype=self._dtype)
        except RuntimeError as error:  # where the system does not let a process reserve what it may never touch
            raise StateStoreFullError(
                f"the server cannot have {self._budget.max_bytes // 2**20} MiB of memory for token states ({error}); "
                "ask for fewer rows at a time, or allow the server to reserve memory (vm.overcommit_memory=0)"
            ) from error

    def give_back(self, pages: list[int]) -> None:
        """Take pages back; in any thread."""
        self._given_back.append(pages)

    def write(self, rows_MKD: torch.Tensor, places: Sequence[int]) -> None:
        """Write M rows, each to its place; in the finisher's thread."""
        if self._rows is None:
            return  # dropped: nobody has a place in it any more
        self._rows.index_copy_(0, on_device(places, _CPU), rows_MKD.flatten(1))

    def read(self, places: Sequence[int]) -> torch.Tensor:
        """Copy rows out, ``[len(places), K, D]``; in the finisher's thread."""
        if self._rows is None:
            return torch.empty(0, *self._shape, dtype=self._dtype)
        return self._rows.index_select(0, on_device(places, _CPU)).reshape(-1, *self._shape)
