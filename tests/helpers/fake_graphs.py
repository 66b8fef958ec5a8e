"""CUDA graphs without CUDA: what torch computes is recorded once, and a replay computes it again without any Python."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class _Recorder(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.operations: list[tuple[Any, tuple[Any, ...], dict[str, Any], Any]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        output = func(*args, **(kwargs or {}))
        self.operations.append((func, args, kwargs or {}, output))
        return output


class FakeGraph:
    """Records a function as `torch.cuda.graph` does: its tensors keep their places, and a replay fills them again."""

    def __init__(self) -> None:
        self._recorder = _Recorder()

    @contextmanager
    def recording(self) -> Iterator[None]:
        """Record what runs inside the block, which sees that a stream is capturing."""
        with pytest.MonkeyPatch.context() as patch, self._recorder:
            patch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
            yield

    def capture(self, function: Callable[[], Any]) -> Any:
        """Record the function, and return what it returns."""
        with self.recording():
            return function()

    def replay(self) -> None:
        """Compute what was recorded again, from what the tensors hold now."""
        for func, args, kwargs, output in self._recorder.operations:
            again = func(*args, **kwargs)
            for old, new in zip(tree_leaves(output), tree_leaves(again), strict=True):
                if isinstance(old, torch.Tensor) and old.data_ptr() != new.data_ptr():
                    old.copy_(new)
