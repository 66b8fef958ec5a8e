"""Keep the token ids of one request on the device.

Pure torch; knows nothing of batches, or of what reads the ids.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from torchrl_sglang_hidden.reduce.device import on_device

__all__ = ["IdsOnDevice"]


class IdsOnDevice:
    """The ids of one request on the device, for constraints of the user's own: copied there once, then appended to."""

    def __init__(self) -> None:
        # Made when they are first read: most requests have no constraint of the user's own.
        self._response_T: torch.Tensor | None = None
        self._known = 0
        self._sequence_P: torch.Tensor | None = None

    def of_response(self, index: int, on_host: Sequence[int], last_1: torch.Tensor | None) -> torch.Tensor:
        """Return the response's ids before token ``index``, int64 ``[index]``.

        Args:
            index: the token.
            on_host: the ids that the host has: all, all but the last one, or more.
            last_1: the id before the token, on the device; None where it is on the host alone.
        """
        device = torch.device("cpu") if last_1 is None else last_1.device
        next_is_last = last_1 is not None and self._known == index - 1
        if self._response_T is None or not next_is_last or index > len(self._response_T):
            # The first token, or one after SGLang computed the request again: what the device has may be other ids.
            known = min(len(on_host), index)
            self._response_T = torch.empty(max(64, 2 * index), dtype=torch.int64, device=device)
            self._response_T[:known] = on_device(list(on_host[:known]), device, torch.int64)
            self._known = known
        if last_1 is not None and self._known == index - 1:
            self._response_T[index - 1 : index] = last_1
            self._known = index
        return self._response_T[: self._known]

    def of_sequence(self, ids: Sequence[int], start: int, stop: int, device: torch.device) -> torch.Tensor:
        """Return the ids ``start … stop-1`` of a scored sequence, whose ids are copied to the device once."""
        if self._sequence_P is None:
            self._sequence_P = on_device(list(ids), device, torch.int64)
        return self._sequence_P[start:stop]
