"""Samples a prompt several times, and computes the prompt once.

Knows requests and completions only: any engine samples them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, cast

import torch

from torchrl_sglang_hidden.engines.base import Engine
from torchrl_sglang_hidden.engines.races import first_to_end
from torchrl_sglang_hidden.engines.row_errors import numbered
from torchrl_sglang_hidden.errors import InputError, SGLangHiddenError
from torchrl_sglang_hidden.records import READING, Completion, Pooled, Request, SamplingRecords, TokenRows
from torchrl_sglang_hidden.reduce.reducers import reducer_of
from torchrl_sglang_hidden.sglang_api.checks import check_requests
from torchrl_sglang_hidden.spec.head_scores import HeadSpec
from torchrl_sglang_hidden.spec.hidden import HiddenSpec, Pooling, Segment, SegmentName, reads_prompt
from torchrl_sglang_hidden.spec.logits import LogitsSpec
from torchrl_sglang_hidden.spec.spans import PromptSpan, ResolvedSpan

__all__ = ["generate_ahead", "generate_samples"]


def generate_ahead(engine: Engine, requests: Sequence[Request]) -> list[Completion]:
    """Generate requests that only fill the prefix cache, or bring what is asked of a prompt.

    Raises:
        EngineError: see `Engine.generate`. It carries no completions: nobody asked for their tokens.
    """
    try:
        return engine.generate(requests)
    except SGLangHiddenError as error:
        error.completions = ()
        raise


def generate_samples(
    engine: Engine, requests: Sequence[Request], num_samples: int, *, ahead: Engine | None = None, extra: int = 0
) -> list[Completion]:
    """Sample every request ``num_samples`` times.

    SGLang computes a prompt again for each of several equal requests that arrive together. So each prompt goes ahead
    once, for a single token: that fills the prefix cache and brings home what is asked of the prompt, and the samples
    then ask for their responses. What pools all rows of ``"full"`` is each sample's own: the server half still has the
    running value of the prompt that went ahead. Stock SGLang does not, and computes such a prompt for every sample.

    Args:
        engine: samples.
        requests: one per prompt.
        num_samples: samples per prompt.
        ahead: computes the prompts, by default ``engine``.
        extra: samples per prompt that are asked for beyond ``num_samples``: the first ``num_samples`` that end are
            returned, and the others aborted. They are sent one by one, by ``ahead``: a queue would wait for all.

    Returns:
        ``len(requests) * num_samples`` completions: all samples of the first request, then of the second, and so on.

    Raises:
        InputError: a request that must not be sent, or more racing samples than this process can open connections for;
            nothing was sent. Or a head that was pushed again between a prompt and its samples.
        EngineError: see `Engine.generate`.
    """
    check_requests(requests, engine.info)
    if extra:
        (ahead or engine).check_calls(len(requests) * (num_samples + extra))
    firsts = generate_ahead(ahead or engine, [_ahead(request) for request in requests])

    def merged(samples: Sequence[Completion | None]) -> list[Any]:
        # What went wrong with a prompt is said of each of its samples, which are counted by themselves.
        ahead_of = [numbered(firsts[index // num_samples], lambda _, i=index: i) for index in range(len(samples))]  # type: ignore[misc]
        return [
            None if sample is None else _merged(requests[index // num_samples], sample, ahead_of[index])
            for index, sample in enumerate(samples)
        ]

    if extra:
        groups = [[_sample(request, index) for index in range(num_samples + extra)] for request in requests]
        return merged(first_to_end(ahead or engine, groups, num_samples))
    try:
        samples = engine.generate([_sample(request, index) for request in requests for index in range(num_samples)])
    except SGLangHiddenError as error:
        error.completions = tuple(merged(error.completions))
        raise
    return merged(samples)


def _ahead(request: Request) -> Request:
    """Make the request of one token that brings what the request asks of its prompt."""
    spec = request.hidden
    spans = {name: span for name, span in request.spans.items() if isinstance(span, PromptSpan)}
    if spec is not None:
        tokens = spec.tokens and reads_prompt(spec.segments)
        # For all rows of `full` the server half must have pooled the prompt.
        whole = (
            tokens
            or Segment.PROMPT in spec.segments
            or (reads_prompt(spec.segments) and spec.pooling is not None and reducer_of(spec.pooling).needs_all_rows)
        )
        spec = _narrowed(spec, (Segment.PROMPT,) if whole else (), tokens, spans)
    return replace(
        request,
        sampling=READING,
        return_log_probs=False,
        hidden=spec,
        spans=spans,
        # This token is discarded: drop its logits, and its constraints too, since they might leave it no choice.
        logits=_of_segment(request.logits, Segment.PROMPT),
        heads=_scores_of(request.heads, Segment.PROMPT),
        constraints=(),
        processor=None,
        records=SamplingRecords(),
    )


def _sample(request: Request, index: int) -> Request:
    """Make the request of one sample, with what the request asks of the response, and of both together."""
    if "sampling_seed" in request.sampling:
        # One seed for all would give the same response again and again.
        seed = (request.sampling["sampling_seed"] + index + 2**63) % 2**64 - 2**63
        request = replace(request, sampling={**request.sampling, "sampling_seed": seed})
    spec = request.hidden
    spans = {name: span for name, span in request.spans.items() if not isinstance(span, PromptSpan)}
    if spec is not None:
        segments = tuple(segment for segment in spec.segments if segment != Segment.PROMPT)
        if spec.tokens and segments:
            # Every token's state of `full` would come with the whole prompt each time.
            segments = (Segment.RESPONSE,)
        spec = _narrowed(spec, segments, spec.tokens and bool(segments), spans)
    logits, heads = _of_segment(request.logits, Segment.RESPONSE), _scores_of(request.heads, Segment.RESPONSE)
    return replace(request, hidden=spec, spans=spans, logits=logits, heads=heads)


def _of_segment(spec: LogitsSpec | None, segment: Segment) -> LogitsSpec | None:
    """Return the logits of one segment only; None where it is not asked for."""
    if spec is None or not (spec.of_prompt if segment is Segment.PROMPT else spec.of_response):
        return None
    return replace(spec, segments=(segment,))


def _scores_of(spec: HeadSpec | None, segment: Segment) -> HeadSpec | None:
    """Return the scores of one segment only; None where they are not asked for."""
    if spec is not None and spec.pooled is not None:
        # A number over prompt and response is made of both: every sample has its prompt scored anew.
        return None if segment is Segment.PROMPT else spec
    if spec is None or not (spec.of_prompt if segment is Segment.PROMPT else spec.of_response):
        return None
    return replace(spec, segments=(segment,), stop_when=None if segment is Segment.PROMPT else spec.stop_when)


def _narrowed(
    spec: HiddenSpec, segments: tuple[Segment | SegmentName, ...], tokens: bool, spans: Mapping[str, ResolvedSpan]
) -> HiddenSpec | None:
    """Return a spec of these parts only; None where they are nothing."""
    if not segments and not spans:
        return None
    return replace(
        spec, segments=segments, tokens=tokens, spans={name: span for name, span in spec.spans.items() if name in spans}
    )


def _merged(request: Request, sample: Completion, first: Completion) -> Completion:
    """Return a sample together with its prompt's part of what was asked."""
    spec, of_prompt = request.hidden, _ahead(request)
    if of_prompt.hidden is None and of_prompt.logits is None and of_prompt.heads is None:
        return sample
    if first.error is not None:
        # What was asked of the prompt is missing, and its rows in front of the response's.
        joined = of_prompt.hidden is not None and of_prompt.hidden.tokens
        # What was sampled cannot be gone on from: the rest would not bring what is missing either.
        begun = sample.finish_reason == "abort" and sample.response_ids
        return replace(
            sample,
            finish_reason="error" if begun else sample.finish_reason,
            token_rows=None if joined else sample.token_rows,
            error=sample.error or first.error,
        )
    if of_prompt.heads is not None:
        apart = _apart(sample, first)
        if apart is not None and not request.return_errors:
            raise apart
        sample = replace(
            sample,
            scores={
                name: replace(sample.scores.get(name, one), prompt_P=one.prompt_P) for name, one in first.scores.items()
            },
            mixed_weights=sample.mixed_weights or sample.weight_version != first.weight_version,
            error=sample.error or apart,
        )
    if of_prompt.logits is not None:
        sample = replace(
            sample,
            prompt_logits=first.prompt_logits,
            mixed_weights=sample.mixed_weights or sample.weight_version != first.weight_version,
        )
    if spec is None or of_prompt.hidden is None:
        return sample
    hidden: dict[str, Pooled] = {**sample.hidden}
    if spec.pooling is not None and Segment.PROMPT in spec.segments:
        hidden[Segment.PROMPT] = first.hidden[Segment.PROMPT]
    spans = {**first.spans, **sample.spans}
    token_rows = sample.token_rows
    if spec.tokens and first.token_rows is not None:
        token_rows = _joined(first.token_rows, sample.token_rows)
        if Segment.FULL in spec.segments and spec.pooling is not None and Segment.RESPONSE in sample.hidden:
            hidden[Segment.FULL] = _full(spec, sample, first)
    return replace(
        sample,
        hidden={segment: hidden[segment] for segment in spec.segments if segment in hidden},
        spans={name: spans[name] for name in spec.spans if name in spans},
        token_rows=token_rows,
        # The prompt's states and the response's are of two requests, and an update may have come between them.
        mixed_weights=sample.mixed_weights or sample.weight_version != first.weight_version,
    )


