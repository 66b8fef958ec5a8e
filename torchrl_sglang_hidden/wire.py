"""Requests to SGLang's payload, and SGLang's answers to `Completion`s.

The only reader of a finished answer's ``meta_info``, and the place where rows are counted against tokens. Past this
module there are records, no dicts. Knows nothing of how bytes travel, nor of TensorDicts.
"""

from __future__ import annotations

import math
import uuid
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, NamedTuple

import torch

from torchrl_sglang_hidden.channel import CHANNEL, FALLBACK_REMEDY, Status, Way, pack_options, unpack_answer
from torchrl_sglang_hidden.errors import (
    AlignmentError,
    CapabilityError,
    InputError,
    InputTypeError,
    PromptLengthError,
    ProtocolError,
    RequestAbortedError,
    SpanError,
    TokenIdError,
)
from torchrl_sglang_hidden.pooling import Pools, RequestPools, Wanted, sum_rows
from torchrl_sglang_hidden.shared import is_shared
from torchrl_sglang_hidden.spans import Between, LastTokens, PromptSpan
from torchrl_sglang_hidden.specs import (
    Completion,
    EngineInfo,
    HiddenSpec,
    Pooled,
    Request,
    ResolvedSpan,
    Segment,
    TokenRows,
    canonical_layer,
    rows_expected,
)

__all__ = ["ModelSizes", "check_requests", "read_info", "read_responses", "to_payload", "warm_up"]


class ModelSizes(NamedTuple):
    """What a model's configuration says."""

    vocab_size: int
    hidden_size: int
    num_layers: int
    context_length: int


def warm_up(server_info: Mapping[str, Any]) -> dict[str, Any] | None:
    """A payload to send before an engine can say which layers it gives, or None: it is checked on the first step."""
    states = [state.get(CHANNEL) for state in server_info.get("internal_states") or [{}]]
    if all(state is None or state.get("layers", ()) is not None for state in states):
        return None
    # One for each of the engine's data-parallel parts.
    return {"input_ids": [[0]] * len(states), "sampling_params": {"max_new_tokens": 1, "temperature": 0.0}}


def _stock_refusal(server_info: Mapping[str, Any]) -> str:
    """Why SGLang's own hidden states cannot be trusted on this server; empty where they can."""
    if server_info.get("speculative_algorithm"):
        return f"speculative decoding ({server_info['speculative_algorithm']}) gives rows of rejected tokens"
    if (server_info.get("pp_size") or 1) > 1:
        return f"SGLang loses hidden states between pipeline stages (pp_size={server_info['pp_size']})"
    return ""


def read_info(
    model_info: Mapping[str, Any],
    server_info: Mapping[str, Any],
    ask_model: Callable[[str], ModelSizes],
) -> EngineInfo:
    """Reads what an engine says of itself.

    Args:
        model_info: SGLang's ``/model_info``.
        server_info: SGLang's ``/server_info``.
        ask_model: for an engine without the server half, gives the sizes of the model at a path.

    Raises:
        ProtocolError: the server half speaks another protocol, or the answers lack what they should have.
        CapabilityError: the server does not generate text.
    """
    if not model_info.get("is_generation", True) or server_info.get("skip_tokenizer_init"):
        raise CapabilityError(
            f"the server at model {model_info.get('model_path')!r} does not generate text; start it with a causal "
            "language model and without --skip-tokenizer-init"
        )
    states = [state.get(CHANNEL) for state in server_info.get("internal_states") or [{}]]
    statuses = [Status.unpack(state) for state in states if state is not None]
    everywhere = len(statuses) == len(states)
    try:
        if statuses:
            first = statuses[0]
            sizes = ModelSizes(first.vocab_size, first.hidden_size, first.num_layers, first.context_length)
        else:
            sizes = ask_model(model_info["model_path"])
        context_length = server_info.get("context_length") or sizes.context_length
        pools = everywhere and all(status.layers != () for status in statuses)
        because = next((status.because for status in statuses if status.because), _stock_refusal(server_info))
        # The last layer's need no check, and are there before anything has run.
        layers = [status.layers or (-1,) for status in statuses] if pools else [(-1,)]
        return EngineInfo(
            model_path=model_info["model_path"],
            tokenizer_path=model_info.get("tokenizer_path") or model_info["model_path"],
            vocab_size=sizes.vocab_size,
            hidden_size=sizes.hidden_size,
            num_layers=sizes.num_layers,
            layers=tuple(sorted(set(layers[0]).intersection(*layers))),
            context_length=context_length,
            # SGLang refuses a prompt that leaves no room for a token, in the context or in its KV cache.
            max_prompt_tokens=min(context_length, server_info["max_req_input_len"]) - 1,
            weight_version=str(model_info["weight_version"]),
            pools_in_server=pools,
            returns_hidden_states=bool(server_info.get("enable_return_hidden_states"))
            and not _stock_refusal(server_info)
            and all(status.normed for status in statuses),
            honours_seeds=bool(server_info.get("enable_deterministic_inference")),
            honours_priorities=bool(server_info.get("enable_priority_scheduling")),
            no_states_because=because,
            shares_memory=pools and all(is_shared(status.shared) for status in statuses),
        )
    except KeyError as error:
        raise ProtocolError(
            f"the server's description lacks {error}; this client is written for SGLang 0.5.23"
        ) from error


