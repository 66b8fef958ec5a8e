"""`BatchingEngine`: who shares a request with whom, when it is sent, and whom an error reaches.

Threads are held by semaphores and events, and time is turned by hand (`Turned`), so that nothing here waits for a clock
but the two tests that say so.
"""

from __future__ import annotations

import asyncio
import math
import threading
from collections.abc import Callable
from itertools import islice
from typing import Any

import pytest
from helpers.engine_contract import EngineContract, assert_all_same, request
from helpers.fake_engine import RecordingEngine
from helpers.held_engine import (
    LIMIT_S,
    WAYS,
    A,
    B,
    C,
    D,
    Held,
    Turned,
    assert_answered,
    call,
    ids_of,
    in_thread,
    take,
)
from hypothesis import given
from hypothesis import strategies as st

from torchrl_sglang_hidden.engines.batching import BatchingEngine
from torchrl_sglang_hidden.errors import (
    InputError,
    InputTypeError,
)
from torchrl_sglang_hidden.records import Completion, Request

# --- options ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        ({"min_batch_size": 0}, InputError, "min_batch_size=0.*at least 1"),
        ({"min_batch_size": -3}, InputError, "min_batch_size=-3.*at least 1"),
        ({"max_batch_size": 0}, InputError, "max_batch_size=0.*at least 1"),
        ({"max_batch_size": -1}, InputError, "max_batch_size=-1.*at least 1"),
        (
            {"min_batch_size": 5, "max_batch_size": 4},
            InputError,
            r"min_batch_size \(5\) must be <= max_batch_size \(4\).*lower",
        ),
        ({"min_batch_size": 2.0}, InputTypeError, r"min_batch_size=2\.0 is a float.*integer"),
        ({"min_batch_size": True}, InputTypeError, "min_batch_size=True is a bool.*integer"),
        ({"min_batch_size": None}, InputTypeError, "min_batch_size=None is a NoneType.*integer"),
        ({"max_batch_size": "8"}, InputTypeError, "max_batch_size='8' is a str.*integer"),
        ({"timeout_s": 0}, InputError, "timeout of 0 s.*over 0.*min_batch_size=1"),
        ({"timeout_s": -0.5}, InputError, r"timeout of -0\.5 s.*over 0"),
        ({"timeout_s": math.nan}, InputError, "timeout of nan s.*over 0"),
        ({"timeout_s": math.inf}, InputError, r"timeout of inf s.*up to \d+"),
        ({"timeout_s": None}, InputTypeError, "None is a NoneType.*seconds"),
        ({"timeout_s": True}, InputTypeError, "True is a bool.*seconds"),
        ({"timeout_s": "10"}, InputTypeError, "'10' is a str.*seconds"),
    ],
)
def test_options_are_checked(options: dict[str, Any], error: type[InputError], words: str) -> None:
    with pytest.raises(error, match=words) as caught:
        BatchingEngine(RecordingEngine(), **options)
    assert type(caught.value) is error


def test_an_engine_is_wanted() -> None:
    with pytest.raises(InputTypeError, match=r"http://x.*expected an Engine, such as SGLangServer"):
        BatchingEngine("http://x")


# --- when a batch is sent ---------------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:the server has no torchrl_sglang_hidden server half")
class TestContract(EngineContract):
    """The contract of every engine: alone, with callers that wait for others, and with calls that are split."""

    @pytest.fixture(params=[{}, {"min_batch_size": 3, "timeout_s": 0.02}, {"max_batch_size": 2}], ids=str)
    def engine(self, request: pytest.FixtureRequest) -> BatchingEngine:
        return BatchingEngine(RecordingEngine(), **request.param)

    @pytest.fixture
    def another(self) -> BatchingEngine:
        return BatchingEngine(RecordingEngine())


def test_as_many_rows_as_wanted_are_one_call(inner: Held, make: Callable[..., Turned]) -> None:
    engine = make(min_batch_size=8)
    requests = [request((6 + i, 7, 8)) for i in range(8)]
    barrier = threading.Barrier(8)

    def one(mine: Request) -> list[Completion]:
        barrier.wait(LIMIT_S)
        return engine.generate([mine])

    futures = [in_thread(lambda mine=mine: one(mine)) for mine in requests]
    for future, mine in zip(futures, requests, strict=True):
        assert_answered(future, mine)
    (rows,) = inner.calls
    assert sorted(rows) == sorted(ids_of(*requests))


@WAYS
def test_fewer_rows_wait_for_others(inner: Held, make: Callable[..., Turned], way: str) -> None:
    engine = make(min_batch_size=4)
    first, second = call(engine, A, way=way), call(engine, B, C, way=way)
    assert (inner.calls, first.done(), second.done()) == ([], False, False)
    third = call(engine, D, way=way)
    for future, requests in ((first, (A,)), (second, (B, C)), (third, (D,))):
        assert_answered(future, *requests)
    assert inner.calls == [ids_of(A, B, C, D)]


def test_the_default_waits_for_nobody(inner: Held) -> None:
    engine = BatchingEngine(inner, timeout_s=LIMIT_S * 100)
    for requests in ((A,), (B, C)):
        assert_all_same(engine.generate(requests), RecordingEngine().generate(requests))
    assert inner.calls == [ids_of(A), ids_of(B, C)]


@WAYS
def test_all_that_wait_are_sent_when_the_time_of_the_oldest_is_up(
    inner: Held, make: Callable[..., Turned], way: str
) -> None:
    engine = make(min_batch_size=9, timeout_s=10.0)
    first = call(engine, A, way=way)
    engine.turn(6.0)
    second = call(engine, B, way=way)
    engine.turn(3.9)
    third = call(engine, C, way=way)
    assert (inner.calls, engine.state()["queue_size"]) == ([], 3)
    engine.turn(0.2)  # 10.1 s for the first, 4.1 s for the second
    for future, mine in ((first, A), (second, B), (third, C)):
        assert_answered(future, mine)
    assert inner.calls == [ids_of(A, B, C)]


