"""Reduce one forward step's hidden rows on the device, and add them to their requests' pools on the host.

Knows SGLang's batches and auxiliary outputs by attribute name, and imports nothing of SGLang. What a step must bring is
planned by `Capture.plan_step`; this module carries the plan out. Runs inside the scheduler, where an exception ends the
server: what does not fit is left out, and the client's count finds it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from torchrl_sglang_hidden.protocol import Options
from torchrl_sglang_hidden.reduce.pooling import RequestPools
from torchrl_sglang_hidden.reduce.reducers import reduce_rows
from torchrl_sglang_hidden.reduce.token_logits import RequestLogits
from torchrl_sglang_hidden.reduce.wanted import PromptStep
from torchrl_sglang_hidden.server.prefix_sums import PrefixKeys

__all__ = ["DeviceRows", "HostRows", "RowSelection", "StepPlan", "TrackedRequest"]


@dataclass(slots=True)
class TrackedRequest:
    """One request under way.

    Args:
        pools: pools its states.
        options: what it asked for.
        logits: collects its logits.
        keys: the names of its tokens' beginnings.
        epoch: value of the cache-clear counter when the request started. If it has changed, this request's running
            values belong to old weights and must not be stored.
        limit: most positions that it may take from the prefix cache; None for any number.
        base: the running value over that many first positions, where one is kept.
    """

    pools: RequestPools
    options: Options
    logits: RequestLogits
    keys: PrefixKeys
    epoch: int
    limit: int | None = None
    base: tuple[int, torch.Tensor] | None = None

    @property
    def reads_prompt(self) -> bool:
        """Whether anything of the prompt is wanted, so that not all of it may come from the prefix cache."""
        return self.pools.reads_prompt or self.logits.wanted.prompt_from is not None

    def restart(self) -> None:
        """Plan from what has arrived, after the request went back into the queue."""
        self.pools.restart()
        self.logits.restart()

    def select(self, row: int, first: int, position: int, length: int) -> RowSelection:
        """Plan what the request wants of a step that computes ``length`` of its positions.

        Args:
            row: the request's index in the batch.
            first: the row of the step's states that holds its first position.
            position: that position.
            length: positions.
        """
        base = self.base[1] if self.base is not None and self.base[0] == position else None
        last, num_prompt = position + length - 1, self.pools.num_prompt
        # The row that produces a token is that of the prompt's last position, or a later one. The end of a middle
        # chunk of the prompt produces nothing.
        produces = last >= num_prompt - 1 and self.options.wanted.produced
        return RowSelection(
            row=row,
            offset=first - position,
            prompt=self.pools.plan_prompt(position, position + length, base) if position < num_prompt else None,
            produced=first + length - 1 if produces else None,
        )


@dataclass(frozen=True, slots=True)
class RowSelection:
    """What one request wants of one forward step.

    Args:
        row: the request's index in the batch.
        offset: the row of the step's states that position 0 would have.
        prompt: what it wants of the prompt, or None.
        produced: the row of the step's states that produces its next token, or None.
    """

    row: int
    offset: int
    prompt: PromptStep | None
    produced: int | None

    @property
    def num_rows(self) -> int:
        """How many rows of the prompt are wanted as they are."""
        return 0 if self.prompt is None or self.prompt.rows is None else self.prompt.rows[1] - self.prompt.rows[0]


@dataclass(frozen=True, slots=True)
class HostRows:
    """One step's reduced rows on the host, SGLang's ``HostAuxiliaryOutput``.

    Args:
        values_MD: float32: for each selection of the plan, in order, the running value of each of its groups and the
            row that produces its token, each for every layer of its request.
        rows_ND: the rows wanted as they are, in the same order and the model's dtype; or None.
        plan: what was planned.
    """

    values_MD: torch.Tensor
    rows_ND: torch.Tensor | None
    plan: StepPlan

    def consume(self, batch: Any, commits: Sequence[Any]) -> None:
        """Add the rows to the pools of their requests. ``commits[i]`` is None when row i committed no token."""
        vectors, rows = iter(self.values_MD), 0
        for selection in self.plan.selections:
            req = self.plan.reqs[selection.row]
            tracked = self.plan.tracked[selection.row]
            depth = len(tracked.options.wanted.layers)
            groups = [] if selection.prompt is None else selection.prompt.groups
            values = [_stack(vectors, depth) for _ in groups]
            produced_KD = _stack(vectors, depth) if selection.produced is not None else None
            length = selection.num_rows
            rows_NKD = None
            if self.rows_ND is not None and length:
                # A clone: a view would keep the whole step's buffer alive in the pools of one request.
                part_MD = self.rows_ND[rows : rows + length * depth]
                rows_NKD = part_MD.reshape(depth, length, -1).transpose(0, 1).clone()
                rows += length * depth
            in_batch = selection.row < len(batch.reqs) and batch.reqs[selection.row] is req
            if not in_batch or self.plan.opened.get(req) is not tracked:
                continue
            if selection.prompt is not None:
                tracked.pools.add_prompt(selection.prompt, values, rows_NKD)
            if produced_KD is not None and commits[selection.row] is not None:
                tracked.pools.add_produced(produced_KD, commits[selection.row].output_index)
            self.plan.keep_sums(tracked)


@dataclass(frozen=True, slots=True)
class DeviceRows:
    """One step's reduced rows on the device, SGLang's ``DeviceAuxiliaryOutput``. The fields are those of `HostRows`."""

    values_MD: torch.Tensor
    rows_ND: torch.Tensor | None
    plan: StepPlan

    def copy_to_host(self, copy: Callable[[torch.Tensor], torch.Tensor]) -> HostRows:
        """Start the step's copies."""
        return HostRows(copy(self.values_MD), None if self.rows_ND is None else copy(self.rows_ND), self.plan)


