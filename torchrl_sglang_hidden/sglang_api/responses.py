"""Read SGLang's answers into `Completion`s.

The only reader of a finished answer's ``meta_info``, and the place where rows are counted against tokens. Past this
module there are records, no dicts. Knows nothing of how bytes travel, nor of TensorDicts.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, Literal, NamedTuple

import torch

from torchrl_sglang_hidden.errors import AlignmentError, ProtocolError, RequestAbortedError, SpanError
from torchrl_sglang_hidden.protocol import CHANNEL, FALLBACK_REMEDY, Answer, drop_shared, unpack_answer
from torchrl_sglang_hidden.records import Completion, EngineInfo, Pooled, Request, TokenLogits, TokenRows
from torchrl_sglang_hidden.reduce.pooling import Pools, RequestPools
from torchrl_sglang_hidden.reduce.reducers import reduce_rows
from torchrl_sglang_hidden.reduce.token_logits import FoundLogits, WantedLogits
from torchrl_sglang_hidden.reduce.wanted import Wanted
from torchrl_sglang_hidden.sglang_api.payload import logits_of, shares, wanted_of
from torchrl_sglang_hidden.spec.hidden import HiddenSpec, Segment, positions_of
from torchrl_sglang_hidden.spec.logits import LogitsSpec
from torchrl_sglang_hidden.spec.spans import LastTokens, PromptSpan, ResolvedSpan

__all__ = ["read_responses"]


def read_responses(
    requests: Sequence[Request], rows: object, info: EngineInfo, *, first_row: int = 0
) -> list[Completion]:
    """Read SGLang's answer to one batched payload, and count every row.

    Args:
        requests: what was sent.
        rows: SGLang's answers.
        info: as for `to_payload`.
        first_row: where these requests start in the caller's batch, for the errors.

    Raises:
        AlignmentError: ids, log-probs and states do not agree in number, or a prompt was not taken whole.
        RequestAbortedError: the engine gave up on a row.
        ProtocolError: the answer cannot be read.
    """
    if not isinstance(rows, list) or len(rows) != len(requests):
        found = len(rows) if isinstance(rows, list) else repr(rows)[:80]
        raise ProtocolError(
            f"sent {len(requests)} requests and got {found} answers; this is a fault of the engine, please report it"
        )
    completions: list[Completion] = []
    try:
        for request, row in zip(requests, rows, strict=True):
            completions.append(_read_row(first_row + len(completions), request, row, info))
    finally:
        # Nobody reads the rows after one that raised, and what they have in shared memory would stay there.
        for row in rows[len(completions) :] if info.shares_memory else ():
            drop_shared(_meta_of(row).get(CHANNEL))
    return completions


def _meta_of(row: Any) -> dict[str, Any]:
    meta = row.get("meta_info") if isinstance(row, dict) else None
    return meta if isinstance(meta, dict) else {}


def _read_row(index: int, request: Request, row: Any, info: EngineInfo) -> Completion:
    try:
        meta, text, response_ids = row["meta_info"], row["text"], tuple(int(i) for i in row["output_ids"])
        name = f"row {index} (request {meta['id']})"
        finish_type = meta["finish_reason"]["type"]
        if finish_type not in ("stop", "length"):
            # Before the rest: SGLang leaves fields out of a request that it aborts in its queue.
            message = meta["finish_reason"].get("message", "")
            raise RequestAbortedError(
                f"{name}: finished with {finish_type!r} after {len(response_ids)} tokens: {message}; send it again, or "
                "look at the server's log"
            )
        num_prompt = meta["prompt_tokens"]
        weight_version = str(meta["weight_version"])
        versions = {span["version"] for span in meta.get("weight_versions") or ()}
    except (KeyError, TypeError, ValueError) as error:
        raise ProtocolError(
            f"row {index}: the answer lacks {error}: {str(row)[:200]}; is that an SGLang server?"
        ) from error
    if num_prompt != len(request.prompt_ids):
        raise AlignmentError(
            f"{name}: sent a prompt of {len(request.prompt_ids)} tokens and the engine took {num_prompt}; start the "
            "server without --allow-auto-truncate"
        )
    if not response_ids:
        raise AlignmentError(
            f"{name}: 0 response tokens with finish reason {finish_type!r}; expected at least 1; send it again"
        )
    wanted = logits_of(request)
    answer = None
    if info.pools_in_server and (request.hidden is not None or wanted is not None):
        shared = shares(request) and info.shares_memory
        answer = unpack_answer(meta.get(CHANNEL), name, info.hidden_size, shared=shared)
    states = None
    if request.hidden is not None:
        states = _read_states(name, request, request.hidden, meta, response_ids, info, answer)
    logits = None
    if wanted is not None:
        logits = _read_logits(name, request, wanted, None if answer is None else answer.logits, len(response_ids), info)
    log_probs_T = _read_log_probs(name, meta, "output", response_ids) if request.return_log_probs else None
    if request.reads_only:
        text, response_ids, finish_type = "", (), "length"
        log_probs_T = None if log_probs_T is None else log_probs_T[:0]
    return Completion(
        prompt_ids=request.prompt_ids,
        response_ids=response_ids,
        text=text,
        log_probs_T=log_probs_T,
        hidden={} if states is None else states.hidden,
        finish_reason=finish_type,
        weight_version=weight_version,
        mixed_weights=len(versions) > 1,
        prompt_log_probs_P=_read_prompt_log_probs(name, request, meta, logits) if request.score_prompt else None,
        spans={} if states is None else states.spans,
        token_rows=None if states is None else states.token_rows,
        logits=None if logits is None else logits.response,
        prompt_logits=None if logits is None else logits.prompt,
    )


def _read_prompt_log_probs(
    name: str, request: Request, meta: Mapping[str, Any], logits: FoundLogits | None
) -> torch.Tensor:
    """Return the log-probs of the prompt's tokens from ``score_from`` on."""
    first = request.score_from
    if logits is None or not request.constraints:
        # SGLang's start at the token before, without a log-prob.
        start = max(first - 1, 0)
        return _read_log_probs(name, meta, "input", request.prompt_ids[start:])[first - start :]
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
    spec = wanted.spec
    if spec is None:
        return found
    columns = spec.num_columns(info.vocab_size)
    return FoundLogits(
        response=_counted(name, "response", found.response, spec, num_response, columns) if spec.of_response else None,
        prompt=_counted(name, "prompt", found.prompt, spec, expected, columns) if spec.of_prompt else None,
        log_probs_N=found.log_probs_N,
    )


