"""Defines spans inside a prompt or a response, and finds the tokens that they select.

A span of a prompt selects positions, which are known before the request is sent. A span of a response selects rows,
which are known once the response was sampled; row t is the state that produced response token t, as everywhere in this
package. Knows nothing of SGLang or TensorDicts, and of a tokenizer only its ``decode``.
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
    "Image",
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

CHARACTER_BYTES = 4  # most bytes of a character in UTF-8, and so most tokens that share one character


@dataclass(frozen=True, slots=True)
class LastTokens:
    """Selects the last ``count`` tokens of the prompt or of the response.

    One row with fewer tokens fails the whole call with `SpanError`; for a response, after all rows were sampled.

    Args:
        count: the number of tokens, at least 1.
        segment: ``"response"`` or ``"prompt"``.
        allow_fewer: True selects all tokens of a shorter segment, instead of raising `SpanError`.

    Raises:
        InputError: a count below 1, or an unknown segment.
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
    """Selects the prompt tokens where a mask of the TensorDict is True.

    Args:
        key: the key of a bool mask. In tokens mode the mask has the shape of the token ids, ragged or padded like
            them; where they have one placeholder for each image, its entry stands for all rows of the image. In the
            other modes it has one entry for each token of the prompt.

    Raises:
        InputTypeError: a key that is no string or tuple of strings.
    """

    key: str | tuple[str, ...]

    def __post_init__(self) -> None:
        parts = self.key if isinstance(self.key, tuple) else (self.key,)
        if not parts or not all(isinstance(part, str) and part for part in parts):
            raise InputTypeError(f"TokenMask(key={self.key!r}): expected a TensorDict key, a string or a tuple of them")


@dataclass(frozen=True, slots=True)
class Turn:
    """Selects the text of one message of the prompt's chat, without the chat template's markers.

    Args:
        index: the message, from 0; a negative index counts from the end, as in Python.

    Raises:
        InputTypeError: an index that is no int.
    """

    index: int

    def __post_init__(self) -> None:
        if type(self.index) is not int:
            raise InputTypeError(f"Turn(index={self.index!r}): expected an integer")


@dataclass(frozen=True, slots=True)
class Role:
    """Selects the text of all messages of one role in the prompt's chat, without the chat template's markers.

    Args:
        name: the role, such as ``"user"``, ``"system"`` or ``"assistant"``.

    Raises:
        InputTypeError: a name that is no string, or empty.
    """

    name: str

    def __post_init__(self) -> None:
        if not isinstance(self.name, str) or not self.name:
            raise InputTypeError(f"Role(name={self.name!r}): expected a role's name, such as 'user'")


@dataclass(frozen=True, slots=True)
class Image:
    """Selects the rows of one image of the prompt: every position that its placeholder is expanded to.

    Args:
        index: the image, from 0, in the order of the prompt's placeholders; a negative index counts from the end.

    Raises:
        InputTypeError: an index that is no int.
    """

    index: int

    def __post_init__(self) -> None:
        if type(self.index) is not int:
            raise InputTypeError(f"Image(index={self.index!r}): expected an integer")


@dataclass(frozen=True, slots=True)
class Between:
    """Selects the tokens between two marker strings: the first ``start``, and the first ``end`` after it.

    A token that holds any part of a marker is not in the span. Markers are searched in the text with special tokens, so
    that ``"<|im_end|>"`` can be a marker.

    A marker that is missing, or no token between the markers, is a `SpanError`, which fails the whole call unless the
    policy has ``on_error="nan"``; for a response, after all rows were sampled. ``unclosed="end"`` accepts a missing
    ``end``. A missing ``start`` is always an error.

    In history mode a chat may open a response's span: with ``start``, blanks apart, at its end, as a generation prompt
    that ends with ``"<think>"``, or in an assistant's message that the response goes on from. The span then begins with
    the response. In the other modes, ``start=None`` says so.

    Args:
        start: the marker before the span; None for the segment's beginning.
        end: the marker after the span; None for the segment's end.
        segment: ``"response"`` or ``"prompt"``.
        unclosed: for a segment without ``end``, ``"error"`` raises `SpanError`, and ``"end"`` selects up to the
            segment's end, for example in a response that was cut by its length.

    Raises:
        InputError: no marker, an empty marker, or an unknown ``segment`` or ``unclosed``.
        InputTypeError: a marker that is no string.
    """

    start: str | None
    end: str | None
    segment: SpanSegment = "response"
    unclosed: Literal["error", "end"] = "error"

    def __post_init__(self) -> None:
        for marker in (self.start, self.end):
            if not isinstance(marker, (str, type(None))):
                raise InputTypeError(f"{self!r}: a marker is a string or None; pass one of these")
        if "" in (self.start, self.end) or (self.start is None and self.end is None):
            raise InputError(f"{self!r}: expected at least one marker, and none of them empty")
        if self.unclosed not in ("error", "end"):
            raise InputError(f"{self!r}: unclosed is one of ('error', 'end'); pass one of these")
        _check_segment(self)