# --- requests ------------------------------------------------------------------------------------------------------


def check_requests(requests: Sequence[Request], info: EngineInfo) -> None:
    """Refuses what would take the whole server down, or be refused by it, before anything is sent.

    SGLang 0.5.23's scheduler ends on an id outside the vocabulary and on an empty prompt.

    Raises:
        PromptLengthError: no rows, a row without tokens, or one over `EngineInfo.max_prompt_tokens`.
        TokenIdError: an id outside ``[0, vocab_size)``.
        InputTypeError: an id that is no Python int.
        CapabilityError: hidden states or seeds asked of an engine that has no use for them.
    """
    if not requests:
        raise PromptLengthError("the batch has 0 rows; pass at least 1 prompt")
    priorities = {request.priority for request in requests}
    if len(priorities) > 1:
        raise InputError(f"the rows have priorities {priorities}, and SGLang takes one per batch; send them apart")
    if priorities != {None} and not info.honours_priorities:
        raise CapabilityError(
            f"priority={requests[0].priority}, which this engine does not read; start SGLang with "
            "--enable-priority-scheduling, or leave it out"
        )
    for row, request in enumerate(requests):
        ids = request.prompt_ids
        if not ids:
            raise PromptLengthError(f"row {row}: the prompt has 0 tokens; SGLang needs at least 1")
        if any(type(token_id) is not int for token_id in ids):
            wrong = next(token_id for token_id in ids if type(token_id) is not int)
            raise InputTypeError(f"row {row}: token id {wrong!r} is a {type(wrong).__name__}; token ids are integers")
        for extreme in (min(ids), max(ids)):
            if not 0 <= extreme < info.vocab_size:
                raise TokenIdError(
                    f"row {row}: token id {extreme} at position {ids.index(extreme)} is outside the vocabulary of "
                    f"{info.vocab_size}; ids are 0..{info.vocab_size - 1}. Was it made by another model's tokenizer?"
                )
        if len(ids) > info.max_prompt_tokens:
            raise PromptLengthError(
                f"row {row}: the prompt has {len(ids)} tokens, over the engine's limit of {info.max_prompt_tokens} "
                f"(context length {info.context_length}); shorten it, or start the server with a larger context or KV "
                "cache"
            )
        for name in ("stop_token_ids", "logit_bias"):
            unknown = [i for i in map(int, request.sampling.get(name) or ()) if i >= info.vocab_size]
            if unknown:
                raise TokenIdError(
                    f"row {row}: {name} has id {unknown[0]}, outside the vocabulary of {info.vocab_size}; ids are "
                    f"0..{info.vocab_size - 1}"
                )
        if "sampling_seed" in request.sampling and not info.honours_seeds:
            raise CapabilityError(
                f"row {row}: sampling_seed={request.sampling['sampling_seed']}, which this engine does not read; start "
                "SGLang with --enable-deterministic-inference (an accelerator's attention backend), or leave it out"
            )
        # A prompt that is only read still costs a token: SGLang generates one at least.
        total = len(ids) + (request.sampling.get("max_new_tokens", 1) or 1)
        if total > info.context_length:
            raise PromptLengthError(
                f"row {row}: {len(ids)} prompt tokens and max_new_tokens={total - len(ids)} are {total} together, over "
                f"the context length of {info.context_length}; lower max_new_tokens to {info.context_length - len(ids)}"
            )
        if request.hidden is not None:
            _check_hidden(row, request, request.hidden, info)


