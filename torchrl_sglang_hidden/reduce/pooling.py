"""Pooling of hidden rows, the same code inside the server and on the client.

Knows nothing of SGLang, wires or TensorDicts. Rows come in order of position, in pieces: chunks of a prompt, then one
row per generated token. Which rows a piece must bring is planned before it is computed (`RequestPools.plan_prompt`);
what was reduced from them is added afterwards (`add_prompt`, `add_produced`). K layers are pooled side by side.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch

from torchrl_sglang_hidden.errors import SpanError
from torchrl_sglang_hidden.spec.hidden import Pooling, Segment, SegmentName, reads_prompt, reads_response
from torchrl_sglang_hidden.spec.spans import Between, Decode, LastTokens, PromptSpan, ResolvedSpan, find_between

__all__ = ["BLOCK", "Pools", "PromptStep", "RequestPools", "Wanted", "WantedRows", "sum_rows"]

# Positions between two sums over the beginning of a prompt that are worth keeping: a prompt that shares a part of it is
# computed again from the last of them on.
BLOCK = 64

Ranges = tuple[tuple[int, int], ...]


@dataclass(frozen=True, slots=True)
class Wanted:
    """What one request wants pooled.

    Args:
        segments: whole segments.
        pooling: how rows are reduced; None for none.
        layers: canonical layer ids, K of them.
        spans: places inside the segments.
        tokens: whether every row of the segments is wanted as it is.
        row_dtype: in which dtype those rows are kept.
    """

    segments: tuple[Segment | SegmentName, ...]
    pooling: Pooling | None = "mean"
    layers: tuple[int, ...] = (-1,)
    spans: Mapping[str, ResolvedSpan] = field(default_factory=dict)
    tokens: bool = False
    row_dtype: torch.dtype = torch.float32

    def __post_init__(self) -> None:
        object.__setattr__(self, "segments", tuple(map(Segment, self.segments)))

    @property
    def sums_prefix(self) -> bool:
        """Whether a sum from the first position on is wanted."""
        return self.pooling == "mean" and reads_prompt(self.segments)

    @property
    def prompt_rows(self) -> bool:
        """Whether the prompt's rows are wanted as they are."""
        return self.tokens and reads_prompt(self.segments)

    @property
    def response_rows(self) -> bool:
        """Whether the rows that produced the response are wanted as they are."""
        return self.tokens and reads_response(self.segments)

    @property
    def produced(self) -> bool:
        """Whether anything needs the rows that produce tokens."""
        pooled = self.pooling is not None and reads_response(self.segments)
        return pooled or self.response_rows or any(not isinstance(span, PromptSpan) for span in self.spans.values())

    def prompt_places(self, num_prompt: int) -> dict[str, PromptSpan]:
        """What is pooled inside the prompt, apart from sums from its beginning: by span name, the segment as ``""``."""
        places = {name: span for name, span in self.spans.items() if isinstance(span, PromptSpan)}
        if self.pooling == "last":
            places = {name: PromptSpan(((span.end - 1, span.end),)) for name, span in places.items()}
            if Segment.PROMPT in self.segments:
                places[""] = PromptSpan(((num_prompt - 1, num_prompt),))
        return places


@dataclass(frozen=True, slots=True)
class PromptStep:
    """What one request wants of the prompt positions ``begin … stop-1``, in one forward step.

    Args:
        begin: the first position that is new to the pools.
        stop: behind the last.
        planned: the first position that was still to come when the step was planned: those from there to ``begin`` are
            not computed for this request.
        base_KD: the sum over all positions before ``begin``, where some were not computed and it is wanted.
        cuts: ``begin``, …, ``stop``: the sums between them are wanted; empty for none.
        places: per span, the positions whose sum is wanted.
        rows: the positions wanted as they are.
    """

    begin: int
    stop: int
    planned: int
    base_KD: torch.Tensor | None
    cuts: tuple[int, ...]
    places: tuple[tuple[str, Ranges], ...]
    rows: tuple[int, int] | None

    @property
    def groups(self) -> list[Ranges]:
        """Each a set of positions whose rows are to be summed: between the cuts, then the places."""
        between = [((start, stop),) for start, stop in zip(self.cuts, self.cuts[1:], strict=False)]
        return [*between, *(ranges for _, ranges in self.places)]


@dataclass(slots=True)
class _Pool:
    """A running float32 ``[K, D]``, and the rows it stands for."""

    value_KD: torch.Tensor | None = None
    count: int = 0

    def add(self, rows_KD: torch.Tensor, count: int) -> None:
        self.value_KD = rows_KD if self.value_KD is None else self.value_KD + rows_KD
        self.count += count

    def mean(self) -> tuple[torch.Tensor | None, int]:
        return (None if self.value_KD is None else self.value_KD / self.count), self.count


@dataclass(frozen=True, slots=True)
class WantedRows:
    """Rows as they are: ``[N, K, D]``, those of the positions ``first … first+N-1``."""

    first: int
    rows_NKD: torch.Tensor


