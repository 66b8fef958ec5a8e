"""Reduce many sets of a step's rows at once, with a number of tensor operations that does not depend on how many.

Pure torch. A prefill step of 256 prompts has hundreds of sets of rows to reduce: up to each place where a running value
is kept, and each span. One operation for each would keep the scheduler longer than the step takes, so that all of them
are bags of two indexed sums: of rows into atoms, and of atoms into sets. Sets that begin alike share their atoms, so
that no row is read twice for the running values of one prompt.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import pairwise

import numpy as np
import torch

from torchrl_sglang_hidden.reduce.device import on_device
from torchrl_sglang_hidden.reduce.reducers import Ranges, Reducer
from torchrl_sglang_hidden.reduce.wanted import PromptStep

__all__ = ["Bags", "reduce_steps", "separate"]

# Rows that are widened to float32 at the same time: with D = 8192, 64 MB.
WINDOW = 2048


class Bags:
    """Collects the sets of rows to reduce in one step, and reduces them."""

    def __init__(self) -> None:
        self._starts: list[int] = []
        self._stops: list[int] = []
        self._bags: list[tuple[int, int]] = []

    def __len__(self) -> int:
        return len(self._bags)

    def add_running(self, cuts: Sequence[int], offset: int) -> None:
        """Add the sets of rows from the first cut up to each other one.

        Args:
            cuts: positions, in order.
            offset: added to a position, gives its row.
        """
        first = len(self._starts)
        for start, stop in pairwise(cuts):
            self._add_atoms(start + offset, stop + offset)
            self._bags.append((first, len(self._starts)))

    def add(self, ranges: Ranges, offset: int) -> None:
        """Add a set of rows: those of the positions in some ranges."""
        first = len(self._starts)
        for start, stop in ranges:
            self._add_atoms(start + offset, stop + offset)
        self._bags.append((first, len(self._starts)))

    def _add_atoms(self, start: int, stop: int) -> None:
        while start < stop:
            end = min(stop, (start // WINDOW + 1) * WINDOW)
            self._starts.append(start)
            self._stops.append(end)
            start = end

    def reduce(self, states: Sequence[torch.Tensor], reducer: Reducer) -> torch.Tensor:
        """Return the running value of each set, in the order in which they were added: float32 ``[G, K, D]``.

        Args:
            states: K times ``[N, D]``, the same rows of each layer. Never aliased: they may be static buffers of a
                CUDA graph.
            reducer: reduces them.
        """
        device = states[0].device
        starts_A, stops_A = np.array(self._starts), np.array(self._stops)
        window_A = starts_A // WINDOW
        order_A = np.argsort(window_A, kind="stable")
        atoms: list[torch.Tensor] = []
        for window in np.unique(window_A):
            chosen = order_A[window_A[order_A] == window]
            first = int(window) * WINDOW
            index_M, bag_M, offsets_A = _flatten(starts_A[chosen] - first, stops_A[chosen] - first)
            indices = [on_device(array, device) for array in (index_M, bag_M, offsets_A)]
            rows = slice(first, min(first + WINDOW, states[0].shape[0]))
            atoms.append(torch.stack([reducer.bags(state_ND[rows], *indices) for state_ND in states], 1))
        atoms_AKD = atoms[0] if len(atoms) == 1 else torch.cat(atoms)
        if len(atoms) == 1 and self._bags == [(atom, atom + 1) for atom in range(len(self._starts))]:
            return atoms_AKD
        bag_starts_G, bag_stops_G = np.array(self._bags).T
        place_A = np.empty_like(order_A)
        place_A[order_A] = np.arange(len(order_A))
        index_M, bag_M, offsets_G = _flatten(bag_starts_G, bag_stops_G)
        indices = [on_device(array, device) for array in (place_A[index_M], bag_M, offsets_G)]
        return reducer.bags(atoms_AKD.flatten(1), *indices).reshape(-1, *atoms_AKD.shape[1:])


def reduce_steps(
    steps: Iterable[tuple[PromptStep, int]], states: Sequence[torch.Tensor], reducer: Reducer
) -> torch.Tensor | None:
    """Return the value of each of `PromptStep.groups`, step after step: float32 ``[G, K, D]``; None for nothing.

    Args:
        steps: what is wanted of one forward step, each with what makes a row of a position when it is added to it.
        states: as for `Bags.reduce`.
        reducer: the one of all these requests. Spans with another have bags of their own.
    """
    bags = {reducer.running: (reducer, Bags())}
    found: list[tuple[str, int]] = []
    for step, offset in steps:
        _, own = bags[reducer.running]
        found += [(reducer.running, len(own) + place) for place in range(step.num_running)]
        own.add_running(step.cuts, offset)
        for part in step.parts:
            one = part.reducer or reducer
            _, its = bags.setdefault(one.running, (one, Bags()))
            found.append((one.running, len(its)))
            its.add(part.ranges, offset)
    if not found:
        return None
    first: dict[str, int] = {}
    values: list[torch.Tensor] = []
    for running, (one, its) in bags.items():
        if len(its):
            first[running] = sum(len(one) for one in values)
            values.append(its.reduce(states, one))
    if len(values) == 1:
        return values[0]
    order_G = on_device([first[running] + place for running, place in found], states[0].device)
    return torch.cat(values).index_select(0, order_G)


def _flatten(starts_G: np.ndarray, stops_G: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """List the numbers in each of G ranges one after another, the range of each, and where each range begins."""
    lengths_G = stops_G - starts_G
    offsets_G = np.cumsum(lengths_G) - lengths_G
    bag_M = np.repeat(np.arange(len(lengths_G)), lengths_G)
    return np.arange(len(bag_M)) + np.repeat(starts_G - offsets_G, lengths_G), bag_M, offsets_G


def separate(values_GKD: torch.Tensor) -> list[torch.Tensor]:
    """Copy G values to memory of their own, with one operation: a view of one would keep all of them alive."""
    separated: list[torch.Tensor] = torch.ops.aten.unbind_copy.int(values_GKD)
    return separated
