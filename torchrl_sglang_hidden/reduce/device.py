"""Copies from the host to an accelerator, without waiting for the accelerator.

The server half shares SGLang's scheduler thread. A plain copy of a list, ``torch.tensor(values, device="cuda")``, waits
until the device has done all that is queued, which is the whole forward pass that was just launched. So every tensor of
the server half that begins on the host goes through `on_device`; `tests/test_device_copies.py` holds that.

Knows nothing of requests, batches or logits.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

__all__ = ["on_device"]


def on_device(
    values: Sequence[int] | Sequence[float] | Sequence[bool] | np.ndarray | torch.Tensor,
    device: torch.device,
    dtype: torch.dtype | None = None,
) -> torch.Tensor:
    """Copy values from the host to a device, in the order of the current stream and without waiting for it.

    The copy goes through pinned memory, which torch keeps until the device has read it.

    Args:
        values: a list of numbers, a numpy array, or a CPU tensor. The result never shares its memory.
        device: where the tensor is needed.
        dtype: the tensor's dtype; None for the dtype of the values: int64 for integers, bool for bools, and torch's
            default for floats. Give it where the list may be empty.

    Returns:
        The tensor, on ``device``.
    """
    pinned = device.type == "cuda"
    if isinstance(values, torch.Tensor):
        host = torch.empty(values.shape, dtype=dtype or values.dtype, pin_memory=pinned).copy_(values)
    else:
        host = torch.tensor(values, dtype=dtype, pin_memory=pinned)
    return host.to(device, non_blocking=True)
