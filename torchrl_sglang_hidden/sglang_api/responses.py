"""Read SGLang's answers into `Completion`s.

The only reader of a finished answer's ``meta_info``, and the place where rows are counted against tokens. Past this
module there are records, no dicts. Knows nothing of how bytes travel, nor of TensorDicts.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch

from torchrl_sglang_hidden.errors import (
    AlignmentError,
    ConstraintError,
    EngineError,
    ProtocolError,
    SpanError,
)
from torchrl_sglang_hidden.protocol import CHANNEL, drop_shared, excerpt, unpack_answer
from torchrl_sglang_hidden.records import (
    Completion,
    EngineInfo,
    Request,
    Scores,
    TokenLogits,
    failed_completion,
)
from torchrl_sglang_hidden.reduce.wanted_logits import FoundLogits, WantedLogits
from torchrl_sglang_hidden.sglang_api.fields import read_fields
from torchrl_sglang_hidden.sglang_api.images import check_computed
from torchrl_sglang_hidden.sglang_api.log_probs import read_log_probs
from torchrl_sglang_hidden.sglang_api.overflow import overflow_of
from torchrl_sglang_hidden.sglang_api.payload import logits_of, shares
from torchrl_sglang_hidden.sglang_api.sampled import read_sampled
from torchrl_sglang_hidden.sglang_api.scores import read_scores
from torchrl_sglang_hidden.sglang_api.states import States, read_states
from torchrl_sglang_hidden.spec.logits import LogitsSpec

__all__ = ["raise_errors", "read_responses", "read_rows"]


def read_responses(
    requests: Sequence[Request], rows: object, info: EngineInfo, *, rids: Sequence[str] | None = None
) -> list[Completion]:
    """Read SGLang's answer to one batched payload, count every row, and raise what went wrong with one of them.

    Args:
        requests: what was sent.
        rows: SGLang's answers.
        info: as for `to_payload`.
        rids: see `read_rows`.

    Raises:
        RequestAbortedError, SpanError, ConstraintError: see `raise_errors`.
        AlignmentError: ids, log-probs and states do not agree in number, or a prompt was not taken whole.
        ProtocolError: the answer cannot be read.
    """
    completions = read_rows(requests, rows, info, rids=rids)
    raise_errors(requests, completions)
    return completions


def raise_errors(requests: Sequence[Request], completions: Sequence[Completion | None]) -> None:
    """Raise the first error that a request does not want as `Completion.error`, with all completions on it.

    Raises:
        RequestAbortedError: the engine gave up on a request.
        IncompleteWeightsError: the engine has a part of new weights.
        SpanError: a response does not have a span.
        ConstraintError: constraints left no token.
    """
    for request, completion in zip(requests, completions, strict=True):
        if completion is not None and completion.error is not None and not request.return_errors:
            completion.error.completions = tuple(completions)
            raise completion.error


def read_rows(
    requests: Sequence[Request],
    rows: object,
    info: EngineInfo,
    *,
    numbers: Sequence[int] | None = None,
    rids: Sequence[str] | None = None,
) -> list[Completion]:
    """Read SGLang's answer to one batched payload as `read_responses` does, and keep the errors of single rows.

    Args:
        requests: what was sent.
        rows: SGLang's answers.
        info: as for `to_payload`.
        numbers: where each request stands in the caller's batch, for the errors; by default from 0.
        rids: the requests' names on the server; None where they were sent without.

    Raises:
        AlignmentError: ids, log-probs and states do not agree in number, or a prompt was not taken whole.
        ProtocolError: the answer cannot be read.
    """
    if not isinstance(rows, list) or len(rows) != len(requests):
        found = len(rows) if isinstance(rows, list) else excerpt(rows)
        raise ProtocolError(
            f"sent {len(requests)} requests and got {found} answers; this is a fault of the engine, please report it"
        )
    completions: list[Completion] = []
    try:
        names: Sequence[str | None] = rids or [None] * len(rows)
        for number, request, row, rid in zip(numbers or range(len(rows)), requests, rows, names, strict=True):
            completions.append(_read_row(number, request, row, info, rid))
    finally:
        # Nobody reads the rows after one that raised, and what they have in shared memory would stay there.
        for row in rows[len(completions) :]:
            _drop_shared(row, info)
    return completions


def _drop_shared(row: Any, info: EngineInfo) -> None:
    meta = row.get("meta_info") if isinstance(row, dict) else None
    if info.shares_memory and isinstance(meta, dict):
        drop_shared(meta.get(CHANNEL))


def _read_row(number: int, request: Request, row: Any, info: EngineInfo, rid: str | None) -> Completion:
    name, text, response_ids, finish_type, num_prompt, weight_version, versions, meta, error = read_fields(
        number, row, info, rid
    )
    if error is not None and (request.reads_only or not response_ids or num_prompt is None):
        _drop_shared(row, info)
        return failed_completion(request, error, weight_version, finish_reason="abort")
    _check_length(name, request, num_prompt)
    if not response_ids:
        raise AlignmentError(
            f"{name}: 0 response tokens with finish reason {finish_type!r}; expected at least 1; send it again"
        )
    wanted, answer = logits_of(request), None
    if info.pools_in_server and _asks_server_half(request):
        shared = shares(request) and info.shares_memory
        limit = _most_bytes(request, len(request.prompt_ids) + len(response_ids), info)
        answer = unpack_answer(meta.get(CHANNEL), name, info.hidden_size, shared=shared, limit=limit)
        check_computed(name, request, answer.prompt_digest)
        if answer.logits is not None and answer.logits.fault:
            # What was sampled from there on, nobody asked for.
            return failed_completion(request, ConstraintError(f"{name}: {answer.logits.fault}"), weight_version)
    states = logits = None
    if request.hidden is not None:
        states = read_states(name, request, request.hidden, meta, response_ids, info, answer)
        for span_name, fault in states.faults.items():
            error = error or SpanError(f"{name}, span {span_name!r}: {fault}")
    if wanted is not None:
        logits = _read_logits(name, request, wanted, None if answer is None else answer.logits, len(response_ids), info)
    heads = read_scores(name, request, answer, response_ids, finish_type, info, complete=error is None)
    error = error or _fault_of(name, heads.faults)
    log_probs_T = _read_log_probs(name, meta, "output", response_ids) if request.return_log_probs else None
    sampling_mask, routed_experts = read_sampled(name, request, meta, response_ids, info=info, complete=error is None)
    error = error or _overflow(name, states, logits, heads.scores)
    if request.reads_only:
        text, response_ids, finish_type, versions = "", (), "length", ()
        log_probs_T = None if log_probs_T is None else log_probs_T[:0]
    return Completion(
        prompt_ids=request.prompt_ids,
        response_ids=response_ids,
        text=text,
        log_probs_T=log_probs_T,
        hidden={} if states is None else states.hidden,
        finish_reason=finish_type,
        weight_version=weight_version,
        mixed_weights=len(dict(versions)) > 1,
        prompt_log_probs_P=_read_prompt_log_probs(name, request, meta, logits, info.vocab_size)
        if request.score_prompt
        else None,
        spans={} if states is None else states.spans,
        token_rows=None if states is None else states.token_rows,
        logits=None if logits is None else logits.response,
        prompt_logits=None if logits is None else logits.prompt,
        error=error,
        versions=versions,
        entropy_T=None if logits is None else logits.entropy_T,
        sampling_mask=sampling_mask,
        routed_experts=routed_experts,
        cached_tokens=cached if type(cached := meta.get("cached_tokens")) is int else 0,
        scores=heads.scores,
    )


def _asks_server_half(request: Request) -> bool:
    asked = (request.hidden, logits_of(request), request.images, request.heads)
    return any(one is not None for one in asked)


def _fault_of(name: str, faults: Mapping[str, str]) -> SpanError | None:
    """Return the first error of a span whose scores are not there; None for none."""
    return next((SpanError(f"{name}, span {span!r} of heads: {fault}") for span, fault in faults.items()), None)


def _most_bytes(request: Request, num_rows: int, info: EngineInfo) -> int:
    """Return how many bytes the largest tensor of an answer can have, with one row for each token."""
    spec, logits = request.hidden, request.logits
    num_states = 0 if spec is None else len(spec.layer_ids) * info.hidden_size
    num_scores = 1 if request.heads is None else len(request.heads.heads)
    num_logits = 0 if logits is None else logits.num_columns(info.vocab_size)
    return 4 * num_rows * max(num_states, num_logits, num_scores)


def _check_length(name: str, request: Request, num_prompt: int | None) -> None:
    if num_prompt == len(request.prompt_ids):
        return
    if request.images is None:
        raise AlignmentError(
            f"{name}: sent a prompt of {len(request.prompt_ids)} tokens and the engine took {num_prompt}; start the "
            "server without --allow-auto-truncate"
        )
    # SGLang looks for Qwen's placeholders between <|vision_start|> and <|vision_end|>, and for no others.
    left_out = num_prompt == len(request.images.sent_ids)
    remedy = (
        "as many as without them; write around each image what the chat template of the served model writes there"
        if left_out
        else "use the processor of the served model to expand them"
    )
    raise AlignmentError(
        f"{name}: the prompt's images make it {len(request.prompt_ids)} rows, and the engine took {num_prompt}; "
        f"{remedy}"
    )


def _read_prompt_log_probs(
    name: str, request: Request, meta: Mapping[str, Any], logits: FoundLogits | None, vocab_size: int
) -> torch.Tensor:
    """Return the log-probs of the prompt's tokens from ``score_from`` on; NaN where an image stands."""
    first = request.score_from
    if logits is None or not request.constraints:
        # SGLang's start at the token before, without a log-prob.
        start = max(first - 1, 0)
        images = [row - start for row in request.image_rows if row >= start]
        ids = request.prompt_ids[start:]
        from_start = _read_log_probs(name, meta, "input", ids, first=start, images=images, vocab_size=vocab_size)
        return from_start[first - start :]
    num_wanted = len(request.prompt_ids) - max(first, 1)
    found_N = torch.empty(0) if logits.log_probs_N is None else logits.log_probs_N
    log_probs = found_N[len(found_N) - num_wanted :]
    return log_probs if first > 0 else torch.cat([torch.tensor([math.nan]), log_probs])


