"""Keeps the running values over the responses under way in one matrix on the device: a slot for each request.

A decode step then costs a few tensor operations however many requests and layers it serves, and nothing travels to the
host until a request finishes. Which tokens were committed is known on the host a step later, so that rows are folded in
then (`Slots.fold`) and not when they are computed: a row behind the end of a response, or of a request that was put
back into the queue, is folded into slot 0, which nobody reads.

Knows nothing of SGLang or of requests.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from torchrl_sglang_hidden.reduce.device import on_device
from torchrl_sglang_hidden.reduce.reducers import Reducer
from torchrl_sglang_hidden.server.side_stream import Landing, SideStream, side_stream_of

__all__ = ["DISCARDED", "Slot", "Slots"]

# The slot of rows that nobody reads.
DISCARDED = 0

_SMALLEST = 64


class Slot:
    """One request's place in the matrix. It is given back when the request is forgotten.

    Attributes:
        index: its row.
    """

    __slots__ = ("_free", "index")

    def __init__(self, index: int, free: list[int]) -> None:
        self.index, self._free = index, free

    def __del__(self) -> None:
        self._free.append(self.index)


class Slots:
    """The running values of all requests that want the same layers and the same kind of running value.

    Args:
        layers: canonical ids, K of them.
        reducer: folds rows in.
    """

    def __init__(self, layers: tuple[int, ...], reducer: Reducer) -> None:
        self.layers = layers
        self.reducer = reducer
        self.stream: SideStream | None = None
        self._free: list[int] = []
        self._used = DISCARDED + 1
        self._values_SKD: torch.Tensor | None = None
        self._reserved = False

    def take(self) -> Slot:
        """Take a free slot; its memory is made when the first row comes."""
        if self._free:
            return Slot(self._free.pop(), self._free)
        self._used += 1
        return Slot(self._used - 1, self._free)

    @property
    def is_idle(self) -> bool:
        """Whether no request has a slot, and none was reserved."""
        return not self._reserved and len(self._free) == self._used - DISCARDED - 1

    def mark(self, device: torch.device) -> Any:
        """Mark what the current stream has queued so far, for `fold`."""
        if self.stream is None:
            self.stream = side_stream_of(device)
        return self.stream.mark()

    @property
    def device_bytes(self) -> int:
        """The matrix's size on the device."""
        return 0 if self._values_SKD is None else self._values_SKD.nbytes

    def reserve(self, hidden_size: int, device: torch.device, slots: int) -> None:
        """Make room for a number of slots before they are needed, so that SGLang sees the memory as taken."""
        self._reserved = True
        self._make_room(slots, hidden_size, device)

    def fold(self, rows_NKD: torch.Tensor, mark: Any, slots: Sequence[int], first: Sequence[int]) -> None:
        """Fold one row into each of N slots.

        Args:
            rows_NKD: in the model's dtype.
            mark: of the stream that made them, see `SideStream.mark`.
            slots: the slot of each row; no slot twice, except for `DISCARDED`.
            first: those whose row is the first of its request.

        Raises:
            torch.OutOfMemoryError: the device has no room for so many slots. No row was folded.
        """
        self._make_room(self._used, rows_NKD.shape[2], rows_NKD.device)
        assert self._values_SKD is not None
        assert self.stream is not None
        with self.stream.after(mark, rows_NKD):
            if first:
                self._values_SKD.index_fill_(0, on_device(first, rows_NKD.device), self.reducer.empty)
            self.reducer.fold(self._values_SKD, on_device(slots, rows_NKD.device), rows_NKD.float())

    def read(self, slots: Sequence[int]) -> Landing:
        """Start a copy of some slots to the host, float32 ``[len(slots), K, D]``; rows were folded into all of them."""
        assert self._values_SKD is not None
        assert self.stream is not None
        with self.stream.after(None):
            return self.stream.land(self._values_SKD.index_select(0, on_device(slots, self._values_SKD.device)))

    def _make_room(self, slots: int, hidden_size: int, device: torch.device) -> None:
        before_SKD = self._values_SKD
        if before_SKD is not None and len(before_SKD) >= slots:
            return
        if self.stream is None:
            self.stream = side_stream_of(device)
        with self.stream.after(None):
            size = max(2 * (0 if before_SKD is None else len(before_SKD)), slots, _SMALLEST)
            values_SKD = torch.zeros(size, len(self.layers), hidden_size, dtype=torch.float32, device=device)
            if before_SKD is not None:
                values_SKD[: len(before_SKD)] = before_SKD
            self._values_SKD = values_SKD