def _counted(
    name: str, segment: str, rows: TokenLogits | None, spec: LogitsSpec, num_tokens: int, columns: int
) -> TokenLogits:
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
    return rows


def _read_log_probs(
    name: str, meta: Mapping[str, Any], side: Literal["input", "output"], ids: tuple[int, ...]
) -> torch.Tensor:
    """Return the log-prob of each of ``ids``, float32; NaN for the first of the input, which SGLang gives as null."""
    entries = meta.get(f"{side}_token_logprobs")
    if entries is None:
        raise ProtocolError(f"{name}: {side} log-probs were asked for and are not in the answer; send it again")
    try:
        found_ids = tuple(int(entry[1]) for entry in entries)
        values = [entry[0] for entry in entries]
        if side == "input" and values and values[0] is None:
            values[0] = math.nan
        log_probs = torch.tensor([float(value) for value in values], dtype=torch.float32)
    except (TypeError, ValueError, IndexError) as error:
        raise ProtocolError(
            f"{name}: the {side} log-probs cannot be read ({error}); is that an SGLang server?"
        ) from error
    if found_ids != ids:
        raise AlignmentError(
            f"{name}: {len(entries)} log-probs for {len(ids)} {side} tokens, or of other ids; this is a fault of the "
            "engine, please report it"
        )
    return log_probs


class _States(NamedTuple):
    hidden: dict[str, Pooled]
    spans: dict[str, Pooled]
    token_rows: TokenRows | None


