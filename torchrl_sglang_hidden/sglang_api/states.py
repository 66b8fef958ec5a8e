"""Reads the states of one answer, and counts their rows against the tokens.

Knows nothing of log-probs, logits or texts, nor of how bytes travel.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple, NoReturn, assert_never

import torch

from torchrl_sglang_hidden.errors import AlignmentError, ProtocolError
from torchrl_sglang_hidden.protocol import FALLBACK_REMEDY, Answer, excerpt
from torchrl_sglang_hidden.records import EngineInfo, Pooled, Request, TokenRows
from torchrl_sglang_hidden.reduce.pooling import Pools, WantedRows
from torchrl_sglang_hidden.sglang_api.payload import row_dtype_of, wanted_of
from torchrl_sglang_hidden.sglang_api.stock_states import pool_stock
from torchrl_sglang_hidden.spec.hidden import HiddenSpec, Segment, positions_of
from torchrl_sglang_hidden.spec.places import At, Each, Every, Window
from torchrl_sglang_hidden.spec.span_search import find_rows
from torchrl_sglang_hidden.spec.spans import Between, LastTokens, PromptSpan, ResolvedSpan, may_be_empty

__all__ = ["States", "read_states"]


class States(NamedTuple):
    """The states of one answer; ``faults`` says why a span is not there."""

    hidden: dict[str, Pooled]
    spans: dict[str, Pooled]
    token_rows: TokenRows | None
    faults: Mapping[str, str]


def read_states(
    name: str,
    request: Request,
    spec: HiddenSpec,
    meta: Mapping[str, Any],
    response_ids: tuple[int, ...],
    info: EngineInfo,
    answer: Answer | None,
) -> States:
    """Read the states of one answer, and count them against the tokens.

    Args:
        name: names the request in errors.
        request: what was sent.
        spec: its states.
        meta: SGLang's ``meta_info``, where stock states are.
        response_ids: the T sampled ids.
        info: the engine's.
        answer: the server half's, or None for stock states.

    Raises:
        AlignmentError: the rows are not those of the tokens.
        ProtocolError: the states are of another shape or dtype, or cannot be read.
    """
    num_prompt = len(request.prompt_ids)
    if answer is not None:
        found = answer.pools
    else:
        wanted = wanted_of(request, spec, info)
        found = pool_stock(name, wanted, meta.get("hidden_states"), num_prompt, response_ids, info.hidden_size)
    counter = _Counter(name, spec, info, num_prompt, response_ids)
    hidden = {
        str(segment): counter.segment(Segment(segment), found)
        for segment in (spec.segments if spec.pooling is not None else ())
    }
    spans = {key: counter.span(key, span, found) for key, span in request.spans.items() if key not in found.faults}
    return States(hidden, spans, counter.token_rows(found.rows) if spec.tokens else None, found.faults)


@dataclass(frozen=True, slots=True)
class _Counter:
    """Counts the rows of one answer against its tokens."""

    name: str
    spec: HiddenSpec
    info: EngineInfo
    num_prompt: int
    response_ids: tuple[int, ...]

    def segment(self, segment: Segment, found: Pools) -> Pooled:
        expected = len(segment.positions(self.num_prompt, len(self.response_ids)))
        vector_KD, count = found.segments.get(segment) or (None, 0)
        if vector_KD is None or count != expected:
            self._refuse(f"{str(segment)!r} segment", count, expected)
        return Pooled(self._shaped(vector_KD, torch.float32), count)

    def span(self, key: str, span: ResolvedSpan, found: Pools) -> Pooled:
        value, count = found.spans.get(key) or (None, 0)
        unpooled = self.spec.pooling_of(key) is None
        expected, rows = self._rows_of(span, found.places.get(key), listed=unpooled)
        is_empty = expected == 0 and may_be_empty(self.spec.spans[key])
        is_right = count >= 1 if expected is None else count == expected
        if not is_right or (value is None and not is_empty):
            self._refuse(f"span {key!r}", count, expected)
        if value is not None and (value.ndim != 2 + unpooled or (unpooled and len(value) != count)):
            shape, remedy = tuple(value.shape), self._remedy
            raise AlignmentError(f"{self.name}: states of shape {shape} for the {count} rows of span {key!r}; {remedy}")
        if value is None or is_empty:
            depth = len(self.spec.layer_ids)
            value = torch.full((*(0,) * unpooled, depth, self.info.hidden_size), torch.nan)
        return Pooled(self._shaped(value, torch.float32), count, rows)

    def _rows_of(
        self, span: ResolvedSpan, sent: tuple[int, ...] | None, *, listed: bool
    ) -> tuple[int | None, tuple[int, ...] | None]:
        """Return how many rows a span has, and which, where that was said.

        The number is None if only the engine knows, because it looked for the markers; and the rows unless ``listed``
        or sent.
        """
        num_response = len(self.response_ids)
        match span:
            case PromptSpan():
                return span.count, tuple(span.positions) if listed else None
            case LastTokens() | Window() | Every():
                of_fewer = replace(span, allow_fewer=True) if isinstance(span, LastTokens) else span
                rows = find_rows(of_fewer, self.response_ids, _no_text)
                if sent is not None and sent != tuple(rows):
                    self._refuse(f"{span!r} at rows {excerpt(list(sent))}", len(sent), len(rows))
                return len(rows), tuple(rows) if listed else None
            case Between() if not listed:
                return None, None
            case Between() | At() | Each():
                most, remedy = 1 if isinstance(span, At) else num_response, self._remedy
                if sent is None or len(sent) > most or any(row >= num_response for row in sent):
                    raise AlignmentError(
                        f"{self.name}: the rows of {span!r} are {excerpt(sent)} in a response of {num_response} "
                        f"tokens, expected up to {most} of them; {remedy}"
                    )
                return len(sent), sent
            case _:
                assert_never(span)

    def token_rows(self, rows: WantedRows | None) -> TokenRows:
        positions = positions_of(self.spec.segments, self.num_prompt, len(self.response_ids))
        if rows is None or (rows.first, len(rows.rows_NKD)) != (positions.start, len(positions)):
            remedy = self._remedy
            got = "none" if rows is None else f"those of {len(rows.rows_NKD)} positions from {rows.first} on"
            raise AlignmentError(
                f"{self.name}: expected the states of positions {positions.start}..{positions.stop - 1}, "
                f"{self.num_prompt} prompt and {len(self.response_ids)} response tokens, and got {got}; {remedy}"
            )
        return TokenRows(positions.start, self._shaped(rows.rows_NKD, row_dtype_of(self.spec)))

    @property
    def _remedy(self) -> str:
        return "send it again" if self.info.pools_in_server else FALLBACK_REMEDY

    def _refuse(self, what: str, count: int, expected: int | None) -> NoReturn:
        remedy = self._remedy
        raise AlignmentError(
            f"{self.name}: {count} rows of states for the {what} of {self.num_prompt} prompt and "
            f"{len(self.response_ids)} response tokens, expected {'at least 1' if expected is None else expected}; "
            f"{remedy}"
        )

    def _shaped(self, states: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        """Return states ``[…, K, D]`` as they were asked for: without K if the layers are one id."""
        expected = (len(self.spec.layer_ids), self.info.hidden_size)
        if states.shape[-2:] != expected or states.dtype != dtype:
            raise ProtocolError(
                f"{self.name}: states of shape {tuple(states.shape)}, expected [..., {expected[0]}, {expected[1]}], or "
                f"of {states.dtype} instead of {dtype}; use the same version of torchrl_sglang_hidden on both sides"
            )
        return states if isinstance(self.spec.layers, tuple) else states.squeeze(-2)


def _no_text(ids: Sequence[int]) -> str:
    raise AssertionError("no text is searched for")
