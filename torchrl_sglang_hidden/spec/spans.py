"""Spans inside a prompt or a response: what the user writes, and the places that they come to mean.

Knows nothing of SGLang, TensorDicts or tokenizers but their ``decode``.

A span of the prompt means positions, known before the request is sent. A span of the response means rows, known once
it was sampled; row t is the state that produced response token t, as everywhere in this package.
"""

from __future__ import annotations

import functools
from bisect import bisect_left, bisect_right
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, TypeAlias, get_args

from torchrl_sglang_hidden.errors import InputError, InputTypeError, SpanError

__all__ = [
    "Between",
    "LastTokens",
    "PromptSpan",
    "ResolvedSpan",
    "Role",
    "Span",
    "TokenMask",
    "Turn",
    "find_between",
    "intervals_of",
    "tokens_around",
]

SpanSegment = Literal["prompt", "response"]
SPAN_SEGMENTS: tuple[SpanSegment, ...] = get_args(SpanSegment)

Decode: TypeAlias = Callable[[Sequence[int]], str]

CHARACTER_BYTES = 4  # the most that one has in UTF-8, so the most tokens that it can be cut into


@dataclass(frozen=True, slots=True)
class LastTokens:
    """The last ``count`` tokens of the prompt or of the response.

    One row with fewer of them fails the whole call with `SpanError`, for a response after all rows were sampled.

    Args:
        count: k, at least 1.
        segment: ``"response"`` or ``"prompt"``.
        allow_fewer: take what there is where the segment is shorter; else that raises `SpanError`.

    Raises:
        InputError: a count below 1, or another segment.
        InputTypeError: a count that is no int.
    """

    count: int
    segment: SpanSegment = "response"
    allow_fewer: bool = False

    def __post_init__(self) -> None:
        if type(self.count) is not int:
            raise InputTypeError(f"LastTokens(count={self.count!r}): expected an integer of at least 1")
        if self.count < 1:
            raise InputError(f"LastTokens(count={self.count}): expected an integer of at least 1")
        _check_segment(self)


@dataclass(frozen=True, slots=True)
class TokenMask:
    """The prompt's tokens where a mask of the TensorDict is True.

    Args:
        key: where the mask is, bool: the shape of the token ids in tokens mode, one entry per token of the prompt in
            the others; ragged or padded like the ids.
    """

    key: str | tuple[str, ...]

    def __post_init__(self) -> None:
        parts = self.key if isinstance(self.key, tuple) else (self.key,)
        if not parts or not all(isinstance(part, str) and part for part in parts):
            raise InputTypeError(f"TokenMask(key={self.key!r}): expected a TensorDict key, a string or a tuple of them")


@dataclass(frozen=True, slots=True)
class Turn:
    """The words of one message of the prompt's chat.

    Args:
        index: the message, from 0; negative ones count from the end, as in Python.
    """

    index: int

    def __post_init__(self) -> None:
        if type(self.index) is not int:
            raise InputTypeError(f"Turn(index={self.index!r}): expected an integer")


@dataclass(frozen=True, slots=True)
class Role:
    """The words of all messages of one role in the prompt's chat.

    Args:
        name: the role, such as ``"user"``, ``"system"`` or ``"assistant"``.
    """

    name: str

    def __post_init__(self) -> None:
        if not isinstance(self.name, str) or not self.name:
            raise InputTypeError(f"Role(name={self.name!r}): expected a role's name, such as 'user'")


@dataclass(frozen=True, slots=True)
class Between:
    """What stands between two marker strings: the first ``start``, and the first ``end`` behind it.

    A token that holds any part of a marker is not in the span. The text is that of the ids with special tokens, so
    that ``"<|im_end|>"`` can be a marker.

    One row in which a marker is missing, or nothing stands between them, fails the whole call with `SpanError`, for a
    response after all rows were sampled. ``unclosed="end"`` lets a missing ``end`` pass; nothing lets a missing
    ``start`` pass.

    Args:
        start: the marker in front; None for the segment's beginning.
        end: the marker behind; None for the segment's end.
        segment: ``"response"`` or ``"prompt"``.
        unclosed: what a segment without ``end`` means: ``"error"`` raises `SpanError`, ``"end"`` takes the span up to
            the segment's end, such as where a response was cut by its length.

    Raises:
        InputError: neither marker, an empty one, or a value outside those named.
        InputTypeError: a marker that is no string.
    """

    start: str | None
    end: str | None
    segment: SpanSegment = "response"
    unclosed: Literal["error", "end"] = "error"

    def __post_init__(self) -> None:
        for marker in (self.start, self.end):
            if not isinstance(marker, (str, type(None))):
                raise InputTypeError(f"{self!r}: a marker is a string or None")
        if "" in (self.start, self.end) or (self.start is None and self.end is None):
            raise InputError(f"{self!r}: expected at least one marker, and none of them empty")
        if self.unclosed not in ("error", "end"):
            raise InputError(f"{self!r}: unclosed is one of ('error', 'end')")
        _check_segment(self)


