"""Responses in two parts: the request that goes on from an aborted response, and the join of both completions.

Knows requests and completions only: any engine generates the second part.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, TypeAlias, cast

import torch

from torchrl_sglang_hidden.errors import InputError, SpanError
from torchrl_sglang_hidden.records import (
    DEFAULT_NEW_TOKENS,
    Completion,
    Pooled,
    Request,
    Scores,
    TokenLogits,
    TokenRows,
)
from torchrl_sglang_hidden.reduce.reducers import reducer_of
from torchrl_sglang_hidden.spec.head_scores import HeadSpec
from torchrl_sglang_hidden.spec.hidden import HiddenSpec, Pooling, Segment
from torchrl_sglang_hidden.spec.spans import LastTokens, PromptSpan, ResolvedSpan

__all__ = ["join_completions", "rest_of"]

# A grammar would begin anew in the middle of its text, and a stop_regex not see what is before.
GRAMMARS = ("json_schema", "regex", "ebnf", "structural_tag", "stop_regex")
# SGLang 0.5.23 counts the tokens that a request sampled, and none of its prompt. By the value that does nothing.
PENALTIES = {"frequency_penalty": 0, "presence_penalty": 0, "repetition_penalty": 1}


def rest_of(request: Request, first: Completion) -> Request:
    """Return the request that goes on where a completion of ``request`` ended.

    Its prompt is the prompt and the response so far, and it asks for the rest of the tokens, and for their states.

    Args:
        request: what was asked.
        first: what came of it, at least one token.

    Raises:
        InputError: options that look at the tokens from the response's beginning on, or a response that has all its
            tokens. Stop strings across the border are the caller's to look for.
    """
    sampling: dict[str, Any] = dict(request.sampling)
    grammars = [name for name in GRAMMARS if name in sampling]
    counted = [name for name, neutral in PENALTIES.items() if sampling.get(name, neutral) != neutral]
    counted += [one.name for one in request.constraints if _counts(one)]
    if grammars or counted or request.processor is not None:
        what = (*grammars, *counted, *(["custom_logit_processor"] if request.processor is not None else []))
        raise InputError(
            f"{', '.join(what)}: it begins with the response's first token, and cannot go on from the middle of one; "
            "send the prompt again"
        )
    done = len(first.response_ids)
    limit = sampling.get("max_new_tokens", DEFAULT_NEW_TOKENS)
    if done >= limit:
        raise InputError(
            f"the response has {done} tokens, and max_new_tokens={limit}; raise max_new_tokens, which counts all"
        )
    sampling["max_new_tokens"] = limit - done
    if "min_new_tokens" in sampling:
        sampling["min_new_tokens"] = max(sampling["min_new_tokens"] - done, 0)
    return replace(
        request,
        prompt_ids=(*first.prompt_ids, *first.response_ids),
        images=None if request.images is None else request.images.followed_by(first.response_ids),
        sampling=sampling,
        hidden=None if request.hidden is None else _response_part(request.hidden),
        spans=_last_tokens(request.spans),
        logits=None if request.logits is None else _of_response(request),
        heads=None if request.heads is None else _response_scores(request.heads),
        head_spans=_last_tokens(request.head_spans),
        return_errors=True,
    )


def _counts(constraint: Any) -> bool:
    """Return whether a constraint depends on how many tokens of the response are before."""
    return constraint.positions is not None or constraint.first_tokens is not None or not hasattr(constraint, "allowed")


def _response_part(spec: HiddenSpec) -> HiddenSpec | None:
    spans = {
        name: span for name, span in spec.spans.items() if isinstance(span, LastTokens) and span.segment == "response"
    }
    segments = (Segment.RESPONSE,) if any(segment != Segment.PROMPT for segment in spec.segments) else ()
    if not segments and not spans:
        return None
    return replace(spec, segments=segments, tokens=spec.tokens and bool(segments), spans=spans)


def _response_scores(spec: HeadSpec) -> HeadSpec | None:
    spans = {
        name: span for name, span in spec.spans.items() if isinstance(span, LastTokens) and span.segment == "response"
    }
    segments = (Segment.RESPONSE,) if any(segment != Segment.PROMPT for segment in spec.segments) else ()
    if not segments and not spans:
        if spec.stop_when is None:
            return None
        # A rule alone is none: it is held against scores.
        segments = (Segment.RESPONSE,)
    return replace(spec, segments=segments, spans=spans)


def _last_tokens(spans: Mapping[str, ResolvedSpan]) -> dict[str, ResolvedSpan]:
    """Return the spans that may be in the second part; `join_completions` says which of them lack tokens."""
    return {name: replace(span, allow_fewer=True) for name, span in spans.items() if isinstance(span, LastTokens)}


def _of_response(request: Request) -> Any:
    spec = request.logits
    return None if spec is None or not spec.of_response else replace(spec, segments=(Segment.RESPONSE,))


def join_completions(request: Request, first: Completion, rest: Completion) -> Completion:
    """Join a completion and what went on from it, see `rest_of`, to the completion of the whole response.

    Tokens, log-probs, logits and scores stand one after another; both parts must be scored by the same heads. Pooled
    states and scores of a response are those of both parts, each row of the weights that sampled its token; those of
    the prompt are the first part's. A span of the response is joined where its rows are all in the second part, and is
    else missing, with a `SpanError`.

    Args:
        request: what was asked at first.
        first: the aborted part.
        rest: the second part; where it was aborted too, or failed, so is the whole, with the same error.
    """
    done, more = len(first.response_ids), len(rest.response_ids)
    hidden: dict[str, Pooled] = {}
    spans: dict[str, Pooled] = {}
    error = rest.error
    if request.hidden is not None and request.hidden.pooling is not None:
        hidden, spans, lost = _join_pools(
            request.hidden, request.spans, (first.hidden, first.spans), (rest.hidden, rest.spans), done, more
        )
        error = error or _lost_span(lost, "ask for tokens=True to pool it yourself")
    scores, lost = _join_scores(request, first.scores, rest.scores, done, more)
    error = error or _lost_span(lost, "ask for the scores of all tokens, with pooling=None, to pool it yourself")
    apart = [
        name for name, one in first.scores.items() if name in rest.scores and rest.scores[name].version != one.version
    ]
    if apart and error is None:
        error = InputError(
            f"head {apart[0]!r}: version {first.scores[apart[0]].version!r} scored the first part of the response, and "
            f"{rest.scores[apart[0]].version!r} the second; send the prompt again, or push the first again before"
        )
    versions = list(first.versions)
    for version, count in rest.versions:
        if versions and versions[-1][0] == version:
            versions[-1] = (version, versions[-1][1] + count)
        else:
            versions.append((version, count))
    return replace(
        first,
        response_ids=(*first.response_ids, *rest.response_ids),
        text=first.text + rest.text,
        log_probs_T=_cat(first.log_probs_T, rest.log_probs_T),
        hidden=hidden,
        finish_reason=rest.finish_reason,
        # A second part without a token sampled nothing, whatever its engine's weights are.
        weight_version=versions[-1][0] if versions else rest.weight_version,
        mixed_weights=first.mixed_weights or rest.mixed_weights or len(dict(versions)) > 1,
        spans=spans,
        token_rows=_joined_rows(first.token_rows, rest.token_rows),
        logits=_joined_logits(first.logits, rest.logits),
        scores=scores,
        error=error,
        versions=tuple(versions),
    )


def _lost_span(lost: Sequence[str], remedy: str) -> SpanError | None:
    """Return the error of a span that is not in the second part alone; None for none."""
    if not lost:
        return None
    return SpanError(f"span {lost[0]!r}: the response came in two parts, and the span is not in the second; {remedy}")


def _join_scores(
    request: Request, first: Mapping[str, Scores], rest: Mapping[str, Scores], done: int, more: int
) -> tuple[dict[str, Scores], list[str]]:
    """Join the scores of both parts, by head; and name the spans that are not there."""
    spec = None if request.heads is None else request.heads.pooled
    joined: dict[str, Scores] = {}
    lost: list[str] = []
    for name, one in first.items():
        after = rest.get(name, Scores(None, None, one.version))
        joined[name] = replace(one, response_T=_cat(one.response_T, after.response_T))
        if spec is not None:
            pooled, spans, lost = _join_pools(
                spec, request.head_spans, (one.pooled, one.spans), (after.pooled, after.spans), done, more
            )
            joined[name] = replace(joined[name], pooled=pooled, spans=spans)
    return joined, lost


_Pools: TypeAlias = tuple[Mapping[Any, Pooled], Mapping[str, Pooled]]


def _join_pools(
    spec: HiddenSpec, spans: Mapping[str, ResolvedSpan], first: _Pools, rest: _Pools, done: int, more: int
) -> tuple[dict[str, Pooled], dict[str, Pooled], list[str]]:
    """Join what was pooled of segments and spans.

    Args:
        spec: what was asked at first, with a pooling.
        spans: its spans.
        first: the pools of the first part, by segment and by span.
        rest: those of the second part.
        done: how many tokens the first part has.
        more: how many the second one has.

    Returns:
        The pools of both, by segment and by span; and the names of the spans that are not there.
    """
    segments: dict[str, Pooled] = {}
    found: dict[str, Pooled] = {}
    lost: list[str] = []
    after = rest[0].get(Segment.RESPONSE)
    for segment in spec.segments:
        before = first[0].get(segment)
        if before is not None and segment == Segment.PROMPT:
            segments[str(segment)] = before
        elif before is not None and (after is not None or not more):
            segments[str(segment)] = before if after is None else _merged(cast("Pooling", spec.pooling), before, after)
    for name, span in spans.items():
        if isinstance(span, PromptSpan) and name in first[1]:
            found[name] = first[1][name]
        elif isinstance(span, LastTokens) and more >= span.count and name in rest[1]:
            places = rest[1][name].places
            found[name] = replace(rest[1][name], places=None if places is None else tuple(done + row for row in places))
        else:
            lost.append(name)
    return segments, found, lost


def _merged(pooling: Pooling, before: Pooled, after: Pooled) -> Pooled:
    reducer, count = reducer_of(pooling), before.count + after.count
    value = reducer.merge(reducer.resume(before.vector, before.count), reducer.resume(after.vector, after.count))
    return Pooled(reducer.result(value, count), count)


def _cat(first: torch.Tensor | None, rest: torch.Tensor | None) -> torch.Tensor | None:
    return first if rest is None or first is None else torch.cat([first, rest])


def _joined_rows(first: TokenRows | None, rest: TokenRows | None) -> TokenRows | None:
    if first is None or rest is None:
        return first
    return TokenRows(first.first, cast("torch.Tensor", _cat(first.rows_ND, rest.rows_ND.to(first.rows_ND.dtype))))


def _joined_logits(first: TokenLogits | None, rest: TokenLogits | None) -> TokenLogits | None:
    if first is None or rest is None:
        return first
    return TokenLogits(torch.cat([first.values_NC, rest.values_NC]), _cat(first.token_ids_NC, rest.token_ids_NC))
