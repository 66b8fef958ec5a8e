"""Jobs of the finisher's thread: in order, bounded, and never the end of it."""

from __future__ import annotations

import threading
from collections.abc import Callable

import pytest
from stand_ins import wait_for_jobs

from torchrl_sglang_hidden.server.finisher import MOST_BYTES, MOST_WAITING, Finisher


def test_jobs_are_done_in_order_in_another_thread() -> None:
    finisher, done = Finisher(), list[tuple[int, str]]()
    for number in range(50):
        finisher.add(lambda number=number: done.append((number, threading.current_thread().name)))
    wait_for_jobs(finisher.add)
    assert done == [(number, "finish-requests") for number in range(50)]


def test_a_job_that_fails_does_not_stop_those_behind_it(caplog: pytest.LogCaptureFixture) -> None:
    finisher, done = Finisher(), list[int]()
    finisher.add(lambda: done.append(1 // 0))
    finisher.add(lambda: done.append(2))
    wait_for_jobs(finisher.add)
    assert done == [2]
    assert "a request could not be finished" in caplog.text


def assert_waits(finisher: Finisher, add: Callable[[], None], blocking_bytes: int = 0) -> None:
    """Check that a thread which adds jobs is held up behind one that is not done, and goes on after it."""
    gate, added = threading.Event(), threading.Event()
    finisher.add(lambda: gate.wait(60) and None, blocking_bytes)
    thread = threading.Thread(target=lambda: (add(), added.set()))
    thread.start()
    assert not added.wait(0.2)
    gate.set()
    thread.join(60)
    assert added.is_set()
    wait_for_jobs(finisher.add)


def test_whoever_adds_too_many_waits() -> None:
    """Rather than fill the memory with what waits."""
    finisher = Finisher()

    def add_many() -> None:
        for _ in range(MOST_WAITING + 1):
            finisher.add(lambda: None)

    assert_waits(finisher, add_many)


def test_whoever_adds_too_large_ones_waits() -> None:
    finisher = Finisher()
    assert_waits(finisher, lambda: finisher.add(lambda: None, MOST_BYTES // 2 + 1), MOST_BYTES // 2)
    finisher.add(lambda: None, 2 * MOST_BYTES)
    wait_for_jobs(finisher.add)


def test_no_thread_is_started_for_nothing() -> None:
    before = threading.active_count()
    Finisher()
    assert threading.active_count() == before
