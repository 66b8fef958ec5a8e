"""Requests to SGLang's payload, and SGLang's answers to `Completion`s.

The only reader of SGLang's ``meta_info``, and the place where rows are counted against tokens. Past this module there
are records, no dicts. Knows nothing of how bytes travel, nor of TensorDicts.
"""

from __future__ import annotations

import math
import uuid
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, cast

import torch

from torchrl_sglang_hidden.channel import CHANNEL, FALLBACK_REMEDY, PROTOCOL, pack_options, unpack_answer
from torchrl_sglang_hidden.errors import (
    AlignmentError,
    CapabilityError,
    InputTypeError,
    PromptLengthError,
    ProtocolError,
    RequestAbortedError,
    TokenIdError,
)
from torchrl_sglang_hidden.pooling import RequestPools, reduce_rows
from torchrl_sglang_hidden.specs import Completion, EngineInfo, HiddenSpec, Pooled, Request, Segment, rows_expected

__all__ = ["check_requests", "read_info", "read_responses", "to_payload"]


def read_info(
    model_info: Mapping[str, Any],
    server_info: Mapping[str, Any],
    ask_model: Callable[[str], tuple[int, int, int]],
) -> EngineInfo:
    """Reads what an engine says of itself.

    Args:
        model_info: SGLang's ``/model_info``.
        server_info: SGLang's ``/server_info``.
        ask_model: for an engine without the server half, gives vocabulary size, hidden size and context length of the
            model at a path.

    Raises:
        ProtocolError: the server half speaks another protocol, or the answers lack what they should have.
        CapabilityError: the server does not generate text.
    """
    if not model_info.get("is_generation", True) or server_info.get("skip_tokenizer_init"):
        raise CapabilityError(
            f"the server at model {model_info.get('model_path')!r} does not generate text; start it with a causal "
            "language model and without --skip-tokenizer-init"
        )
    statuses = [state.get(CHANNEL) for state in server_info.get("internal_states") or [{}]]
    spoken = {status["protocol"] for status in statuses if status is not None}
    if spoken - {PROTOCOL}:
        raise ProtocolError(
            f"the server half speaks protocol {sorted(spoken)} and this client {PROTOCOL}; install the same version of "
            "torchrl_sglang_hidden on both sides"
        )
    try:
        if statuses[0] is not None:
            sizes = tuple(statuses[0][name] for name in ("vocab_size", "hidden_size", "context_length"))
        else:
            sizes = ask_model(model_info["model_path"])
        vocab_size, hidden_size, context_length = sizes
        context_length = server_info.get("context_length") or context_length
        return EngineInfo(
            model_path=model_info["model_path"],
            tokenizer_path=model_info.get("tokenizer_path") or model_info["model_path"],
            vocab_size=vocab_size,
            hidden_size=hidden_size,
            context_length=context_length,
            # SGLang refuses a prompt that leaves no room for a token, in the context or in its KV cache.
            max_prompt_tokens=min(context_length, server_info["max_req_input_len"]) - 1,
            weight_version=str(model_info["weight_version"]),
            pools_in_server=all(status is not None and status["captures"] for status in statuses),
            returns_hidden_states=bool(server_info.get("enable_return_hidden_states"))
            and all(status is None or status["normed"] for status in statuses),
            honours_seeds=bool(server_info.get("enable_deterministic_inference")),
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
        total = len(ids) + request.sampling.get("max_new_tokens", 1)
        if total > info.context_length:
            raise PromptLengthError(
                f"row {row}: {len(ids)} prompt tokens and max_new_tokens={total - len(ids)} are {total} together, over "
                f"the context length of {info.context_length}; lower max_new_tokens to {info.context_length - len(ids)}"
            )
        if request.hidden is not None and not (info.pools_in_server or info.returns_hidden_states):
            raise CapabilityError(
                f"row {row}: hidden states are asked for, and the server was started without them; {FALLBACK_REMEDY}, "
                "start SGLang with --enable-return-hidden-states, or pass hidden=None"
            )


def to_payload(requests: Sequence[Request], info: EngineInfo, *, binary: bool) -> dict[str, Any]:
    """Writes one batched payload for SGLang's ``/generate`` (``Engine.async_generate`` takes the same names).

    Args:
        requests: checked requests, at least one.
        info: decides between the server half and stock ``return_hidden_states``.
        binary: see `pack_options`.
    """
    sampling = [dict(request.sampling) for request in requests]
    payload: dict[str, Any] = {
        "input_ids": [list(request.prompt_ids) for request in requests],
        "sampling_params": sampling,
        "return_logprob": [request.return_log_probs or request.score_prompt for request in requests],
    }
    if any(request.score_prompt for request in requests):
        # From the first token on; -1 is SGLang's "no prompt log-probs".
        payload["logprob_start_len"] = [0 if request.score_prompt else -1 for request in requests]
    if info.pools_in_server:
        for request, params in zip(requests, sampling, strict=True):
            if request.hidden is not None:
                params["custom_params"] = {CHANNEL: pack_options(request.hidden, binary=binary)}
    elif any(request.hidden is not None for request in requests):
        payload["return_hidden_states"] = [request.hidden is not None for request in requests]
        # Stock SGLang leaves out the rows of a prefix-cache hit. A salt of its own keeps a request from hitting.
        payload["cache_salt"] = [
            uuid.uuid4().hex if request.hidden is not None and request.hidden.reads_whole_prompt else ""
            for request in requests
        ]
    return payload


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
        finish, num_prompt = meta["finish_reason"], meta["prompt_tokens"]
        finish_type = finish["type"]
        weight_version = str(meta["weight_version"])
        versions = {span["version"] for span in meta.get("weight_versions") or ()}
    except (KeyError, TypeError, ValueError) as error:
        raise ProtocolError(f"row {index}: the answer lacks {error}: {str(row)[:200]}") from error
    if finish_type not in ("stop", "length"):
        raise RequestAbortedError(
            f"{name}: finished with {finish_type!r} after {len(response_ids)} tokens: {finish.get('message', '')}"
        )
    if num_prompt != len(request.prompt_ids):
        raise AlignmentError(
            f"{name}: sent a prompt of {len(request.prompt_ids)} tokens and the engine took {num_prompt}; start the "
            "server without --allow-auto-truncate"
        )
    if not response_ids:
        raise AlignmentError(f"{name}: 0 response tokens with finish reason {finish_type!r}; expected at least 1")
    return Completion(
        prompt_ids=request.prompt_ids,
        response_ids=response_ids,
        text=text,
        log_probs_T=_read_log_probs(name, meta, "output", response_ids) if request.return_log_probs else None,
        hidden=_read_hidden(name, request, meta, len(response_ids), info) if request.hidden is not None else {},
        finish_reason=finish_type,
        weight_version=weight_version,
        mixed_weights=len(versions) > 1,
        prompt_log_probs_P=_read_log_probs(name, meta, "input", request.prompt_ids) if request.score_prompt else None,
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


def _read_hidden(
    name: str, request: Request, meta: Mapping[str, Any], num_response: int, info: EngineInfo
) -> dict[Segment, Pooled]:
    spec = cast("HiddenSpec", request.hidden)
    num_prompt = len(request.prompt_ids)
    if info.pools_in_server:
        found = unpack_answer(meta.get(CHANNEL), name)
    else:
        found = _pool_stock(name, spec, meta.get("hidden_states"), num_prompt)
    hidden: dict[Segment, Pooled] = {}
    for segment in spec.segments:
        vector, count = found.get(segment, (None, 0))
        expected = rows_expected(segment, num_prompt, num_response)
        if vector is None or count != expected:
            remedy = "send it again" if info.pools_in_server else FALLBACK_REMEDY
            raise AlignmentError(
                f"{name}: {count} rows of states for the {segment!r} segment of {num_prompt} prompt and {num_response} "
                f"response tokens, expected {expected}; {remedy}"
            )
        if vector.shape != (info.hidden_size,):
            raise ProtocolError(f"{name}: a state of shape {tuple(vector.shape)}, expected ({info.hidden_size},)")
        hidden[segment] = Pooled(vector, count)
    return hidden


def _pool_stock(
    name: str, spec: HiddenSpec, entries: Any, num_prompt: int
) -> dict[Segment, tuple[torch.Tensor | None, int]]:
    """Pools stock ``hidden_states``: one entry per forward step, the first with the prompt rows that it computed.

    A later entry of several rows is a prefill repeated after a retraction; its last row produced the next token.
    """
    if not isinstance(entries, list) or not entries:
        raise ProtocolError(f"{name}: hidden states were asked for and are not in the answer; {FALLBACK_REMEDY}")
    pools = RequestPools(spec.segments, spec.pooling, num_prompt)
    try:
        rows = [torch.tensor(entry, dtype=torch.float32) for entry in entries]
    except (TypeError, ValueError) as error:
        raise ProtocolError(f"{name}: the hidden states cannot be read ({error})") from error
    steps = [row if row.ndim == 2 else row[None] for row in rows]
    first_ND = steps[0]
    start = num_prompt - first_ND.shape[0]
    span = pools.prompt_span(max(start, 0), num_prompt)
    if span is not None and start >= 0:
        rows_D = reduce_rows(first_ND, span[0] - start, span[1] - start, spec.pooling)
        pools.add_prompt(rows_D, *span)
    for index, step_ND in enumerate(steps):
        pools.add_produced(step_ND[-1], index)
    found = pools.results()
    if spec.reads_whole_prompt and start > 0:
        # Rows are missing before those that came. Their number is for the error that follows.
        missing = {"prompt": first_ND.shape[0], "full": first_ND.shape[0] + len(steps) - 1}
        found.update({segment: (None, count) for segment, count in missing.items() if segment in found})
    return found
