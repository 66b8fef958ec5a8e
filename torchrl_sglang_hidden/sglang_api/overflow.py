"""Finds rows whose numbers are none. Knows nothing of answers: only of tensors."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from torchrl_sglang_hidden.errors import EngineError

__all__ = ["overflow_of"]


def overflow_of(name: str, **tensors: Sequence[torch.Tensor]) -> EngineError | None:
    """Return the error of a row whose numbers are none: the model's overflowed, for this row and perhaps no other.

    Scores may also be those of a head that overflowed by itself: its numbers are finite, and their sum is not.

    Args:
        name: names the row in the error.
        tensors: what came of each kind, ``states``, ``logits`` and ``scores``.
    """
    for what, values in tensors.items():
        if any(one.isnan().any() for one in values):
            return EngineError(
                f"{name}: the {what} have NaN; the model's numbers overflowed there, as they do in float16: serve the "
                "model with dtype='bfloat16' or 'float32', and look at its weights"
                + (", and at those of the head" if what == "scores" else "")
            )
    return None
