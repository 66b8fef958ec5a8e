"""Writes vectors as a client reads them: JSON with their counts and texts, or raw float32 with their shape beside it.

Knows nothing of requests or of HTTP, except for the names of headers.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any
from urllib.parse import quote

import torch

from torchrl_sglang_hidden.errors import EngineError
from torchrl_sglang_hidden.records import Completion

__all__ = ["as_bytes", "as_json"]


def as_json(completions: Sequence[Completion], segments: Sequence[str], model: str) -> bytes:
    """Return the vectors as JSON: numbers that are exactly the float32 ones.

    Args:
        completions: one for each row.
        segments: the names of the pooled segments, in order.
        model: the served model's name.

    Raises:
        EngineError: a vector with a value that is not finite, which JSON has no number for.
    """
    for row, completion in enumerate(completions):
        for segment in segments:
            if not completion.hidden[segment].vector.isfinite().all():
                raise EngineError(
                    f"row {row}: the states of the {segment} have values that are not finite, for which JSON has no "
                    'numbers; ask for encoding_format="bytes"'
                )
    num_prompt = sum(len(completion.prompt_ids) for completion in completions)
    num_response = sum(len(completion.response_ids) for completion in completions)
    answer = {
        "object": "list",
        "data": [_row(index, completion, segments) for index, completion in enumerate(completions)],
        "model": model,
        "usage": {
            "prompt_tokens": num_prompt,
            "completion_tokens": num_response,
            "total_tokens": num_prompt + num_response,
        },
    }
    return json.dumps(answer, separators=(",", ":")).encode()


def _row(index: int, completion: Completion, segments: Sequence[str]) -> dict[str, Any]:
    generated = bool(completion.response_ids)
    return {
        "object": "hidden_states",
        "index": index,
        "hidden_states": {segment: completion.hidden[segment].vector.tolist() for segment in segments},
        "counts": {segment: completion.hidden[segment].count for segment in segments},
        "prompt_tokens": len(completion.prompt_ids),
        "completion_tokens": len(completion.response_ids),
        "text": completion.text if generated else None,
        "token_ids": list(completion.response_ids),
        "finish_reason": completion.finish_reason if generated else None,
        "weight_version": completion.weight_version,
        "mixed_weights": completion.mixed_weights,
    }


def as_bytes(completions: Sequence[Completion], segments: Sequence[str], model: str) -> tuple[bytes, dict[str, str]]:
    """Return the vectors as little-endian float32, ``[rows, segments, D]``, and the headers that describe them.

    With K layers, as a list, the shape is ``[rows, segments, K, D]``. Arguments are those of `as_json`.
    """
    vectors = torch.stack(
        [torch.stack([completion.hidden[segment].vector for segment in segments]) for completion in completions]
    )
    versions = dict.fromkeys(completion.weight_version for completion in completions)
    headers = {
        "Hidden-States-Shape": ",".join(map(str, vectors.shape)),
        "Hidden-States-Segments": ",".join(segments),
        # A header carries neither line breaks nor every letter.
        "Hidden-States-Model": quote(model, safe="/:"),
        "Hidden-States-Weight-Version": ",".join(quote(version, safe="/:") for version in versions),
    }
    return vectors.numpy().astype("<f4").tobytes(), headers