Span: TypeAlias = LastTokens | TokenMask | Turn | Role | Between


@dataclass(frozen=True, slots=True)
class PromptSpan:
    """A span of one prompt, resolved: half-open intervals of positions, in order, apart, none of them empty."""

    intervals: tuple[tuple[int, int], ...]

    @property
    def count(self) -> int:
        """How many positions it has."""
        return sum(stop - start for start, stop in self.intervals)

    @property
    def end(self) -> int:
        """Behind its last position."""
        return self.intervals[-1][1]


# What a span is once its prompt is known; those of the response are found when it has ended.
ResolvedSpan: TypeAlias = PromptSpan | LastTokens | Between


def intervals_of(mask: Sequence[bool]) -> PromptSpan:
    """The True places of a mask as a span.

    Raises:
        SpanError: there is none.
    """
    edges: list[int] = []
    for place, inside in enumerate((*mask, False)):
        if bool(inside) != bool(len(edges) % 2):
            edges.append(place)
    if not edges:
        raise SpanError(f"a mask of {len(mask)} tokens is False everywhere, and an empty span has no state")
    return PromptSpan(tuple(zip(edges[::2], edges[1::2], strict=True)))


def find_between(span: Between, ids: Sequence[int], decode: Decode) -> tuple[int, int]:
    """Which of the tokens ``ids`` stand between the markers: ``start … stop-1``.

    Args:
        span: the markers.
        ids: the segment's tokens.
        decode: turns ids into text, special tokens included.

    Raises:
        SpanError: a marker is missing, or nothing stands between them.
    """
    text = decode(ids)
    begin = 0
    if span.start is not None:
        found = text.find(span.start)
        if found < 0:
            raise SpanError(f"the marker {span.start!r} is not in the {span.segment}, {text[-80:]!r}")
        begin = found + len(span.start)
    end = len(text) if span.end is None else text.find(span.end, begin)
    if end < 0 and span.unclosed == "error":
        raise SpanError(
            f"the marker {span.end!r} is not in the {span.segment} behind {span.start!r}, {text[-80:]!r}; raise "
            "max_new_tokens, or pass unclosed='end'"
        )
    closed = span.end is not None and end >= 0
    around = tokens_around((begin, end) if closed else (begin,), text, ids, decode)
    first, last = around[0][1], around[1][0] if closed else len(ids)
    if last <= first:
        raise SpanError(f"nothing stands between {span.start!r} and {span.end!r} in the {span.segment}, {text[-80:]!r}")
    return first, last


def tokens_around(places: Sequence[int], text: str, ids: Sequence[int], decode: Decode) -> list[tuple[int, int]]:
    """For each place of the text, how many of the ids end at or before it, and how many begin before it.

    The two differ by the token that holds something on both sides of the place, if there is one.

    How many bytes a U+FFFD in the text stands for cannot be read from it: between two of them the counts are rough.

    Args:
        places: from 0 to ``len(text)``.
        text: what ``decode`` makes of all ids.
        ids: the tokens.
        decode: turns ids into text. It is called about ``log2(len(ids))`` times for a place, at most
            `CHARACTER_BYTES` times as often where characters are cut.
    """

    @functools.cache
    def read(count: int) -> tuple[int, bool]:
        """How far the text of the first ids is the beginning of the whole text, and whether all of it is."""
        prefix = decode(ids[:count])
        if text.startswith(prefix):
            return len(prefix), True
        differs = bisect_left(range(len(prefix)), True, key=lambda last: not text.startswith(prefix[: last + 1]))
        return differs, False

    @functools.cache
    def end(count: int) -> int:
        """Behind the last character that the first ids hold any part of."""
        same, fits = read(count)
        if fits:
            return same
        # A character is cut. Byte fallback then writes U+FFFD for the whole characters right before it too, so how
        # many there are is asked of the ids that end before it.
        fewer = range(count - 1, max(count - CHARACTER_BYTES, 0), -1)
        return max(same, next((read(some)[0] for some in fewer if read(some)[1]), 0)) + 1

    def around(place: int) -> tuple[int, int]:
        before = bisect_right(range(1, len(ids) + 1), place, key=end)
        return before, before if read(before) == (place, True) else min(before + 1, len(ids))

    return [around(place) for place in places]


def _check_segment(span: LastTokens | Between) -> None:
    if span.segment not in SPAN_SEGMENTS:
        raise InputError(f"{type(span).__name__}(segment={span.segment!r}): expected one of {SPAN_SEGMENTS}")
