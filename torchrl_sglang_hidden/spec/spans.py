"""Defines spans inside a prompt or a response: which states they select, and how these are pooled.

A span of a prompt selects positions, which are known before the request is sent. A span of a response selects rows,
which are known once the response was sampled; row t is the state that produced response token t, as everywhere in this
package. The spans of single states and windows are in ``places.py``. How spans are found in tokens is in
``span_search.py``.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal, TypeAlias

from torchrl_sglang_hidden.errors import InputError, InputTypeError, SpanError
from torchrl_sglang_hidden.spec.places import At, Each, Every, Window
from torchrl_sglang_hidden.spec.span_base import SpanBase, SpanPooling, SpanSegment, check_pooling, check_segment

__all__ = [
    "Between",
    "Image",
    "LastTokens",
    "PromptSpan",
    "ResolvedSpan",
    "ResponseSpan",
    "Role",
    "Span",
    "TokenMask",
    "Turn",
    "intervals_of",
    "is_of_response",
    "may_be_empty",
    "span_over",
]


@dataclass(frozen=True, slots=True, repr=False)
class LastTokens(SpanBase):
    """Selects the last ``count`` tokens of the prompt or of the response.

    One row with fewer tokens fails the whole call with `SpanError`; for a response, after all rows were sampled.

    Args:
        count: the number of tokens, at least 1.
        segment: ``"response"`` or ``"prompt"``.
        allow_fewer: True selects all tokens of a shorter segment, instead of raising `SpanError`.
        pooling: of these rows; see `HiddenSpec.spans`.

    Raises:
        InputError: a count below 1, or an unknown segment.
        InputTypeError: a count that is no int.
    """

    count: int
    segment: SpanSegment = "response"
    allow_fewer: bool = False

    def __post_init__(self) -> None:
        check_pooling(self)
        if type(self.count) is not int:
            raise InputTypeError(f"LastTokens(count={self.count!r}): expected an integer of at least 1")
        if self.count < 1:
            raise InputError(f"LastTokens(count={self.count}): expected an integer of at least 1")
        check_segment(self)


@dataclass(frozen=True, slots=True, repr=False)
class TokenMask(SpanBase):
    """Selects the prompt tokens where a mask of the TensorDict is True.

    Args:
        key: the key of a bool mask. In tokens mode the mask has the shape of the token ids, ragged or padded like
            them; where they have one placeholder for each image, its entry stands for all rows of the image. In the
            other modes it has one entry for each token of the prompt.
        pooling: of these rows; see `HiddenSpec.spans`.

    Raises:
        InputTypeError: a key that is no string or tuple of strings.
    """

    key: str | tuple[str, ...]

    def __post_init__(self) -> None:
        check_pooling(self)
        parts = self.key if isinstance(self.key, tuple) else (self.key,)
        if not parts or not all(isinstance(part, str) and part for part in parts):
            raise InputTypeError(f"TokenMask(key={self.key!r}): expected a TensorDict key, a string or a tuple of them")


@dataclass(frozen=True, slots=True, repr=False)
class Turn(SpanBase):
    """Selects the text of one message of the prompt's chat, without the chat template's markers.

    Args:
        index: the message, from 0; a negative index counts from the end, as in Python.
        pooling: of these rows; see `HiddenSpec.spans`.

    Raises:
        InputTypeError: an index that is no int.
    """

    index: int

    def __post_init__(self) -> None:
        check_pooling(self)
        if type(self.index) is not int:
            raise InputTypeError(f"Turn(index={self.index!r}): expected an integer")


@dataclass(frozen=True, slots=True, repr=False)
class Role(SpanBase):
    """Selects the text of all messages of one role in the prompt's chat, without the chat template's markers.

    Args:
        name: the role, such as ``"user"``, ``"system"`` or ``"assistant"``.
        pooling: of these rows; see `HiddenSpec.spans`.

    Raises:
        InputTypeError: a name that is no string, or empty.
    """

    name: str

    def __post_init__(self) -> None:
        check_pooling(self)
        if not isinstance(self.name, str) or not self.name:
            raise InputTypeError(f"Role(name={self.name!r}): expected a role's name, such as 'user'")


@dataclass(frozen=True, slots=True, repr=False)
class Image(SpanBase):
    """Selects the rows of one image of the prompt: every position that its placeholder is expanded to.

    Args:
        index: the image, from 0, in the order of the prompt's placeholders; a negative index counts from the end.
        pooling: of these rows; see `HiddenSpec.spans`.

    Raises:
        InputTypeError: an index that is no int.
    """

    index: int

    def __post_init__(self) -> None:
        check_pooling(self)
        if type(self.index) is not int:
            raise InputTypeError(f"Image(index={self.index!r}): expected an integer")


@dataclass(frozen=True, slots=True, repr=False)
class Between(SpanBase):
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
        pooling: of these rows; see `HiddenSpec.spans`.

    Raises:
        InputError: no marker, an empty marker, or an unknown ``segment`` or ``unclosed``.
        InputTypeError: a marker that is no string.
    """

    start: str | None
    end: str | None
    segment: SpanSegment = "response"
    unclosed: Literal["error", "end"] = "error"

    def __post_init__(self) -> None:
        check_pooling(self)
        for marker in (self.start, self.end):
            if not isinstance(marker, (str, type(None))):
                raise InputTypeError(f"{self!r}: a marker is a string or None; pass one of these")
        if "" in (self.start, self.end) or (self.start is None and self.end is None):
            raise InputError(f"{self!r}: expected at least one marker, and none of them empty")
        if self.unclosed not in ("error", "end"):
            raise InputError(f"{self!r}: unclosed is one of ('error', 'end'); pass one of these")
        check_segment(self)


