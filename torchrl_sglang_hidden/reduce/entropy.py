"""The entropy of the distributions that a step's tokens are drawn from: a few operations for any number of rows.

Pure torch; knows nothing of batches or requests.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from torchrl_sglang_hidden.reduce.device import on_device

__all__ = ["entropy_rows"]


def entropy_rows(
    logits_BV: torch.Tensor, rows: Sequence[int], vocab_size: int, temperatures_B1: torch.Tensor | None = None
) -> torch.Tensor:
    """Return the entropy of some rows' softmax, in nats.

    Args:
        logits_BV: float ``[B, ≥V]``; ``-inf`` for a token that cannot be drawn.
        rows: the R rows in increasing order.
        vocab_size: V.
        temperatures_B1: the rows are divided by these; None for no division.

    Returns:
        float32 ``[R, 1]``.
    """
    rows_R = None if len(rows) == len(logits_BV) else on_device(rows, logits_BV.device)
    logits_RV = (logits_BV[:, :vocab_size] if rows_R is None else logits_BV[rows_R, :vocab_size]).float()
    if temperatures_B1 is not None:
        logits_RV = logits_RV / (temperatures_B1 if rows_R is None else temperatures_B1[rows_R])
    # entr(p) is -p · log p, and 0 where p is 0: a product of 0 and -inf would be NaN.
    entropy_R1: torch.Tensor = torch.special.entr(logits_RV.softmax(-1)).sum(-1, keepdim=True)
    return entropy_R1
