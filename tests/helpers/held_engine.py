"""A `BatchingEngine` whose time is turned by hand, over an engine that can be held: nothing waits for a clock."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from typing import Any

import pytest

from helpers.engine_contract import assert_all_same, request
from helpers.fake_engine import RecordingEngine
from torchrl_sglang_hidden.engines import Engine
from torchrl_sglang_hidden.engines.batching import BatchingEngine
from torchrl_sglang_hidden.records import Completion, Request

# Nothing waits as long; what would wait for ever fails then.
LIMIT_S = 20.0
A, B, C, D = (request((6 + i, 7)) for i in range(4))


class Held(RecordingEngine):
    """An engine that signals each call, holds the call until the gate is open, and refuses it when told to.

    Attributes:
        entered: released by every call.
        gate: open at first.
        refuse: called with every call's requests; may raise.
        given: the arguments of every `update_weights`.
    """

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.entered = threading.Semaphore(0)
        self.gate = threading.Event()
        self.gate.set()
        self.refuse: Callable[[Sequence[Request]], None] = lambda requests: None
        self.given: list[Any] = []

    def generate(self, requests: Sequence[Request]) -> list[Completion]:
        answer = super().generate(requests)
        self.entered.release()
        assert self.gate.wait(LIMIT_S)
        self.refuse(requests)
        return answer

    async def agenerate(self, requests: Sequence[Request]) -> list[Completion]:
        return await asyncio.to_thread(self.generate, requests)

    def update_weights(self, weights: Any, **options: Any) -> str:
        self.given.append((weights, options))
        return "v8"

    @property
    def calls(self) -> list[list[tuple[int, ...]]]:
        return [[tuple(ids) for ids in payload["input_ids"]] for payload in self.payloads]


class Turned(BatchingEngine):
    """A `BatchingEngine` whose time is turned by hand, and which signals when a call has joined its queue."""

    def __init__(self, engine: Engine, **options: Any) -> None:
        self.time = 0.0
        self.joined = threading.Semaphore(0)
        super().__init__(engine, **{"timeout_s": 1000.0, **options})

    def _join(self, call: Any) -> None:
        super()._join(call)
        self.joined.release()

    def _now(self) -> float:
        return self.time

    def turn(self, seconds: float) -> None:
        with self._lock:
            self.time += seconds
            for call in self._queue:
                call.wake()


def in_thread(work: Callable[[], Any]) -> Future[Any]:
    """Run something in a daemon thread: if it waits for ever, pytest can still end."""
    future: Future[Any] = Future()

    def run() -> None:
        try:
            future.set_result(work())
        except BaseException as error:  # noqa: BLE001  whatever it is, the test looks at it
            future.set_exception(error)

    threading.Thread(target=run, daemon=True).start()
    return future


def take(semaphore: threading.Semaphore, count: int = 1) -> None:
    for _ in range(count):
        assert semaphore.acquire(timeout=LIMIT_S)


def call(engine: Turned, *requests: Request, way: str = "thread") -> Future[list[Completion]]:
    """Call the engine in a thread, and return when the call has joined the queue."""
    if way == "thread":
        future = in_thread(lambda: engine.generate(requests))
    else:
        future = in_thread(lambda: asyncio.run(engine.agenerate(requests)))
    take(engine.joined)
    return future


def ids_of(*requests: Request) -> list[tuple[int, ...]]:
    return [one.prompt_ids for one in requests]


def assert_answered(future: Future[list[Completion]], *requests: Request) -> None:
    """Check that the completions are the very ones that the requests get when they are sent alone."""
    assert_all_same(future.result(LIMIT_S), RecordingEngine().generate(requests))


WAYS = pytest.mark.parametrize("way", ["thread", "task"])
