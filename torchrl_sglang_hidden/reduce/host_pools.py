"""Pools a request whose rows come one by one, in this process's own memory.

The plain way to keep what `RequestPools` counts: the client pools stock states with it.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from torchrl_sglang_hidden.reduce.pooling import Pools, RequestPools, WantedRows, rows_to_keep
from torchrl_sglang_hidden.reduce.reducers import reduce_rows
from torchrl_sglang_hidden.reduce.wanted import PromptStep, Wanted
from torchrl_sglang_hidden.spec.span_search import Decode

__all__ = ["HostPools"]


class HostPools(RequestPools):
    """Pools a request whose rows come one by one and stay in this process's memory, such as the client's."""

    def __init__(self, wanted: Wanted, num_prompt: int) -> None:
        super().__init__(wanted, num_prompt)
        self._response_KD: torch.Tensor | None = None
        self._prompt_rows: list[torch.Tensor] = []
        self._response_rows: list[torch.Tensor] = []
        self._keep = rows_to_keep(wanted)

    def add_rows(self, step: PromptStep, rows_NKD: torch.Tensor) -> None:
        """Add a planned step of the prompt from its rows.

        Args:
            step: what was planned.
            rows_NKD: row n is that of position n, for all positions of the step.
        """
        if not self.accepts(step):
            return
        pieces, before_KD = step.num_running, self.value_before(step)
        reducers = [*(None for _ in range(pieces)), *(part.reducer for part in step.parts)]
        values = [
            reduce_rows(rows_NKD, ranges, own or self._reducer)
            for ranges, own in zip(step.groups, reducers, strict=True)
        ]
        if before_KD is not None:
            values[:pieces] = [self._reducer.merge(before_KD, value_KD) for value_KD in values[:pieces]]
        if step.rows is not None:
            self._prompt_rows.append(rows_NKD[step.rows[0] : step.rows[1]].float())
        self.add_prompt(step, values)

    def add_produced(self, row_KD: torch.Tensor, index: int) -> None:
        """Add the row that produced response token ``index``, float32 ``[K, D]``."""
        if not self.count_produced(index):
            return
        before_KD = self._response_KD
        self._response_KD = row_KD if before_KD is None else self._reducer.merge(before_KD, row_KD)
        if self._keep != 0:
            self._response_rows.append(row_KD)
            if self._keep is not None:
                del self._response_rows[: -self._keep]
        if self.sum_is_due:
            self._keep_with(self._response_KD)

    def results(self, response_ids: Sequence[int], decode: Decode | None = None) -> Pools:
        """Return what was pooled; see `finish`."""
        first = self.num_prompt - 1 + self.count - len(self._response_rows)
        rows = self._response_rows
        if self.wanted.prompt_rows:
            # The prompt's last row produced token 0. Behind a gap no row is where it belongs.
            behind = rows[1:] if self.done == self.num_prompt else []
            first, rows = 0, [*(row_KD for part in self._prompt_rows for row_KD in part), *behind]
        kept = WantedRows(first, torch.stack(rows)) if rows else None
        self.keep_end(self._response_KD)
        return self.finish(response_ids, decode, self._response_KD, kept)
