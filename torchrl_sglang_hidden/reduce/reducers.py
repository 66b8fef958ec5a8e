"""Reduce the rows of a segment or span to one vector: one reducer for each kind of pooling.

Pure torch; knows nothing of requests, positions or chunks. A reducer keeps nothing itself: whoever pools keeps a
running value, float32 ``[*, K, D]``, and the number of rows that it stands for. `reducer_of` is the one place where
the name of a pooling becomes code. To add a kind, add its name to `Pooling` in ``spec/span_base.py``, and its
case there.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from typing import ClassVar, assert_never

import torch
from torch.nn.functional import embedding_bag

from torchrl_sglang_hidden.reduce.device import on_device
from torchrl_sglang_hidden.spec.hidden import Pooling

__all__ = ["Last", "Max", "Mean", "Ranges", "Reducer", "Sum", "reduce_rows", "reducer_of"]

Ranges = tuple[tuple[int, int], ...]


class Reducer(ABC):
    """Turns rows into a running value, merges values, and reads the result off the last of them.

    The running value of one row is the row itself in float32: a single row is merged as it is, and never goes through
    `rows`.

    Attributes:
        running: which running values this reducer makes. Reducers of one name have the same `rows` and `merge`, so that
            a mean can go on from the sum that was kept of a prompt's beginning.
        needs_all_rows: whether every row of a segment counts; otherwise its last one stands for all of them.
        empty: what the running value of no rows is in every dimension.
    """

    running: ClassVar[str]
    needs_all_rows: ClassVar[bool] = True
    empty: ClassVar[float] = 0.0

    @abstractmethod
    def rows(self, rows: torch.Tensor) -> torch.Tensor:
        """Reduce one or more rows ``[N, *]`` of any floating dtype to a running value, float32 ``[*]``."""

    @abstractmethod
    def merge(self, before: torch.Tensor, after: torch.Tensor) -> torch.Tensor:
        """Merge the running values of two runs of rows, in the order of their positions; writes into neither.

        The running value of a single row is the row itself in float32, so this also adds one row.
        """

    @abstractmethod
    def fold(self, values_SKD: torch.Tensor, slots_N: torch.Tensor, rows_NKD: torch.Tensor) -> None:
        """Merge one more row into each of N running values, in place: one tensor operation however many they are.

        Args:
            values_SKD: the running values, float32; those of no rows yet are `empty`.
            slots_N: int64, which value each row is merged into: no value twice, except for one that nobody reads.
            rows_NKD: float32.
        """

    @abstractmethod
    def bags(
        self, rows_ND: torch.Tensor, index_M: torch.Tensor, bag_M: torch.Tensor, starts_G: torch.Tensor
    ) -> torch.Tensor:
        """Reduce G bags of rows to their running values, float32 ``[G, D]``: few operations however many there are.

        Args:
            rows_ND: rows of any floating dtype.
            index_M: int64, the rows in the bags, bag after bag.
            bag_M: int64, the bag of each of them.
            starts_G: int64, where each bag begins in ``index_M``; no bag is empty.
        """

    def result(self, value: torch.Tensor, count: int) -> torch.Tensor:
        """Return what a running value over ``count`` rows pools to; overridden together with `resume`."""
        return value

    def resume(self, result: torch.Tensor, count: int) -> torch.Tensor:
        """Return the running value from a result over ``count`` rows, so that more rows can be merged."""
        return result


class Sum(Reducer):
    """Adds rows up, in float32 whatever their dtype."""

    running = "sum"

    def rows(self, rows: torch.Tensor) -> torch.Tensor:
        """Reduce rows to their sum."""
        return rows.sum(0, dtype=torch.float32)

    def merge(self, before: torch.Tensor, after: torch.Tensor) -> torch.Tensor:
        """Add two sums."""
        return before + after

    def fold(self, values_SKD: torch.Tensor, slots_N: torch.Tensor, rows_NKD: torch.Tensor) -> None:
        """Add a row to each sum."""
        values_SKD.index_add_(0, slots_N, rows_NKD)

    def bags(
        self, rows_ND: torch.Tensor, index_M: torch.Tensor, bag_M: torch.Tensor, starts_G: torch.Tensor
    ) -> torch.Tensor:
        """Add up the rows of each bag, in their order and in float32: the same bits on every run, on every device."""
        return embedding_bag(index_M, rows_ND.float(), starts_G, mode="sum")


class Mean(Sum):
    """Adds rows up in float32, and divides by their number at the end."""

    def result(self, value: torch.Tensor, count: int) -> torch.Tensor:
        """Divide the sum by the number of its rows."""
        return value / count

    def resume(self, result: torch.Tensor, count: int) -> torch.Tensor:
        """Multiply the mean by the number of its rows."""
        return result * count


class Max(Reducer):
    """Takes the largest value in each dimension. NaN wins over every number, so that a broken row shows."""

    running = "max"
    empty = -math.inf

    def rows(self, rows: torch.Tensor) -> torch.Tensor:
        """Reduce rows to their elementwise maximum. Exact in any dtype: one of the values, widened to float32."""
        return rows.amax(0).float()

    def merge(self, before: torch.Tensor, after: torch.Tensor) -> torch.Tensor:
        """Take the larger of two maxima in each dimension."""
        return torch.maximum(before, after)

    def fold(self, values_SKD: torch.Tensor, slots_N: torch.Tensor, rows_NKD: torch.Tensor) -> None:
        """Take the larger one of each maximum and its row."""
        index_NKD = slots_N[:, None, None].expand(rows_NKD.shape)
        values_SKD.scatter_reduce_(0, index_NKD, rows_NKD, "amax")

    def bags(
        self, rows_ND: torch.Tensor, index_M: torch.Tensor, bag_M: torch.Tensor, starts_G: torch.Tensor
    ) -> torch.Tensor:
        """Take the maximum of each bag. `embedding_bag` has one too, in which a NaN does not win."""
        rows_MD = rows_ND.index_select(0, index_M)
        largest_GD = rows_ND.new_full((len(starts_G), rows_ND.shape[1]), self.empty)
        return largest_GD.scatter_reduce_(0, bag_M[:, None].expand(rows_MD.shape), rows_MD, "amax").float()


class Last(Reducer):
    """Takes the last row."""

    running = "last"
    needs_all_rows = False

    def rows(self, rows: torch.Tensor) -> torch.Tensor:
        """Reduce rows to the last one; a copy, never a view."""
        return rows[-1].to(torch.float32, copy=True)

    def merge(self, before: torch.Tensor, after: torch.Tensor) -> torch.Tensor:
        """Take the later one."""
        return after

    def fold(self, values_SKD: torch.Tensor, slots_N: torch.Tensor, rows_NKD: torch.Tensor) -> None:
        """Write each row over the one before."""
        values_SKD.index_copy_(0, slots_N, rows_NKD)

    def bags(
        self, rows_ND: torch.Tensor, index_M: torch.Tensor, bag_M: torch.Tensor, starts_G: torch.Tensor
    ) -> torch.Tensor:
        """Take the last row of each bag."""
        ends_G = torch.cat([starts_G[1:], starts_G.new_full((1,), len(index_M))]) - 1
        return rows_ND.index_select(0, index_M[ends_G]).to(torch.float32, copy=True)


def reducer_of(pooling: Pooling) -> Reducer:
    """Return the reducer of a kind of pooling. A kind without one fails the type check, and raises here."""
    match pooling:
        case "mean":
            return Mean()
        case "last":
            return Last()
        case "max":
            return Max()
        case "sum":
            return Sum()
        case _:
            assert_never(pooling)


def reduce_rows(rows_ND: torch.Tensor, ranges: Ranges, reducer: Reducer) -> torch.Tensor:
    """Reduce the rows in some ranges, in order, to one running value, float32 ``[D]``.

    Never a view of ``rows_ND``: that may be a static buffer of a CUDA graph, which the next step overwrites.
    """
    if len(ranges) == 1:
        chosen_ND = rows_ND[ranges[0][0] : ranges[0][1]]
    else:
        # One kernel however many ranges.
        indices = [index for start, stop in ranges for index in range(start, stop)]
        chosen_ND = rows_ND.index_select(0, on_device(indices, rows_ND.device))
    if chosen_ND.shape[0] == 1:
        return chosen_ND[0].to(torch.float32, copy=True)
    return reducer.rows(chosen_ND)