def _read_logits(
    name: str, request: Request, wanted: WantedLogits, found: FoundLogits | None, num_response: int, info: EngineInfo
) -> FoundLogits:
    """Count the logits of one answer against its tokens, and the tokens that constraints were applied to."""
    if found is None:
        raise ProtocolError(f"{name}: logits or constraints were asked for and are not in the answer; send it again")
    expected = 0 if wanted.prompt_from is None else len(request.prompt_ids) - wanted.prompt_from
    if wanted.constraints and not request.score_prompt and found.constrained != num_response:
        raise AlignmentError(
            f"{name}: the constraints were applied to {found.constrained} of {num_response} response tokens; the "
            "server's sampler does not pass its logits through SGLang's own sampler, leave --sampling-backend at its "
            "default"
        )
    if wanted.scored and len(found.log_probs_N if found.log_probs_N is not None else ()) != expected:
        got = None if found.log_probs_N is None else len(found.log_probs_N)
        raise AlignmentError(f"{name}: {got} log-probs under constraints for {expected} prompt tokens; send it again")
    num_entropies = None if found.entropy_T is None else len(found.entropy_T)
    if wanted.entropy and num_entropies != num_response:
        raise AlignmentError(
            f"{name}: {num_entropies} entropies for {num_response} response tokens; leave the server's "
            "--sampling-backend at its default, and send it again"
        )
    spec = wanted.spec
    if spec is None:
        return found
    size = info.vocab_size
    return FoundLogits(
        response=_counted(name, "response", found.response, spec, num_response, size) if spec.of_response else None,
        prompt=_counted(name, "prompt", found.prompt, spec, expected, size) if spec.of_prompt else None,
        log_probs_N=found.log_probs_N,
        entropy_T=found.entropy_T,
    )


