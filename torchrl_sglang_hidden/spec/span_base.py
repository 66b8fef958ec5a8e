"""Defines what all spans have: a pooling of their own, and most of them a segment."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Literal, Protocol, TypeAlias, get_args

from torchrl_sglang_hidden.errors import InputError

__all__ = [
    "MAX_SPAN_ROWS",
    "POOLINGS",
    "Pooling",
    "SpanBase",
    "SpanPooling",
    "SpanSegment",
    "check_pooling",
    "check_segment",
    "own_pooling",
]

Pooling = Literal["mean", "last", "max", "sum"]
POOLINGS: tuple[Pooling, ...] = get_args(Pooling)
# "spec" is the pooling of the HiddenSpec; None leaves the rows as they are.
SpanPooling: TypeAlias = Pooling | Literal["spec"] | None
SpanSegment = Literal["prompt", "response"]
SPAN_SEGMENTS: tuple[SpanSegment, ...] = get_args(SpanSegment)

# Most rows of a span without pooling. Each is a value of its own in the scheduler, while all other requests wait;
# tokens=True has rows in any number.
MAX_SPAN_ROWS = 4096


@dataclass(frozen=True, slots=True, kw_only=True, repr=False)
class SpanBase:
    """Has what all spans have.

    Args:
        pooling: how the rows become one vector, as in `HiddenSpec.pooling`, whose it is by default (``"spec"``). None
            pools nothing: the span is ``[S, D]``, its S rows in order, at most 4096 of them, and
            ``("hidden_states", "span_places", name)`` says which they are.
    """

    pooling: SpanPooling = "spec"

    def __repr__(self) -> str:
        # As it is written. Recordings are compared by this text, which does not change while a span has no pooling.
        said = [f"{one.name}={getattr(self, one.name)!r}" for one in fields(self) if one.name != "pooling"]
        said += [] if self.pooling == "spec" else [f"pooling={self.pooling!r}"]
        return f"{type(self).__name__}({', '.join(said)})"


class _OfSegment(Protocol):
    @property
    def segment(self) -> SpanSegment: ...


def own_pooling(own: SpanPooling, of_spec: Pooling | None) -> Pooling | None:
    """Return a span's pooling, which may be the spec's."""
    return of_spec if own == "spec" else own


def check_segment(span: _OfSegment) -> None:
    """Refuse a segment that spans do not have."""
    if span.segment not in SPAN_SEGMENTS:
        raise InputError(f"{type(span).__name__}(segment={span.segment!r}): expected one of {SPAN_SEGMENTS}")


def check_pooling(span: SpanBase) -> None:
    """Refuse a pooling that spans do not have."""
    if span.pooling not in (*POOLINGS, "spec", None):
        raise InputError(
            f"{type(span).__name__}(pooling={span.pooling!r}): expected one of {POOLINGS}, None for the rows as they "
            "are, or 'spec' for the HiddenSpec's"
        )
