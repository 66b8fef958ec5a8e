"""Pool hidden rows, with the same code inside the server and on the client.

Knows nothing of SGLang, JSON or TensorDicts. Rows come in order of position, in pieces: chunks of a prompt, then one
row per generated token. Which rows a piece must bring is planned before it is computed (`RequestPools.plan_prompt`);
what was reduced from them is added afterwards (`add_prompt`, `count_produced`). K layers are pooled side by side. How
rows are reduced is in ``reducers.py``, and what a request wants in ``wanted.py``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch

from torchrl_sglang_hidden.errors import SpanError
from torchrl_sglang_hidden.reduce.reducers import Ranges, Reducer, reducer_of
from torchrl_sglang_hidden.reduce.wanted import BLOCK, PromptStep, SpanPart, Wanted, clip, cuts, next_position
from torchrl_sglang_hidden.spec.hidden import Pooling, Segment, SegmentName
from torchrl_sglang_hidden.spec.places import At, Each
from torchrl_sglang_hidden.spec.span_base import MAX_SPAN_ROWS
from torchrl_sglang_hidden.spec.span_search import Decode, find_rows
from torchrl_sglang_hidden.spec.spans import LastTokens, PromptSpan, ResponseSpan

__all__ = ["NO_VALUE", "Pools", "RequestPools", "WantedRows", "rows_to_keep"]

# Stands for a value that this process counts and does not hold: another rank does, or there was no memory for it.
NO_VALUE = torch.empty(0)


@dataclass(frozen=True, slots=True)
class WantedRows:
    """Rows as they are: ``[N, K, D]``, of the positions ``first … first+N-1``."""

    first: int
    rows_NKD: torch.Tensor


@dataclass(frozen=True, slots=True)
class Pools:
    """The results of a request's pools.

    Args:
        segments: per segment the pooled float32 ``[K, D]`` (None before any row) and the count of its rows. For
            ``"last"`` the count says where in the segment the row stands: it equals the segment's length only if the
            row is the segment's last.
        spans: the same per span; of a span without a pooling all its rows, ``[S, K, D]``.
        faults: why a span has no value, by its name.
        rows: the rows wanted as they are, or None.
        places: which rows of the response those spans have whose rows are as they are or were found one by one: a
            number that is 0 because there are none is known from a gap by this.
    """

    segments: Mapping[str, tuple[torch.Tensor | None, int]]
    spans: Mapping[str, tuple[torch.Tensor | None, int]]
    faults: Mapping[str, str]
    rows: WantedRows | None
    places: Mapping[str, tuple[int, ...]] = field(default_factory=dict)


class RequestPools:
    """Counts what one request wants pooled while it is computed, and makes the results at its end.

    Every position is counted once. A piece that does not continue where the last one ended is not added: the count
    then stays short of the tokens, which the client's check turns into an `AlignmentError`.

    The prompt's values are kept here. The value and the rows of the response are kept by the caller, who may hold those
    of many requests in one matrix: see `HostPools` for the plain way.

    Args:
        wanted: what to pool.
        num_prompt: P.

    Attributes:
        done: prompt positions before this one need not be computed again.
        count: the response's rows so far.
        pools_full: whether a value over all of prompt and response is made.
        sums: running values over the first positions, as (length, float32 ``[K, D]``), for whoever keeps them: sums,
            or maxima.
    """

    def __init__(self, wanted: Wanted, num_prompt: int) -> None:
        self.wanted = wanted
        self.num_prompt = num_prompt
        self.count = 0
        self.sums: list[tuple[int, torch.Tensor]] = []
        self._reducer = wanted.reducer
        self._parts = wanted.prompt_parts(num_prompt)
        self.reads_prompt = wanted.pools_prefix or wanted.prompt_rows or bool(self._parts)
        # Nothing of the prompt is waited for where nothing of it is wanted.
        self.done = 0 if self.reads_prompt else num_prompt
        self._planned = self.done
        # Over the positions from the first on; and the same before the prompt's last position, which the response's
        # first row stands for in the full segment.
        self._prefix = _Running()
        self._before_last = _Running()
        self._inside = {name: _Running() for name in self._parts}
        self._poolings = {name: wanted.span_pooling(name) for name in self._parts}
        self._single: dict[str, list[torch.Tensor]] = {name: [] for name, own in self._poolings.items() if own is None}
        self.pools_full = Segment.FULL in wanted.segments and wanted.pools_prefix

    # --- the prompt ------------------------------------------------------------------------------------------------

    def restart(self) -> None:
        """Plan from what has arrived, after the request went back into the queue."""
        self._planned = self.done

    def first_needed(self) -> int:
        """Return the first position that a value from the beginning cannot stand for, P where there is none."""
        if self.wanted.prompt_rows:
            return self.done
        # Called at every round of scheduling: a span of many intervals must not be walked each time.
        positions = [next_position(span, self.done) for span in self._parts.values()]
        return min((position for position in positions if position is not None), default=self.num_prompt)

    def plan_prompt(self, start: int, stop: int, base_KD: torch.Tensor | None = None) -> PromptStep | None:
        """Plan what is wanted of a forward step over the positions ``start … stop-1``.

        Args:
            start: the first position of the step; earlier ones are in the prefix cache.
            stop: the position after its last.
            base_KD: the running value over the positions before ``start``, if it was kept.

        Returns:
            What to reduce, or None: nothing is new, or positions are missing that nothing stands for.
        """
        stop = min(stop, self.num_prompt)
        begin = max(start, self._planned)
        if begin >= stop:
            return None
        skips = begin > self._planned
        if skips and (self.first_needed() < begin or (self.wanted.pools_prefix and base_KD is None)):
            return None
        planned, self._planned = self._planned, stop
        parts = [part for name, span in self._parts.items() for part in self._part(name, clip(span, begin, stop))]
        return PromptStep(
            begin,
            stop,
            planned,
            base_KD if skips else None,
            cuts(begin, stop, self.num_prompt) if self.wanted.pools_prefix else (),
            tuple(parts),
            (begin, stop) if self.wanted.prompt_rows else None,
        )

    def _part(self, name: str, ranges: Ranges) -> list[SpanPart]:
        """Return the values of a span that these positions are to bring."""
        pooling = self._poolings[name]
        if pooling is None:
            return [SpanPart(name, ((one, one + 1),)) for start, stop in ranges for one in range(start, stop)]
        own = reducer_of(pooling)
        # One position is its own value, whichever the reducer.
        needs_own = own.needs_all_rows and own.running != self._reducer.running
        return [SpanPart(name, ranges, own if needs_own else None)] if ranges else []

    def accepts(self, step: PromptStep) -> bool:
        """Return whether a planned step continues where the last one ended."""
        return self.done == step.planned

    def value_before(self, step: PromptStep) -> torch.Tensor | None:
        """Return the running value over the positions before a step, which its own are merged to; None for none."""
        return self._prefix.value_KD if step.base_KD is None else step.base_KD

    def add_prompt(self, step: PromptStep, values: Sequence[torch.Tensor]) -> None:
        """Add what a planned step brought. A step that does not continue where the last one ended is left out.

        Args:
            step: what was planned.
            values: one value, float32 ``[K, D]``, for each of `PromptStep.groups`. Those between the cuts are merged to
                `value_before` already: they stand for all positions from the first on.
        """
        if not self.accepts(step):
            return
        if step.base_KD is not None:
            self._prefix = _Running(step.base_KD, step.begin)
        pieces = step.num_running
        if step.cuts and step.begin == self.num_prompt - 1:
            self._before_last = self._prefix
        for length, value_KD in zip(step.cuts[1:], values[:pieces], strict=True):
            self._prefix = _Running(value_KD, length)
            self.sums.append((length, value_KD))
            if length == self.num_prompt - 1:
                self._before_last = self._prefix
        for (name, ranges, own), value_KD in zip(step.parts, values[pieces:], strict=True):
            count = sum(stop - start for start, stop in ranges)
            if name in self._single:
                self._single[name].append(value_KD)
            self._inside[name] = self._inside[name].merged(own or self._reducer, value_KD, count)
        self.done = step.stop

    # --- the response ----------------------------------------------------------------------------------------------

    def count_produced(self, index: int) -> bool:
        """Count the row that produced response token ``index``; False where it is not the next one."""
        if self.count != index:
            return False
        self.count += 1
        return True

    @property
    def sum_is_due(self) -> bool:
        """Whether the running value over all positions so far is worth keeping: see `keep_full`."""
        # Token 0's row is the last of the prompt, already in.
        return (
            self.pools_full
            and self.count > 1
            and self._prefix.count == self.num_prompt
            and (self.num_prompt + self.count - 1) % BLOCK == 0
        )

    @property
    def value_before_response(self) -> torch.Tensor | None:
        """The running value over the positions before the response's first row; None where there are none."""
        return self._before_last.value_KD

    def keep_full(self, count: int, full_KD: torch.Tensor) -> None:
        """Note the running value over the prompt and the response's first ``count`` rows."""
        self.sums.append((self._before_last.count + count, full_KD))

    # --- the end ---------------------------------------------------------------------------------------------------

    def finish(
        self,
        response_ids: Sequence[int],
        decode: Decode | None = None,
        response_KD: torch.Tensor | None = None,
        kept: WantedRows | None = None,
    ) -> Pools:
        """Return what was pooled.

        Args:
            response_ids: the T tokens of the response.
            decode: turns ids into text, special tokens included; needed for a `Between` of the response.
            response_KD: the running value over the response's rows, float32; None before any row.
            kept: the rows that were kept for ``tokens=True`` and for spans of the response: of those there may be only
                the last ones, down to `rows_to_keep`.
        """
        spans: dict[str, tuple[torch.Tensor | None, int]] = {}
        faults: dict[str, str] = {}
        places: dict[str, tuple[int, ...]] = {}
        for name, span in self.wanted.spans.items():
            if isinstance(span, PromptSpan):
                spans[name] = self._span_of_prompt(name, span)
                continue
            num_response = len(response_ids)
            if self.count != num_response or num_response == 0:
                spans[name] = None, self.count  # a gap, or aborted before its first token: the count is for the error
            elif kept is None or kept.first + len(kept.rows_NKD) != self.num_prompt + num_response - 1:
                spans[name] = None, 0  # a gap in the prompt, whose rows are kept together with these
            else:
                try:
                    rows = _rows_of(span, self.wanted.span_pooling(name), response_ids, decode)
                except SpanError as error:
                    faults[name] = str(error)
                    continue
                spans[name] = self._span_of_response(name, rows, kept)
                if isinstance(span, (At, Each)) or self.wanted.span_pooling(name) is None:
                    places[name] = tuple(rows)
        segments = self.wanted.segments if self.wanted.pooling is not None else ()
        token_rows = None
        if self.wanted.tokens and kept is not None:
            # Where the prompt's rows alone are wanted, those of the response may be there for a span.
            stop = None if self.wanted.response_rows else self.num_prompt - kept.first
            token_rows = WantedRows(kept.first, kept.rows_NKD[:stop].to(self.wanted.row_dtype))
        pooled = {str(segment): self._segment(segment, response_KD) for segment in segments}
        return Pools(pooled, spans, faults, token_rows, places)

    def keep_end(self, response_KD: torch.Tensor | None) -> None:
        """Note the running value over everything, where that is worth keeping: the next turn may begin with it."""
        if not self.pools_full:
            return
        if self.count > 0 and self._prefix.count == self.num_prompt and response_KD is not None:
            self._keep_with(response_KD)
        elif self._prefix.value_KD is not None:
            self.sums.append((self._prefix.count, self._prefix.value_KD))

    def _keep_with(self, response_KD: torch.Tensor) -> None:
        full = self._before_last.merged(self._reducer, response_KD, self.count)
        # A prompt of one token has nothing before its response, whose value may be a view of many.
        value_KD = response_KD.clone() if full.value_KD is None or full.value_KD is response_KD else full.value_KD
        self.sums.append((full.count, value_KD))

    def _segment(
        self, segment: Segment | SegmentName, response_KD: torch.Tensor | None
    ) -> tuple[torch.Tensor | None, int]:
        response = _Running(response_KD, self.count)
        if segment == Segment.RESPONSE:
            return response.result(self._reducer)
        if not self._reducer.needs_all_rows:
            if segment == Segment.PROMPT:
                return _standing_for(self._inside[""], self.num_prompt)
            return response_KD, len(Segment.FULL.positions(self.num_prompt, self.count)) if self.count else 0
        if segment == Segment.FULL and self.count > 0 and self._prefix.count == self.num_prompt:
            return self._before_last.merged(self._reducer, response_KD, self.count).result(self._reducer)
        if segment == Segment.PROMPT and self._prefix.count < self.num_prompt:
            return None, self._prefix.count  # the count is for the error
        return self._prefix.result(self._reducer)

    def _span_of_prompt(self, name: str, span: PromptSpan) -> tuple[torch.Tensor | None, int]:
        part, pooling = self._inside[name], self._poolings[name]
        if pooling is None:
            rows = self._single[name]
            # On a rank that holds no values they are empty.
            return torch.stack(rows) if len(rows) == span.count else None, len(rows)
        own = reducer_of(pooling)
        return part.result(own) if own.needs_all_rows else _standing_for(part, span.count)

    def _span_of_response(self, name: str, rows: Sequence[int], kept: WantedRows) -> tuple[torch.Tensor | None, int]:
        pooling, first = self.wanted.span_pooling(name), self.num_prompt - 1 - kept.first
        if not rows:
            return None, 0
        if isinstance(rows, range) and rows.step == 1:
            rows_SKD = kept.rows_NKD[first + rows.start : first + rows.stop]
        else:
            rows_SKD = kept.rows_NKD[[first + row for row in rows]]
        if pooling is None:
            return rows_SKD.float(), len(rows)
        own = reducer_of(pooling)
        return own.result(own.rows(rows_SKD), len(rows)), len(rows)


