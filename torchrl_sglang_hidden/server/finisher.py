"""Finishes requests with big answers in a thread of its own, one after another.

Joining every token's states, their checksum and their file take milliseconds to seconds, in which the scheduler could
run many steps. Jobs are done in the order in which they were given. There is a limit on how many may wait: behind it
the scheduler waits, rather than fill the memory.

Knows nothing of SGLang or of what the jobs do.
"""

from __future__ import annotations

import logging
import queue
import threading
from collections.abc import Callable

import torch

__all__ = ["MOST_BYTES", "MOST_WAITING", "Finisher"]

logger = logging.getLogger(__name__)

# Each step that brings token states is one job, and so is each request that finishes.
MOST_WAITING = 256
# What the waiting jobs may keep in memory, SGLang's pinned copies of rows above all; one job may be larger.
MOST_BYTES = 2**30

_Job = tuple[Callable[[], None], int]


class Finisher:
    """Runs jobs in order, in one thread that is started with the first."""

    def __init__(self) -> None:
        self._jobs: queue.Queue[_Job] = queue.Queue(MOST_WAITING)
        self._room = threading.Condition()
        self._bytes = 0
        self._thread: threading.Thread | None = None

    def add(self, job: Callable[[], None], num_bytes: int = 0) -> None:
        """Add a job; wait while too many are waiting, or too large ones.

        Args:
            job: what to do.
            num_bytes: what it keeps in memory until it is done.
        """
        if self._thread is None:
            self._thread = threading.Thread(target=self._run, name="finish-requests", daemon=True)
            self._thread.start()
        with self._room:
            self._room.wait_for(lambda: self._bytes == 0 or self._bytes + num_bytes <= MOST_BYTES)
            self._bytes += num_bytes
        self._jobs.put((job, num_bytes))

    def _run(self) -> None:
        while True:
            job, num_bytes = self._jobs.get()
            try:
                # As in the scheduler's thread, whose tensors may not be written to otherwise.
                with torch.inference_mode():
                    job()
            except Exception:
                # Without this thread every later request would hang. Jobs answer for their own failures.
                logger.exception("torchrl_sglang_hidden: a request could not be finished")
            finally:
                del job  # what it holds must not wait for the next one
                with self._room:
                    self._bytes -= num_bytes
                    self._room.notify_all()