def _read_states(
    name: str,
    request: Request,
    spec: HiddenSpec,
    meta: Mapping[str, Any],
    response_ids: tuple[int, ...],
    info: EngineInfo,
    answer: Answer | None,
) -> _States:
    """Read the states of one answer, and count them against the tokens."""
    num_prompt, num_response = len(request.prompt_ids), len(response_ids)
    if answer is not None:
        found = answer.pools
    else:
        found = _pool_stock(name, wanted_of(request, spec, info), meta.get("hidden_states"), num_prompt, response_ids)
    remedy = "send it again" if info.pools_in_server else FALLBACK_REMEDY

    def pooled(what: str, value: tuple[torch.Tensor | None, int] | None, expected: int | None) -> Pooled:
        vector_KD, count = value or (None, 0)
        every_row_counted = count >= 1 if expected is None else count == expected
        if vector_KD is None or not every_row_counted:
            raise AlignmentError(
                f"{name}: {count} rows of states for the {what} of {num_prompt} prompt and {num_response} response "
                f"tokens, expected {'at least 1' if expected is None else expected}; {remedy}"
            )
        return Pooled(_shaped(name, vector_KD, spec, info), count)

    hidden = {
        str(segment): pooled(
            f"{segment!r} segment",
            found.segments.get(segment),
            len(Segment(segment).positions(num_prompt, num_response)),
        )
        for segment in (spec.segments if spec.pooling is not None else ())
    }
    spans = {
        key: pooled(f"span {key!r}", found.spans.get(key), _rows_of(span, num_response))
        for key, span in request.spans.items()
    }
    if not spec.tokens:
        return _States(hidden, spans, None)
    positions = positions_of(spec.segments, num_prompt, num_response)
    rows = found.rows
    if rows is None or (rows.first, len(rows.rows_NKD)) != (positions.start, len(positions)):
        got = "none" if rows is None else f"those of {len(rows.rows_NKD)} positions from {rows.first} on"
        raise AlignmentError(
            f"{name}: expected the states of positions {positions.start}..{positions.stop - 1}, {num_prompt} prompt "
            f"and {num_response} response tokens, and got {got}; {remedy}"
        )
    return _States(hidden, spans, TokenRows(positions.start, _shaped(name, rows.rows_NKD, spec, info)))


def _shaped(name: str, states: torch.Tensor | None, spec: HiddenSpec, info: EngineInfo) -> torch.Tensor:
    """Return states ``[…, K, D]`` as they were asked for: without K if the layers are one id."""
    expected = (len(spec.layer_ids), info.hidden_size)
    if states is None or states.shape[-2:] != expected:
        found = None if states is None else tuple(states.shape)
        raise ProtocolError(f"{name}: states of shape {found}, expected [..., {expected[0]}, {expected[1]}]")
    return states if isinstance(spec.layers, tuple) else states.squeeze(-2)


def _rows_of(span: ResolvedSpan, num_response: int) -> int | None:
    """Return how many rows a span has; None if only the engine knows, because it looked for the markers."""
    if isinstance(span, PromptSpan):
        return span.count
    return min(span.count, num_response) if isinstance(span, LastTokens) else None


def _pool_stock(name: str, wanted: Wanted, entries: Any, num_prompt: int, response_ids: tuple[int, ...]) -> Pools:
    """Pool stock ``hidden_states``: one entry per forward step, the first with the prompt rows that it computed.

    A later entry of several rows is a prefill repeated after a retraction; its last row produced the next token.
    """
    if not isinstance(entries, list) or not entries:
        raise ProtocolError(f"{name}: hidden states were asked for and are not in the answer; {FALLBACK_REMEDY}")
    pools = RequestPools(wanted, num_prompt)
    try:
        rows = [torch.tensor(entry, dtype=torch.float32) for entry in entries]
    except (TypeError, ValueError) as error:
        raise ProtocolError(f"{name}: the hidden states cannot be read ({error}); is that an SGLang server?") from error
    steps = [row if row.ndim == 2 else row[None] for row in rows]
    first_ND = steps[0]
    start = num_prompt - first_ND.shape[0]
    step = pools.plan_prompt(start, num_prompt) if start >= 0 else None
    if step is not None:
        moved = [tuple((begin - start, stop - start) for begin, stop in ranges) for ranges in step.groups]
        kept = None if step.rows is None else first_ND[step.rows[0] - start : step.rows[1] - start, None]
        pools.add_prompt(step, [reduce_rows(first_ND, ranges, wanted.reducer)[None] for ranges in moved], kept)
    for index, step_ND in enumerate(steps):
        pools.add_produced(step_ND[-1][None], index)
    found = pools.finish(response_ids)
    for span_name, fault in found.faults.items():
        raise SpanError(f"{name}, span {span_name!r}: {fault}")
    if start > 0 and wanted.pools_prefix:
        # Rows are missing before the first one that came. The number of rows is for the error that follows.
        missing = {Segment.PROMPT: first_ND.shape[0], Segment.FULL: first_ND.shape[0] + len(steps) - 1}
        segments = {s: (None, missing[Segment(s)]) if s in missing else value for s, value in found.segments.items()}
        return Pools(segments, found.spans, found.faults, found.rows)
    return found
