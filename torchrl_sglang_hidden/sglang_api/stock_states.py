"""Pools the hidden states of SGLang itself, as they come without the server half.

Knows nothing of requests, nor of what else is in an answer.
"""

from __future__ import annotations

from typing import Any

import torch

from torchrl_sglang_hidden.errors import ProtocolError
from torchrl_sglang_hidden.protocol import FALLBACK_REMEDY
from torchrl_sglang_hidden.reduce.host_pools import HostPools
from torchrl_sglang_hidden.reduce.pooling import Pools
from torchrl_sglang_hidden.reduce.wanted import Wanted
from torchrl_sglang_hidden.spec.hidden import Segment

__all__ = ["pool_stock"]


def pool_stock(
    name: str, wanted: Wanted, entries: Any, num_prompt: int, response_ids: tuple[int, ...], hidden_size: int
) -> Pools:
    """Pool stock ``hidden_states``: one entry per forward step, the first with the prompt rows that it computed.

    A later entry of several rows is a prefill repeated after a retraction; its last row produced the next token.

    Args:
        name: names the request in errors.
        wanted: what to pool.
        entries: SGLang's.
        num_prompt: P.
        response_ids: the T sampled ids.
        hidden_size: D.

    Raises:
        ProtocolError: they are not there, or cannot be read.
    """
    if not isinstance(entries, list) or not entries:
        raise ProtocolError(f"{name}: hidden states were asked for and are not in the answer; {FALLBACK_REMEDY}")
    pools = HostPools(wanted, num_prompt)
    try:
        steps = [_rows_of(entry, hidden_size) for entry in entries]
    except (TypeError, ValueError, RuntimeError, OverflowError) as error:
        raise ProtocolError(f"{name}: the hidden states cannot be read ({error}); is that an SGLang server?") from error
    first_ND = steps[0]
    start = num_prompt - first_ND.shape[0]
    step = pools.plan_prompt(start, num_prompt) if start >= 0 else None
    if step is not None:
        # Earlier positions are not read: the step begins behind them.
        missing_ND = first_ND.new_full((1, 1), torch.nan).expand(start, first_ND.shape[1])
        pools.add_rows(step, torch.cat([missing_ND, first_ND])[:, None])
    for index, step_ND in enumerate(steps):
        pools.add_produced(step_ND[-1][None], index)
    found = pools.results(response_ids)
    if start > 0 and wanted.pools_prefix:
        # Rows are missing before the first one that came. The number of rows is for the error that follows.
        missing = {Segment.PROMPT: first_ND.shape[0], Segment.FULL: first_ND.shape[0] + len(steps) - 1}
        segments = {s: (None, missing[Segment(s)]) if s in missing else value for s, value in found.segments.items()}
        return Pools(segments, found.spans, found.faults, found.rows, found.places)
    return found


def _rows_of(entry: Any, hidden_size: int) -> torch.Tensor:
    """Return the rows of one forward step, ``[N, D]``.

    Raises:
        TypeError, ValueError, RuntimeError, OverflowError: the entry is something else.
    """
    rows = torch.tensor(entry, dtype=torch.float32)
    rows_ND = rows[None] if rows.ndim == 1 else rows
    if rows_ND.ndim != 2 or rows_ND.shape[1] != hidden_size or not len(rows_ND):
        raise ValueError(f"a step's rows have the shape {tuple(rows.shape)}, expected [N, {hidden_size}]")
    return rows_ND
