"""Pool hidden rows, with the same code inside the server and on the client.

Knows nothing of SGLang, JSON or TensorDicts. Rows come in order of position, in pieces: chunks of a prompt, then one
row per generated token. Which rows a piece must bring is planned before it is computed (`RequestPools.plan_prompt`);
what was reduced from them is added afterwards (`add_prompt`, `add_produced`). K layers are pooled side by side. How
rows are reduced is in ``reducers.py``, and what a request wants in ``wanted.py``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from torchrl_sglang_hidden.errors import SpanError
from torchrl_sglang_hidden.reduce.reducers import Reducer
from torchrl_sglang_hidden.reduce.wanted import BLOCK, PromptStep, Wanted, clip, cuts, next_position
from torchrl_sglang_hidden.spec.hidden import Segment, SegmentName
from torchrl_sglang_hidden.spec.spans import Between, Decode, LastTokens, PromptSpan, ResolvedSpan, find_between

__all__ = ["Pools", "RequestPools", "WantedRows"]


@dataclass(slots=True)
class _Pool:
    """A running value, float32 ``[K, D]``, and the number of rows that it stands for."""

    reducer: Reducer
    value_KD: torch.Tensor | None = None
    count: int = 0

    def add(self, rows_KD: torch.Tensor, count: int = 1) -> None:
        """Add a row, or the running value of ``count`` rows."""
        self.value_KD = rows_KD if self.value_KD is None else self.reducer.merge(self.value_KD, rows_KD)
        self.count += count

    def result(self) -> tuple[torch.Tensor | None, int]:
        return (None if self.value_KD is None else self.reducer.result(self.value_KD, self.count)), self.count


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
        spans: the same per span.
        faults: why a span has no value, by its name.
        rows: the rows wanted as they are, or None.
    """

    segments: Mapping[str, tuple[torch.Tensor | None, int]]
    spans: Mapping[str, tuple[torch.Tensor | None, int]]
    faults: Mapping[str, str]
    rows: WantedRows | None


