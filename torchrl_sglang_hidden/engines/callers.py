"""The threads and tasks that call a `BatchingEngine` at the same time, and the batches that they share.

Knows how a caller sends and waits, not when a batch is formed: the queue is `BatchingEngine`'s.
"""

from __future__ import annotations

import asyncio
import threading
from abc import ABC, abstractmethod
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass

from torchrl_sglang_hidden.engines.base import Engine
from torchrl_sglang_hidden.errors import EngineError
from torchrl_sglang_hidden.records import Completion, Request

__all__ = ["Batch", "Caller", "TaskCaller", "ThreadCaller"]


class Caller(ABC):
    """A thread or task that waits for its requests to be answered.

    Every attribute and method except `send` and `wait` is used under the lock of the `BatchingEngine`.

    Args:
        requests: the caller's requests.
    """

    def __init__(self, requests: Sequence[Request]) -> None:
        self.requests = list(requests)
        self.deadline = 0.0
        self.batch: Batch | None = None
        self.completions: list[Completion] | None = None
        self.cancelled: str | None = None

    @abstractmethod
    async def send(self, engine: Engine, requests: Sequence[Request]) -> list[Completion]:
        """Send requests, its own or those of a batch, and return their completions."""

    @abstractmethod
    async def wait(self, timeout_s: float | None) -> None:
        """Wait until `wake` was called after the last `reset`, or until the time has passed."""

    @abstractmethod
    def wake(self) -> None:
        """End the present or the next `wait`. May be called from any thread."""

    @abstractmethod
    def reset(self) -> None:
        """Forget earlier calls of `wake`."""


class ThreadCaller(Caller):
    """A thread. `send` and `wait` block and never suspend, so that a thread can run the coroutines of the queue."""

    def __init__(self, requests: Sequence[Request]) -> None:
        super().__init__(requests)
        self._event = threading.Event()

    async def send(self, engine: Engine, requests: Sequence[Request]) -> list[Completion]:
        return engine.generate(requests)

    async def wait(self, timeout_s: float | None) -> None:
        self._event.wait(timeout_s)

    def wake(self) -> None:
        self._event.set()

    def reset(self) -> None:
        self._event.clear()


class TaskCaller(Caller):
    """A task of an event loop. Other threads may wake it."""

    def __init__(self, requests: Sequence[Request]) -> None:
        super().__init__(requests)
        self._loop = asyncio.get_running_loop()
        self._event = asyncio.Event()

    async def send(self, engine: Engine, requests: Sequence[Request]) -> list[Completion]:
        return await engine.agenerate(requests)

    async def wait(self, timeout_s: float | None) -> None:
        with suppress(TimeoutError):
            async with asyncio.timeout(timeout_s):
                await self._event.wait()

    def wake(self) -> None:
        with suppress(RuntimeError):  # the loop was closed while its task waited: nobody waits there any more
            self._loop.call_soon_threadsafe(self._event.set)

    def reset(self) -> None:
        self._event.clear()


@dataclass(eq=False, slots=True)
class Batch:
    """Callers whose requests are sent together.

    Args:
        callers: in the order in which they joined.
        leader: the caller that sends the batch; None until one of the callers wakes.
        done: whether the batch was sent, with or without success.
        error: the engine's error for every caller.
    """

    callers: list[Caller]
    leader: Caller | None = None
    done: bool = False
    error: EngineError | None = None

    def wake(self) -> None:
        """Wake every caller."""
        for caller in self.callers:
            caller.wake()
