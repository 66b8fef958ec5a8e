"""What a call returns, and under which keys: the wrapper's, an option's, and which of it scoring can return.

Knows nothing of requests.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch

from torchrl_sglang_hidden.errors import InputError, InputTypeError
from torchrl_sglang_hidden.policy.outputs import KeyConfig, OutputKeys
from torchrl_sglang_hidden.records import SamplingRecords
from torchrl_sglang_hidden.spec.head_scores import HeadSpec
from torchrl_sglang_hidden.spec.hidden import HiddenSpec, Segment
from torchrl_sglang_hidden.spec.logits import LogitsSpec
from torchrl_sglang_hidden.spec.spans import Role, Span, Turn, is_of_response

__all__ = [
    "check_head_spec",
    "resolve_hidden",
    "resolve_records",
    "returned_keys",
    "scored_heads",
    "scored_hidden",
    "scored_logits",
]


def resolve_hidden(hidden: Any, return_hidden_states: bool | None, input_mode: str) -> HiddenSpec | None:
    """Return the states that are wanted: ``hidden``, or what the option ``return_hidden_states`` says instead.

    Raises:
        InputTypeError: ``hidden`` is no `HiddenSpec`, bool or None.
        InputError: a span of messages outside history mode.
    """
    if hidden is not None and not isinstance(hidden, (bool, HiddenSpec)):
        raise InputTypeError(f"hidden={hidden!r}: expected a HiddenSpec, True, False or None")
    wanted = bool(hidden) if return_hidden_states is None else return_hidden_states
    if not wanted:
        return None
    spec = hidden if isinstance(hidden, HiddenSpec) else HiddenSpec()
    _check_chat_spans(spec.spans, input_mode)
    return spec


def check_head_spec(heads: Any, input_mode: str) -> None:
    """Check which scores of heads are wanted.

    Raises:
        InputTypeError: ``heads`` is no `HeadSpec` or None.
        InputError: a span of messages outside history mode.
    """
    if heads is None:
        return
    if not isinstance(heads, HeadSpec):
        raise InputTypeError(f"heads={heads!r:.80}: expected a HeadSpec, such as HeadSpec(('confident',)), or None")
    _check_chat_spans(heads.spans, input_mode)


def _check_chat_spans(spans: Mapping[str, Span], input_mode: str) -> None:
    of_chats = [name for name, span in spans.items() if isinstance(span, (Turn, Role))]
    if of_chats and input_mode != "history":
        raise InputError(
            f"the span {of_chats[0]!r}, {spans[of_chats[0]]}, with input_mode={input_mode!r}: only history mode "
            "has messages; use TokenMask or Between"
        )


def resolve_records(options: Mapping[str, Any]) -> SamplingRecords:
    """Return what standardised options ask to be recorded of the sampling; nothing is sampled with no new tokens."""
    samples = options.get("max_new_tokens") != 0
    return SamplingRecords(
        entropy=samples and options.get("return_entropy", False),
        sampling_mask=samples and options.get("return_sampling_mask", False),
        routed_experts=options.get("return_routed_experts", False),
    )


def returned_keys(
    keys: KeyConfig,
    hidden: HiddenSpec | None,
    logits: LogitsSpec | None,
    records: SamplingRecords,
    heads: HeadSpec | None,
    *,
    generate: bool,
    errors: bool,
) -> OutputKeys:
    """Return where the outputs go of a call that returns all that has a key, and these states, logits, records, scores.

    With ``errors`` also those of rows, and the versions that sampled each.
    """
    return OutputKeys(
        text=keys.text_key,
        tokens=keys.tokens_key,
        masks=keys.masks_key,
        log_probs=keys.log_probs_key,
        history=keys.history_key,
        hidden_states=keys.hidden_states_key if hidden is not None and hidden.pooling is not None else None,
        token_hidden_states=keys.token_hidden_states_key if hidden is not None and hidden.tokens else None,
        weight_version="weight_version",
        finish_reason="finish_reason" if generate else None,
        mixed_weights="mixed_weights" if generate else None,
        logits=keys.logits_key if logits is not None else None,
        head_scores=keys.head_scores_key if heads is not None else None,
        sampling=keys.sampling_key if records.entropy or records.sampling_mask else None,
        routed_experts=keys.routed_experts_key if records.routed_experts else None,
        error="error" if errors else None,
        weight_versions="weight_versions" if errors and generate else None,
    )


def scored_hidden(hidden: HiddenSpec | None) -> HiddenSpec | None:
    """Return the states to ask for of a scored sequence: of all its tokens, and of the spans that need no response."""
    if hidden is None:
        return None
    spans = {name: span for name, span in hidden.spans.items() if not is_of_response(span)}
    return replace(hidden, segments=(Segment.PROMPT,), spans=spans)


def scored_heads(heads: HeadSpec | None) -> HeadSpec | None:
    """Return the scores to ask for of a scored sequence: of all its tokens, and of the spans that need no response."""
    if heads is None:
        return None
    spans = {name: span for name, span in heads.spans.items() if not is_of_response(span)}
    return replace(heads, segments=(Segment.PROMPT,), stop_when=None, spans=spans)


def scored_logits(logits: LogitsSpec | None, *, logits_only: bool = False) -> LogitsSpec | None:
    """Return the logits to ask for of a scored sequence: of all its tokens.

    With ``logits_only`` they are all columns, or the wrapper's ``token_ids``, after processing, so that their
    log-softmax has the log-probs.
    """
    if not logits_only:
        return None if logits is None else replace(logits, segments=(Segment.PROMPT,))
    own = LogitsSpec(full=True) if logits is None or logits.token_ids is None else logits
    dtype = torch.float32 if logits is None else logits.dtype
    return replace(own, stage="processed", segments=(Segment.PROMPT,), dtype=dtype)