def test_the_time_counts_anew_for_those_who_come_later(inner: Held, make: Callable[..., Turned]) -> None:
    engine = make(min_batch_size=9, timeout_s=10.0)
    first = call(engine, A)
    engine.turn(10.0)
    assert_answered(first, A)
    second = call(engine, B)
    engine.turn(9.9)
    third = call(engine, C)
    engine.turn(0.1)
    assert_answered(second, B)
    assert_answered(third, C)
    assert inner.calls == [ids_of(A), ids_of(B, C)]


def test_a_thread_goes_by_the_clock(inner: Held) -> None:
    engine = BatchingEngine(inner, min_batch_size=2, timeout_s=0.01)
    assert_all_same(engine.generate([A]), RecordingEngine().generate([A]))


def test_a_task_goes_by_the_clock(inner: Held) -> None:
    engine = BatchingEngine(inner, min_batch_size=2, timeout_s=0.01)
    assert_all_same(asyncio.run(engine.agenerate([A])), RecordingEngine().generate([A]))


@WAYS
def test_a_batch_does_not_wait_for_the_one_before(inner: Held, make: Callable[..., Turned], way: str) -> None:
    engine = make(min_batch_size=2)
    inner.gate.clear()
    futures = []
    for number in range(3):
        futures += [call(engine, A, way=way), call(engine, B, way=way)]
        take(inner.entered)
        assert len(inner.calls) == number + 1
    assert not any(future.done() for future in futures)
    inner.gate.set()
    for future, mine in zip(futures, [A, B] * 3, strict=True):
        assert_answered(future, mine)


def test_threads_and_tasks_share_a_batch(inner: Held, make: Callable[..., Turned]) -> None:
    engine = make(min_batch_size=4)
    ways = ("thread", "task", "task", "thread")
    futures = [call(engine, mine, way=way) for mine, way in zip((A, B, C, D), ways, strict=True)]
    for future, mine in zip(futures, (A, B, C, D), strict=True):
        assert_answered(future, mine)
    assert inner.calls == [ids_of(A, B, C, D)]


def test_tasks_of_one_loop_share_a_batch(inner: Held) -> None:
    engine = BatchingEngine(inner, min_batch_size=3, timeout_s=LIMIT_S * 100)

    async def all_at_once() -> list[list[Completion]]:
        return await asyncio.gather(*(engine.agenerate([mine]) for mine in (A, B, C)))

    found = [rows[0] for rows in asyncio.run(all_at_once())]
    assert_all_same(found, RecordingEngine().generate([A, B, C]))
    assert inner.calls == [ids_of(A, B, C)]


# --- how many rows ----------------------------------------------------------------------------------------------------


def test_a_call_that_does_not_fit_goes_by_itself(inner: Held, make: Callable[..., Turned]) -> None:
    engine = make(min_batch_size=3, max_batch_size=3)
    inner.gate.clear()
    first = call(engine, A, B)
    second = call(engine, C, D)
    take(inner.entered, 2)  # side by side
    inner.gate.set()
    assert_answered(first, A, B)
    assert_answered(second, C, D)
    assert sorted(inner.calls) == [ids_of(A, B), ids_of(C, D)]


@WAYS
def test_a_call_over_the_limit_is_split_in_order(inner: Held, make: Callable[..., Turned], way: str) -> None:
    engine = make(min_batch_size=2, max_batch_size=2)
    requests = [request((6 + i, 7)) for i in range(5)]
    assert_answered(call(engine, *requests, way=way), *requests)
    assert inner.calls == [ids_of(*requests[:2]), ids_of(*requests[2:4]), ids_of(*requests[4:])]


def test_a_split_call_waits_for_each_part(inner: Held, make: Callable[..., Turned]) -> None:
    engine = make(max_batch_size=2)
    inner.gate.clear()
    future = call(engine, A, B, C)
    take(inner.entered)
    assert inner.calls == [ids_of(A, B)]
    inner.gate.set()
    assert_answered(future, A, B, C)
    assert inner.calls == [ids_of(A, B), ids_of(C)]


sizes = st.tuples(st.integers(1, 5), st.integers(0, 4)).map(lambda pair: (pair[0], pair[0] + pair[1]))


@given(limits=sizes, calls=st.lists(st.integers(1, 12), min_size=1, max_size=6))
def test_every_row_is_sent_once_and_answered(limits: tuple[int, int], calls: list[int]) -> None:
    inner = Held()
    engine = Turned(inner, min_batch_size=limits[0], max_batch_size=limits[1])
    numbers = iter(range(sum(calls)))
    # Two ids make a prompt that no other row has.
    callers = [[request((6 + n % 50, 6 + n // 50)) for n in islice(numbers, size)] for size in calls]
    futures = []
    for mine in callers:
        futures.append(call(engine, *mine))
        assert engine.state()["queue_size"] < limits[0]
    engine.cleanup(flush=True)
    for future, mine in zip(futures, callers, strict=True):
        assert_answered(future, *mine)
    sent = inner.calls
    assert sorted(row for rows in sent for row in rows) == sorted(ids_of(*(one for mine in callers for one in mine)))
    assert all(len(rows) <= limits[1] for rows in sent)
    for mine in (ids_of(*one) for one in callers):
        parts = [[row for row in rows if row in mine] for rows in sent if set(rows) & set(mine)]
        assert [row for part in parts for row in part] == mine
        assert len(parts) == math.ceil(len(mine) / limits[1])
    assert engine.state()["pending_futures"] == 0
