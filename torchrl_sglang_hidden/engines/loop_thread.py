"""The thread that runs an in-process engine's event loop while calls are under way.

Knows nothing of engines or requests.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Coroutine, Iterator
from contextlib import contextmanager, suppress
from typing import Any, ClassVar, Generic, TypeVar
from weakref import WeakValueDictionary

from torchrl_sglang_hidden.engines.waits import result_of
from torchrl_sglang_hidden.errors import EngineError

__all__ = ["LoopThread"]

T = TypeVar("T")

# Longest wait for a call that was given up to end.
ABORT_TIMEOUT_S = 3.0


class _CallUnderWay(Generic[T]):
    """A call in a loop of another thread that can be given up at any moment, before its first step too."""

    def __init__(self, call: Callable[[], Coroutine[Any, Any, T]]) -> None:
        self.ended = threading.Event()
        self._call = call
        self._task: asyncio.Task[Any] | None = None
        self._given_up = False

    async def whole(self) -> T:
        self._task = asyncio.current_task()
        try:
            if self._given_up:
                raise asyncio.CancelledError
            return await self._call()
        finally:
            self.ended.set()

    def give_up(self, loop: asyncio.AbstractEventLoop) -> None:
        """Cancel the call from another thread, and wait for its end."""
        if not self.ended.is_set():
            loop.call_soon_threadsafe(self._cancel)
            self.ended.wait(ABORT_TIMEOUT_S)

    def _cancel(self) -> None:
        self._given_up = True
        if self._task is not None:
            self._task.cancel()


class LoopThread:
    """Runs an engine's event loop in a thread while calls are under way, so that several threads may call at once.

    Between calls the loop stands still, and the engine's own blocking methods work as before. There is one object per
    loop: several `SGLangOffline`s of one engine share it.
    """

    _all: ClassVar[WeakValueDictionary[asyncio.AbstractEventLoop, LoopThread]] = WeakValueDictionary()
    _all_lock = threading.Lock()

    @classmethod
    def of(cls, loop: asyncio.AbstractEventLoop) -> LoopThread:
        """Return the one object of a loop."""
        with cls._all_lock:
            return cls._all.setdefault(loop, cls(loop))

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self._lock = threading.Lock()
        self._calls = 0
        self._thread: threading.Thread | None = None

    def run(self, call: Callable[[], Coroutine[Any, Any, T]]) -> T:
        """Return the result of a call in the loop; an error of the wait, such as Ctrl-C, gives the call up.

        Raises:
            EngineError: the loop runs already, in the caller's thread.
        """
        under_way = _CallUnderWay(call)
        with self._running():
            try:
                return result_of(asyncio.run_coroutine_threadsafe(under_way.whole(), self._loop))
            except BaseException:
                # An interrupt must not leave the call running, wherever it came: between its start and the wait for it
                # as well. SGLang aborts its requests while the call ends, for which the loop must go on.
                under_way.give_up(self._loop)
                raise

    async def arun(self, call: Callable[[], Coroutine[Any, Any, T]]) -> T:
        """Return the result of a call as `run` does, from a coroutine of this loop or of another one."""
        if asyncio.get_running_loop() is self._loop:
            return await call()
        under_way = _CallUnderWay(call)
        with self._running():
            future = asyncio.run_coroutine_threadsafe(under_way.whole(), self._loop)
            try:
                return await asyncio.wrap_future(future)
            except asyncio.CancelledError:
                await asyncio.to_thread(under_way.ended.wait, ABORT_TIMEOUT_S)
                raise

    def run_later(self, call: Callable[[], Coroutine[Any, Any, Any]]) -> None:
        """Run a call in a new thread without waiting for it, so that the loop's own thread may ask for it too.

        The garbage collector closes an abandoned stream in whichever thread it runs.
        """
        with suppress(RuntimeError):  # the interpreter ends, and the engine with it
            threading.Thread(target=self.run, args=(call,), daemon=True).start()

    @contextmanager
    def _running(self) -> Iterator[None]:
        with self._lock:
            if self._calls == 0:
                if self._loop.is_running():
                    raise EngineError(
                        "the sglang.Engine's event loop is already running here, so that a blocking call would wait "
                        "for itself; await agenerate(), or let SGLangOffline(model_path) make the engine"
                    )
                self._thread = threading.Thread(target=self._loop.run_forever, name="sglang-engine-loop", daemon=True)
                self._thread.start()
            self._calls += 1
        try:
            yield
        finally:
            with self._lock:
                self._calls -= 1
                if self._calls == 0 and self._thread is not None:
                    self._loop.call_soon_threadsafe(self._loop.stop)
                    self._thread.join()
