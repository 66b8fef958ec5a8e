"""The server half's own channel through SGLang: options in, pooled vectors and a status out. Used on both sides.

A request carries options in ``sampling_params["custom_params"]``; its answer comes back in
``meta_info["torchrl_sglang_hidden"]``; the server's status stands in SGLang's internal state under the same name.
Names, numbers and float32 bytes only: nothing received is ever unpickled.
"""

from __future__ import annotations

import base64
import binascii
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
import torch

from torchrl_sglang_hidden.errors import ProtocolError
from torchrl_sglang_hidden.pooling import RequestPools
from torchrl_sglang_hidden.specs import POOLINGS, SEGMENTS, HiddenSpec, Pooling, Segment

__all__ = [
    "CHANNEL",
    "FALLBACK_REMEDY",
    "PLUGIN_ENV",
    "PROTOCOL",
    "HiddenOptions",
    "pack_answer",
    "pack_options",
    "pack_status",
    "unpack_answer",
    "unpack_options",
]

CHANNEL = "torchrl_sglang_hidden"
PROTOCOL = 1
PLUGIN_ENV = "TORCHRL_SGLANG_HIDDEN"  # "1" in a server's environment opts in to the server half

FALLBACK_REMEDY = (
    "start the server with torchrl_sglang_hidden.launch or `torchrl-sglang-hidden serve`, whose server half pools "
    "without gaps"
)


@dataclass(frozen=True, slots=True)
class HiddenOptions:
    """What one request asks of the server half."""

    segments: tuple[Segment, ...]
    pooling: Pooling
    binary: bool


def pack_options(spec: HiddenSpec, *, binary: bool) -> dict[str, str | int | bool]:
    """Writes a request's options. SGLang carries scalars, flat lists and flat dicts here, hence the joined names.

    Args:
        spec: what to pool.
        binary: answer with raw bytes (in-process) instead of base64 text (JSON).
    """
    return {
        "protocol": PROTOCOL,
        "segments": ",".join(spec.segments),
        "pooling": spec.pooling,
        "binary": binary,
    }


def unpack_options(custom_params: object) -> HiddenOptions | None:
    """Reads a request's options inside the server; None when there are none or they are not ours to read.

    Never raises: an exception in the scheduler would end the server. What is not understood is not answered, and the
    client reports that.
    """
    options = custom_params.get(CHANNEL) if isinstance(custom_params, dict) else None
    if not isinstance(options, dict) or options.get("protocol") != PROTOCOL:
        return None
    segments, pooling = str(options.get("segments")).split(","), options.get("pooling")
    if not set(segments) <= set(SEGMENTS) or len(set(segments)) < len(segments) or pooling not in POOLINGS:
        return None
    return HiddenOptions(cast("tuple[Segment, ...]", tuple(segments)), pooling, options.get("binary") is True)


def pack_answer(pools: RequestPools, *, binary: bool) -> dict[str, Any]:
    """Writes a finished request's pools: counts, and the vectors of the segments that have rows, one after another."""
    results = pools.results()
    vectors = [vector for vector, _ in results.values() if vector is not None]
    data = torch.stack(vectors).numpy().astype("<f4").tobytes() if vectors else b""
    return {
        "protocol": PROTOCOL,
        "segments": list(results),
        "counts": [count for _, count in results.values()],
        "data": data if binary else base64.b64encode(data).decode("ascii"),
    }


def unpack_answer(answer: object, row: str) -> dict[Segment, tuple[torch.Tensor | None, int]]:
    """Reads what `pack_answer` wrote."""
    if not isinstance(answer, list) or len(answer) != 1 or not isinstance(answer[0], dict):
        raise ProtocolError(f"{row}: expected one {CHANNEL} answer in meta_info, got {answer!r:.80}; {FALLBACK_REMEDY}")
    fields = answer[0]
    if fields.get("protocol") != PROTOCOL:
        raise ProtocolError(
            f"{row}: the server half speaks protocol {fields.get('protocol')!r} and this client {PROTOCOL}; install "
            "the same version of torchrl_sglang_hidden on both sides"
        )
    try:
        segments, counts, data = fields["segments"], fields["counts"], fields["data"]
        payload = data if isinstance(data, bytes) else base64.b64decode(data, validate=True)
        filled = sum(1 for count in counts if count > 0)
        vectors_SD = np.frombuffer(payload, "<f4").reshape(filled, -1) if filled else np.empty((0, 0), "<f4")
        rows = dict(zip(segments, counts, strict=True))
    except (KeyError, TypeError, ValueError, binascii.Error) as error:
        raise ProtocolError(f"{row}: the pooled states cannot be read ({error}); was the answer cut short?") from error
    vectors = iter(torch.from_numpy(vectors_SD.astype(np.float32)))
    return {segment: (next(vectors) if count > 0 else None, count) for segment, count in rows.items()}


def pack_status(
    *, vocab_size: int, hidden_size: int, context_length: int, captures: bool, normed: bool, open_pools: int
) -> Any:
    """Writes what the server half says of itself in SGLang's internal state.

    Args:
        vocab_size: ids are in ``[0, vocab_size)``.
        hidden_size: D.
        context_length: most tokens of prompt and response together.
        captures: whether every hook is in place, and the server captures one state per position.
        normed: whether those states are the ones after the final norm.
        open_pools: requests with pools at this moment; 0 when nothing is running.
    """
    return {
        "protocol": PROTOCOL,
        "vocab_size": vocab_size,
        "hidden_size": hidden_size,
        "context_length": context_length,
        "captures": captures,
        "normed": normed,
        "open_pools": open_pools,
    }
