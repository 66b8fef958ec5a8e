"""Sends the rows of one call, and returns a completion of each: also of rows that cannot be sent, where that is wanted.

Of the output it knows what is the same for all rows of a call.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from torchrl_sglang_hidden.engines import Engine, generate_rows, generate_samples, refused_rows
from torchrl_sglang_hidden.policy.assemble_heads import HeadRows
from torchrl_sglang_hidden.policy.config import PolicyConfig
from torchrl_sglang_hidden.policy.image_rows import ImageRows
from torchrl_sglang_hidden.policy.outcomes import OutcomeConfig
from torchrl_sglang_hidden.policy.outputs import OutputKeys
from torchrl_sglang_hidden.policy.requests import CallOptions
from torchrl_sglang_hidden.policy.rows import Row
from torchrl_sglang_hidden.records import Completion, EngineInfo, Request

__all__ = ["layout_of", "send"]


def send(
    rows: Sequence[Row],
    requests: Sequence[Request],
    *,
    engine: Engine,
    ahead: Engine,
    num_samples: int | None,
    outcomes: OutcomeConfig,
) -> list[Completion]:
    """Generate the requests of one call.

    Args:
        rows: the prompt rows; of those with an ``error`` nothing is sent.
        requests: one for each row.
        engine: generates.
        ahead: computes the prompts of several samples. Not a queue, which would wait for a batch to fill a second time.
        num_samples: responses per prompt; None for one.
        outcomes: whether errors of rows are raised, and how many samples more are asked for.

    Returns:
        One completion for each row, or ``num_samples``, in order.

    Raises:
        InputError, EngineError, SpanError, ConstraintError, AlignmentError: see `SGLangHiddenWrapper.forward`.
    """

    def generate(sent: list[Request]) -> list[Completion]:
        if num_samples is None:
            return engine.generate(sent)
        return generate_samples(engine, sent, num_samples, ahead=ahead, extra=outcomes.extra_samples)

    if not outcomes.keeps_errors:
        return generate(list(requests))
    unread = [row.error for row in rows]
    readable = [None if error is not None else request for error, request in zip(unread, requests, strict=True)]
    refused = [one or other for one, other in zip(unread, refused_rows(readable, ahead.info), strict=True)]
    version = ahead.info.weight_version
    return generate_rows(requests, refused, version, generate, num_samples=num_samples or 1)


def layout_of(
    config: PolicyConfig,
    call: CallOptions,
    keys: OutputKeys,
    info: EngineInfo,
    *,
    batch_size: torch.Size,
    device: torch.device | None,
) -> dict[str, Any]:
    """Return what `assemble` needs beside rows and completions.

    Args:
        config: the policy's.
        call: the options of the call.
        keys: where the outputs go.
        info: the engine's.
        batch_size: the output's.
        device: the input's.
    """
    return {
        "batch_size": batch_size,
        "keys": keys,
        "hidden": call.hidden,
        "hidden_size": info.hidden_size,
        "logits": call.logits,
        "num_columns": 0 if call.logits is None else call.logits.num_columns(info.vocab_size),
        "pad_id": config.padding_value if config.pad_output else None,
        "heads": HeadRows(call.heads, keys.head_scores),
        "images": ImageRows(config.processor, keys.images, keys.pixel_values),
        "device": config.device or device,
    }