@dataclass(frozen=True, slots=True)
class Pools:
    """What a request's pools came to.

    Args:
        segments: per segment the pooled float32 ``[K, D]`` (None before any row) and the count of its rows. For
            ``"last"`` the count says where in the segment the row stands: it equals the segment's length only if the
            row is the segment's last.
        spans: likewise, per span.
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
        sums: sums over the first positions that came by, as (length, float32 ``[K, D]``), for who keeps them.
    """

    def __init__(self, wanted: Wanted, num_prompt: int) -> None:
        self.wanted = wanted
        self.num_prompt = num_prompt
        self.sums: list[tuple[int, torch.Tensor]] = []
        self._places = wanted.prompt_places(num_prompt)
        self.reads_prompt = wanted.sums_prefix or wanted.prompt_rows or bool(self._places)
        # Nothing of the prompt is waited for where nothing of it is wanted.
        self.done = 0 if self.reads_prompt else num_prompt
        self._planned = self.done
        self._prefix = _Pool()
        self._prompt: tuple[torch.Tensor | None, int] = (None, 0)
        self._inside = {name: _Pool() for name in self._places}
        self._response = _Pool()
        self._last: tuple[torch.Tensor | None, int] = (None, 0)
        self._prompt_rows: list[torch.Tensor] = []
        self._response_rows: list[torch.Tensor] = []
        # The response's rows that a span may still turn out to mean.
        self._window: list[torch.Tensor] = []
        self._window_size = self._longest_window()

    def _longest_window(self) -> int | None:
        """How many of the response's last rows must be kept; None for all of them."""
        spans = [span for span in self.wanted.spans.values() if not isinstance(span, PromptSpan)]
        if any(isinstance(span, Between) for span in spans):
            return None
        return max((span.count for span in spans if isinstance(span, LastTokens)), default=0)

    # --- the prompt ------------------------------------------------------------------------------------------------

    def restart(self) -> None:
        """Plans from what has arrived, after the request went back into the queue."""
        self._planned = self.done

    def first_needed(self) -> int:
        """The first position that a sum from the beginning cannot stand for, P where there is none."""
        if self.wanted.prompt_rows:
            return self.done
        # Asked at every round of scheduling: a place of many intervals must not be walked each time.
        nexts = [_next_inside(place, self.done) for place in self._places.values()]
        return min((place for place in nexts if place is not None), default=self.num_prompt)

    def plan_prompt(self, start: int, stop: int, base_KD: torch.Tensor | None = None) -> PromptStep | None:
        """Notes what is wanted of a forward step over the positions ``start … stop-1``.

        Args:
            start: its first position; those before it are in the prefix cache.
            stop: behind its last.
            base_KD: the sum over the positions before ``start``, where somebody kept it.

        Returns:
            What to reduce, or None: nothing is new, or positions are missing that nothing stands for.
        """
        stop = min(stop, self.num_prompt)
        begin = max(start, self._planned)
        if begin >= stop:
            return None
        skips = begin > self._planned
        if skips and (self.first_needed() < begin or (self.wanted.sums_prefix and base_KD is None)):
            return None
        planned, self._planned = self._planned, stop
        places = [(name, _inside(place, begin, stop)) for name, place in self._places.items()]
        return PromptStep(
            begin,
            stop,
            planned,
            base_KD if skips else None,
            _cuts(begin, stop, self.num_prompt) if self.wanted.sums_prefix else (),
            tuple((name, ranges) for name, ranges in places if ranges),
            (begin, stop) if self.wanted.prompt_rows else None,
        )

    def add_prompt(self, step: PromptStep, sums: Sequence[torch.Tensor], rows_NKD: torch.Tensor | None) -> None:
        """Adds what a planned step brought.

        Args:
            step: what was planned.
            sums: float32 ``[K, D]`` for each of `PromptStep.groups`.
            rows_NKD: the rows of `PromptStep.rows`.
        """
        if self.done != step.planned:
            return
        if step.base_KD is not None:
            self._prefix = _Pool(step.base_KD, step.begin)
        pieces = max(len(step.cuts) - 1, 0)
        for length, piece_KD in zip(step.cuts[1:], sums[:pieces], strict=True):
            self._prefix.add(piece_KD, length - self._prefix.count)
            self._keep_sum(length)
        if step.cuts and step.stop == self.num_prompt:
            self._prompt = self._prefix.mean()
        for (name, ranges), sum_KD in zip(step.places, sums[pieces:], strict=True):
            self._inside[name].add(sum_KD, sum(stop - start for start, stop in ranges))
        if rows_NKD is not None:
            self._prompt_rows.append(rows_NKD.to(self.wanted.row_dtype))
        self.done = step.stop

    def _keep_sum(self, length: int) -> None:
        if self._prefix.value_KD is not None:
            self.sums.append((length, self._prefix.value_KD))

    # --- the response ----------------------------------------------------------------------------------------------

    def add_produced(self, row_KD: torch.Tensor, index: int) -> None:
        """Adds the row that produced response token ``index``, float32 ``[K, D]``."""
        if self._response.count != index:
            return
        wanted = self.wanted
        self._response.add(row_KD, 1) if wanted.pooling == "mean" else _replace(self._response, row_KD, index + 1)
        if wanted.response_rows:
            self._response_rows.append(row_KD.to(wanted.row_dtype)[None])
        if self._window_size != 0:
            self._window.append(row_KD)
            if self._window_size is not None:
                del self._window[: -self._window_size]
        if Segment.FULL not in wanted.segments:
            return
        length = len(Segment.FULL.positions(self.num_prompt, index + 1))
        if wanted.pooling == "last":
            self._last = (row_KD, length)
        elif wanted.sums_prefix and index > 0 and self._prefix.count == length - 1:
            # Token 0's row is the last of the prompt, already in.
            self._prefix.add(row_KD, 1)
            if length % BLOCK == 0:
                self._keep_sum(length)

    # --- the end ---------------------------------------------------------------------------------------------------

    def finish(self, response_ids: Sequence[int], decode: Decode | None = None) -> Pools:
        """What was pooled.

        Args:
            response_ids: the T tokens of the response.
            decode: turns ids into text, special tokens included; needed for a `Between` of the response.
        """
        if Segment.FULL in self.wanted.segments and self.wanted.sums_prefix:
            self._keep_sum(self._prefix.count)
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
        if self.wanted.pooling == "last":
            if segment == Segment.PROMPT:
                value_KD = self._inside[""].value_KD
                return value_KD, 0 if value_KD is None else self.num_prompt
            return self._last if segment == Segment.FULL else (self._response.value_KD, self._response.count)
        if segment == Segment.PROMPT:
            # Before its end, what there is: the count is for the error.
            return self._prompt if self._prompt[1] else (None, self._prefix.count)
        return (self._prefix if segment == Segment.FULL else self._response).mean()

    def _span(
        self, name: str, span: ResolvedSpan, response_ids: Sequence[int], decode: Decode | None
    ) -> tuple[torch.Tensor | None, int]:
        if isinstance(span, PromptSpan):
            pool = self._inside[name]
            if self.wanted.pooling == "last":
                return pool.value_KD, span.count if pool.count else 0
            return pool.mean()
        num_response = len(response_ids)
        if self._response.count != num_response or num_response == 0:
            return None, self._response.count  # a gap, or aborted before its first token: the count is for the error
        start, stop = _places_in_response(span, response_ids, decode)
        first = num_response - len(self._window)
        rows_NKD = torch.stack(self._window[start - first : stop - first])
        return (rows_NKD[-1] if self.wanted.pooling == "last" else rows_NKD.mean(0)), stop - start

    def _rows(self) -> WantedRows | None:
        if not self.wanted.tokens:
            return None
        if not self.wanted.prompt_rows:
            return _wanted_rows(self.num_prompt - 1, self._response_rows)
        # The prompt's last row produced token 0.
        return _wanted_rows(0, self._prompt_rows + self._response_rows[1:])


