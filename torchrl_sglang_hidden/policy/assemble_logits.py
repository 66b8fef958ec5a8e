"""The logits of one row's tokens, as `Logits`. Knows nothing of the other outputs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import cast

import torch
from tensordict import TensorDict

from torchrl_sglang_hidden.policy.outputs import Logits
from torchrl_sglang_hidden.records import Completion, TokenLogits
from torchrl_sglang_hidden.spec.hidden import Segment, reads_prompt, reads_response
from torchrl_sglang_hidden.spec.logits import LogitsSpec

__all__ = ["logits_of_row"]


def logits_of_row(
    completion: Completion,
    spec: LogitsSpec,
    num_columns: int,
    segments: Sequence[str],
    *,
    pad: Callable[[str, torch.Tensor], torch.Tensor],
) -> Logits:
    """Return the logits of one row's tokens; ``pad`` pads the rows of a field."""

    def read(found: TokenLogits | None, num_rows: int) -> TokenLogits:
        if found is not None or completion.error is None:
            return cast("TokenLogits", found)
        nan_NC = torch.full((num_rows, num_columns), torch.nan, dtype=spec.dtype)
        return TokenLogits(nan_NC, None if spec.top_k is None else torch.zeros(nan_NC.shape, dtype=torch.int64))

    parts: dict[str, TokenLogits] = {}
    if reads_prompt(segments):
        num_prompt = len(completion.prompt_ids)
        found = read(completion.prompt_logits, num_prompt - 1 if num_prompt else 0)
        parts["prompt"] = _with_first_token(found) if num_prompt else found
    if reads_response(segments):
        parts["response"] = read(completion.logits, len(completion.response_ids))
    if Segment.FULL in segments:
        parts["full"] = _joined(parts["prompt"], parts["response"])
    fields: dict[str, torch.Tensor] = {}
    for segment in segments:
        fields[str(segment)] = pad(segment, parts[segment].values_NC)
        ids_NC = parts[segment].token_ids_NC
        if ids_NC is not None:
            fields["token_ids" if segment == Segment.RESPONSE else f"{segment}_token_ids"] = pad(segment, ids_NC)
    return cast("Logits", Logits._from_tensordict(TensorDict(fields)))


def _with_first_token(logits: TokenLogits) -> TokenLogits:
    """Return the rows of the prompt's tokens, with a row of zeros for the first token, which no token precedes."""
    columns = torch.arange(logits.values_NC.shape[1])[None]
    zeros = TokenLogits(
        torch.zeros(columns.shape, dtype=logits.values_NC.dtype), None if logits.token_ids_NC is None else columns
    )
    return _joined(zeros, logits)


def _joined(first: TokenLogits, second: TokenLogits) -> TokenLogits:
    ids = [part.token_ids_NC for part in (first, second) if part.token_ids_NC is not None]
    return TokenLogits(torch.cat([first.values_NC, second.values_NC]), torch.cat(ids) if ids else None)
