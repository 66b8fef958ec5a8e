"""Takes hidden rows from a forward step on the device, and pools them per request on the host.

Knows SGLang's batches and auxiliary outputs by their shape only, and imports nothing of SGLang. Runs inside the
scheduler, where an exception ends the server: what does not fit is left out, and the client's count finds it.

One step's way: `plan_step` notes which rows are wanted, on the host, before the forward pass; `StepPlan.gather` reduces
them to one float32 matrix on the device, after it; SGLang copies that with its other results; `HostRows.consume` adds
the rows to their requests' pools once the tokens are committed.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal
from weakref import WeakKeyDictionary

import torch

from torchrl_sglang_hidden.channel import pack_answer, unpack_options
from torchrl_sglang_hidden.pooling import RequestPools, reduce_rows
from torchrl_sglang_hidden.specs import Pooling

# The forward modes whose rows are one per position. Speculative verification, for one, has rows of tokens that may be
# rejected; a request that met such a step comes back with too few rows, which the client refuses.
_PREFILL_MODES = ("EXTEND", "MIXED")
_DECODE_MODE = "DECODE"


@dataclass(frozen=True, slots=True)
class Span:
    """Some rows of one request in one forward step.

    Args:
        row: the request's index in the batch.
        part: prompt positions, or the row that produces the next token.
        start, stop: rows of the step's hidden states.
        position: the position in the request of row ``start``.
        pooling: how to reduce several rows.
    """

    row: int
    part: Literal["prompt", "produced"]
    start: int
    stop: int
    position: int
    pooling: Pooling


@dataclass(frozen=True, slots=True)
class HostRows:
    """One step's reduced rows on the host, SGLang's ``HostAuxiliaryOutput``.

    Args:
        rows_SD: float32 ``[spans, D]``.
        plan: what was planned.
    """

    rows_SD: torch.Tensor
    plan: StepPlan

    def consume(self, batch: Any, commits: Sequence[Any]) -> None:
        """Adds the rows to the pools of their requests. ``commits[i]`` is None when row i committed no token."""
        for index, span in enumerate(self.plan.spans):
            req = self.plan.reqs[span.row]
            pools = self.plan.capture.pools.get(req)
            if pools is None or span.row >= len(batch.reqs) or batch.reqs[span.row] is not req:
                continue
            # A clone: a view would keep the whole step's buffer alive in the pools of one request.
            row_D = self.rows_SD[index].clone()
            if span.part == "prompt":
                pools.add_prompt(row_D, span.position, span.position + span.stop - span.start)
            elif commits[span.row] is not None:
                pools.add_produced(row_D, commits[span.row].output_index)


@dataclass(frozen=True, slots=True)
class DeviceRows:
    """One step's reduced rows on the device, SGLang's ``DeviceAuxiliaryOutput``."""

    rows_SD: torch.Tensor
    plan: StepPlan

    def copy_to_host(self, copy: Callable[[torch.Tensor], torch.Tensor]) -> HostRows:
        """Starts the step's one copy."""
        return HostRows(copy(self.rows_SD), self.plan)


@dataclass(frozen=True, slots=True)
class StepPlan:
    """What to take from one forward step, noted before it ran.

    Args:
        spans: the rows wanted.
        num_rows: all rows of the step, wanted or not.
        is_decode: whether every request has one row.
        reqs: the batch's requests.
        capture: whose pools the rows are for.
    """

    spans: tuple[Span, ...]
    num_rows: int
    is_decode: bool
    reqs: tuple[Any, ...]
    capture: Capture

    def gather(self, hidden_ND: torch.Tensor | None) -> DeviceRows | None:
        """Reduces the planned rows of the step's hidden states ``[N, D]`` to float32 ``[spans, D]``, on the device."""
        if hidden_ND is None or hidden_ND.dim() != 2 or hidden_ND.shape[0] < self.num_rows:
            return None
        if self.is_decode:
            # Two kernels however many rows, and only the rows that somebody asked for. cat copies: the rows may be a
            # CUDA graph's buffer, which the next step overwrites.
            return DeviceRows(torch.cat([hidden_ND[span.start : span.stop] for span in self.spans]).float(), self)
        rows = [reduce_rows(hidden_ND, span.start, span.stop, span.pooling) for span in self.spans]
        return DeviceRows(torch.stack(rows), self)


class Capture:
    """The pools of the requests that a scheduler is working on.

    Attributes:
        pools: by request, weakly: what SGLang forgets (finished, aborted) is forgotten here.
        on: whether this SGLang can carry the rows at all.
        normed: whether the model hands over its states after the final norm. SGLang prefers those before it where a
            model gives both.
    """

    def __init__(self) -> None:
        self.on = True
        self.normed = True
        self.pools: WeakKeyDictionary[Any, RequestPools] = WeakKeyDictionary()

    def pools_of(self, req: Any) -> RequestPools | None:
        """The request's pools, made when it is first seen; None when it did not ask."""
        pools = self.pools.get(req)
        if pools is None:
            options = unpack_options(req.sampling_params.custom_params) if self.on else None
            if options is None or req.finished():
                return None
            pools = self.pools[req] = RequestPools(options.segments, options.pooling, len(req.origin_input_ids))
        return pools

    def plan_step(self, batch: Any) -> StepPlan | None:
        """Notes which rows of the coming step are wanted; None when no request of the batch asked."""
        mode = batch.forward_mode.name
        if mode not in (*_PREFILL_MODES, _DECODE_MODE) or not self.normed:
            return None
        spans: list[Span] = []
        first = 0
        for row, req in enumerate(batch.reqs):
            length = batch.extend_lens[row] if mode in _PREFILL_MODES else 1
            pools = self.pools_of(req)
            if pools is not None:
                position = batch.prefix_lens[row] if mode in _PREFILL_MODES else pools.num_prompt
                spans += _spans(pools, row, first, position, length)
            first += length
        return StepPlan(tuple(spans), first, mode == _DECODE_MODE, tuple(batch.reqs), self) if spans else None

    def needs_uncached_prompt(self, req: Any) -> bool:
        """Whether a prefix-cache hit would leave a gap in what the request asked for."""
        pools = self.pools_of(req)
        return pools is not None and pools.needs_uncached_prompt

    def answer(self, req: Any) -> list[dict[str, Any]]:
        """The finished request's answer as a list of one, and its pools' end; an empty list when there is none."""
        pools = self.pools.pop(req, None) if req.finished() else None
        if pools is None:
            return []
        options = unpack_options(req.sampling_params.custom_params)
        return [pack_answer(pools, binary=options is not None and options.binary)]


def _spans(pools: RequestPools, row: int, first: int, position: int, length: int) -> list[Span]:
    """The spans of a request whose ``length`` rows start at row ``first``, the first of them at ``position``."""
    spans = []
    prompt = pools.prompt_span(position, position + length)
    if prompt is not None:
        start, stop = first + prompt[0] - position, first + prompt[1] - position
        spans.append(Span(row, "prompt", start, stop, prompt[0], pools.pooling))
    last = position + length - 1
    # The row that produces a token is that of the prompt's last position, or one behind it. The end of a middle chunk
    # of the prompt produces nothing.
    if last >= pools.num_prompt - 1 and pools.segments != ("prompt",):
        spans.append(Span(row, "produced", first + length - 1, first + length, last, pools.pooling))
    return spans
