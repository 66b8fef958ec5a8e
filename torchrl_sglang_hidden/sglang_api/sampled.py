"""Reads what SGLang records of the sampling: what top-k, top-p and min-p left to draw from, and a mixture's experts.

Knows nothing of what else is in an answer.
"""

from __future__ import annotations

import base64
import binascii
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from torchrl_sglang_hidden.errors import AlignmentError, ProtocolError
from torchrl_sglang_hidden.protocol.excerpts import as_count
from torchrl_sglang_hidden.records import EngineInfo, Request, SamplingMask

__all__ = ["read_routed_experts", "read_sampled", "read_sampling_mask"]


def read_sampled(
    name: str, request: Request, meta: Mapping[str, Any], ids: Sequence[int], *, info: EngineInfo, complete: bool
) -> tuple[SamplingMask | None, torch.Tensor | None]:
    """Read the sampling mask and the routed experts that a request asks for.

    Args:
        name: names the request in errors.
        request: what was asked.
        meta: the answer's ``meta_info``.
        ids: the T sampled ids.
        info: the engine's sizes.
        complete: whether they must be there: an aborted response may lack them.
    """
    mask = experts = None
    if request.records.sampling_mask and (complete or "output_token_sampling_mask" in meta):
        mask = read_sampling_mask(name, meta, ids, max_width=info.max_sampling_mask, vocab_size=info.vocab_size)
    if request.records.routed_experts and (complete or "routed_experts" in meta):
        experts = read_routed_experts(name, meta, len(request.prompt_ids) + len(ids) - 1, info.num_layers)
    return mask, experts


def read_sampling_mask(
    name: str, meta: Mapping[str, Any], ids: Sequence[int], *, max_width: int, vocab_size: int
) -> SamplingMask:
    """Read the tokens that each sampled token was drawn from, and their log-probs.

    Args:
        name: names the request in errors.
        meta: the answer's ``meta_info``.
        ids: the T sampled ids.
        max_width: most tokens that one token is drawn from.
        vocab_size: V.

    Raises:
        AlignmentError: they are of another number of tokens or over ``max_width``, or a sampled token is not among
            those it was drawn from.
        ProtocolError: they are not there, or cannot be read.
    """
    masks, log_probs = meta.get("output_token_sampling_mask"), meta.get("output_token_sampling_logprobs")
    if masks is None or log_probs is None:
        raise ProtocolError(f"{name}: return_sampling_mask was asked for and is not in the answer; send it again")
    try:
        if not len(masks) == len(log_probs) == len(ids):
            raise AlignmentError(
                f"{name}: {len(masks)} sampling masks with {len(log_probs)} rows of log-probs for {len(ids)} response "
                "tokens; this is a fault of the engine, please report it"
            )
        width = max(map(len, masks), default=0)
        # Before there is memory for all rows: one long row would widen every other.
        if width > max_width:
            raise AlignmentError(
                f"{name}: a token was drawn from {width} tokens, over the server's limit of {max_width}; this is a "
                "fault of the engine, please report it"
            )
        token_ids_TS = torch.full((len(ids), width), -1)
        token_log_probs_TS = torch.full((len(ids), width), -torch.inf)
        for place, (mask, row) in enumerate(zip(masks, log_probs, strict=True)):
            mask_S = torch.tensor([as_count(token_id, "a token's id", vocab_size - 1) for token_id in mask])
            token_ids_TS[place, : len(mask)] = mask_S
            token_log_probs_TS[place, : len(mask)] = torch.tensor(row, dtype=torch.float32).reshape(len(mask))
        if token_log_probs_TS.isnan().any() or token_log_probs_TS.isposinf().any():
            raise ValueError("a log-prob is no number")
    except AlignmentError:
        raise
    except (TypeError, ValueError, RuntimeError, LookupError, OverflowError) as error:
        raise ProtocolError(
            f"{name}: the sampling masks cannot be read ({error}); is that an SGLang server of a version that this "
            "package supports?"
        ) from error
    drawn_TS = token_ids_TS == torch.tensor(ids)[:, None]
    if not bool((drawn_TS.sum(-1) == 1).all()):
        place = int((drawn_TS.sum(-1) != 1).nonzero()[0])
        raise AlignmentError(
            f"{name}: response token {place} (id {ids[place]}) is not once among the tokens that it was drawn from; "
            "this is a fault of the engine, please report it"
        )
    return SamplingMask(
        log_probs_T=token_log_probs_TS[drawn_TS], token_ids_TS=token_ids_TS, token_log_probs_TS=token_log_probs_TS
    )


def read_routed_experts(name: str, meta: Mapping[str, Any], num_rows: int, num_layers: int) -> torch.Tensor:
    """Read the experts that each position was routed to.

    Args:
        name: names the request in errors.
        meta: the answer's ``meta_info``.
        num_rows: positions that were computed, P+T-1.
        num_layers: L.

    Returns:
        int32 ``[num_rows, L, k]``, k experts for each token and layer.

    Raises:
        AlignmentError: they are of another number of positions.
        ProtocolError: they are not there, or cannot be read.
    """
    text = meta.get("routed_experts")
    if text is None:
        raise ProtocolError(f"{name}: return_routed_experts was asked for and is not in the answer; send it again")
    try:
        experts = torch.frombuffer(bytearray(base64.b64decode(text, validate=True)), dtype=torch.int32)
    except (TypeError, ValueError, binascii.Error) as error:
        raise ProtocolError(
            f"{name}: the routed experts cannot be read ({error}); is that an SGLang server of a version that this "
            "package supports?"
        ) from error
    if num_rows < 1 or experts.numel() == 0 or experts.numel() % (num_rows * num_layers):
        raise AlignmentError(
            f"{name}: {experts.numel()} routed experts are not those of {num_rows} positions in {num_layers} layers; "
            "this is a fault of the engine, please report it"
        )
    return experts.view(num_rows, num_layers, -1)