def _counted(
    name: str, segment: str, rows: TokenLogits | None, spec: LogitsSpec, num_tokens: int, vocab_size: int
) -> TokenLogits:
    columns = spec.num_columns(vocab_size)
    if rows is None and num_tokens == 0:
        ids = torch.empty(0, columns, dtype=torch.int64)
        return TokenLogits(torch.empty(0, columns, dtype=spec.dtype), ids if spec.top_k is not None else None)
    shape = None if rows is None else tuple(rows.values_NC.shape)
    if rows is None or shape != (num_tokens, columns):
        raise AlignmentError(
            f"{name}: logits of shape {shape} for {num_tokens} {segment} tokens and {columns} columns; send it again, "
            "and report it if it stays"
        )
    if (rows.token_ids_NC is None) is not (spec.top_k is None):
        raise ProtocolError(
            f"{name}: the {segment} logits came {'without' if spec.top_k else 'with'} their token ids; use the same "
            "version of torchrl_sglang_hidden on both sides"
        )
    found = rows.token_ids_NC
    strange = found is not None and bool(((found < 0) | (found >= vocab_size)).any())
    if rows.values_NC.dtype != spec.dtype or strange:
        raise ProtocolError(
            f"{name}: the {segment} logits are {rows.values_NC.dtype}, expected {spec.dtype}, or of ids that the model "
            "does not have; use the same version of torchrl_sglang_hidden on both sides"
        )
    return rows


def _overflow(
    name: str, states: States | None, logits: FoundLogits | None, scores: Mapping[str, Scores]
) -> EngineError | None:
    # A span that may be empty is NaN where it is.
    pooled = [] if states is None else [*states.hidden.values(), *(one for one in states.spans.values() if one.count)]
    rows = None if states is None else states.token_rows
    return overflow_of(
        name,
        states=[*(one.vector for one in pooled), *([] if rows is None else [rows.rows_ND])],
        logits=[] if logits is None else [one.values_NC for one in (logits.prompt, logits.response) if one is not None],
        scores=[part for one in scores.values() for part in _numbers_of(one)],
    )


def _numbers_of(scores: Scores) -> list[torch.Tensor]:
    pooled = [one.vector for one in (*scores.pooled.values(), *scores.spans.values()) if one.count]
    return [part for part in (scores.prompt_P, scores.response_T, *pooled) if part is not None]


def _read_log_probs(
    name: str,
    meta: Mapping[str, Any],
    side: Literal["input", "output"],
    ids: tuple[int, ...],
    *,
    first: int = 0,
    images: Sequence[int] = (),
    vocab_size: int | None = None,
) -> torch.Tensor:
    """Return the log-prob of each of ``ids``; see `read_log_probs`."""
    entries = meta.get(f"{side}_token_logprobs")
    if entries is None:
        raise ProtocolError(f"{name}: {side} log-probs were asked for and are not in the answer; send it again")
    return read_log_probs(name, side, entries, ids, first=first, images=images, vocab_size=vocab_size)
