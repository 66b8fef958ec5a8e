"""An engine whose concurrent callers share requests.

There is no thread of its own: the caller that completes a batch, or whose time runs out first, sends it for all. SGLang
batches what runs at the same time by itself, so this is for those who want few and large requests.
"""

from __future__ import annotations

import copy
import re
import threading
import time
from collections.abc import Coroutine, Sequence
from typing import Any, TypeVar

from torchrl_sglang_hidden.engines.base import Engine
from torchrl_sglang_hidden.engines.callers import Batch, Call, TaskCall, ThreadCall
from torchrl_sglang_hidden.engines.sessions import Session
from torchrl_sglang_hidden.engines.streams import AsyncStream, Stream
from torchrl_sglang_hidden.errors import (
    AuthenticationError,
    BatchCancelledError,
    EngineError,
    EngineTimeoutError,
    EngineUnreachableError,
    InputError,
    InputTypeError,
    ProtocolError,
    SGLangHiddenError,
)
from torchrl_sglang_hidden.records import Completion, EngineInfo, Request
from torchrl_sglang_hidden.weights.validation import Running, Transport, Weights

__all__ = ["BatchingEngine", "check_batching"]

T = TypeVar("T")

DEFAULT_TIMEOUT_S = 10.0
# Errors that say nothing about any one row: sending it again would end in the same.
OF_THE_ENGINE = (EngineUnreachableError, EngineTimeoutError, AuthenticationError)


def check_batching(min_batch_size: object, max_batch_size: object, timeout_s: object) -> None:
    """Checks the options of `BatchingEngine`.

    Raises:
        InputError: a size below 1, ``min_batch_size`` over ``max_batch_size``, or a time that is no positive number.
        InputTypeError: a size that is no int, or a time that is no number.
    """
    for name, size in (("min_batch_size", min_batch_size), ("max_batch_size", max_batch_size)):
        if name == "max_batch_size" and size is None:
            continue
        if type(size) is not int:
            raise InputTypeError(f"{name}={size!r} is a {type(size).__name__}; expected an integer of at least 1")
        if size < 1:
            raise InputError(f"{name}={size}: expected an integer of at least 1")
    if type(max_batch_size) is int and type(min_batch_size) is int and min_batch_size > max_batch_size:
        raise InputError(
            f"min_batch_size={min_batch_size} is over max_batch_size={max_batch_size}, so that no batch could be sent; "
            "lower the one or raise the other"
        )
    if isinstance(timeout_s, bool) or not isinstance(timeout_s, (int, float)):
        raise InputTypeError(
            f"batching timeout {timeout_s!r} is a {type(timeout_s).__name__}; expected a number of seconds"
        )
    if not 0 < timeout_s <= threading.TIMEOUT_MAX:  # NaN too
        raise InputError(
            f"batching timeout of {timeout_s} s: expected a number over 0 and up to {threading.TIMEOUT_MAX:.0f}; to "
            "wait for nobody, use min_batch_size=1"
        )