@dataclass(frozen=True, slots=True)
class StepPlan:
    """What to take from one forward step, noted before it ran.

    Args:
        selections: the rows wanted, one selection for each request that wants any.
        num_rows: all rows of the step, wanted or not.
        reqs: the batch's requests.
        tracked: the requests of the selections, by their index in the batch.
        opened: all requests that are tracked, as they stand when the step's results arrive.
        keep_sums: stores the running values that a request came by.
    """

    selections: tuple[RowSelection, ...]
    num_rows: int
    reqs: tuple[Any, ...]
    tracked: Mapping[int, TrackedRequest]
    opened: Mapping[Any, TrackedRequest]
    keep_sums: Callable[[TrackedRequest], None]

    @property
    def layers(self) -> set[int]:
        """The layers that anybody wants."""
        return {layer for tracked in self.tracked.values() for layer in tracked.options.wanted.layers}

    def gather(self, states: Mapping[int, torch.Tensor]) -> DeviceRows | None:
        """Reduce the planned rows of the step's states, on the device.

        Args:
            states: by layer, each ``[N, D]``.
        """
        found = {layer: states.get(layer) for layer in self.layers}
        if any(state is None or state.dim() != 2 or state.shape[0] < self.num_rows for state in found.values()):
            return None
        singles = all(selection.prompt is None for selection in self.selections)
        vectors: list[torch.Tensor] = []
        rows: list[torch.Tensor] = []
        for selection in self.selections:
            wanted, offset = self.tracked[selection.row].options.wanted, selection.offset
            layers = [states[layer] for layer in wanted.layers]
            if selection.prompt is not None:
                reducer = wanted.reducer
                for ranges in selection.prompt.groups:
                    moved = tuple((start + offset, stop + offset) for start, stop in ranges)
                    vectors += [reduce_rows(state_ND, moved, reducer) for state_ND in layers]
                if selection.prompt.rows is not None:
                    start, stop = selection.prompt.rows
                    rows += [state_ND[start + offset : stop + offset] for state_ND in layers]
            if selection.produced is not None:
                last = [state_ND[selection.produced : selection.produced + 1] for state_ND in layers]
                vectors += last if singles else [row[0].float() for row in last]
        # Two kernels however many requests decode. cat and stack copy: the rows may be a CUDA graph's buffer, which the
        # next step overwrites.
        values_MD = torch.cat(vectors).float() if singles else torch.stack(vectors) if vectors else torch.empty(0, 0)
        return DeviceRows(values_MD, torch.cat(rows) if rows else None, self)


def _stack(vectors: Iterator[torch.Tensor], depth: int) -> torch.Tensor:
    return torch.stack([next(vectors) for _ in range(depth)])