def _apart(sample: Completion, first: Completion) -> InputError | None:
    """Return an error where a head was pushed again between the prompt and its sample: a row names one version."""
    for name, of_prompt in first.scores.items():
        version = sample.scores.get(name, of_prompt).version
        if version != of_prompt.version:
            return InputError(
                f"head {name!r}: version {of_prompt.version!r} scored the prompt, and {version!r} the response; send "
                "the prompt again, and push heads between calls"
            )
    return None


def _joined(prompt: TokenRows, response: TokenRows | None) -> TokenRows:
    """Join the rows of the prompt and the response. The response's first row is the prompt's last."""
    if response is None:
        return prompt
    return TokenRows(prompt.first, torch.cat([prompt.rows_ND, response.rows_ND[1:]]))


def _full(spec: HiddenSpec, sample: Completion, first: Completion) -> Pooled:
    """Pool ``full`` of a sample that brought its response's rows: the prompt's value, and the rows after its last."""
    count = len(Segment.FULL.positions(len(sample.prompt_ids), len(sample.response_ids)))
    reducer = reducer_of(cast("Pooling", spec.pooling))
    if not reducer.needs_all_rows:
        return Pooled(sample.hidden[Segment.RESPONSE].vector, count)
    prompt, rows_TD = first.hidden[Segment.PROMPT], cast("TokenRows", sample.token_rows).rows_ND
    value_D = reducer.resume(prompt.vector, prompt.count)
    if len(rows_TD) > 1:
        value_D = reducer.merge(value_D, reducer.rows(rows_TD[1:]))
    return Pooled(reducer.result(value_D, count), count)