class BatchingEngine(Engine):
    """Lets the concurrent callers of an engine, threads and awaiters alike, share its requests.

    A call's requests join a queue. Once ``min_batch_size`` rows wait in it, or ``timeout_s`` after the oldest of them
    joined, all that wait are sent, in calls of up to ``max_batch_size`` rows. A call's rows stay together in one of
    them; those of a call with more rows than ``max_batch_size`` share with nobody and go out in several calls, one
    after the other, in order. No batch waits for another one to finish.

    Bad requests are refused before they join. If the engine refuses a shared call or fails at it, each caller's rows
    are sent again by themselves, so that an error reaches the caller whose row it is about, with rows counted in the
    caller's own batch, and the others get their completions. An engine that cannot be reached, does not answer in time
    or refuses the API key is an error for every caller of the batch. The queue goes on in all cases. A caller that is
    interrupted or cancelled takes its own rows with it and nobody else's.

    Pickles and copies as its engine and options, without what waits in the queue.

    Args:
        engine: the engine; it stays yours to close.
        min_batch_size: rows that must wait before they are sent at once. 1 waits for nobody.
        max_batch_size: most rows of one call; None for any number.
        timeout_s: seconds that a call waits at most for others to join.

    Raises:
        InputError: a size below 1, a minimum over the maximum, or a time that is not positive.
        InputTypeError: ``engine`` is no `Engine`, or an option is of the wrong type.
    """

    def __init__(
        self,
        engine: Engine,
        *,
        min_batch_size: int = 1,
        max_batch_size: int | None = None,
        timeout_s: float = DEFAULT_TIMEOUT_S,
    ) -> None:
        if not isinstance(engine, Engine):
            raise InputTypeError(f"BatchingEngine({engine!r:.80}): expected an Engine, such as SGLangServer(url)")
        check_batching(min_batch_size, max_batch_size, timeout_s)
        self.engine = engine
        self.min_batch_size = min_batch_size
        self.max_batch_size = max_batch_size
        self.timeout_s = timeout_s
        # Reentrant: the garbage collector may end an abandoned task's call in a thread that holds it.
        self._lock = threading.RLock()
        # Between two calls it holds fewer rows than min_batch_size: whoever brings more sends all.
        self._queue: list[Call] = []
        self._batches: list[Batch] = []
        self._closed = False

    # --- what is the engine's own ----------------------------------------------------------------------------------

    @property
    def info(self) -> EngineInfo:
        """What the wrapped engine says of itself."""
        return self.engine.info

    def update_weights(
        self,
        weights: Weights,
        *,
        version: str | None = None,
        transport: Transport = "auto",
        running: Running = "finish",
    ) -> str:
        """See `Engine.update_weights`. What waits in the queue at that time is answered with the new weights."""
        return self.engine.update_weights(weights, version=version, transport=transport, running=running)

    async def aupdate_weights(
        self,
        weights: Weights,
        *,
        version: str | None = None,
        transport: Transport = "auto",
        running: Running = "finish",
    ) -> str:
        """As `update_weights`, awaited."""
        return await self.engine.aupdate_weights(weights, version=version, transport=transport, running=running)

    def stream(self, request: Request) -> Stream:
        """See `Engine.stream`. It is sent at once, by itself."""
        return self.engine.stream(request)

    async def astream(self, request: Request) -> AsyncStream:
        """As `stream`, for ``async for``."""
        return await self.engine.astream(request)

    def session(self) -> Session:
        """See `Engine.session`. Its turns are sent at once, by themselves."""
        return self.engine.session()

    # --- calls -----------------------------------------------------------------------------------------------------

    def generate(self, requests: Sequence[Request]) -> list[Completion]:
        """See `Engine.generate`; blocks while the batch fills and runs.

        Raises:
            BatchCancelledError: the queue was emptied by `cleanup` or `close` while the call waited.
        """
        return _run_blocking(self._serve(ThreadCall(requests)))

    async def agenerate(self, requests: Sequence[Request]) -> list[Completion]:
        """See `Engine.agenerate`, and `generate`."""
        return await self._serve(TaskCall(requests))

    async def _serve(self, call: Call) -> list[Completion]:
        # Here and by the engine's own check, so that a bad row reaches nobody else's batch.
        self.engine._check(call.requests, self.engine.info)
        try:
            self._join(call)
            batch = await self._wait_for_batch(call)
            if batch.leader is call:
                await self._lead(call, batch)
        finally:
            self._leave(call)
        if batch.error is not None:
            # A copy: several threads that raise one exception would write over each other's traceback.
            raise copy.copy(batch.error) from batch.error
        if call.completions is None:
            return await self._send(call, call.requests)
        return call.completions

    def _join(self, call: Call) -> None:
        with self._lock:
            if self._closed:
                raise EngineError("the BatchingEngine was closed by close(); make a new one")
            waiting = _count_rows(self._queue)
            full = waiting + len(call.requests) >= self.min_batch_size
            if self.max_batch_size is not None and waiting + len(call.requests) > self.max_batch_size:
                self._form_batch()
            call.deadline = self._now() + self.timeout_s
            self._queue.append(call)
            if full:
                self._form_batch(leader=call)

    async def _wait_for_batch(self, call: Call) -> Batch:
        """Waits until the call's batch is done, or is the call's own to lead."""
        while True:
            with self._lock:
                call.rest()
                if call.cancelled is not None:
                    raise BatchCancelledError(call.cancelled)
                remaining_s = call.deadline - self._now()
                if call.batch is None and remaining_s <= 0:
                    self._form_batch(leader=call)
                batch = call.batch
                if batch is not None:
                    batch.leader = batch.leader or call
                    if batch.leader is call or batch.done:
                        return batch
            await call.wait(remaining_s if batch is None else None)

    async def _lead(self, call: Call, batch: Batch) -> None:
        """Sends a batch. Where that fails for a reason that may lie in one row, it leaves it without completions."""
        requests = [request for one in batch.calls for request in one.requests]
        try:
            completions = await self._send(call, requests)
        except OF_THE_ENGINE as error:
            batch.error = error
            raise
        except SGLangHiddenError:
            if len(batch.calls) == 1:
                raise
            return
        for one in batch.calls:
            one.completions, completions = completions[: len(one.requests)], completions[len(one.requests) :]

    async def _send(self, call: Call, requests: Sequence[Request]) -> list[Completion]:
        size = self.max_batch_size or len(requests)
        completions: list[Completion] = []
        for start in range(0, len(requests), size):
            part = requests[start : start + size]
            try:
                found = await call.send(self.engine, part)
            except SGLangHiddenError as error:
                if start == 0:
                    raise
                raise _counted_from(start, error) from error
            if len(found) != len(part):
                raise ProtocolError(f"sent {len(part)} requests and got {len(found)} completions")
            completions += found
        return completions

    def _leave(self, call: Call) -> None:
        """Takes a call out, however it ended, so that nobody waits for it."""
        with self._lock:
            batch = call.batch
            if batch is None:
                self._queue = [one for one in self._queue if one is not call]
                return
            if batch.leader is None:
                batch.calls = [one for one in batch.calls if one is not call]
            if batch.leader is call or not batch.calls:
                batch.done = True
                self._batches = [one for one in self._batches if one is not batch]
                batch.wake()

    def _form_batch(self, leader: Call | None = None) -> None:
        """Makes one batch of all that wait. Without a leader, the first of them that wakes leads it. Under the lock."""
        if self._queue:
            batch = Batch(self._queue, leader)
            self._queue = []
            self._batches.append(batch)
            for call in batch.calls:
                call.batch = batch
            if leader is None:
                batch.wake()

    def _now(self) -> float:
        return time.monotonic()

    # --- the queue -------------------------------------------------------------------------------------------------

    def cleanup(self, *, flush: bool = False) -> None:
        """Empties the queue, and returns at once. What was sent already is not touched, and the queue goes on.

        Args:
            flush: True has the calls that wait sent now, by their callers. False ends them with `BatchCancelledError`.
        """
        with self._lock:
            if flush:
                self._form_batch()
            else:
                self._cancel("the queue was emptied by cleanup(flush=False) before the batch was sent; call again")

    def close(self) -> None:
        """Ends the calls that wait with `BatchCancelledError`; the wrapped engine stays open, for it is yours.

        Batches that were sent end as they would. Later calls raise `EngineError`.
        """
        with self._lock:
            self._closed = True
            self._cancel("the BatchingEngine was closed by close() before the batch was sent; make a new one")

    def _cancel(self, message: str) -> None:
        for call in self._queue:
            call.cancelled = message
            call.wake()
        self._queue = []

    def state(self) -> dict[str, Any]:
        """What `LLMWrapperBase.get_batching_state` returns.

        Returns:
            ``min_batch_size``, ``max_batch_size``, ``timeout`` (s) as given; ``queue_size``, the rows that wait to be
            sent; ``pending_futures``, those and the rows of shared calls under way; ``processing``, whether one is, and
            the same in words as ``lock_state``; ``batching_enabled``, True.
        """
        with self._lock:
            queued = _count_rows(self._queue)
            under_way = sum(_count_rows(batch.calls) for batch in self._batches)
        return {
            "batching_enabled": True,
            "min_batch_size": self.min_batch_size,
            "max_batch_size": self.max_batch_size,
            "queue_size": queued,
            "processing": under_way > 0,
            "lock_state": "locked" if under_way else "unlocked",
            "pending_futures": queued + under_way,
            "timeout": self.timeout_s,
        }

    def __reduce__(self) -> tuple[Any, ...]:
        options = {name: getattr(self, name) for name in ("min_batch_size", "max_batch_size", "timeout_s")}
        return (_rebuild, (type(self), self.engine, options))

    def __repr__(self) -> str:
        return (
            f"{type(self).__name__}({self.engine!r}, min_batch_size={self.min_batch_size}, "
            f"max_batch_size={self.max_batch_size}, timeout_s={self.timeout_s})"
        )


def _rebuild(kind: type[BatchingEngine], engine: Engine, options: dict[str, Any]) -> BatchingEngine:
    return kind(engine, **options)


def _run_blocking(course: Coroutine[Any, Any, T]) -> T:
    """Runs a coroutine that never suspends, so that threads and tasks take the same course through the queue."""
    try:
        course.send(None)
    except StopIteration as done:
        result: T = done.value
        return result
    raise AssertionError("a thread's course never suspends")


def _count_rows(calls: Sequence[Call]) -> int:
    return sum(len(call.requests) for call in calls)


def _counted_from(start: int, error: SGLangHiddenError) -> SGLangHiddenError:
    """The same error, with the row that it names counted from another one."""
    moved = copy.copy(error)
    moved.args = (re.sub(r"^row (\d+)", lambda found: f"row {int(found[1]) + start}", str(error)),)
    return moved
