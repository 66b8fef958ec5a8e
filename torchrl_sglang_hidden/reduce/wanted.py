"""Describe what a request wants of its hidden rows, and which positions of one forward step that takes.

Pure torch, host side: plans only, before any row is computed. Knows nothing of SGLang, JSON or TensorDicts.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

import torch

from torchrl_sglang_hidden.reduce.reducers import Last, Ranges, Reducer, reducer_of
from torchrl_sglang_hidden.spec.hidden import Pooling, Segment, SegmentName, reads_prompt, reads_response
from torchrl_sglang_hidden.spec.span_base import own_pooling
from torchrl_sglang_hidden.spec.spans import PromptSpan, ResolvedSpan

__all__ = ["BLOCK", "PromptStep", "SpanPart", "Wanted", "clip", "cuts", "next_position"]

# Positions between two running values over the beginning of a prompt that are worth keeping: a prompt that shares a
# part of it is computed again from the last of them on.
BLOCK = 64


@dataclass(frozen=True, slots=True)
class Wanted:
    """What one request wants pooled.

    Args:
        segments: whole segments.
        pooling: how rows are reduced; None for none.
        layers: canonical layer ids, K of them.
        spans: parts of the segments, by name.
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
    def reducer(self) -> Reducer:
        """The reducer of the pooling. Without a pooling, the one that keeps least: rows are then only counted."""
        return Last() if self.pooling is None else reducer_of(self.pooling)

    @property
    def pools_prefix(self) -> bool:
        """Whether a value over all rows from the first position on is wanted."""
        return self.pooling is not None and self.reducer.needs_all_rows and reads_prompt(self.segments)

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

    def span_pooling(self, name: str) -> Pooling | None:
        """Return how a span is pooled; that of the prompt segment is ``""``."""
        return own_pooling(self.spans[name].pooling, self.pooling) if name else self.pooling

    def prompt_parts(self, num_prompt: int) -> dict[str, PromptSpan]:
        """Return which positions inside the prompt are taken, by span name; those of the prompt segment as ``""``.

        Values over all rows from the first position on are not among them: see `pools_prefix`.
        """
        parts = {}
        for name, span in self.spans.items():
            if isinstance(span, PromptSpan):
                pooling = self.span_pooling(name)
                last_stands = pooling is not None and not reducer_of(pooling).needs_all_rows
                parts[name] = PromptSpan(((span.end - 1, span.end),)) if last_stands else span
        if self.pooling is not None and not self.reducer.needs_all_rows and Segment.PROMPT in self.segments:
            parts[""] = PromptSpan(((num_prompt - 1, num_prompt),))
        return parts


class SpanPart(NamedTuple):
    """What one forward step must bring of a span.

    Args:
        name: the span's.
        ranges: the positions whose value is wanted.
        reducer: makes it; None for the request's own, which also does for one position alone.
    """

    name: str
    ranges: Ranges
    reducer: Reducer | None = None


@dataclass(frozen=True, slots=True)
class PromptStep:
    """What one request wants of the prompt positions ``begin … stop-1``, in one forward step.

    Args:
        begin: the first position that is new to the pools.
        stop: the position after the last.
        planned: the first position that was still to come when the step was planned: the positions from there to
            ``begin`` are not computed for this request.
        base_KD: the running value over all positions before ``begin``, if some of them were not computed and it is
            wanted.
        cuts: ``begin``, …, ``stop``: the values from ``begin`` up to each of them are wanted; empty for none.
        parts: the values of spans that are wanted; one for each position of a span without a pooling.
        rows: the positions wanted as they are.
    """

    begin: int
    stop: int
    planned: int
    base_KD: torch.Tensor | None
    cuts: tuple[int, ...]
    parts: tuple[SpanPart, ...]
    rows: tuple[int, int] | None

    @property
    def num_running(self) -> int:
        """How many values stand for all positions from the first on."""
        return max(len(self.cuts) - 1, 0)

    @property
    def num_groups(self) -> int:
        """How many sets of positions there are in `groups`."""
        return self.num_running + len(self.parts)

    @property
    def groups(self) -> list[Ranges]:
        """The sets of positions whose rows are to be reduced: up to each cut, then the spans' parts."""
        return [*(((self.begin, cut),) for cut in self.cuts[1:]), *(part.ranges for part in self.parts)]


def next_position(span: PromptSpan, position: int) -> int | None:
    """Return the first position of a span that is not before ``position``; None where the span ends before it."""
    index = bisect_right(span.intervals, position, key=lambda interval: interval[1])
    return None if index == len(span.intervals) else max(span.intervals[index][0], position)


def clip(span: PromptSpan, begin: int, stop: int) -> Ranges:
    """Return the intervals of a span inside ``begin … stop-1``."""
    clipped = ((max(first, begin), min(last, stop)) for first, last in span.intervals)
    return tuple((first, last) for first, last in clipped if first < last)


def cuts(begin: int, stop: int, num_prompt: int) -> tuple[int, ...]:
    """Return where running values are kept: at blocks, and before the last token, where equal prompts meet."""
    inner = {*range((begin // BLOCK + 1) * BLOCK, stop, BLOCK), num_prompt - 1}
    return (begin, *sorted(cut for cut in inner if begin < cut < stop), stop)
