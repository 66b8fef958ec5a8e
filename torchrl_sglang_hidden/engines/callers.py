"""Those who call a `BatchingEngine` at the same time: how each sends and waits, and what is sent for several."""

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

__all__ = ["Batch", "Call", "TaskCall", "ThreadCall"]


class Call(ABC):
    """One caller with its requests, and how it sends and waits. All but `send` and `wait` are used under the lock."""

    def __init__(self, requests: Sequence[Request]) -> None:
        self.requests = list(requests)
        self.deadline = 0.0
        self.batch: Batch | None = None
        self.completions: list[Completion] | None = None
        self.cancelled: str | None = None

    @abstractmethod
    async def send(self, engine: Engine, requests: Sequence[Request]) -> list[Completion]: ...

    @abstractmethod
    async def wait(self, timeout_s: float | None) -> None:
        """Waits for a `wake` since the last `rest`, or for the time to pass."""

    @abstractmethod
    def wake(self) -> None: ...

    @abstractmethod
    def rest(self) -> None: ...


class ThreadCall(Call):
    """A thread. It blocks in `send` and `wait`, which so never suspend: `_run_blocking` runs them to their end."""

    def __init__(self, requests: Sequence[Request]) -> None:
        super().__init__(requests)
        self._event = threading.Event()

    async def send(self, engine: Engine, requests: Sequence[Request]) -> list[Completion]:
        return engine.generate(requests)

    async def wait(self, timeout_s: float | None) -> None:
        self._event.wait(timeout_s)

    def wake(self) -> None:
        self._event.set()

    def rest(self) -> None:
        self._event.clear()


class TaskCall(Call):
    """A task of an event loop, which is woken from other threads."""

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
        with suppress(RuntimeError):  # the loop was closed over its waiting task: nobody waits there any more
            self._loop.call_soon_threadsafe(self._event.set)

    def rest(self) -> None:
        self._event.clear()


@dataclass(eq=False, slots=True)
class Batch:
    """Calls that are sent together by one of them, the leader; nobody yet when it is None."""

    calls: list[Call]
    leader: Call | None = None
    done: bool = False
    error: EngineError | None = None

    def wake(self) -> None:
        for call in self.calls:
            call.wake()
