"""What an engine says of itself, and `Request`s to SGLang's payload: checked before anything is sent.

Knows nothing of TensorDicts, nor of how a payload travels.
"""

from __future__ import annotations

import uuid
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch

from torchrl_sglang_hidden.channel import CHANNEL, FALLBACK_REMEDY, Status, Way, pack_options
from torchrl_sglang_hidden.errors import (
    CapabilityError,
    InputError,
    InputTypeError,
    PromptLengthError,
    ProtocolError,
    SpanError,
    TokenIdError,
)
from torchrl_sglang_hidden.pooling import RequestPools, Wanted
from torchrl_sglang_hidden.shared import MAX_BYTES, is_shared
from torchrl_sglang_hidden.spans import Between, LastTokens, PromptSpan
from torchrl_sglang_hidden.specs import (
    EngineInfo,
    HiddenSpec,
    Request,
    canonical_layer,
)

# SGLang's own default for max_new_tokens.
DEFAULT_NEW_TOKENS = 128
# Of one request's token states: as text they are copied by three processes and parsed as JSON, in a file by nobody.
MAX_TEXT_BYTES = 256 * 2**20
MAX_SHARED_BYTES = MAX_BYTES // 2

__all__ = ["ModelSizes", "check_requests", "read_info", "to_payload", "wanted_of", "warm_up"]


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
    canonical = [canonical_layer(layer, info.num_layers) for layer in spec.layer_ids]
    wanted = set(canonical)
    if len(wanted) < len(canonical):
        raise InputError(
            f"row {row}: layers={spec.layers}: two of them are the same layer of {info.num_layers}; ask for each once"
        )
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
        _check_span(f"row {row}, span {name!r}:", span, request, info)
    if spec.tokens:
        _check_token_bytes(row, request, spec, info)


def _check_span(name: str, span: object, request: Request, info: EngineInfo) -> None:
    if isinstance(span, PromptSpan):
        if span.end > len(request.prompt_ids):
            raise SpanError(f"{name} ends at {span.end} in a prompt of {len(request.prompt_ids)} tokens")
        return
    if not isinstance(span, (LastTokens, Between)) or span.segment != "response":
        raise InputTypeError(
            f"{name} {span!r} is not resolved; what is of the prompt goes to an engine as a PromptSpan of positions, "
            "which SGLangHiddenWrapper makes of it"
        )
    most = request.sampling.get("max_new_tokens")
    if isinstance(span, LastTokens) and not span.allow_fewer and most is not None and span.count > most:
        raise SpanError(
            f"{name} LastTokens({span.count}) of a response of at most max_new_tokens={most}; raise that, or pass "
            "allow_fewer=True"
        )
    if isinstance(span, Between) and not info.pools_in_server:
        raise CapabilityError(f"{name} markers are found by the server half; {FALLBACK_REMEDY}")


def _check_token_bytes(row: int, request: Request, spec: HiddenSpec, info: EngineInfo) -> None:
    """Refuses token states that would stand in the way of everybody: they pass through all of SGLang's processes."""
    num_new = request.sampling.get("max_new_tokens", DEFAULT_NEW_TOKENS)
    rows = num_new if spec.segments == ("response",) else len(request.prompt_ids) + num_new
    size = rows * len(spec.layer_ids) * info.hidden_size * wanted_of(request, spec, info).row_dtype.itemsize
    limit = MAX_SHARED_BYTES if info.shares_memory else MAX_TEXT_BYTES
    if size > limit:
        raise InputError(
            f"row {row}: tokens=True for up to {rows} positions and {len(spec.layer_ids)} layers is {size / 2**20:.0f} "
            f"MiB, over the limit of {limit / 2**20:.0f} MiB; ask for fewer tokens or layers, dtype=torch.bfloat16, or "
            "segments=('response',)" + ("" if info.shares_memory else ", or run on the server's machine")
        )


def wanted_of(request: Request, spec: HiddenSpec, info: EngineInfo) -> Wanted:
    """What the request asks of the server half, or of whoever pools stock states."""
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
    wanted = [None if request.hidden is None else wanted_of(request, request.hidden, info) for request in requests]
    if info.pools_in_server:
        for one, params in zip(wanted, sampling, strict=True):
            if one is not None:
                params["custom_params"] = {CHANNEL: pack_options(one, "binary" if binary else _way(one.tokens, info))}
    elif any(one is not None for one in wanted):
        payload["return_hidden_states"] = [one is not None for one in wanted]
        # Stock SGLang leaves out the rows of a prefix-cache hit. A salt of its own keeps a request from hitting.
        payload["cache_salt"] = [
            uuid.uuid4().hex if one is not None and _reads_prompt(one, len(request.prompt_ids)) else ""
            for one, request in zip(wanted, requests, strict=True)
        ]
    return payload


def _way(tokens: bool, info: EngineInfo) -> Way:
    return "shared" if tokens and info.shares_memory else "text"


def _sampling(request: Request) -> dict[str, Any]:
    # SGLang has no states where nothing is generated, and the token comes with the prompt's one forward pass.
    return {"max_new_tokens": 1, "temperature": 0.0} if request.reads_only else dict(request.sampling)


def _reads_prompt(wanted: Wanted, num_prompt: int) -> bool:
    """Whether rows before the prompt's last, which is always computed, are wanted."""
    return wanted.sums_prefix or RequestPools(wanted, num_prompt).first_needed() < num_prompt - 1
