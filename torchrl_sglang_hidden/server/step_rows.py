"""Take one forward step's hidden rows on the device, and hand them to their requests once its tokens are committed.

What a step must bring is planned by `Capture.plan_step`; this module carries the plan out. The number of tensor
operations does not depend on how many requests the step serves, nor, in a decode step, on how many layers: requests
that want the same layers pooled alike are one `LayerGroup`, whose rows are stacked, copied and folded together.

Every rank of a tensor-parallel server counts; only the one that answers takes rows. So whether a row was counted never
depends on whether it could be taken: where memory is short the request is refused, and all ranks go on alike.

Knows SGLang's batches and auxiliary outputs by attribute name, and imports nothing of SGLang. Runs inside the
scheduler, where an exception ends the server: what does not fit is left out, and the client's count finds it.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, Protocol

import torch

from torchrl_sglang_hidden.counters import SERVER, timed
from torchrl_sglang_hidden.reduce.bags import reduce_steps, separate
from torchrl_sglang_hidden.reduce.device import on_device
from torchrl_sglang_hidden.reduce.pooling import NO_VALUE
from torchrl_sglang_hidden.reduce.wanted import PromptStep
from torchrl_sglang_hidden.server.side_stream import Landing
from torchrl_sglang_hidden.server.slots import DISCARDED, Slots
from torchrl_sglang_hidden.server.state_store import StateStore, StateStoreFullError
from torchrl_sglang_hidden.server.tracked_request import PromptSelection, TrackedRequest

logger = logging.getLogger(__name__)

__all__ = ["OUT_OF_MEMORY", "DeviceRows", "GroupRows", "HostRows", "Keeper", "LayerGroup", "StepPlan"]

# Steps of more rows are prefills: selecting the few wanted rows of each layer costs less than stacking all rows.
_MOST_STACKED = 1024

_FULL = "the server ran out of memory on its device for this request's states; lower --mem-fraction-static, ask for "
OUT_OF_MEMORY = _FULL + "fewer layers, or send fewer requests at a time"
LOST_VALUE = "the states of this prompt's beginning were lost when memory was short; empty the cache (/flush_cache)"


class Keeper(Protocol):
    """What a step's results go to beside the requests themselves: `Capture`."""

    sends: bool
    hidden_size: int

    def keep_sums(self, tracked: TrackedRequest) -> None:
        """Store the running values that a request came by."""

    def store(self, rows_MKD: torch.Tensor) -> StateStore:
        """Return the store for rows of that depth, width and dtype."""

    def later(self, job: Callable[[], None], num_bytes: int = 0) -> None:
        """Do something in the finisher's thread; it keeps so many bytes until it is done."""

    def land(self, landing: Landing | None, due: list[tuple[TrackedRequest, int]]) -> None:
        """Note running values over prompt and response that are on their way to the host."""

    def land_all(self) -> None:
        """Add those to their requests."""


@dataclass(slots=True)
class LayerGroup:
    """What the requests that want the same layers, pooled alike, want of one step.

    Args:
        slots: where their running values are kept.
        rows: the batch rows that produce a token.
        sources: the row of the step's states that produces each of them.
        tracked: their requests.
        prompts: what is wanted of prompts.
    """

    slots: Slots
    rows: list[int] = field(default_factory=list)
    sources: list[int] = field(default_factory=list)
    tracked: list[TrackedRequest] = field(default_factory=list)
    prompts: list[PromptSelection] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class GroupRows:
    """The rows of one `LayerGroup`.

    Args:
        group: what was planned.
        produced_NKD: the rows that produce tokens, on the device and in the model's dtype; None where nobody pools
            them.
        mark: of the stream that made them.
        values_GKD: float32, what was reduced of the prompts; None for nothing. On the host in `HostRows`.
        kept: by dtype, the rows wanted as they are. On the host in `HostRows`. In a step with prompts these are each
            selection's prompt rows, then for each request that keeps any the row that produces its token; in other
            steps all of ``produced_NKD``.
        failed: why nothing could be taken; empty where it was.
    """

    group: LayerGroup
    produced_NKD: torch.Tensor | None = None
    mark: Any = None
    values_GKD: torch.Tensor | None = None
    kept: Mapping[torch.dtype | None, torch.Tensor] = field(default_factory=dict)
    failed: str = ""


