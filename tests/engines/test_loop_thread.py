"""`LoopThread`: what an interrupted or cancelled call leaves of an event loop that runs while calls are under way."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator
from concurrent.futures import Future
from typing import Any

import pytest
from helpers.held_engine import LIMIT_S

from torchrl_sglang_hidden.engines import waits
from torchrl_sglang_hidden.engines.loop_thread import LoopThread


@pytest.fixture
def loop() -> Iterator[asyncio.AbstractEventLoop]:
    loop = asyncio.new_event_loop()
    yield loop
    loop.close()


class Call:
    """A call that never answers, and that needs the loop to end, as SGLang does to abort its requests."""

    def __init__(self) -> None:
        self.started, self.aborted = threading.Event(), False

    async def __call__(self) -> None:
        try:
            self.started.set()
            await asyncio.Event().wait()
        finally:
            await asyncio.sleep(0.05)
            self.aborted = True


def test_an_interrupted_call_ends_before_the_loop_stands_still(
    loop: asyncio.AbstractEventLoop, monkeypatch: pytest.MonkeyPatch
) -> None:
    call = Call()

    def interrupted_wait(futures: list[Future[Any]], timeout: float) -> None:
        assert timeout <= 1  # Ctrl-C just before a wait is heard after it
        assert call.started.wait(LIMIT_S)
        raise KeyboardInterrupt

    monkeypatch.setattr(waits, "wait", interrupted_wait)
    with pytest.raises(KeyboardInterrupt):
        LoopThread.of(loop).run(call)
    assert call.aborted
    assert not loop.is_running()


def test_a_call_that_is_interrupted_before_its_first_step_does_not_begin(
    loop: asyncio.AbstractEventLoop, monkeypatch: pytest.MonkeyPatch
) -> None:
    call, given_up = Call(), threading.Event()
    start, soon = asyncio.run_coroutine_threadsafe, loop.call_soon_threadsafe

    def interrupted_start(*args: Any) -> None:
        soon(given_up.wait, LIMIT_S)  # holds the loop until the call has been given up
        start(*args)
        monkeypatch.setattr(loop, "call_soon_threadsafe", soon_and_go)
        raise KeyboardInterrupt

    def soon_and_go(*args: Any) -> None:
        soon(*args)
        given_up.set()

    monkeypatch.setattr(asyncio, "run_coroutine_threadsafe", interrupted_start)
    with pytest.raises(KeyboardInterrupt):
        LoopThread.of(loop).run(call)
    assert not call.started.is_set()
    assert not asyncio.all_tasks(loop)


def test_a_cancelled_task_ends_its_call(loop: asyncio.AbstractEventLoop) -> None:
    call = Call()

    async def cancel() -> None:
        task = asyncio.ensure_future(LoopThread.of(loop).arun(call))
        assert await asyncio.to_thread(call.started.wait, LIMIT_S)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert call.aborted

    asyncio.run(cancel())
    assert not loop.is_running()


def test_an_error_of_the_call_is_the_callers(loop: asyncio.AbstractEventLoop) -> None:
    async def fail() -> None:
        raise LookupError("no table")

    with pytest.raises(LookupError, match="no table"):
        LoopThread.of(loop).run(fail)
