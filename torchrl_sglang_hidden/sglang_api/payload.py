"""Writes `Request`s as SGLang's payload.

Knows nothing of TensorDicts, nor of how a payload travels.
"""

from __future__ import annotations

import uuid
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from torchrl_sglang_hidden.protocol import CHANNEL, Way, pack_options
from torchrl_sglang_hidden.records import DEFAULT_NEW_TOKENS, READING, EngineInfo, Request
from torchrl_sglang_hidden.reduce.head_scores import WantedScores
from torchrl_sglang_hidden.reduce.pooling import RequestPools
from torchrl_sglang_hidden.reduce.wanted import Wanted
from torchrl_sglang_hidden.reduce.wanted_logits import WantedLogits
from torchrl_sglang_hidden.spec.hidden import HiddenSpec, Segment, canonical_layer
from torchrl_sglang_hidden.spec.spans import PromptSpan, ResolvedSpan

__all__ = ["logits_of", "row_dtype_of", "scores_of", "sent_ids_of", "shares", "to_payload", "wanted_of"]


def wanted_of(request: Request, spec: HiddenSpec, info: EngineInfo) -> Wanted:
    """Return what to pool for a request: for the server half, or for the client when it pools stock states."""
    return Wanted(
        segments=spec.segments,
        pooling=spec.pooling,
        layers=tuple(canonical_layer(layer, info.num_layers) for layer in spec.layer_ids),
        # What is known to be empty is not sent.
        spans=_sent_spans(request.spans),
        tokens=spec.tokens,
        row_dtype=row_dtype_of(spec),
    )


def row_dtype_of(spec: HiddenSpec) -> torch.dtype:
    """Return in which dtype the states of tokens come: narrower rows are fewer bytes."""
    # Wider ones than float32 hold no more than it does.
    return spec.dtype if spec.dtype in (torch.bfloat16, torch.float16) else torch.float32


def to_payload(requests: Sequence[Request], info: EngineInfo, *, binary: bool) -> dict[str, Any]:
    """Write one batched payload for SGLang's ``/generate`` (``Engine.async_generate`` takes the same names).

    Args:
        requests: checked requests, at least one.
        info: decides between the server half and stock ``return_hidden_states``.
        binary: whether states come as raw bytes (in one process) instead of text (JSON).

    Returns:
        SGLang's parameters by name, each a list with one entry for each request.
    """
    sampling = [_sampling(request, info) for request in requests]
    payload: dict[str, Any] = {
        "input_ids": [list(sent_ids_of(request)) for request in requests],
        "sampling_params": sampling,
        "return_logprob": [request.return_log_probs or _scores_stock(request) for request in requests],
    }
    if any(_scores_stock(request) for request in requests):
        # SGLang gives no log-prob for the first token that it starts with, so start one earlier. -1 asks for none.
        payload["logprob_start_len"] = [
            max(request.score_from - 1, 0) if _scores_stock(request) else -1 for request in requests
        ]
    if any(request.images for request in requests):
        # Lists for all rows: SGLang takes an entry that is none for one image, where the first is no list.
        payload["image_data"] = [list(request.images.data) if request.images else [] for request in requests]
    if any(request.lora is not None for request in requests):
        payload["lora_path"] = [request.lora for request in requests]
    if any(request.processor is not None for request in requests):
        payload["custom_logit_processor"] = [request.processor for request in requests]
    masks = [request.records.sampling_mask for request in requests]
    if any(masks):
        payload["return_sampling_mask"] = masks
        payload["sampling_logprobs_mode"] = ["support" if mask else None for mask in masks]
    if any(request.records.routed_experts for request in requests):
        payload["return_routed_experts"] = True  # one for all of a batch, as SGLang has it
    if requests[0].priority is not None:
        payload["priority"] = requests[0].priority
    wanted = [None if request.hidden is None else wanted_of(request, request.hidden, info) for request in requests]
    if info.pools_in_server:
        for states, params, request in zip(wanted, sampling, requests, strict=True):
            logits, scores = logits_of(request), scores_of(request)
            # Of a prompt with images the server half always tells which ids it computed.
            if states is None and logits is None and request.images is None and scores is None:
                continue
            states = states or Wanted(segments=(), pooling=None)
            way = "binary" if binary else _way(shares(request), info)
            # A native SGLang logit processor reads the user's entries of the same dict.
            custom_params = params.get("custom_params") or {}
            params["custom_params"] = {**custom_params, CHANNEL: pack_options(states, way, logits, scores)}
    elif any(states is not None for states in wanted):
        payload["return_hidden_states"] = [states is not None for states in wanted]
        # Stock SGLang leaves out the rows of a prefix-cache hit. A salt that no other request has prevents the hit.
        payload["cache_salt"] = [
            uuid.uuid4().hex if states is not None and _reads_prompt(states, len(request.prompt_ids)) else ""
            for states, request in zip(wanted, requests, strict=True)
        ]
    return payload