@dataclass(frozen=True, slots=True)
class HostRows:
    """One step's rows on the host, SGLang's ``HostAuxiliaryOutput``; what is folded in stays on the device."""

    groups: tuple[GroupRows, ...]
    plan: StepPlan

    @timed
    def consume(self, batch: Any, commits: Sequence[Any]) -> None:
        """Hand the rows to their requests. ``commits[i]`` is None when batch row i committed no token."""
        self.plan.keeper.land_all()
        for rows in self.groups:
            _GroupConsumer(rows, self.plan.keeper, batch.reqs).consume(commits)
        SERVER.add(steps=1)


class _GroupConsumer:
    """Hands the rows of one group to their requests."""

    def __init__(self, rows: GroupRows, keeper: Keeper, reqs: Sequence[Any]) -> None:
        self._rows, self._group, self._keeper, self._reqs = rows, rows.group, keeper, reqs
        self._places: dict[torch.dtype | None, list[int]] = {dtype: [] for dtype in rows.kept}
        self._stores = {dtype: keeper.store(kept_MKD) for dtype, kept_MKD in rows.kept.items()}

    def consume(self, commits: Sequence[Any]) -> None:
        rows, group, keeper = self._rows, self._group, self._keeper
        if rows.failed:
            for tracked in (*group.tracked, *(selection.tracked for selection in group.prompts)):
                # A request that has finished needs nothing of the step that was launched behind its last token.
                if not tracked.closed:
                    tracked.refuse(rows.failed)
        if group.prompts:
            self._add_prompts()
        slots, first, due = self._count_produced(commits)
        if rows.produced_NKD is not None and any(slots):
            self._fold(rows.produced_NKD, slots, first)
        if due:
            taken = rows.produced_NKD is not None and not all(tracked.refused for tracked, _ in due)
            keeper.land(self._read(due) if taken else None, due)
        for dtype, kept_MKD in rows.kept.items():
            if any(self._places[dtype]):
                keeper.later(partial(self._write, dtype, kept_MKD), kept_MKD.nbytes)

    def _is_there(self, row: int, tracked: TrackedRequest) -> bool:
        """Return whether the request of a batch row is the one that the step was planned for, and goes on."""
        return not tracked.closed and row < len(self._reqs) and tracked.req() is self._reqs[row]

    def _count_produced(self, commits: Sequence[Any]) -> tuple[list[int], list[int], list[tuple[TrackedRequest, int]]]:
        """Count the rows whose tokens were committed.

        Returns:
            The slot of each row, the slots whose first row this is, and the requests whose running value over prompt
            and response is worth keeping, with the response's rows so far.
        """
        slots: list[int] = []
        first: list[int] = []
        due: list[tuple[TrackedRequest, int]] = []
        keeps = bool(self._places)
        for row, tracked in zip(self._group.rows, self._group.tracked, strict=True):
            pools, slot = tracked.pools, DISCARDED
            commit = commits[row] if self._is_there(row, tracked) else None
            counted = commit is not None and pools.count_produced(commit.output_index)
            if counted:
                slot = tracked.slot_index
                if pools.count == 1 and slot != DISCARDED:
                    first.append(slot)
                if pools.pools_full and pools.sum_is_due:
                    due.append((tracked, pools.count))
            slots.append(slot)
            if keeps:
                self._place_produced(tracked, counted)
        return slots, first, due

    def _fold(self, produced_NKD: torch.Tensor, slots: list[int], first: list[int]) -> None:
        try:
            self._group.slots.fold(produced_NKD, self._rows.mark, slots, first)
        except torch.OutOfMemoryError:
            for slot, tracked in zip(slots, self._group.tracked, strict=True):
                if slot != DISCARDED:
                    tracked.refuse(OUT_OF_MEMORY)

    def _read(self, due: Sequence[tuple[TrackedRequest, int]]) -> Landing | None:
        try:
            return self._group.slots.read([tracked.slot_index for tracked, _ in due])
        except torch.OutOfMemoryError:
            return None  # a prompt that begins alike is refused when it needs them

    def _write(self, dtype: torch.dtype | None, kept_MKD: torch.Tensor) -> None:
        """Keep a step's rows, in the finisher's thread."""
        try:
            self._stores[dtype].write(kept_MKD, self._places[dtype])
        except Exception as error:
            # Whatever it was: answered as they are, the requests would have the numbers of others.
            logger.exception("torchrl_sglang_hidden: the rows of a step could not be kept")
            for tracked in (*self._group.tracked, *(selection.tracked for selection in self._group.prompts)):
                if tracked.keeps_rows and tracked.row_dtype == dtype:
                    tracked.refuse(f"its token states could not be kept ({error}); see the server's log")

    # --- prompts -----------------------------------------------------------------------------------------------------

    def _add_prompts(self) -> None:
        accepted = [
            self._is_there(selection.row, selection.tracked) and selection.tracked.pools.accepts(selection.step)
            for selection in self._group.prompts
        ]
        values = iter(self._values(accepted))
        for selection, is_accepted in zip(self._group.prompts, accepted, strict=True):
            tracked, step = selection.tracked, selection.step
            found = [next(values) for _ in range(step.num_groups)]
            if is_accepted:
                tracked.pools.add_prompt(step, found)
                self._keeper.keep_sums(tracked)
            if step.rows is not None and tracked.row_dtype in self._places:
                self._place_prompt(tracked, step, is_accepted)

    def _values(self, accepted: Sequence[bool]) -> Sequence[torch.Tensor]:
        """Return one value for each group of each selection, those of running values merged to what was before."""
        values_GKD = self._rows.values_GKD
        before: list[torch.Tensor] = []
        index: list[int] = []
        place = 0
        for selection, is_accepted in zip(self._group.prompts, accepted, strict=True):
            tracked, step = selection.tracked, selection.step
            before_KD = tracked.pools.value_before(step) if is_accepted and step.num_running else None
            if before_KD is not None and values_GKD is not None:
                if before_KD.numel():
                    before += [before_KD] * step.num_running
                    index += range(place, place + step.num_running)
                else:
                    tracked.refuse(LOST_VALUE)
            place += step.num_groups
        if values_GKD is None:
            return [NO_VALUE] * place
        if before:
            index_I = torch.tensor(index)
            merged = self._group.slots.reducer.merge(torch.stack(before), values_GKD.index_select(0, index_I))
            values_GKD = values_GKD.index_copy(0, index_I, merged)
        return separate(values_GKD)

    # --- rows that are kept ------------------------------------------------------------------------------------------

    def _place_prompt(self, tracked: TrackedRequest, step: PromptStep, is_accepted: bool) -> None:
        assert step.rows is not None
        start, stop = step.rows
        places = [DISCARDED] * (stop - start)
        if is_accepted and not tracked.refused:
            try:
                places = tracked.prompt_places(step, self._stores[tracked.row_dtype])
            except StateStoreFullError as error:
                tracked.refuse(str(error))
        self._places[tracked.row_dtype] += places

    def _place_produced(self, tracked: TrackedRequest, counted: bool) -> None:
        """Note where the row of a request is kept: nowhere where it was not counted, or is not wanted as it is."""
        for dtype, places in self._places.items():
            mine = tracked.keeps_produced and dtype == tracked.row_dtype
            if mine and counted and not tracked.refused:
                try:
                    places.append(tracked.produced_place(self._stores[dtype]))
                except StateStoreFullError as error:
                    tracked.refuse(str(error))
                    places.append(DISCARDED)
            elif mine or not self._group.prompts:
                # In a step with prompts, only requests that keep rows have one here.
                places.append(DISCARDED)


