"""What an engine says of itself, and `Request`s to SGLang's payload: checked before anything is sent.

Knows nothing of TensorDicts, nor of how a payload travels.
"""

from __future__ import annotations

import uuid
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch

from torchrl_sglang_hidden.errors import (
    CapabilityError,
    ProtocolError,
)
from torchrl_sglang_hidden.protocol import CHANNEL, Status, Way, pack_options
from torchrl_sglang_hidden.protocol.shared_memory import is_shared
from torchrl_sglang_hidden.records import DEFAULT_NEW_TOKENS, READING, EngineInfo, Request
from torchrl_sglang_hidden.reduce.pooling import RequestPools, Wanted
from torchrl_sglang_hidden.reduce.token_logits import WantedLogits
from torchrl_sglang_hidden.spec.hidden import HiddenSpec, canonical_layer

__all__ = ["ModelSizes", "logits_of", "read_info", "shares", "to_payload", "wanted_of", "warm_up"]


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
    return {"input_ids": [[0]] * len(states), "sampling_params": dict(READING)}


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
            constraints=tuple(sorted(set.intersection(*(set(status.constraints) for status in statuses))))
            if pools
            else (),
            takes_processors=bool(server_info.get("enable_custom_logit_processor")),
        )
    except KeyError as error:
        raise ProtocolError(
            f"the server's description lacks {error}; this client is written for SGLang 0.5.23"
        ) from error


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
        "return_logprob": [request.return_log_probs or _scores_stock(request) for request in requests],
    }
    if any(_scores_stock(request) for request in requests):
        # SGLang gives none for the first token of those it starts with; -1 is its "no prompt log-probs".
        payload["logprob_start_len"] = [
            max(request.score_from - 1, 0) if _scores_stock(request) else -1 for request in requests
        ]
    if any(request.lora is not None for request in requests):
        payload["lora_path"] = [request.lora for request in requests]
    if any(request.processor is not None for request in requests):
        payload["custom_logit_processor"] = [request.processor for request in requests]
    if requests[0].priority is not None:
        payload["priority"] = requests[0].priority
    wanted = [None if request.hidden is None else wanted_of(request, request.hidden, info) for request in requests]
    if info.pools_in_server:
        for one, params, request in zip(wanted, sampling, requests, strict=True):
            logits = logits_of(request)
            if one is None and logits is None:
                continue
            one = one or Wanted(segments=(), pooling=None)
            way = "binary" if binary else _way(shares(request), info)
            # Beside what a processor of SGLang's own reads there.
            params["custom_params"] = {**(params.get("custom_params") or {}), CHANNEL: pack_options(one, way, logits)}
    elif any(one is not None for one in wanted):
        payload["return_hidden_states"] = [one is not None for one in wanted]
        # Stock SGLang leaves out the rows of a prefix-cache hit. A salt of its own keeps a request from hitting.
        payload["cache_salt"] = [
            uuid.uuid4().hex if one is not None and _reads_prompt(one, len(request.prompt_ids)) else ""
            for one, request in zip(wanted, requests, strict=True)
        ]
    return payload


def logits_of(request: Request) -> WantedLogits | None:
    """What the request asks of the logits; None for nothing. Only the server half gives it."""
    spec, scored = request.logits, request.score_prompt and bool(request.constraints)
    if spec is None and not request.constraints:
        return None
    limit = request.response_limit
    if not request.score_prompt:
        # Not SGLang's own number, which it lowers where the context ends: a schedule goes by what was asked for.
        limit = request.sampling.get("max_new_tokens", DEFAULT_NEW_TOKENS)
    given = 1 if spec is not None and spec.of_prompt else max(request.score_from, 1) if scored else None
    return WantedLogits(spec, request.constraints, given, scored, request.responses, limit)


def shares(request: Request) -> bool:
    """Whether many bytes may come back, which go through shared memory where there is one."""
    return request.logits is not None or (request.hidden is not None and request.hidden.tokens)


def _scores_stock(request: Request) -> bool:
    """Whether SGLang's own log-probs of the prompt are wanted: under constraints they are the server half's."""
    return request.score_prompt and not request.constraints


def _way(many: bool, info: EngineInfo) -> Way:
    return "shared" if many and info.shares_memory else "text"


def _sampling(request: Request) -> dict[str, Any]:
    # SGLang has no states where nothing is generated, and the token comes with the prompt's one forward pass.
    return dict(READING if request.reads_only else request.sampling)


def _reads_prompt(wanted: Wanted, num_prompt: int) -> bool:
    """Whether rows before the prompt's last, which is always computed, are wanted."""
    return wanted.sums_prefix or RequestPools(wanted, num_prompt).first_needed() < num_prompt - 1