def rows_to_keep(wanted: Wanted) -> int | None:
    """Return how many of the response's last rows a request needs as they are; None for all of them."""
    spans = [span for span in wanted.spans.values() if not isinstance(span, PromptSpan)]
    counts = [span.count for span in spans if isinstance(span, LastTokens)]
    if wanted.response_rows or len(counts) < len(spans) or (wanted.prompt_rows and spans):
        return None  # with the prompt's rows they are one run of positions
    return max(counts, default=0)


@dataclass(frozen=True, slots=True)
class _Running:
    """A running value, float32 ``[K, D]``, and the number of rows that it stands for."""

    value_KD: torch.Tensor | None = None
    count: int = 0

    def merged(self, reducer: Reducer, rows_KD: torch.Tensor | None, count: int) -> _Running:
        """Return the running value that stands for ``count`` more rows."""
        if self.value_KD is None or rows_KD is None:
            return _Running(rows_KD, self.count + count)
        if not self.value_KD.numel() or not rows_KD.numel():
            return _Running(NO_VALUE, self.count + count)
        return _Running(reducer.merge(self.value_KD, rows_KD), self.count + count)

    def result(self, reducer: Reducer) -> tuple[torch.Tensor | None, int]:
        return (None if self.value_KD is None else reducer.result(self.value_KD, self.count)), self.count


def _standing_for(value: _Running, num_rows: int) -> tuple[torch.Tensor | None, int]:
    """Return the value of one row that stands for ``num_rows`` of them."""
    return value.value_KD, num_rows if value.count else 0


def _rows_of(
    span: ResponseSpan, pooling: Pooling | None, response_ids: Sequence[int], decode: Decode | None
) -> Sequence[int]:
    """Return the response's rows that a span selects."""

    def cannot_decode(_: Sequence[int]) -> str:
        raise SpanError(
            f"{span!r}: start the server without --skip-tokenizer-init; the server has no tokenizer to find the "
            "markers with"
        )

    rows = find_rows(span, response_ids, decode or cannot_decode)
    if pooling is None and len(rows) > MAX_SPAN_ROWS:
        raise SpanError(
            f"{span!r}: {len(rows)} rows, over the limit of {MAX_SPAN_ROWS} for a span with pooling=None; pool it, or "
            "ask for tokens=True"
        )
    return rows
