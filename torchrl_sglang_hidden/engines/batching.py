"""`BatchingEngine`: concurrent callers share the requests that are sent to another engine.

There is no thread for the queue: the caller that completes a batch, or whose waiting time ends first, sends the batch
for all. SGLang batches what runs at the same time by itself, so a queue is for users who want few and large requests.
Knows nothing of how the wrapped engine sends.
"""

from __future__ import annotations

import copy
import threading
import time
from collections.abc import Coroutine, Sequence
from dataclasses import replace
from functools import partial
from operator import add
from typing import Any, TypeVar

from torchrl_sglang_hidden.engines.base import Engine
from torchrl_sglang_hidden.engines.callers import Batch, Caller, TaskCaller, ThreadCaller
from torchrl_sglang_hidden.engines.row_errors import numbered, renumber
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
from torchrl_sglang_hidden.sglang_api.responses import raise_errors
from torchrl_sglang_hidden.weights.adapters import AdapterSource
from torchrl_sglang_hidden.weights.heads import PushedHeads
from torchrl_sglang_hidden.weights.validation import Weights

__all__ = ["BatchingEngine", "check_batching"]

T = TypeVar("T")

DEFAULT_TIMEOUT_S = 10.0
# Errors that say nothing about any one row: sending a row again would end in the same error.
ENGINE_WIDE_ERRORS = (EngineUnreachableError, EngineTimeoutError, AuthenticationError)


