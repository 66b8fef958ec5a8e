"""Defines spans of single states, which stand at a text or at a number, and of windows.

Row t of a response is the state that produced response token t, and row p of a prompt the state that has read token p.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from torchrl_sglang_hidden.errors import InputError, InputTypeError
from torchrl_sglang_hidden.spec.span_base import SpanBase, SpanPooling, SpanSegment, check_pooling, check_segment

__all__ = ["At", "Each", "Every", "Window"]


@dataclass(frozen=True, slots=True, repr=False)
class At(SpanBase):
    """Selects the one state that stands at the first place of a marker string.

    ``where="after"`` is the first state that has read the whole marker, and ``"before"`` the last one that has read
    none of it. A token that holds any part of the marker counts as its own. In a prompt, ``"after"`` stands at the
    marker's last token, and ``"before"`` at the token in front of its first one. In a response, where row t is the
    state that produced token t, ``"before"`` is the row of the marker's first token, and ``"after"`` the row of the
    token behind its last one. A marker that ends a response has no state after it: the model never reads the last
    token.

    Markers are searched in the text with special tokens, so that ``"<|im_end|>"`` can be a marker. Where there is no
    such state, the span is NaN with a count of 0; ``missing="error"`` raises `SpanError` instead.

    Args:
        marker: the text.
        where: ``"after"`` or ``"before"``.
        segment: ``"response"`` or ``"prompt"``.
        missing: ``"nan"`` or ``"error"``, for a marker that is not there or has no such state.
        pooling: of these rows; see `HiddenSpec.spans`.

    Raises:
        InputError: an empty marker, or an unknown ``where``, ``segment``, ``missing`` or ``pooling``.
        InputTypeError: a marker that is no string.
    """

    marker: str
    where: Literal["after", "before"] = "after"
    segment: SpanSegment = "response"
    missing: Literal["nan", "error"] = "nan"

    def __post_init__(self) -> None:
        _check_marked(self)


@dataclass(frozen=True, slots=True, repr=False)
class Each(SpanBase):
    """Selects the states that stand at each place of a marker string, in order: S of them.

    Each state is as in `At`. Places are searched from the left and do not overlap, as in ``str.split``. States that
    coincide, because one token holds several markers, are one. By default the rows stay as they are, ``[S, D]``;
    ``pooling="last"`` is the state at the last place.

    Where there is no such state, S is 0, and a pooled span is NaN with a count of 0; ``missing="error"`` raises
    `SpanError` instead.

    Args:
        marker: the text, such as ``"\\n\\n"``.
        where: ``"after"`` or ``"before"``.
        segment: ``"response"`` or ``"prompt"``.
        missing: ``"nan"`` or ``"error"``.
        pooling: of these rows; see `HiddenSpec.spans`.

    Raises:
        InputError: an empty marker, or an unknown ``where``, ``segment``, ``missing`` or ``pooling``.
        InputTypeError: a marker that is no string.
    """

    marker: str
    where: Literal["after", "before"] = "after"
    segment: SpanSegment = "response"
    missing: Literal["nan", "error"] = "nan"
    pooling: SpanPooling = field(default=None, kw_only=True)

    def __post_init__(self) -> None:
        _check_marked(self)


@dataclass(frozen=True, slots=True, repr=False)
class Window(SpanBase):
    """Selects the rows ``start … stop-1`` of the prompt or of the response, as the slice ``[start:stop]`` does.

    A window that goes past the end is cut there, in each row of a batch by itself. One that begins past the end is NaN
    with a count of 0.

    Args:
        start: the first row, from 0.
        stop: one past the last row.
        segment: ``"response"`` or ``"prompt"``, where rows of images count.
        pooling: of these rows; see `HiddenSpec.spans`.

    Raises:
        InputError: a negative start, a stop that is not over the start, or an unknown ``segment`` or ``pooling``.
        InputTypeError: an end that is no int.
    """

    start: int
    stop: int
    segment: SpanSegment = "response"

    def __post_init__(self) -> None:
        check_pooling(self)
        check_segment(self)
        if type(self.start) is not int or type(self.stop) is not int:
            raise InputTypeError(f"{self!r}: expected integers, 0 <= start < stop")
        if not 0 <= self.start < self.stop:
            raise InputError(f"{self!r}: expected 0 <= start < stop; the end of a segment is LastTokens")


@dataclass(frozen=True, slots=True, repr=False)
class Every(SpanBase):
    """Selects the rows 0, n, 2n, … of the prompt or of the response, as the slice ``[::n]`` does.

    By default the rows stay as they are, ``[S, D]``.

    Args:
        n: the distance, at least 1.
        segment: ``"response"`` or ``"prompt"``, where rows of images count.
        pooling: of these rows; see `HiddenSpec.spans`.

    Raises:
        InputError: an n below 1, or an unknown ``segment`` or ``pooling``.
        InputTypeError: an n that is no int.
    """

    n: int
    segment: SpanSegment = "response"
    pooling: SpanPooling = field(default=None, kw_only=True)

    def __post_init__(self) -> None:
        check_pooling(self)
        check_segment(self)
        if type(self.n) is not int:
            raise InputTypeError(f"{self!r}: expected an integer of at least 1")
        if self.n < 1:
            raise InputError(f"{self!r}: expected an integer of at least 1")


def _check_marked(span: At | Each) -> None:
    check_pooling(span)
    check_segment(span)
    if not isinstance(span.marker, str):
        raise InputTypeError(f"{span!r}: a marker is a string, such as '</think>'; pass one")
    if not span.marker:
        raise InputError(f"{span!r}: an empty marker is everywhere; pass some text")
    for name, known in (("where", ("after", "before")), ("missing", ("nan", "error"))):
        if getattr(span, name) not in known:
            raise InputError(f"{span!r}: {name} is one of {known}; pass one of these")