@dataclass(frozen=True, slots=True)
class DeviceRows:
    """One step's rows on the device, SGLang's ``DeviceAuxiliaryOutput``. The fields are those of `HostRows`."""

    groups: tuple[GroupRows, ...]
    plan: StepPlan

    def copy_to_host(self, copy: Callable[[torch.Tensor], torch.Tensor]) -> HostRows:
        """Start the copies of what is wanted on the host now."""
        groups = tuple(
            rows
            if rows.values_GKD is None and not rows.kept
            else replace(
                rows,
                values_GKD=None if rows.values_GKD is None else copy(rows.values_GKD),
                kept={dtype: copy(kept_MKD) for dtype, kept_MKD in rows.kept.items()},
            )
            for rows in self.groups
        )
        return HostRows(groups, self.plan)


@dataclass(frozen=True, slots=True, weakref_slot=True)
class StepPlan:
    """What to take from one forward step, noted before it ran.

    Args:
        groups: what is wanted.
        num_rows: all rows of the step, wanted or not.
        keeper: takes the results.
    """

    groups: tuple[LayerGroup, ...]
    num_rows: int
    keeper: Keeper

    @property
    def layers(self) -> set[int]:
        """The layers that anybody wants."""
        return {layer for group in self.groups for layer in group.slots.layers}

    @timed
    def gather(self, states: Mapping[int, torch.Tensor]) -> DeviceRows | None:
        """Take the planned rows of the step's states, on the device. What is returned aliases none of them.

        Args:
            states: by layer, each ``[N, D]``. They may be static buffers of a CUDA graph, which the next step
                overwrites.
        """
        found = {layer: states.get(layer) for layer in self.layers}
        if any(state is None or state.dim() != 2 or state.shape[0] < self.num_rows for state in found.values()):
            return None
        groups = [self._take(group, [states[layer] for layer in group.slots.layers]) for group in self.groups]
        return DeviceRows(tuple(groups), self)

    def _take(self, group: LayerGroup, states: Sequence[torch.Tensor]) -> GroupRows:
        self.keeper.hidden_size = states[0].shape[1]
        if not self.keeper.sends:
            return GroupRows(group)
        states = [state_ND if len(state_ND) == self.num_rows else state_ND[: self.num_rows] for state_ND in states]
        try:
            kept_dtypes = dict.fromkeys(tracked.row_dtype for tracked in self._keeping(group))
            produced_NKD = None
            pooled = any(tracked.slot_index != DISCARDED for tracked in group.tracked)
            if pooled or (kept_dtypes and not group.prompts):
                produced_NKD = self._select(states, group.sources)
            kept = {dtype: self._kept(group, states, dtype, produced_NKD) for dtype in kept_dtypes}
            return GroupRows(
                group=group,
                produced_NKD=produced_NKD if pooled else None,
                mark=group.slots.mark(states[0].device),
                values_GKD=reduce_steps(
                    ((selection.step, selection.offset) for selection in group.prompts), states, group.slots.reducer
                ),
                kept=kept,
            )
        except torch.OutOfMemoryError:
            return GroupRows(group, failed=OUT_OF_MEMORY)

    def _keeping(self, group: LayerGroup) -> list[TrackedRequest]:
        """List the requests that want rows of this step as they are."""
        prompts = [selection.tracked for selection in group.prompts if selection.step.rows is not None]
        return [*prompts, *(tracked for tracked in group.tracked if tracked.keeps_produced)]

    def _kept(
        self,
        group: LayerGroup,
        states: Sequence[torch.Tensor],
        dtype: torch.dtype | None,
        produced_NKD: torch.Tensor | None,
    ) -> torch.Tensor:
        if not group.prompts:
            assert produced_NKD is not None
            return produced_NKD if dtype is None else produced_NKD.type(dtype)
        index: list[int] = []
        for selection in group.prompts:
            if selection.step.rows is not None and selection.tracked.row_dtype == dtype:
                start, stop = selection.step.rows
                index += range(start + selection.offset, stop + selection.offset)
        for source, tracked in zip(group.sources, group.tracked, strict=True):
            if tracked.keeps_produced and tracked.row_dtype == dtype:
                index.append(source)
        kept_MKD = self._select(states, index)
        return kept_MKD if dtype is None else kept_MKD.type(dtype)

    def _select(self, states: Sequence[torch.Tensor], rows: Sequence[int]) -> torch.Tensor:
        """Copy some rows of all layers, ``[len(rows), K, D]``."""
        if len(rows) == self.num_rows and rows == list(range(self.num_rows)):
            return torch.stack(list(states), 1)
        index_R = on_device(rows, states[0].device, torch.int64)
        if self.num_rows <= _MOST_STACKED:
            return torch.stack(list(states), 1).index_select(0, index_R)
        return torch.stack([state_ND.index_select(0, index_R) for state_ND in states], 1)
