"""Keep the rows of many requests, each step's rows in one copy.

A step brings one block of rows, one row for each request. A list of such blocks would keep every block alive until the
longest request of it has ended, and a tensor for each row would cost an operation for each row and step. Here a
request's rows are in pages of its own, and all pages are in a few slabs, whose sizes double. A step's block is copied
with one operation for each slab that it reaches.

Pure torch, on the host; knows nothing of logits or requests.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from weakref import WeakValueDictionary

import torch

__all__ = ["RowStore", "StoredRows", "store_of"]

# Rows of a page, if a page of so many rows is at most so many bytes; and at least one row.
PAGE_ROWS, PAGE_BYTES = 64, 2**16
# Pages of the smallest slab.
SLAB_PAGES = 16
# A slab is at most so large, or one page: rows of a whole vocabulary must not come to be allocated by the gigabyte.
SLAB_BYTES = 2**28

Column = tuple[int, torch.dtype]


class _Slab:
    """Pages that were allocated together: for each kind of columns one tensor ``[pages · rows of a page, C]``."""

    def __init__(self, columns: Sequence[Column], num_pages: int, page_rows: int) -> None:
        self.num_pages = num_pages
        self.tensors = [torch.empty(num_pages * page_rows, width, dtype=dtype) for width, dtype in columns]
        self.free = list(range(num_pages - 1, -1, -1))


class RowStore:
    """The pages of all requests whose rows have the same columns.

    Args:
        columns: the width and dtype of each tensor of rows, such as values and their token ids.
    """

    def __init__(self, columns: Sequence[Column]) -> None:
        self.columns = tuple(columns)
        row_bytes = max(sum(width * dtype.itemsize for width, dtype in columns), 1)
        self.page_rows = max(1, min(PAGE_ROWS, PAGE_BYTES // row_bytes))
        self._most_pages = max(1, SLAB_BYTES // (row_bytes * self.page_rows))
        self._slabs: list[_Slab] = []
        # Filled by requests that are gone, in whichever thread the last reference to one went; emptied by `_take`.
        self._returned: deque[tuple[_Slab, int]] = deque()

    @property
    def num_pages(self) -> int:
        """All pages, in use or free."""
        return sum(slab.num_pages for slab in self._slabs)

    def append(self, block: Sequence[torch.Tensor], picks: Sequence[int], owners: Sequence[StoredRows]) -> None:
        """Copy rows of a step's block to the ends of their requests' rows.

        Args:
            block: one tensor ``[R, C]`` for each of the columns.
            picks: a row of the block for each owner, in increasing order.
            owners: what each row is added to, each once.
        """
        targets: dict[int, tuple[_Slab, list[int], list[int]]] = {}
        needed = sum(1 for owner in owners if owner.count % self.page_rows == 0)
        for pick, owner in zip(picks, owners, strict=True):
            offset = owner.count % self.page_rows
            if offset == 0:
                owner.pages.append(self._take(needed))
                needed -= 1
            slab, page = owner.pages[-1]
            _, rows, sources = targets.setdefault(id(slab), (slab, [], []))
            rows.append(page * self.page_rows + offset)
            sources.append(pick)
            owner.count += 1
        for slab, rows, sources in targets.values():
            rows_R = torch.tensor(rows)
            every = len(sources) == len(block[0])
            for tensor, source in zip(slab.tensors, block, strict=True):
                tensor[rows_R] = source if every else source[torch.tensor(sources)]

    def give_back(self, pages: Sequence[tuple[_Slab, int]]) -> None:
        """Let pages be used again. Safe in any thread."""
        self._returned.extend(pages)

    def _take(self, needed: int) -> tuple[_Slab, int]:
        while self._returned:
            slab, page = self._returned.popleft()
            slab.free.append(page)
            if len(slab.free) == slab.num_pages and len(self._slabs) > 1:
                self._slabs.remove(slab)
        for slab in self._slabs:
            if slab.free:
                return slab, slab.free.pop()
        pages = max(min(max(SLAB_PAGES, needed, self.num_pages), self._most_pages), 1)
        self._slabs.append(_Slab(self.columns, pages, self.page_rows))
        return self._slabs[-1], self._slabs[-1].free.pop()


class StoredRows:
    """The rows of one request. Its pages go back to the store when it is gone."""

    def __init__(self, store: RowStore) -> None:
        self._store = store
        self.pages: list[tuple[_Slab, int]] = []
        self.count = 0

    def join(self) -> list[torch.Tensor]:
        """Copy all rows into one tensor ``[count, C]`` for each of the columns."""
        size, left = self._store.page_rows, self.count
        parts: list[list[torch.Tensor]] = [[] for _ in self._store.columns]
        for slab, page in self.pages:
            stop = page * size + min(size, left)
            for found, tensor in zip(parts, slab.tensors, strict=True):
                found.append(tensor[page * size : stop])
            left -= size
        return [torch.cat(found) for found in parts]

    def __del__(self) -> None:
        self._store.give_back(self.pages)


_STORES: WeakValueDictionary[tuple[Column, ...], RowStore] = WeakValueDictionary()


def store_of(block: Sequence[torch.Tensor]) -> RowStore:
    """Find the store for rows like a block's; it lives as long as any of its rows."""
    columns = tuple((tensor.shape[1], tensor.dtype) for tensor in block)
    store = _STORES.get(columns)
    if store is None:
        store = _STORES[columns] = RowStore(columns)
    return store