Span: TypeAlias = LastTokens | TokenMask | Turn | Role | Image | Between


@dataclass(frozen=True, slots=True)
class PromptSpan:
    """Holds the positions that a span selects in one prompt.

    Args:
        intervals: half-open ``(start, stop)`` in order, each with at least one position, without overlap.
    """

    intervals: tuple[tuple[int, int], ...]

    @property
    def count(self) -> int:
        """The number of positions."""
        return sum(stop - start for start, stop in self.intervals)

    @property
    def end(self) -> int:
        """One past the last position."""
        return self.intervals[-1][1]


# A span of one request: a prompt's positions are known when it is sent, a response's rows when it has ended.
ResolvedSpan: TypeAlias = PromptSpan | LastTokens | Between


def intervals_of(mask: Sequence[bool]) -> PromptSpan:
    """Turn a mask over a prompt's tokens into the span of its True positions.

    Raises:
        SpanError: the mask is False everywhere.
    """
    edges: list[int] = []
    for position, inside in enumerate((*mask, False)):
        if bool(inside) != bool(len(edges) % 2):
            edges.append(position)
    if not edges:
        raise SpanError(
            f"a mask of {len(mask)} tokens is False everywhere, and an empty span has no state; leave at least 1 True"
        )
    return PromptSpan(tuple(zip(edges[::2], edges[1::2], strict=True)))


def find_between(span: Between, ids: Sequence[int], decode: Decode) -> tuple[int, int]:
    """Find the tokens between the markers.

    Args:
        span: the markers.
        ids: the segment's token ids.
        decode: turns ids into text, special tokens included.

    Returns:
        ``(start, stop)``: the span is ``ids[start:stop]``.

    Raises:
        SpanError: a marker is missing, or no token is between the markers.
    """
    text = decode(ids)
    begin = 0
    if span.start is not None:
        found = text.find(span.start)
        if found < 0:
            raise SpanError(
                f"the marker {span.start!r} is not in the {span.segment}, {text[-80:]!r}; check that the model "
                "writes it, or use start=None for a span that begins with the segment"
            )
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
        raise SpanError(
            f"nothing stands between {span.start!r} and {span.end!r} in the {span.segment}, {text[-80:]!r}; an empty "
            "span has no state: choose other markers"
        )
    return first, last


def tokens_around(offsets: Sequence[int], text: str, ids: Sequence[int], decode: Decode) -> list[tuple[int, int]]:
    """Count, for each offset into the text, the tokens that end at or before it and the tokens that begin before it.

    The two counts differ by one where a token holds text on both sides of the offset. For example, with the tokens
    ``["ab", "cd"]`` offset 2 gives ``(1, 1)`` and offset 3 gives ``(1, 2)``.

    Some tokenizers write one U+FFFD for several bytes, so that between two U+FFFD the counts are approximate.

    Args:
        offsets: in characters, from 0 to ``len(text)``.
        text: the text of all ids.
        ids: the token ids.
        decode: turns ids into text. It is called about ``log2(len(ids))`` times for an offset, and at most
            `CHARACTER_BYTES` times as often where tokens share characters.
    """

    @functools.cache
    def read(count: int) -> tuple[int, bool]:
        """Return the length of text that the first ids agree with, and whether all their text agrees."""
        prefix = decode(ids[:count])
        if text.startswith(prefix):
            return len(prefix), True
        differs = bisect_left(range(len(prefix)), True, key=lambda last: not text.startswith(prefix[: last + 1]))
        return differs, False

    @functools.cache
    def end(count: int) -> int:
        """Return the offset behind the last character that the first ids hold any part of."""
        same, agrees = read(count)
        if agrees:
            return same
        # The last token ends inside a character. Byte fallback then writes U+FFFD for the whole characters right before
        # it too, so count characters with the ids that end before it.
        fewer = range(count - 1, max(count - CHARACTER_BYTES, 0), -1)
        return max(same, next((read(some)[0] for some in fewer if read(some)[1]), 0)) + 1

    def around(offset: int) -> tuple[int, int]:
        before = bisect_right(range(1, len(ids) + 1), offset, key=end)
        return before, before if read(before) == (offset, True) else min(before + 1, len(ids))

    return [around(offset) for offset in offsets]


def _check_segment(span: LastTokens | Between) -> None:
    if span.segment not in SPAN_SEGMENTS:
        raise InputError(f"{type(span).__name__}(segment={span.segment!r}): expected one of {SPAN_SEGMENTS}")