def check_batching(min_batch_size: object, max_batch_size: object, timeout_s: object) -> None:
    """Check the options of `BatchingEngine`.

    Args:
        min_batch_size: rows that must wait before they are sent at once.
        max_batch_size: most rows of one call; None for any number.
        timeout_s: seconds that a call waits at most for others to join.

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
            f"min_batch_size ({min_batch_size}) must be <= max_batch_size ({max_batch_size}), or no batch could be "
            "sent; lower the one or raise the other"
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

    Each call of `generate` or `agenerate` puts its requests (rows) in a queue. When ``min_batch_size`` rows wait, or
    ``timeout_s`` after the oldest of the waiting calls joined, all waiting rows are sent, in batches of up to
    ``max_batch_size`` rows. The rows of one call stay together in one batch. A call with more rows than
    ``max_batch_size`` shares no batch; its rows are sent in several batches, one after the other, in order. No other
    batch waits for an earlier batch to finish.

    Bad requests are refused before they join the queue. If the engine refuses a shared batch or fails, the rows of each
    caller are sent again by themselves: an error then reaches only the caller whose row caused the error, with rows
    counted in the caller's own call, and the other callers get their completions. An engine that cannot be reached,
    does not answer in time or refuses the API key is an error for every caller of the batch. The queue goes on after
    every error. A caller that is interrupted or cancelled takes only its own rows out of the queue.

    Copies and pickles hold the engine and the options; their queue is empty.

    Args:
        engine: the engine to send to; `close` leaves it open.
        min_batch_size: number of waiting rows at which they are sent at once. 1 waits for nobody.
        max_batch_size: most rows of one batch; None for any number.
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
        self.engine, self._meter = engine, engine._meter
        self.min_batch_size = min_batch_size
        self.max_batch_size = max_batch_size
        self.timeout_s = timeout_s
        # Reentrant: the garbage collector may end an abandoned task in a thread that holds the lock.
        self._lock = threading.RLock()
        # While nobody holds the lock, the queue has fewer than min_batch_size rows: whoever completes them sends all.
        self._queue: list[Caller] = []
        self._batches: list[Batch] = []
        self._closed = False

    # --- what is the engine's own ----------------------------------------------------------------------------------

    @property
    def info(self) -> EngineInfo:
        """See `Engine.info`: of the wrapped engine."""
        return self.engine.info

    def weight_version(self) -> str:
        """See `Engine.weight_version`."""
        return self.engine.weight_version()

    def update_weights(self, weights: Weights, **options: Any) -> str:
        """See `Engine.update_weights`. Requests that wait in the queue are answered with the new weights."""
        return self.engine.update_weights(weights, **options)

    def check_calls(self, count: int) -> None:
        """See `Engine.check_calls`."""
        self.engine.check_calls(count)

    async def close_event_loop(self) -> None:
        """See `Engine.close_event_loop`."""
        await self.engine.close_event_loop()

    def load_adapter(self, name: str, adapter: AdapterSource, **options: Any) -> str:
        """See `Engine.load_adapter`. Requests that wait in the queue are answered with the new adapter."""
        return self.engine.load_adapter(name, adapter, **options)

    def unload_adapter(self, name: str) -> None:
        """See `Engine.unload_adapter`."""
        self.engine.unload_adapter(name)

    def _pushed_heads(self) -> PushedHeads:
        return self.engine._pushed_heads()

    def stream(self, request: Request) -> Stream:
        """See `Engine.stream`. The request is sent at once, outside the queue."""
        return self.engine.stream(request)

    async def astream(self, request: Request) -> AsyncStream:
        """See `Engine.astream`. The request is sent at once, outside the queue."""
        return await self.engine.astream(request)

    def session(self) -> Session:
        """See `Engine.session`. Turns are sent at once, outside the queue."""
        return self.engine.session()

    # --- calls -----------------------------------------------------------------------------------------------------

    def generate(self, requests: Sequence[Request]) -> list[Completion]:
        """See `Engine.generate`; blocks while the batch fills and runs.

        Raises:
            BatchCancelledError: the queue was emptied by `cleanup` or `close` while the call waited.
        """
        return _run_blocking(self._serve(ThreadCaller(requests)))

    async def agenerate(self, requests: Sequence[Request]) -> list[Completion]:
        """See `Engine.agenerate`; waits while the batch fills and runs.

        Raises:
            BatchCancelledError: the queue was emptied by `cleanup` or `close` while the call waited.
        """
        return await self._serve(TaskCaller(requests))

    async def _serve(self, caller: Caller) -> list[Completion]:
        # Before the requests join the queue, so that a bad row reaches nobody else's batch.
        self.engine._check(caller.requests, self.engine.info)
        try:
            self._join(caller)
            batch = await self._wait_for_batch(caller)
            if batch.leader is caller:
                await self._lead(caller, batch)
        finally:
            self._leave(caller)
        if batch.error is not None:
            # A copy: several threads that raise one exception would write over each other's traceback.
            raise copy.copy(batch.error) from batch.error
        if caller.completions is None:
            return await self._send(caller, caller.requests)
        raise_errors(caller.requests, caller.completions)
        return caller.completions

    def _join(self, caller: Caller) -> None:
        with self._lock:
            if self._closed:
                raise EngineError("the BatchingEngine was closed by close(); make a new one")
            waiting = _count_rows(self._queue)
            full = waiting + len(caller.requests) >= self.min_batch_size
            if self.max_batch_size is not None and waiting + len(caller.requests) > self.max_batch_size:
                self._form_batch()
            caller.deadline = self._now() + self.timeout_s
            self._queue.append(caller)
            if full:
                self._form_batch(leader=caller)

    async def _wait_for_batch(self, caller: Caller) -> Batch:
        """Wait until the caller's batch is done, or the caller is to lead the batch."""
        while True:
            with self._lock:
                caller.reset()
                if caller.cancelled is not None:
                    raise BatchCancelledError(caller.cancelled)
                remaining_s = caller.deadline - self._now()
                if caller.batch is None and remaining_s <= 0:
                    self._form_batch(leader=caller)
                batch = caller.batch
                if batch is not None:
                    batch.leader = batch.leader or caller
                    if batch.leader is caller or batch.done:
                        return batch
            await caller.wait(remaining_s if batch is None else None)

    async def _lead(self, caller: Caller, batch: Batch) -> None:
        """Send a batch for all its callers.

        A failure whose reason may lie in one row leaves the callers without completions: each then sends its own rows.
        """
        requests = [request for member in batch.callers for request in member.requests]
        if len(batch.callers) > 1:
            # An error of one row must not cost the others theirs. Its caller raises it.
            requests = [replace(request, return_errors=True) for request in requests]
        try:
            completions = await self._send(caller, requests)
        except ENGINE_WIDE_ERRORS as error:
            batch.error = error
            raise
        except SGLangHiddenError:
            if len(batch.callers) == 1:
                raise
            return
        start = 0
        for member in batch.callers:
            stop = start + len(member.requests)
            member.completions = [numbered(one, partial(add, -start)) for one in completions[start:stop]]
            start = stop

    async def _send(self, caller: Caller, requests: Sequence[Request]) -> list[Completion]:
        size = self.max_batch_size or len(requests)
        completions: list[Completion] = []
        for start in range(0, len(requests), size):
            part = requests[start : start + size]
            try:
                found = await caller.send(self.engine, part)
            except SGLangHiddenError as error:
                if error.completions:
                    unsent = len(requests) - start - len(part)
                    tried = [one and numbered(one, partial(add, start)) for one in error.completions]
                    error.completions = (*completions, *tried, *[None] * unsent)
                if start == 0:
                    raise
                raise renumber(error, partial(add, start)) from error
            if len(found) != len(part):
                raise ProtocolError(
                    f"sent {len(part)} requests and got {len(found)} completions; this is a fault of the engine, "
                    "please report it"
                )
            completions += [numbered(one, partial(add, start)) for one in found]
        return completions

    def _leave(self, caller: Caller) -> None:
        """Take a caller out of the queue or its batch, however its call ended, so that nobody waits for it."""
        with self._lock:
            batch = caller.batch
            if batch is None:
                self._queue = [other for other in self._queue if other is not caller]
                return
            if batch.leader is None:
                batch.callers = [other for other in batch.callers if other is not caller]
            if batch.leader is caller or not batch.callers:
                batch.done = True
                self._batches = [other for other in self._batches if other is not batch]
                batch.wake()

    def _form_batch(self, leader: Caller | None = None) -> None:
        """Make one batch of all waiting callers. Without a leader, the first caller that wakes leads. Hold the lock."""
        if self._queue:
            batch = Batch(self._queue, leader)
            self._queue = []
            self._batches.append(batch)
            for caller in batch.callers:
                caller.batch = batch
            if leader is None:
                batch.wake()

    def _now(self) -> float:
        return time.monotonic()

    # --- the queue -------------------------------------------------------------------------------------------------

    def cleanup(self, *, flush: bool = False) -> None:
        """Empty the queue, and return at once. Batches that were sent are not touched; later calls join as before.

        Args:
            flush: True has the waiting callers send their requests now. False ends their calls with
                `BatchCancelledError`.
        """
        with self._lock:
            if flush:
                self._form_batch()
            else:
                self._cancel("the queue was emptied by cleanup(flush=False) before the batch was sent; call again")

    def close(self) -> None:
        """End the waiting calls with `BatchCancelledError`; the wrapped engine stays open.

        Batches that were sent run to their end. Later calls raise `EngineError`.
        """
        with self._lock:
            self._closed = True
            self._cancel("the BatchingEngine was closed by close() before the batch was sent; make a new one")

    def _cancel(self, message: str) -> None:
        for caller in self._queue:
            caller.cancelled = message
            caller.wake()
        self._queue = []

    def state(self) -> dict[str, Any]:
        """Describe the queue, in the form of torchrl's ``LLMWrapperBase.get_batching_state``.

        Returns:
            ``min_batch_size``, ``max_batch_size``, ``timeout`` (s): the options. ``queue_size``: rows that wait to be
            sent. ``pending_futures``: rows that wait or were sent and not answered. ``processing``: whether a batch was
            sent and not answered; ``lock_state``: the same as "locked" or "unlocked". ``batching_enabled``: True.
        """
        with self._lock:
            queued = _count_rows(self._queue)
            under_way = sum(_count_rows(batch.callers) for batch in self._batches)
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


def _run_blocking(coroutine: Coroutine[Any, Any, T]) -> T:
    """Run a coroutine that never suspends, so that threads and tasks share the code of the queue."""
    try:
        coroutine.send(None)
    except StopIteration as done:
        result: T = done.value
        return result
    raise AssertionError("a thread's coroutine never suspends")


def _count_rows(callers: Sequence[Caller]) -> int:
    return sum(len(caller.requests) for caller in callers)