def _check_hidden(row: int, request: Request, spec: HiddenSpec, info: EngineInfo) -> None:
    if not (info.pools_in_server or info.returns_hidden_states):
        because = f", which gives none: {info.no_states_because}" if info.no_states_because else ""
        raise CapabilityError(
            f"row {row}: hidden states are asked of a server that was started without them{because}; "
            f"{FALLBACK_REMEDY}, start SGLang with --enable-return-hidden-states, or pass hidden=None"
        )
    wanted = {canonical_layer(layer, info.num_layers) for layer in spec.layer_ids}
    if not wanted <= set(info.layers):
        because = f" ({info.no_states_because})" if info.no_states_because else ""
        raise CapabilityError(
            f"row {row}: layers={spec.layers}: the server gives the states of layers {list(info.layers)}{because}; "
            f"start it with launch(layers={tuple(sorted({*wanted, *info.layers} - {-1}))}), or `serve --layers`"
        )
    if request.reads_only and spec.needs_response:
        raise InputError(
            f"row {row}: max_new_tokens=0 generates nothing, and segments={spec.segments}, spans={list(spec.spans)} "
            "are not all of the prompt; ask for the prompt's, or for tokens"
        )
    if request.spans.keys() != spec.spans.keys():
        raise InputError(
            f"row {row}: spans {sorted(request.spans)} are resolved, and {sorted(spec.spans)} are asked for"
        )
    for name, span in request.spans.items():
        if isinstance(span, PromptSpan) and span.end > len(request.prompt_ids):
            raise SpanError(
                f"row {row}, span {name!r}: ends at {span.end} in a prompt of {len(request.prompt_ids)} tokens"
            )
        most = request.sampling.get("max_new_tokens")
        if isinstance(span, LastTokens) and not span.allow_fewer and most is not None and span.count > most:
            raise SpanError(
                f"row {row}, span {name!r}: LastTokens({span.count}) of a response of at most max_new_tokens={most}; "
                "raise that, or pass allow_fewer=True"
            )
        if isinstance(span, Between) and not info.pools_in_server:
            raise CapabilityError(f"row {row}, span {name!r}: markers are found by the server half; {FALLBACK_REMEDY}")


def _wanted(request: Request, spec: HiddenSpec, info: EngineInfo) -> Wanted:
    # Narrower rows are fewer bytes; wider ones than float32 hold no more than it does.
    narrow = spec.dtype in (torch.bfloat16, torch.float16)
    return Wanted(
        segments=spec.segments,
        pooling=spec.pooling,
        layers=tuple(canonical_layer(layer, info.num_layers) for layer in spec.layer_ids),
        spans=request.spans,
        tokens=spec.tokens,
        row_dtype=spec.dtype if narrow else torch.float32,
    )


def to_payload(requests: Sequence[Request], info: EngineInfo, *, binary: bool) -> dict[str, Any]:
    """Writes one batched payload for SGLang's ``/generate`` (``Engine.async_generate`` takes the same names).

    Args:
        requests: checked requests, at least one.
        info: decides between the server half and stock ``return_hidden_states``.
        binary: states come as raw bytes (in-process), not as text (JSON).
    """
    sampling = [_sampling(request) for request in requests]
    payload: dict[str, Any] = {
        "input_ids": [list(request.prompt_ids) for request in requests],
        "sampling_params": sampling,
        "return_logprob": [request.return_log_probs or request.score_prompt for request in requests],
    }
    if any(request.score_prompt for request in requests):
        # From the first token on; -1 is SGLang's "no prompt log-probs".
        payload["logprob_start_len"] = [0 if request.score_prompt else -1 for request in requests]
    if any(request.lora is not None for request in requests):
        payload["lora_path"] = [request.lora for request in requests]
    if requests[0].priority is not None:
        payload["priority"] = requests[0].priority
    wanted = [None if request.hidden is None else _wanted(request, request.hidden, info) for request in requests]
    if info.pools_in_server:
        for one, params in zip(wanted, sampling, strict=True):
            if one is not None:
                shared: Way = "shared" if one.tokens and info.shares_memory else "text"
                params["custom_params"] = {CHANNEL: pack_options(one, "binary" if binary else shared)}
    elif any(one is not None for one in wanted):
        payload["return_hidden_states"] = [one is not None for one in wanted]
        # Stock SGLang leaves out the rows of a prefix-cache hit. A salt of its own keeps a request from hitting.
        payload["cache_salt"] = [
            uuid.uuid4().hex if one is not None and _reads_prompt(one, len(request.prompt_ids)) else ""
            for one, request in zip(wanted, requests, strict=True)
        ]
    return payload


