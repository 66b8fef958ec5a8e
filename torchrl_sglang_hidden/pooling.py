"""Pooling of hidden rows, the same code inside the server and on the client.

Knows nothing of SGLang, wires or TensorDicts. Rows arrive in pieces, in order of position: chunks of a prompt, then one
row per generated token.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch

from torchrl_sglang_hidden.specs import Pooling, Segment, rows_expected

__all__ = ["RequestPools", "reduce_rows"]


def reduce_rows(hidden_ND: torch.Tensor, start: int, stop: int, pooling: Pooling) -> torch.Tensor:
    """Reduces rows ``start … stop-1`` to one float32 vector ``[D]``: their sum for ``"mean"``, the last for ``"last"``.

    Never a view of ``hidden_ND``: that may be a static buffer of a CUDA graph, which the next step overwrites.
    """
    if pooling == "last" or stop - start == 1:
        return hidden_ND[stop - 1].to(torch.float32, copy=True)
    return hidden_ND[start:stop].sum(0, dtype=torch.float32)


@dataclass(slots=True)
class _Pool:
    """The running value of one segment: a float32 sum or the latest row, and the rows it stands for."""

    value_D: torch.Tensor | None = None
    count: int = 0

    def add(self, rows_D: torch.Tensor, count: int) -> None:
        self.value_D = rows_D if self.value_D is None else self.value_D + rows_D
        self.count += count

    def replace(self, row_D: torch.Tensor, count: int) -> None:
        self.value_D, self.count = row_D, count


@dataclass(slots=True)
class RequestPools:
    """Pools the segments of one request while it is computed.

    Every position is counted once. A piece that does not continue where the last one ended is not added: the count
    then stays short of the tokens, which the client's check turns into an `AlignmentError`.

    Args:
        segments: the segments wanted.
        pooling: how their rows are reduced.
        num_prompt: P.
    """

    segments: tuple[Segment, ...]
    pooling: Pooling
    num_prompt: int
    _pools: dict[Segment, _Pool] = field(init=False)
    _next_position: int = field(init=False, default=0)

    def __post_init__(self) -> None:
        self._pools = {segment: _Pool() for segment in self.segments}

    @property
    def wants_prompt(self) -> bool:
        """Whether prompt rows are pooled at all."""
        return "prompt" in self._pools or (self.pooling == "mean" and "full" in self._pools)

    @property
    def needs_uncached_prompt(self) -> bool:
        """Whether a prefix-cache hit would still leave a gap: all prompt rows count, and some are yet to come."""
        return self.pooling == "mean" and self.wants_prompt and self._next_position < self.num_prompt

    def prompt_span(self, start: int, stop: int) -> tuple[int, int] | None:
        """Which of the positions ``start … stop-1`` of a forward step this request pools as prompt, or None."""
        stop = min(stop, self.num_prompt)
        if not self.wants_prompt or start >= stop:
            return None
        if self.pooling == "last":
            return (stop - 1, stop) if stop == self.num_prompt else None
        return (start, stop)

    def add_prompt(self, rows_D: torch.Tensor, start: int, stop: int) -> None:
        """Adds the reduced prompt positions ``start … stop-1``, float32 ``[D]``."""
        if self.pooling == "last":
            if "prompt" in self._pools:
                self._pools["prompt"].replace(rows_D, stop)
            return
        if self._next_position == self.num_prompt:
            return  # computed again after a retraction
        if start == 0 and self._next_position:
            self._pools = {segment: _Pool() for segment in self.segments}  # retracted in the middle of its prompt
        elif start != self._next_position:
            return
        self._next_position = stop
        for segment in ("prompt", "full"):
            if segment in self._pools:
                self._pools[segment].add(rows_D, stop - start)

    def add_produced(self, row_D: torch.Tensor, index: int) -> None:
        """Adds the row that produced response token ``index``, float32 ``[D]``."""
        response, full = self._pools.get("response"), self._pools.get("full")
        if response is not None and response.count == index:
            if self.pooling == "mean":
                response.add(row_D, 1)
            else:
                response.replace(row_D, index + 1)
        if full is None:
            return
        count = rows_expected("full", self.num_prompt, index + 1)
        if self.pooling == "last":
            full.replace(row_D, count)
        elif index > 0 and full.count == count - 1:  # token 0's row is the last of the prompt, already in
            full.add(row_D, 1)

    def results(self) -> dict[Segment, tuple[torch.Tensor | None, int]]:
        """The pooled float32 ``[D]`` of each segment (None before any row), and the count of its rows.

        For ``"last"`` the count says where in the segment the row stands: it equals the segment's length only if the
        row is the segment's last.
        """
        out: dict[Segment, tuple[torch.Tensor | None, int]] = {}
        for segment, pool in self._pools.items():
            value = pool.value_D
            if value is not None and self.pooling == "mean":
                value = value / pool.count
            out[segment] = (value, pool.count)
        return out