Span: TypeAlias = LastTokens | TokenMask | Turn | Role | Image | Between | At | Each | Window | Every


@dataclass(frozen=True, slots=True)
class PromptSpan:
    """Holds the positions that a span selects in one prompt.

    Args:
        intervals: half-open ``(start, stop)`` in order, each with at least one position, without overlap. None at all
            for a span that may be empty: it is NaN with a count of 0, and is not sent.
        pooling: of these rows; see `HiddenSpec.spans`.
    """

    intervals: tuple[tuple[int, int], ...]
    pooling: SpanPooling = "spec"

    @property
    def count(self) -> int:
        """The number of positions."""
        return sum(stop - start for start, stop in self.intervals)

    @property
    def end(self) -> int:
        """One past the last position; 0 without any."""
        return self.intervals[-1][1] if self.intervals else 0

    @property
    def positions(self) -> list[int]:
        """The positions, in order."""
        return [position for start, stop in self.intervals for position in range(start, stop)]


# A span of one request: a prompt's positions are known when it is sent, a response's rows when it has ended.
ResponseSpan: TypeAlias = LastTokens | Between | At | Each | Window | Every
ResolvedSpan: TypeAlias = PromptSpan | ResponseSpan


def is_of_response(span: Span | ResolvedSpan) -> bool:
    """Return whether a span's rows are those that produced the response."""
    return isinstance(span, ResponseSpan) and span.segment == "response"


def may_be_empty(span: object) -> bool:
    """Return whether a span without rows is NaN with a count of 0, and no error."""
    return isinstance(span, Window) or (isinstance(span, (At, Each)) and span.missing == "nan")


def span_over(positions: Sequence[int]) -> PromptSpan:
    """Return the span of some positions, which are in order, none of them twice."""
    edges = [-1, *(place for place, (one, other) in enumerate(pairwise(positions)) if other != one + 1)]
    edges.append(len(positions) - 1)
    return PromptSpan(
        tuple((positions[first + 1], positions[last] + 1) for first, last in pairwise(edges) if last > first)
    )


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
