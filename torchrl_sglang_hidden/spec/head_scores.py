"""Define which scores of heads a policy returns, and when a score ends a response.

Knows nothing of what a head computes, of servers or TensorDicts.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from torchrl_sglang_hidden.errors import InputError, InputTypeError
from torchrl_sglang_hidden.spec.heads import HEAD_NAME, MAX_HEADS, check_head_name
from torchrl_sglang_hidden.spec.hidden import (
    SEGMENTS,
    HiddenSpec,
    Pooling,
    Segment,
    SegmentName,
    reads_prompt,
    reads_response,
)
from torchrl_sglang_hidden.spec.spans import Span, is_of_response

__all__ = ["HeadSpec", "StopRule"]

_RULE = re.compile(
    rf"\s*({HEAD_NAME.pattern})\s*(>=|<=|>|<)\s*([+-]?(?:[0-9]+(?:\.[0-9]*)?|\.[0-9]+)(?:[eE][+-]?[0-9]+)?)\s*",
    re.ASCII,
)
_COMPARISONS: dict[str, Callable[[float, float], bool]] = {
    ">": float.__gt__, ">=": float.__ge__, "<": float.__lt__, "<=": float.__le__,
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class StopRule:
    """Says which score of a response token ends the response.

    Args:
        head: the head's name.
        comparison: ``">"``, ``">="``, ``"<"`` or ``"<="``.
        threshold: what the score is compared with.
    """

    head: str
    comparison: str
    threshold: float

    @classmethod
    def parse(cls, text: object) -> StopRule:
        """Read a rule such as ``"confident > 0.9"``: a head's name, a comparison and a number, and nothing else.

        Raises:
            InputTypeError: it is no string.
            InputError: it is something else than these three.
        """
        if not isinstance(text, str):
            raise InputTypeError(f"stop_when={text!r:.80}: expected a string, such as 'confident > 0.9'")
        match = _RULE.fullmatch(text)
        if match is None or not math.isfinite(float(match[3])):
            raise InputError(
                f"stop_when={text!r:.200}: expected a head's name, one of > >= < <= and a finite number, such as "
                "'confident > 0.9'"
            )
        return cls(match[1], match[2], float(match[3]))

    def holds(self, score: float) -> bool:
        """Return whether a score fulfils the rule; NaN fulfils none."""
        return _COMPARISONS[self.comparison](score, self.threshold)

    def __str__(self) -> str:
        return f"{self.head} {self.comparison} {self.threshold!r}"


@dataclass(frozen=True, slots=True)
class HeadSpec:
    """Says which heads score which tokens: one number for each head and token, or for each segment, instead of D.

    Args:
        heads: names of heads that the server has, see `Engine.push_head`.
        segments: any of ``"prompt"``, ``"response"``, ``"full"``, or none beside spans. Score t of a response is of the
            state that produced response token t, as in `HiddenSpec`. Scoring returns ``"full"`` alone.
        stop_when: ends a response behind the first token whose score fulfils a rule such as ``"confident > 0.9"``: a
            head among ``heads``, one of ``>``, ``>=``, ``<``, ``<=``, and a number. That token is the last, and
            ``finish_reason`` is ``"head"``; a token that also ends the response by itself, such as EOS, says
            ``"stop"``. As with stop strings, ``min_new_tokens`` does not hold it back. Scoring ignores it, and tensor
            parallelism refuses it.
        pooling: how the scores of a segment's tokens become one number, as in `HiddenSpec.pooling`; None leaves a score
            for each token. The mean of scores is the score of the mean state only for a linear head whose ``normalize``
            is ``"none"`` or ``"standard"`` and whose output is raw.
        spans: parts of the prompt or the response whose scores come back as well, by names of yours, as in
            `HiddenSpec.spans`: at ``At("</think>")`` one score, at ``Each("\\n\\n")`` one at each boundary. A span
            without a pooling of its own has the pooling above, and the mean where that is None.

    Raises:
        InputError: a name or segment that is none, or given twice; a rule that cannot be read, or of another head; a
            rule without a response; a pooling or span that is none.
        InputTypeError: a value of the wrong type.
    """

    heads: tuple[str, ...]
    segments: tuple[Segment | SegmentName, ...] = ("response",)
    stop_when: str | None = None
    pooling: Pooling | None = None
    spans: Mapping[str, Span] = field(default_factory=dict, hash=False)

    def __post_init__(self) -> None:
        for name, values in (("heads", self.heads), ("segments", self.segments)):
            if isinstance(values, str) or not isinstance(values, (tuple, list)):
                raise InputTypeError(f"HeadSpec({name}={values!r:.80}): expected a tuple of names")
            object.__setattr__(self, name, tuple(values))
        if not isinstance(self.spans, Mapping):
            raise InputTypeError(f"HeadSpec(spans={self.spans!r:.80}): expected a dict of names to spans")
        for name in self.heads:
            check_head_name(name)
        if not 1 <= len(self.heads) <= MAX_HEADS or len(set(self.heads)) != len(self.heads):
            raise InputError(f"HeadSpec(heads={self.heads!r:.200}): expected 1 to {MAX_HEADS} names, each once")
        unknown = [segment for segment in self.segments if segment not in SEGMENTS]
        if unknown or not (self.segments or self.spans) or len(set(self.segments)) != len(self.segments):
            raise InputError(
                f"HeadSpec(segments={self.segments!r:.200}): expected one or more of {SEGMENTS}, each once; none only "
                "beside spans"
            )
        object.__setattr__(self, "segments", tuple(map(str, self.segments)))
        try:
            pooled = self.pooled
        except InputError as error:
            # Whoever wrote a HeadSpec knows of no other.
            raise type(error)(str(error).replace("HiddenSpec(", "HeadSpec(", 1)) from None
        object.__setattr__(self, "spans", {} if pooled is None else pooled.spans)
        rule = self.rule
        if rule is not None and rule.head not in self.heads:
            raise InputError(
                f"HeadSpec(stop_when={self.stop_when!r:.200}): {rule.head!r} is not among heads={self.heads!r:.200}; "
                "add it"
            )
        if rule is not None and not self.of_response:
            raise InputError(
                f"HeadSpec(stop_when={self.stop_when!r:.200}, segments={self.segments}): the rule reads a response's "
                "scores; add 'response' to segments"
            )

    @property
    def rule(self) -> StopRule | None:
        """The rule of ``stop_when``, read."""
        return None if self.stop_when is None else StopRule.parse(self.stop_when)

    @property
    def pooled(self) -> HiddenSpec | None:
        """What is pooled, as if scores were states of as many dimensions as there are heads; None for nothing."""
        if self.pooling is None and not self.spans:
            return None
        segments = () if self.pooling is None else self.segments
        return HiddenSpec(segments, "mean" if self.pooling is None else self.pooling, spans=self.spans)

    @property
    def unpooled(self) -> tuple[str, ...]:
        """The names of the spans whose scores stay as they are, ``[S]``."""
        pooled = self.pooled
        return () if pooled is None else pooled.unpooled

    @property
    def of_prompt(self) -> bool:
        """Whether prompt tokens are scored."""
        return reads_prompt(self.segments) or not all(map(is_of_response, self.spans.values()))

    @property
    def of_response(self) -> bool:
        """Whether response tokens are scored."""
        return reads_response(self.segments) or any(map(is_of_response, self.spans.values()))

    @property
    def prompt_tokens(self) -> bool:
        """Whether a score of each prompt token comes back."""
        return self.pooling is None and reads_prompt(self.segments)

    @property
    def response_tokens(self) -> bool:
        """Whether a score of each response token comes back."""
        return self.pooling is None and reads_response(self.segments)

    @property
    def sends_response(self) -> bool:
        """Whether scores of response tokens travel: with a rule always, which the response's end is held against."""
        return self.response_tokens or self.stop_when is not None
