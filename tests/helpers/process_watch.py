"""Waiting for processes that are not this one's children."""

from __future__ import annotations

import os
import select
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

Watch = dict[int, int]


@contextmanager
def watched(pids: Iterable[int]) -> Iterator[Watch]:
    """Yield handles on running processes, by process id. A handle never means a later process of the same id."""
    handles = {pid: os.pidfd_open(pid) for pid in pids}
    try:
        yield handles
    finally:
        for handle in handles.values():
            os.close(handle)


def still_running(handles: Watch, timeout_s: float) -> list[int]:
    """Return the processes that have not ended after ``timeout_s``; return as soon as all have ended."""
    deadline = time.monotonic() + timeout_s
    return [
        pid
        for pid, handle in handles.items()
        # A pidfd is readable once its process has ended, reaped or not.
        if not select.select([handle], [], [], max(0.0, deadline - time.monotonic()))[0]
    ]