def sent_ids_of(request: Request) -> tuple[int, ...]:
    """Return the ids that SGLang gets: with one placeholder for each image, which it expands."""
    return request.prompt_ids if request.images is None else request.images.sent_ids


def logits_of(request: Request) -> WantedLogits | None:
    """Return the logits and constraints that the request asks the server half for; None for neither."""
    spec, scored = request.logits, request.score_prompt and bool(request.constraints)
    if spec is None and not request.constraints and not request.records.entropy:
        return None
    limit = request.response_limit
    if not request.score_prompt:
        # SGLang lowers its own max_new_tokens where the context ends. A temperature schedule must use the asked number.
        limit = request.sampling.get("max_new_tokens", DEFAULT_NEW_TOKENS)
    prompt_from = 1 if spec is not None and spec.of_prompt else max(request.score_from, 1) if scored else None
    return WantedLogits(
        spec=spec,
        constraints=request.constraints,
        prompt_from=prompt_from,
        scored=scored,
        response_ranges=request.response_ranges,
        response_limit=limit,
        entropy=request.records.entropy,
    )


def shares(request: Request) -> bool:
    """Return whether the result may be many bytes, so that shared memory is used where the engine has it."""
    return request.logits is not None or (request.hidden is not None and request.hidden.tokens)


def _scores_stock(request: Request) -> bool:
    """Return whether SGLang computes the prompt's log-probs; under constraints the server half does."""
    return request.score_prompt and not request.constraints


def _way(many: bool, info: EngineInfo) -> Way:
    return "shared" if many and info.shares_memory else "text"


def _sampling(request: Request, info: EngineInfo) -> dict[str, Any]:
    # SGLang gives no states where nothing is generated. The one token of READING needs no further forward pass.
    sampling = dict(READING if request.reads_only else request.sampling)
    # SGLang lets a response grow past the longest prompt that it takes: prompt and response could then be neither
    # scored nor gone on from. A prompt of that length gets its one token all the same.
    room = max(info.max_prompt_tokens - len(request.prompt_ids), 1)
    if sampling.get("max_new_tokens", DEFAULT_NEW_TOKENS) > room:
        sampling["max_new_tokens"] = room
        if sampling.get("min_new_tokens", 0) > room:
            sampling["min_new_tokens"] = room
    return sampling


def _reads_prompt(wanted: Wanted, num_prompt: int) -> bool:
    """Return whether prompt rows before the last are wanted. SGLang computes the last row even on a full cache hit."""
    return wanted.pools_prefix or RequestPools(wanted, num_prompt).first_needed() < num_prompt - 1


def scores_of(request: Request) -> WantedScores | None:
    """Return the scores that a request asks the server half for; None for none."""
    spec = request.heads
    if spec is None:
        return None
    pooled = spec.pooled
    return WantedScores(
        spec.heads,
        spec.prompt_tokens,
        spec.sends_response,
        spec.rule,
        None
        if pooled is None
        else Wanted(tuple(map(Segment, pooled.segments)), pooled.pooling, spans=_sent_spans(request.head_spans)),
    )


def _sent_spans(spans: Mapping[str, ResolvedSpan]) -> dict[str, ResolvedSpan]:
    """Return the spans without those of a prompt that are empty, of which nothing can be sent."""
    return {name: one for name, one in spans.items() if not (isinstance(one, PromptSpan) and not one.count)}
