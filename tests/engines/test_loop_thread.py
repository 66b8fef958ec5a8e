"""`LoopThread`: what an interrupted or cancelled call leaves of an event loop that runs while calls are under way."""

from __future__ import annotations

import asyncio
import os
import signal
import threading
from collections.abc import Iterator

import pytest
from helpers.held_engine import LIMIT_S

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


@pytest.mark.usefixtures("ctrl_c_interrupts")
def test_an_interrupted_call_ends_before_the_loop_stands_still(loop: asyncio.AbstractEventLoop) -> None:
    call = Call()

    def interrupt() -> None:
        assert call.started.wait(LIMIT_S)
        os.kill(os.getpid(), signal.SIGINT)

    threading.Thread(target=interrupt, daemon=True).start()
    with pytest.raises(KeyboardInterrupt):
        LoopThread.of(loop).run(call)
    assert call.aborted
    assert not loop.is_running()


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
