"""Apply the constraints of many requests to their logits: a few operations for any number of rows.

Knows nothing of batches. The constraints that users write are called row by row, since they may do anything; masks and
temperatures act on all rows together.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from torchrl_sglang_hidden.reduce.device import on_device
from torchrl_sglang_hidden.reduce.masks_on_device import denied_rows
from torchrl_sglang_hidden.reduce.token_logits import NextToken

__all__ = ["constrain"]


def constrain(logits_NV: torch.Tensor, tokens: Sequence[NextToken]) -> tuple[torch.Tensor, torch.Tensor]:
    """Apply each request's constraints to the logits of N tokens.

    Args:
        logits_NV: float ``[N, V]``, not written to.
        tokens: the token of each row.

    Returns:
        The constrained logits ``[N, V]``, and bool ``[N]``: whether any token is left to choose. A row where none is
        left stays as it was, because sampling from all ``-inf`` would end the scheduler.
    """
    device, vocab_size = logits_NV.device, logits_NV.shape[1]
    changed_NV = _apply_own(logits_NV, tokens)
    temperatures = [token.request.temperature(token) for token in tokens]
    if any(temperature != 1 for temperature in temperatures):
        changed_NV = changed_NV / on_device(temperatures, device, logits_NV.dtype)[:, None]
    keys = [token.request.mask_key(token) for token in tokens]
    allowed_of = [token.request.mask_of(token, key, vocab_size) for token, key in zip(tokens, keys, strict=True)]
    denied_NV = denied_rows(keys, allowed_of, vocab_size, device)
    if denied_NV is not None:
        if changed_NV is logits_NV:
            changed_NV = logits_NV.masked_fill(denied_NV, -math.inf)
        else:
            changed_NV.masked_fill_(denied_NV, -math.inf)
    choosable_N = changed_NV.amax(-1).isfinite()
    return torch.where(choosable_N[:, None], changed_NV, logits_NV), choosable_N


def _apply_own(logits_NV: torch.Tensor, tokens: Sequence[NextToken]) -> torch.Tensor:
    places, rows = [], []
    for n, token in enumerate(tokens):
        if token.request.reads_response:
            row_V = logits_NV[n]
            changed_V = token.request.apply_own(row_V, token)
            if changed_V is not row_V:
                places.append(n)
                rows.append(changed_V)
    if not rows:
        return logits_NV
    return logits_NV.index_copy(0, on_device(places, logits_NV.device), torch.stack(rows))
