"""What pooling must come to, in plain torch and float64. It knows none of the ways in which pooling is done."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import chain, combinations

import torch
from hypothesis import strategies as st

from torchrl_sglang_hidden.reduce.pooling import Pools
from torchrl_sglang_hidden.reduce.wanted import Wanted
from torchrl_sglang_hidden.spec.hidden import POOLINGS, SEGMENTS, Segment
from torchrl_sglang_hidden.spec.places import At, Each, Every, Window
from torchrl_sglang_hidden.spec.spans import Between, LastTokens, PromptSpan, ResolvedSpan, intervals_of

SUBSETS = [*chain.from_iterable(combinations(SEGMENTS, size) for size in (1, 2, 3))]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
LAYERS = [(-1,), (0, -1), (2, 0, 1)]


def decode(ids: Sequence[int]) -> str:
    """Return the text of token ids, one character for each."""
    return "".join("ab|"[i % 3] for i in ids)


def pool(rows: torch.Tensor, pooling: str) -> torch.Tensor:
    """What rows ``[N, *]`` pool to; a kind that this does not know raises."""
    return {
        "mean": lambda: rows.mean(0),
        "last": lambda: rows[-1],
        "max": lambda: rows.max(0).values,
        "sum": lambda: rows.sum(0),
    }[pooling]()


@dataclass(frozen=True)
class Case:
    """A request, and the states of all its positions ``[N, K, D]``."""

    wanted: Wanted
    num_prompt: int
    response_ids: tuple[int, ...]
    hidden_NKD: torch.Tensor

    @property
    def num_response(self) -> int:
        return len(self.response_ids)

    def rows(self, what: str) -> torch.Tensor | None:
        """Return the rows of a segment or span, in float64; None for a span that the response does not have."""
        span = self.wanted.spans.get(what)
        if isinstance(span, PromptSpan):
            places = [place for start, stop in span.intervals for place in range(start, stop)]
            return self.hidden_NKD[places].double()
        if span is not None:
            found = in_response(span, decode(self.response_ids))
            return None if found is None else self.rows("response")[list(found)]
        num_prompt = self.num_prompt
        places = {"prompt": slice(num_prompt), "response": slice(num_prompt - 1, None), "full": slice(None)}[what]
        return self.hidden_NKD[places].double()

    def pooling(self, what: str) -> str | None:
        return self.wanted.span_pooling(what) if what in self.wanted.spans else self.wanted.pooling

    def pooled(self, what: str) -> torch.Tensor | None:
        rows, pooling = self.rows(what), self.pooling(what)
        return None if rows is None or not len(rows) else rows if pooling is None else pool(rows, pooling)


def in_response(span: ResolvedSpan, text: str) -> Sequence[int] | None:
    """Return the rows of the response that a span covers; a token is one character."""
    rows = range(len(text))
    match span:
        case LastTokens():
            return rows[-span.count :] if span.allow_fewer or span.count <= len(text) else None
        case Window():
            return rows[span.start : span.stop]
        case Every():
            return rows[:: span.n]
        case At() | Each():
            places = [one.end() if span.where == "after" else one.start() for one in _found(span.marker, text)]
            there = [place for place in (places[:1] if isinstance(span, At) else places) if place in rows]
            return there if there or span.missing == "nan" else None
    assert isinstance(span, Between)
    start, stop = 0, len(text)
    if span.start is not None:
        start = text.find(span.start) + 1
        if start == 0:
            return None
    if span.end is not None:
        stop = text.find(span.end, start)
        if stop < 0 and span.unclosed == "error":
            return None
        stop = len(text) if stop < 0 else stop
    return range(start, stop) if start < stop else None


def _found(marker: str, text: str) -> Sequence[re.Match[str]]:
    return list(re.finditer(re.escape(marker), text))


def expected_count(case: Case, what: str) -> int:
    if what in case.wanted.segments:
        return len(Segment(what).positions(case.num_prompt, case.num_response))
    rows = case.rows(what)
    return 0 if rows is None else len(rows)


def assert_value(case: Case, what: str, value: torch.Tensor | None) -> None:
    expected_KD = case.pooled(what)
    if expected_KD is None:
        assert value is None, what
        return
    assert value is not None, what
    assert value.dtype == torch.float32
    # A sum is as large as its rows are many; what takes one of the values takes it exactly.
    atol = {"mean": 1e-5, "sum": 1e-5 * expected_count(case, what), "last": 0.0, "max": 0.0, None: 0.0}[
        case.pooling(what)
    ]
    rtol = 1e-5 if atol else 0.0
    torch.testing.assert_close(value.double(), expected_KD, rtol=rtol, atol=atol, msg=lambda said: f"{what}: {said}")


def token_places(case: Case) -> tuple[int, int]:
    segments = case.wanted.segments
    first = case.num_prompt - 1 if segments == ("response",) else 0
    return first, case.num_prompt if segments == ("prompt",) else len(case.hidden_NKD)


def assert_pools(case: Case, found: Pools) -> None:
    """Check that everything that was wanted is there, with the values of plain torch."""
    wanted = case.wanted
    assert tuple(found.segments) == (() if wanted.pooling is None else wanted.segments)
    missing = {name for name in wanted.spans if case.rows(name) is None}
    assert (set(found.spans), set(found.faults)) == (set(wanted.spans) - missing, missing)
    for what, (value, count) in {**found.segments, **found.spans}.items():
        assert count == expected_count(case, what), what
        assert_value(case, what, value)
    for name, span in wanted.spans.items():
        if not isinstance(span, PromptSpan) and name in found.spans:
            listed = isinstance(span, At | Each) or wanted.span_pooling(name) is None
            rows = in_response(span, decode(case.response_ids))
            assert found.places.get(name) == (tuple(rows or ()) if listed else None), name
    if wanted.tokens:
        first, stop = token_places(case)
        assert found.rows is not None
        assert (found.rows.first, found.rows.rows_NKD.dtype) == (first, wanted.row_dtype)
        assert torch.equal(found.rows.rows_NKD, case.hidden_NKD[first:stop].to(wanted.row_dtype))
    else:
        assert found.rows is None


@st.composite
def spans_of(draw: st.DrawFn, num_prompt: int) -> Mapping[str, ResolvedSpan]:
    spans: dict[str, ResolvedSpan] = {}
    for name in draw(st.sets(st.sampled_from(["p", "q"]))):
        places = draw(st.sets(st.integers(0, num_prompt - 1), min_size=1, max_size=6))
        spans[name] = intervals_of([place in places for place in range(num_prompt)])
    if draw(st.booleans()):
        spans["last"] = LastTokens(draw(st.integers(1, 7)), allow_fewer=draw(st.booleans()))
    if draw(st.booleans()):
        markers = draw(st.sampled_from([("|", None), (None, "|"), ("|", "|")]))
        spans["between"] = Between(*markers, unclosed=draw(st.sampled_from(["error", "end"])))
    for name, kind in (("at", At), ("each", Each)):
        if draw(st.booleans()):
            spans[name] = kind(
                draw(st.sampled_from(["|", "b|", "||", "aa"])),
                draw(st.sampled_from(["after", "before"])),
                missing=draw(st.sampled_from(["nan", "error"])),
            )
    if draw(st.booleans()):
        start = draw(st.integers(0, 4))
        spans["window"] = Window(start, start + draw(st.integers(1, 4)))
    if draw(st.booleans()):
        spans["every"] = Every(draw(st.integers(1, 4)))
    own = st.sampled_from(["spec", "spec", None, *POOLINGS])
    return {name: replace(span, pooling=draw(own)) for name, span in spans.items()}


@st.composite
def wanted_of(draw: st.DrawFn, num_prompt: int) -> Wanted:
    """Draw anything that can be wanted of a prompt of this length."""
    pooling = draw(st.sampled_from([*POOLINGS, None]))
    spans = {} if pooling is None else draw(spans_of(num_prompt))
    segments = draw(st.sampled_from([*SUBSETS, ()] if spans else SUBSETS))
    return Wanted(
        segments=segments,
        pooling=pooling,
        layers=draw(st.sampled_from(LAYERS)),
        spans=spans,
        tokens=pooling is None or (bool(segments) and draw(st.booleans())),
        row_dtype=draw(st.sampled_from(DTYPES)),
    )
