"""Runs work on the device beside SGLang's forward passes, and copies its results to the host without waiting.

Which tokens a step committed is known on the host one step later, when the next forward pass is already queued. What is
then done with the step's rows must not stand in that queue. On a CPU there is no queue: everything happens at once.

Knows nothing of requests or pooling, and imports nothing of SGLang.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

__all__ = ["Landing", "SideStream", "side_stream_of"]


@dataclass(frozen=True, slots=True)
class Landing:
    """A copy to the host that may still be under way."""

    _tensor: torch.Tensor
    _done: Any = None

    def wait(self) -> torch.Tensor:
        """Return the tensor on the host, once it is there."""
        if self._done is not None:
            self._done.synchronize()
        return self._tensor


class SideStream:
    """A stream of one device.

    Args:
        device: of the tensors that it works on.
    """

    def __init__(self, device: torch.device) -> None:
        self._module: Any = None if device.type == "cpu" else torch.get_device_module(device)
        self._stream: Any = None if self._module is None else self._module.Stream(device)

    def mark(self) -> Any:
        """Mark what the current stream has queued so far; None on a CPU."""
        if self._module is None:
            return None
        event = self._module.Event()
        event.record()
        return event

    @contextmanager
    def after(self, mark: Any, *tensors: torch.Tensor) -> Iterator[None]:
        """Queue what the block does on this stream, to run once all that was marked is done.

        Args:
            mark: what `mark` returned; None for nothing to wait for.
            tensors: made on another stream and read in the block: their memory is not used again before that.
        """
        if self._stream is None:
            yield
            return
        with self._module.stream(self._stream):
            if mark is not None:
                self._stream.wait_event(mark)
            for tensor in tensors:
                tensor.record_stream(self._stream)
            yield

    def land(self, tensor: torch.Tensor) -> Landing:
        """Copy a tensor to the host; call it inside `after`."""
        if self._module is None:
            return Landing(tensor)
        try:
            host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
        except RuntimeError:
            # The host has no more memory that can be pinned: a copy that waits is right too.
            return Landing(tensor.cpu())
        host.copy_(tensor, non_blocking=True)
        return Landing(host, self.mark())


@functools.cache
def side_stream_of(device: torch.device) -> SideStream:
    """Return the side stream of a device: one for all, as torch hands out the same few streams again and again."""
    return SideStream(device)
