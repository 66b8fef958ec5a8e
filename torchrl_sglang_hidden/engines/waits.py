"""Waiting for calls in other threads so that Ctrl-C is heard, and so that none of them keeps the interpreter alive."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import Future, wait
from typing import TypeVar

__all__ = ["INTERRUPT_S", "in_daemon_thread", "result_of"]

T = TypeVar("T")

# Longest wait in which a Ctrl-C may go unseen: one that comes just before a wait is handled by Python after the wait.
INTERRUPT_S = 1.0


def in_daemon_thread(call: Callable[[], T]) -> Future[T]:
    """Start a call that the interpreter does not wait for when it ends, as it does for those of a thread pool.

    The call may wait for a server that is frozen, for as long as its time limit; the interrupted program must end now.
    """
    future: Future[T] = Future()

    def run() -> None:
        try:
            future.set_result(call())
        except BaseException as error:  # noqa: BLE001 - whoever waits for the future raises it
            future.set_exception(error)

    threading.Thread(target=run, name="sglang-server", daemon=True).start()
    return future


def result_of(future: Future[T]) -> T:
    """Return the result of a call in another thread, or raise its error; a Ctrl-C ends the wait."""
    while not future.done():
        wait([future], timeout=INTERRUPT_S)
    return future.result()