def sum_rows(rows_ND: torch.Tensor, ranges: Ranges) -> torch.Tensor:
    """Sums the rows in some ranges to one float32 ``[D]``.

    Never a view of ``rows_ND``: that may be a static buffer of a CUDA graph, which the next step overwrites.
    """
    if len(ranges) == 1:
        chosen_ND = rows_ND[ranges[0][0] : ranges[0][1]]
    else:
        # One kernel however many ranges.
        places = [place for start, stop in ranges for place in range(start, stop)]
        chosen_ND = rows_ND.index_select(0, torch.tensor(places, device=rows_ND.device))
    if chosen_ND.shape[0] == 1:
        return chosen_ND[0].to(torch.float32, copy=True)
    return chosen_ND.sum(0, dtype=torch.float32)


def _replace(pool: _Pool, row_KD: torch.Tensor, count: int) -> None:
    pool.value_KD, pool.count = row_KD, count


def _next_inside(place: PromptSpan, position: int) -> int | None:
    """The first position of a place that is not before ``position``."""
    index = bisect_right(place.intervals, position, key=lambda interval: interval[1])
    return None if index == len(place.intervals) else max(place.intervals[index][0], position)


def _inside(place: PromptSpan, begin: int, stop: int) -> Ranges:
    clipped = ((max(first, begin), min(last, stop)) for first, last in place.intervals)
    return tuple((first, last) for first, last in clipped if first < last)


def _cuts(begin: int, stop: int, num_prompt: int) -> tuple[int, ...]:
    """Where sums from the beginning are kept: at blocks, and before the last token, where equal prompts meet."""
    inner = {*range((begin // BLOCK + 1) * BLOCK, stop, BLOCK), num_prompt - 1}
    return (begin, *sorted(cut for cut in inner if begin < cut < stop), stop)


def _places_in_response(
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
        raise SpanError(f"{span!r}: the server has no tokenizer to find the markers with")
    return find_between(span, response_ids, decode)


def _wanted_rows(first: int, parts: list[torch.Tensor]) -> WantedRows | None:
    return WantedRows(first, torch.cat(parts)) if parts else None
