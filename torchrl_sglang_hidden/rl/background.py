"""`Background`: one call at a time in a thread of its own.

Knows nothing of what is called.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor, wait
from typing import Any, Generic, TypeVar

__all__ = ["Background"]

T = TypeVar("T")


class Background(Generic[T]):
    """Runs one call in a thread, which starts with the first call. Pickles and copies have none."""

    def __init__(self) -> None:
        self._thread: ThreadPoolExecutor | None = None
        self._future: Future[T] | None = None

    def __reduce__(self) -> tuple[Any, ...]:
        return Background, ()

    def start(self, call: Callable[[], T]) -> None:
        """Start a call; one that nobody took has ended before."""
        self.settle()
        if self._thread is None:
            self._thread = ThreadPoolExecutor(1, "hidden-states")
        self._future = self._thread.submit(call)

    def take(self) -> T | None:
        """Wait for the call and return what it returned, or raise what it raised; None where none was started."""
        future, self._future = self._future, None
        return None if future is None else future.result()

    def settle(self) -> None:
        """Wait for a call that nobody took, because what ran beside it raised."""
        if self._future is not None:
            wait([self._future])
            self._future = None

    def close(self) -> None:
        """End the thread; the next call starts another."""
        if self._thread is not None:
            self._thread.shutdown()
            self._thread = None