class RequestPools:
    """Pools what one request wants while it is computed.

    Every position is counted once. A piece that does not continue where the last one ended is not added: the count
    then stays short of the tokens, which the client's check turns into an `AlignmentError`.

    Args:
        wanted: what to pool.
        num_prompt: P.

    Attributes:
        done: prompt positions before this one need not be computed again.
        sums: running values over the first positions, as (length, float32 ``[K, D]``), for whoever keeps them: sums,
            or maxima.
    """

    def __init__(self, wanted: Wanted, num_prompt: int) -> None:
        self.wanted = wanted
        self.num_prompt = num_prompt
        self.sums: list[tuple[int, torch.Tensor]] = []
        self._reducer = wanted.reducer
        self._parts = wanted.prompt_parts(num_prompt)
        self.reads_prompt = wanted.pools_prefix or wanted.prompt_rows or bool(self._parts)
        # Nothing of the prompt is waited for where nothing of it is wanted.
        self.done = 0 if self.reads_prompt else num_prompt
        self._planned = self.done
        # Over the positions from the first on: of the prompt segment while it is computed, then of the full segment.
        self._prefix = _Pool(self._reducer)
        self._prompt: tuple[torch.Tensor | None, int] = (None, 0)
        self._inside = {name: _Pool(self._reducer) for name in self._parts}
        self._response = _Pool(self._reducer)
        self._prompt_rows: list[torch.Tensor] = []
        self._response_rows: list[torch.Tensor] = []
        # The response's rows that a span may still select.
        self._window: list[torch.Tensor] = []
        self._window_size = self._longest_window()

    def _longest_window(self) -> int | None:
        """Return how many of the response's last rows must be kept; None for all of them."""
        spans = [span for span in self.wanted.spans.values() if not isinstance(span, PromptSpan)]
        if any(isinstance(span, Between) for span in spans):
            return None
        return max((span.count for span in spans if isinstance(span, LastTokens)), default=0)

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
        parts = [(name, clip(span, begin, stop)) for name, span in self._parts.items()]
        return PromptStep(
            begin,
            stop,
            planned,
            base_KD if skips else None,
            cuts(begin, stop, self.num_prompt) if self.wanted.pools_prefix else (),
            tuple((name, ranges) for name, ranges in parts if ranges),
            (begin, stop) if self.wanted.prompt_rows else None,
        )

    def add_prompt(self, step: PromptStep, values: Sequence[torch.Tensor], rows_NKD: torch.Tensor | None) -> None:
        """Add what a planned step brought.

        Args:
            step: what was planned.
            values: the running value, float32 ``[K, D]``, of each of `PromptStep.groups`.
            rows_NKD: the rows of `PromptStep.rows`.
        """
        if self.done != step.planned:
            return
        if step.base_KD is not None:
            self._prefix = _Pool(self._reducer, step.base_KD, step.begin)
        pieces = max(len(step.cuts) - 1, 0)
        for length, piece_KD in zip(step.cuts[1:], values[:pieces], strict=True):
            self._prefix.add(piece_KD, length - self._prefix.count)
            self._keep_prefix(length)
        if step.cuts and step.stop == self.num_prompt:
            self._prompt = self._prefix.result()
        for (name, ranges), value_KD in zip(step.parts, values[pieces:], strict=True):
            self._inside[name].add(value_KD, sum(stop - start for start, stop in ranges))
        if rows_NKD is not None:
            self._prompt_rows.append(rows_NKD.to(self.wanted.row_dtype))
        self.done = step.stop

    def _keep_prefix(self, length: int) -> None:
        if self._prefix.value_KD is not None:
            self.sums.append((length, self._prefix.value_KD))

    # --- the response ----------------------------------------------------------------------------------------------

    def add_produced(self, row_KD: torch.Tensor, index: int) -> None:
        """Add the row that produced response token ``index``, float32 ``[K, D]``."""
        if self._response.count != index:
            return
        wanted = self.wanted
        self._response.add(row_KD)
        if wanted.response_rows:
            self._response_rows.append(row_KD.to(wanted.row_dtype)[None])
        if self._window_size != 0:
            self._window.append(row_KD)
            if self._window_size is not None:
                del self._window[: -self._window_size]
        if Segment.FULL in wanted.segments and wanted.pooling is not None:
            self._add_to_full(row_KD, index)

    def _add_to_full(self, row_KD: torch.Tensor, index: int) -> None:
        length = len(Segment.FULL.positions(self.num_prompt, index + 1))
        if not self._reducer.needs_all_rows:
            self._prefix = _Pool(self._reducer, row_KD, length)
        elif index > 0 and self._prefix.count == length - 1:
            # Token 0's row is the last of the prompt, already in.
            self._prefix.add(row_KD)
            if length % BLOCK == 0:
                self._keep_prefix(length)

    # --- the end ---------------------------------------------------------------------------------------------------

    def finish(self, response_ids: Sequence[int], decode: Decode | None = None) -> Pools:
        """Return what was pooled.

        Args:
            response_ids: the T tokens of the response.
            decode: turns ids into text, special tokens included; needed for a `Between` of the response.
        """
        if Segment.FULL in self.wanted.segments and self.wanted.pools_prefix:
            self._keep_prefix(self._prefix.count)
        spans: dict[str, tuple[torch.Tensor | None, int]] = {}
        faults: dict[str, str] = {}
        for name, span in self.wanted.spans.items():
            try:
                spans[name] = self._span(name, span, response_ids, decode)
            except SpanError as error:
                faults[name] = str(error)
        segments = self.wanted.segments if self.wanted.pooling is not None else ()
        return Pools({str(segment): self._segment(segment) for segment in segments}, spans, faults, self._rows())

    def _segment(self, segment: Segment | SegmentName) -> tuple[torch.Tensor | None, int]:
        if segment == Segment.RESPONSE:
            return self._response.result()
        if segment == Segment.FULL:
            return self._prefix.result()
        if not self._reducer.needs_all_rows:
            return _standing_for(self._inside[""], self.num_prompt)
        # Before the prompt's end, what there is: the count is for the error.
        return self._prompt if self._prompt[1] else (None, self._prefix.count)

    def _span(
        self, name: str, span: ResolvedSpan, response_ids: Sequence[int], decode: Decode | None
    ) -> tuple[torch.Tensor | None, int]:
        if isinstance(span, PromptSpan):
            pool = self._inside[name]
            return pool.result() if self._reducer.needs_all_rows else _standing_for(pool, span.count)
        num_response = len(response_ids)
        if self._response.count != num_response or num_response == 0:
            return None, self._response.count  # a gap, or aborted before its first token: the count is for the error
        start, stop = _positions_in_response(span, response_ids, decode)
        first = num_response - len(self._window)
        value_KD = self._reducer.rows(torch.stack(self._window[start - first : stop - first]))
        return self._reducer.result(value_KD, stop - start), stop - start

    def _rows(self) -> WantedRows | None:
        if not self.wanted.tokens:
            return None
        if not self.wanted.prompt_rows:
            return _wanted_rows(self.num_prompt - 1, self._response_rows)
        # The prompt's last row produced token 0.
        return _wanted_rows(0, self._prompt_rows + self._response_rows[1:])


def _standing_for(pool: _Pool, num_rows: int) -> tuple[torch.Tensor | None, int]:
    """Return the value of a pool of one row that stands for ``num_rows`` of them."""
    return pool.value_KD, num_rows if pool.count else 0


def _positions_in_response(
    span: LastTokens | Between, response_ids: Sequence[int], decode: Decode | None
) -> tuple[int, int]:
    num_response = len(response_ids)
    if isinstance(span, LastTokens):
        if span.count > num_response and not span.allow_fewer:
            raise SpanError(
                f"LastTokens({span.count}): the response has {num_response} tokens; raise min_new_tokens, or pass "
                "allow_fewer=True"
            )
        return max(num_response - span.count, 0), num_response
    if decode is None:
        raise SpanError(
            f"{span!r}: start the server without --skip-tokenizer-init; the server has no tokenizer to find the "
            "markers with"
        )
    return find_between(span, response_ids, decode)


def _wanted_rows(first: int, parts: list[torch.Tensor]) -> WantedRows | None:
    return WantedRows(first, torch.cat(parts)) if parts else None
