"""Counters: added to from any thread, read as a frozen record, summed over servers and ranks."""

from __future__ import annotations

import dataclasses
import math
import threading
from collections.abc import Mapping

import pytest

from torchrl_sglang_hidden.counters import Counters, ServerCounters, Tally


def test_nothing_is_lost_between_threads() -> None:
    tally = Tally(Counters)

    def work() -> None:
        for _ in range(2000):
            tally.add(requests=1, rows=3)

    threads = [threading.Thread(target=work) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert tally.read() == Counters(requests=16000, rows=48000)


def test_what_was_read_does_not_change() -> None:
    tally = Tally(Counters)
    before = tally.read()
    tally.add(gaps=1, weight_seconds=0.5)
    assert (before.gaps, tally.read().gaps, tally.read().weight_seconds) == (0, 1, 0.5)
    with pytest.raises(dataclasses.FrozenInstanceError):
        before.gaps = 3  # type: ignore[misc]


def test_an_unknown_name_is_an_error() -> None:
    with pytest.raises(KeyError):
        Tally(Counters).add(request=1)


def test_sums() -> None:
    assert Counters(requests=2, rows=1) + Counters(requests=3) == Counters(requests=5, rows=1)
    first, second = Tally(ServerCounters), Tally(ServerCounters)
    first.add(steps=2, step_seconds=0.25)
    second.add(steps=3)
    assert ServerCounters.of([first.pack(), second.pack()]) == ServerCounters(steps=5, step_seconds=0.25)


@pytest.mark.parametrize("packed", [None, 3, [], {}, {"steps": "many"}, {"steps": True}, {"unknown": 1}])
def test_what_a_server_sends_may_be_anything(packed: object) -> None:
    assert ServerCounters.of([packed, {"rows": 4}]) == ServerCounters(rows=4)


@pytest.mark.parametrize("number", [10**400, 2**63, -1, math.nan, math.inf, -math.inf])
def test_a_number_that_no_counter_reaches(number: float) -> None:
    packed = {"step_seconds": number, "steps": number}
    assert ServerCounters.of([packed, {"step_seconds": 0.5}]) == ServerCounters(step_seconds=0.5)


def test_whoever_publishes_is_told() -> None:
    told: list[Mapping[str, float]] = []
    tally = Tally(ServerCounters)
    tally.on_add = told.append
    tally.add(rows=2)
    assert told == [{"rows": 2}]
