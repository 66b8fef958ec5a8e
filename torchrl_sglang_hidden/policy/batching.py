"""Whether concurrent callers of a policy share requests; the queue itself is the engines' `BatchingEngine`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from torchrl_sglang_hidden.engines import BatchingEngine, Engine, check_batching
from torchrl_sglang_hidden.errors import InputError, InputTypeError

__all__ = ["BatchingConfig"]


@dataclass(frozen=True, slots=True, kw_only=True)
class BatchingConfig:
    """Whether concurrent callers share requests, through a queue in front of the engine.

    SGLang batches what runs at the same time by itself; the queue is only for programs that want few and large
    requests.

    Args:
        batching: True turns the queue on, False keeps it off; None turns it on where one of the sizes is set.
        min_batch_size: rows to wait for before a request is sent; by default 1.
        max_batch_size: most rows of one request; None for no limit.
        batching_timeout: longest time in seconds that a caller waits for others.

    Raises:
        InputError: a size or time out of range, or ``batching=False`` beside a size.
        InputTypeError: a value of the wrong type.
    """

    batching: bool | None = None
    min_batch_size: int | None = None
    max_batch_size: int | None = None
    batching_timeout: float = 10.0

    def __post_init__(self) -> None:
        """Check the values."""
        if self.batching is not None and not isinstance(self.batching, bool):
            raise InputTypeError(f"batching={self.batching!r}: expected True, False or None")
        check_batching(self._minimum, self.max_batch_size, self.batching_timeout)
        if self.batching is False and self._has_sizes:
            raise InputError(
                f"batching=False with min_batch_size={self.min_batch_size} and max_batch_size={self.max_batch_size}: "
                "leave the sizes out, or batching"
            )

    @property
    def _minimum(self) -> int:
        return 1 if self.min_batch_size is None else self.min_batch_size

    @property
    def _has_sizes(self) -> bool:
        return (self.min_batch_size, self.max_batch_size) != (None, None)

    def make_queue(self, engine: Engine) -> BatchingEngine | None:
        """Return the queue in front of an engine, or None where callers do not share requests."""
        if not self.batching and not self._has_sizes:
            return None
        return BatchingEngine(
            engine,
            min_batch_size=self._minimum,
            max_batch_size=self.max_batch_size,
            timeout_s=self.batching_timeout,
        )

    def changed(self, changes: Mapping[str, Any]) -> BatchingConfig:
        """Return this configuration with some values changed: ``batching`` and the sizes follow each other."""
        sizes = {"min_batch_size", "max_batch_size"}
        follow: dict[str, Any] = {}
        if changes.get("batching") is False:
            follow = dict.fromkeys(sizes)
        elif sizes & changes.keys() and self.batching is False:
            follow = {"batching": None}
        return replace(self, **{**follow, **changes})