def _sampling(request: Request) -> dict[str, Any]:
    # SGLang has no states where nothing is generated, and the token comes with the prompt's one forward pass.
    return {"max_new_tokens": 1, "temperature": 0.0} if request.reads_only else dict(request.sampling)


def _reads_prompt(wanted: Wanted, num_prompt: int) -> bool:
    """Whether rows before the prompt's last, which is always computed, are wanted."""
    return wanted.sums_prefix or RequestPools(wanted, num_prompt).first_needed() < num_prompt - 1


# --- answers -------------------------------------------------------------------------------------------------------


def read_responses(
    requests: Sequence[Request], rows: object, info: EngineInfo, *, first_row: int = 0
) -> list[Completion]:
    """Reads SGLang's answer to one batched payload, and counts every row.

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
        raise ProtocolError(f"sent {len(requests)} requests and got {found} answers")
    return [
        _read_row(index, request, row, info)
        for index, (request, row) in enumerate(zip(requests, rows, strict=True), first_row)
    ]


def _read_row(index: int, request: Request, row: Any, info: EngineInfo) -> Completion:
    try:
        meta, text, response_ids = row["meta_info"], row["text"], tuple(int(i) for i in row["output_ids"])
        name = f"row {index} (request {meta['id']})"
        finish_type = meta["finish_reason"]["type"]
        if finish_type not in ("stop", "length"):
            # Before the rest: SGLang leaves fields out of a request that it aborts in its queue.
            message = meta["finish_reason"].get("message", "")
            raise RequestAbortedError(
                f"{name}: finished with {finish_type!r} after {len(response_ids)} tokens: {message}"
            )
        num_prompt = meta["prompt_tokens"]
        weight_version = str(meta["weight_version"])
        versions = {span["version"] for span in meta.get("weight_versions") or ()}
    except (KeyError, TypeError, ValueError) as error:
        raise ProtocolError(f"row {index}: the answer lacks {error}: {str(row)[:200]}") from error
    if num_prompt != len(request.prompt_ids):
        raise AlignmentError(
            f"{name}: sent a prompt of {len(request.prompt_ids)} tokens and the engine took {num_prompt}; start the "
            "server without --allow-auto-truncate"
        )
    if not response_ids:
        raise AlignmentError(f"{name}: 0 response tokens with finish reason {finish_type!r}; expected at least 1")
    states = None if request.hidden is None else _read_states(name, request, request.hidden, meta, response_ids, info)
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
        prompt_log_probs_P=_read_log_probs(name, meta, "input", request.prompt_ids) if request.score_prompt else None,
        spans={} if states is None else states.spans,
        token_rows=None if states is None else states.token_rows,
    )


def _read_log_probs(
    name: str, meta: Mapping[str, Any], side: Literal["input", "output"], ids: tuple[int, ...]
) -> torch.Tensor:
    """The log-prob of each of ``ids``, float32; NaN for the first of the input, which SGLang gives as null."""
    entries = meta.get(f"{side}_token_logprobs")
    if entries is None:
        raise ProtocolError(f"{name}: {side} log-probs were asked for and are not in the answer")
    try:
        found_ids = tuple(int(entry[1]) for entry in entries)
        values = [entry[0] for entry in entries]
        if side == "input" and values and values[0] is None:
            values[0] = math.nan
        log_probs = torch.tensor([float(value) for value in values], dtype=torch.float32)
    except (TypeError, ValueError, IndexError) as error:
        raise ProtocolError(f"{name}: the {side} log-probs cannot be read ({error})") from error
    if found_ids != ids:
        raise AlignmentError(
            f"{name}: {len(entries)} log-probs for {len(ids)} {side} tokens, or of other ids; this is a fault of the "
            "engine, please report it"
        )
    return log_probs


class _States(NamedTuple):
    hidden: dict[Segment, Pooled]
    spans: dict[str, Pooled]
    token_rows: TokenRows | None


def _read_states(
    name: str,
    request: Request,
    spec: HiddenSpec,
    meta: Mapping[str, Any],
    response_ids: tuple[int, ...],
    info: EngineInfo,
) -> _States:
    """Reads the states of one answer, and counts them against the tokens."""
    num_prompt, num_response = len(request.prompt_ids), len(response_ids)
    if info.pools_in_server:
        found = unpack_answer(meta.get(CHANNEL), name, info.hidden_size)
    else:
        found = _pool_stock(name, _wanted(request, spec, info), meta.get("hidden_states"), num_prompt, response_ids)
    remedy = "send it again" if info.pools_in_server else FALLBACK_REMEDY

    def pooled(what: str, value: tuple[torch.Tensor | None, int] | None, expected: int | None) -> Pooled:
        vector_KD, count = value or (None, 0)
        if vector_KD is None or count != expected if expected is not None else vector_KD is None or count < 1:
            raise AlignmentError(
                f"{name}: {count} rows of states for the {what} of {num_prompt} prompt and {num_response} response "
                f"tokens, expected {'at least 1' if expected is None else expected}; {remedy}"
            )
        return Pooled(_shaped(name, vector_KD, spec, info), count)

    hidden = {
        segment: pooled(
            f"{segment!r} segment", found.segments.get(segment), rows_expected(segment, num_prompt, num_response)
        )
        for segment in (spec.segments if spec.pooling is not None else ())
    }
    spans = {
        key: pooled(f"span {key!r}", found.spans.get(key), _rows_of(span, num_response))
        for key, span in request.spans.items()
    }
    if not spec.tokens:
        return _States(hidden, spans, None)
    first = 0 if spec.segments != ("response",) else num_prompt - 1
    stop = num_prompt if spec.segments == ("prompt",) else num_prompt + num_response - 1
    rows = found.rows
    if rows is None or (rows.first, len(rows.rows_NKD)) != (first, stop - first):
        got = "none" if rows is None else f"those of {len(rows.rows_NKD)} positions from {rows.first} on"
        raise AlignmentError(
            f"{name}: expected the states of positions {first}..{stop - 1}, {num_prompt} prompt and {num_response} "
            f"response tokens, and got {got}; {remedy}"
        )
    return _States(hidden, spans, TokenRows(first, _shaped(name, rows.rows_NKD, spec, info)))


def _shaped(name: str, states: torch.Tensor | None, spec: HiddenSpec, info: EngineInfo) -> torch.Tensor:
    """``[…, K, D]`` as it was asked for: without K where the layers are one id."""
    expected = (len(spec.layer_ids), info.hidden_size)
    if states is None or states.shape[-2:] != expected:
        found = None if states is None else tuple(states.shape)
        raise ProtocolError(f"{name}: states of shape {found}, expected [..., {expected[0]}, {expected[1]}]")
    return states if isinstance(spec.layers, tuple) else states.squeeze(-2)


def _rows_of(span: ResolvedSpan, num_response: int) -> int | None:
    """How many rows a span has; None where the engine found out."""
    if isinstance(span, PromptSpan):
        return span.count
    return min(span.count, num_response) if isinstance(span, LastTokens) else None


def _pool_stock(name: str, wanted: Wanted, entries: Any, num_prompt: int, response_ids: tuple[int, ...]) -> Pools:
    """Pools stock ``hidden_states``: one entry per forward step, the first with the prompt rows that it computed.

    A later entry of several rows is a prefill repeated after a retraction; its last row produced the next token.
    """
    if not isinstance(entries, list) or not entries:
        raise ProtocolError(f"{name}: hidden states were asked for and are not in the answer; {FALLBACK_REMEDY}")
    pools = RequestPools(wanted, num_prompt)
    try:
        rows = [torch.tensor(entry, dtype=torch.float32) for entry in entries]
    except (TypeError, ValueError) as error:
        raise ProtocolError(f"{name}: the hidden states cannot be read ({error})") from error
    steps = [row if row.ndim == 2 else row[None] for row in rows]
    first_ND = steps[0]
    start = num_prompt - first_ND.shape[0]
    step = pools.plan_prompt(start, num_prompt) if start >= 0 else None
    if step is not None:
        moved = [tuple((begin - start, stop - start) for begin, stop in ranges) for ranges in step.groups]
        kept = None if step.rows is None else first_ND[step.rows[0] - start : step.rows[1] - start, None]
        pools.add_prompt(step, [sum_rows(first_ND, ranges)[None] for ranges in moved], kept)
    for index, step_ND in enumerate(steps):
        pools.add_produced(step_ND[-1][None], index)
    found = pools.finish(response_ids)
    for span_name, fault in found.faults.items():
        raise SpanError(f"{name}, span {span_name!r}: {fault}")
    if start > 0 and wanted.sums_prefix:
        # Rows are missing before those that came. Their number is for the error that follows.
        missing = {"prompt": first_ND.shape[0], "full": first_ND.shape[0] + len(steps) - 1}
        segments = {s: (None, missing[s]) if s in missing else value for s, value in found.segments.items()}
        return Pools(segments, found.spans, found.faults, found.rows)
    return found
