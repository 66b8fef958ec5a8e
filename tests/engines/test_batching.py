"""`BatchingEngine`: who shares a request with whom, when it is sent, and whom an error reaches.

Threads are held by semaphores and events, and time is turned by hand (`Turned`), so that nothing here waits for a clock
but the two tests that say so.
"""

from __future__ import annotations

import asyncio
import copy
import math
import pickle
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import CancelledError, Future
from itertools import islice
from types import SimpleNamespace
from typing import Any

import pytest
from helpers.engine_contract import BAD_ROWS, EngineContract, assert_all_same, request
from helpers.fake_engine import Answer, RecordingEngine, RecordingServer, response_of
from hypothesis import given
from hypothesis import strategies as st
from torchrl.modules.llm.policies import LLMWrapperBase

from torchrl_sglang_hidden import SGLangServer, connect
from torchrl_sglang_hidden.engines import Engine
from torchrl_sglang_hidden.engines.batching import BatchingEngine
from torchrl_sglang_hidden.errors import (
    AlignmentError,
    AuthenticationError,
    BatchCancelledError,
    EngineError,
    EngineTimeoutError,
    EngineUnreachableError,
    InputError,
    InputTypeError,
    ProtocolError,
    RequestAbortedError,
    RequestRejectedError,
    SGLangHiddenError,
)
from torchrl_sglang_hidden.records import Completion, Request

# Nothing waits as long; what would wait for ever fails then.
LIMIT_S = 20.0
A, B, C, D = (request((6 + i, 7)) for i in range(4))


class Held(RecordingEngine):
    """Says when a call has come in, holds it until the gate is open, and refuses it when told to.

    Attributes:
        entered: released by every call.
        gate: open at first.
        refuse: called with every call's requests; may raise.
        given: the arguments of every `update_weights`.
    """

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.entered = threading.Semaphore(0)
        self.gate = threading.Event()
        self.gate.set()
        self.refuse: Callable[[Sequence[Request]], None] = lambda requests: None
        self.given: list[Any] = []

    def generate(self, requests: Sequence[Request]) -> list[Completion]:
        answer = super().generate(requests)
        self.entered.release()
        assert self.gate.wait(LIMIT_S)
        self.refuse(requests)
        return answer

    async def agenerate(self, requests: Sequence[Request]) -> list[Completion]:
        return await asyncio.to_thread(self.generate, requests)

    def update_weights(self, weights: Any, **options: Any) -> str:
        self.given.append((weights, options))
        return "v8"

    @property
    def calls(self) -> list[list[tuple[int, ...]]]:
        return [[tuple(ids) for ids in payload["input_ids"]] for payload in self.payloads]


class Turned(BatchingEngine):
    """A `BatchingEngine` whose time is turned by hand, and which says when a call has joined."""

    def __init__(self, engine: Engine, **options: Any) -> None:
        self.time = 0.0
        self.joined = threading.Semaphore(0)
        super().__init__(engine, **{"timeout_s": 1000.0, **options})

    def _join(self, call: Any) -> None:
        super()._join(call)
        self.joined.release()

    def _now(self) -> float:
        return self.time

    def turn(self, seconds: float) -> None:
        with self._lock:
            self.time += seconds
            for call in self._queue:
                call.wake()


def in_thread(work: Callable[[], Any]) -> Future[Any]:
    """Runs something in a thread of its own, which does not outlive pytest where it waits for ever."""
    future: Future[Any] = Future()

    def run() -> None:
        try:
            future.set_result(work())
        except BaseException as error:  # noqa: BLE001  whatever it is, the test looks at it
            future.set_exception(error)

    threading.Thread(target=run, daemon=True).start()
    return future


@pytest.fixture
def inner() -> Iterator[Held]:
    engine = Held()
    yield engine
    engine.gate.set()


@pytest.fixture
def make(inner: Held) -> Iterator[Callable[..., Turned]]:
    """Makes engines over `inner`; none of their callers outlives the test."""
    made: list[Turned] = []

    def make_one(**options: Any) -> Turned:
        made.append(Turned(inner, **options))
        return made[-1]

    yield make_one
    for one in made:
        one.close()


def take(semaphore: threading.Semaphore, count: int = 1) -> None:
    for _ in range(count):
        assert semaphore.acquire(timeout=LIMIT_S)


def call(engine: Turned, *requests: Request, way: str = "thread") -> Future[list[Completion]]:
    """Calls the engine in a thread, and returns when the call has joined the queue."""
    if way == "thread":
        future = in_thread(lambda: engine.generate(requests))
    else:
        future = in_thread(lambda: asyncio.run(engine.agenerate(requests)))
    take(engine.joined)
    return future


def ids_of(*requests: Request) -> list[tuple[int, ...]]:
    return [one.prompt_ids for one in requests]


def assert_answered(future: Future[list[Completion]], *requests: Request) -> None:
    """The very completions that the requests get alone."""
    assert_all_same(future.result(LIMIT_S), RecordingEngine().generate(requests))


WAYS = pytest.mark.parametrize("way", ["thread", "task"])


# --- options ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        ({"min_batch_size": 0}, InputError, "min_batch_size=0.*at least 1"),
        ({"min_batch_size": -3}, InputError, "min_batch_size=-3.*at least 1"),
        ({"max_batch_size": 0}, InputError, "max_batch_size=0.*at least 1"),
        ({"max_batch_size": -1}, InputError, "max_batch_size=-1.*at least 1"),
        ({"min_batch_size": 5, "max_batch_size": 4}, InputError, "min_batch_size=5.*max_batch_size=4.*lower"),
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


# --- errors -----------------------------------------------------------------------------------------------------------


@WAYS
@pytest.mark.parametrize("bad", BAD_ROWS)
def test_bad_input_is_refused_before_it_joins(inner: Held, make: Callable[..., Turned], bad: str, way: str) -> None:
    make_bad, error, words = BAD_ROWS[bad]
    engine = make(min_batch_size=3)
    first = call(engine, A)
    requests = [B, make_bad(engine)]
    with pytest.raises(error, match=words):
        engine.generate(requests) if way == "thread" else asyncio.run(engine.agenerate(requests))
    assert (engine.state()["queue_size"], inner.calls) == (1, [])
    second = call(engine, C, D)
    assert_answered(first, A)
    assert_answered(second, C, D)
    assert inner.calls == [ids_of(A, C, D)]


def refuse(bad: Request, error: SGLangHiddenError) -> Callable[[Sequence[Request]], None]:
    """Refuses every call that has a certain row in it."""

    def look(requests: Sequence[Request]) -> None:
        if bad.prompt_ids in ids_of(*requests):
            raise error

    return look


@WAYS
@pytest.mark.parametrize(
    "error",
    [RequestRejectedError, RequestAbortedError, AlignmentError, ProtocolError, EngineError, InputError],
    ids=lambda error: error.__name__,
)
@pytest.mark.parametrize("bad", [A, D], ids=["follower", "leader"])
def test_an_error_about_a_row_reaches_its_own_caller(
    inner: Held, make: Callable[..., Turned], bad: Request, error: type[SGLangHiddenError], way: str
) -> None:
    engine = make(min_batch_size=4)
    inner.refuse = refuse(bad, error("no such grammar"))
    callers = ((A,), (B, C), (D,))
    futures = [call(engine, *mine, way=way) for mine in callers]
    for mine, future in zip(callers, futures, strict=True):
        if bad in mine:
            with pytest.raises(error, match="no such grammar"):
                future.result(LIMIT_S)
        else:
            assert_answered(future, *mine)
    assert inner.calls[0] == ids_of(A, B, C, D)
    assert sorted(inner.calls[1:]) == [ids_of(A), ids_of(B, C), ids_of(D)]
    # The queue goes on.
    again = [call(engine, mine, way=way) for mine in (B, B, C, C)]
    for future, mine in zip(again, (B, B, C, C), strict=True):
        assert_answered(future, mine)
    assert len(inner.calls) == 5


def abort(bad: Request) -> Callable[[Answer], None]:
    def spoil(rows: Answer) -> None:
        for row in rows:
            if row["output_ids"] == response_of(bad.prompt_ids):
                row["meta_info"]["finish_reason"] = {"type": "abort", "message": "out of memory"}

    return spoil


def test_rows_of_an_error_are_counted_in_the_callers_own_batch(inner: Held, make: Callable[..., Turned]) -> None:
    engine = make(min_batch_size=4)
    inner.fault = abort(C)
    first, second, third = call(engine, A), call(engine, B, C), call(engine, D)
    with pytest.raises(RequestAbortedError, match=r"^row 1 \(request .*out of memory"):
        second.result(LIMIT_S)
    assert_answered(first, A)
    assert_answered(third, D)


def test_rows_of_an_error_are_counted_through_a_split_call(inner: Held) -> None:
    engine = BatchingEngine(inner, max_batch_size=2)
    inner.fault = abort(D)
    with pytest.raises(RequestAbortedError, match=r"^row 3 \(request .*out of memory") as caught:
        engine.generate([A, B, C, D, A, B])
    assert "row 1 " in str(caught.value.__cause__)
    assert inner.calls == [ids_of(A, B), ids_of(C, D)]  # what is left of a lost call is not sent


def test_a_call_alone_is_not_sent_again(inner: Held) -> None:
    inner.refuse = refuse(A, RequestRejectedError("no such grammar"))
    with pytest.raises(RequestRejectedError):
        BatchingEngine(inner).generate([A, B])
    assert inner.calls == [ids_of(A, B)]


@WAYS
@pytest.mark.parametrize(
    "error", [EngineUnreachableError, EngineTimeoutError, AuthenticationError], ids=lambda error: error.__name__
)
def test_an_engine_that_is_gone_is_an_error_for_the_whole_batch(
    inner: Held, make: Callable[..., Turned], error: type[EngineError], way: str
) -> None:
    engine = make(min_batch_size=3)
    inner.refuse = refuse(B, error("nothing answers"))
    futures = [call(engine, mine, way=way) for mine in (A, B, C)]
    errors = [future.exception(LIMIT_S) for future in futures]
    assert [(type(one), str(one)) for one in errors] == [(error, "nothing answers")] * 3
    assert len({id(one) for one in errors}) == 3
    assert inner.calls == [ids_of(A, B, C)]
    again = [call(engine, mine, way=way) for mine in (A, C, D)]
    for future, mine in zip(again, (A, C, D), strict=True):
        assert_answered(future, mine)


@pytest.mark.parametrize("error", [KeyboardInterrupt, ZeroDivisionError], ids=lambda error: error.__name__)
def test_a_leader_that_is_interrupted_leaves_nobody_waiting(
    inner: Held, make: Callable[..., Turned], error: type[BaseException]
) -> None:
    engine = make(min_batch_size=3)

    def interrupt(requests: Sequence[Request]) -> None:
        if len(requests) == 3:
            raise error

    inner.refuse = interrupt
    futures = [call(engine, mine) for mine in (A, B, C)]
    failed = [future for future in futures if future.exception(LIMIT_S) is not None]
    assert [type(future.exception()) for future in failed] == [error]
    for future, mine in zip(futures, (A, B, C), strict=True):
        if future not in failed:
            assert_answered(future, mine)
    assert (engine.state()["pending_futures"], len(inner.calls)) == (0, 3)


async def cancel_once(engine: Turned, ready: threading.Semaphore, *requests: Request) -> None:
    """Calls, cancels the call when it is ready for that, and lets what it was waiting for go on."""
    task = asyncio.ensure_future(engine.agenerate(requests))
    await asyncio.to_thread(take, ready)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task


def test_a_task_that_is_cancelled_while_it_waits_is_not_sent(inner: Held, make: Callable[..., Turned]) -> None:
    engine = make(min_batch_size=3)
    first = call(engine, A)
    asyncio.run(cancel_once(engine, engine.joined, B))
    assert (engine.state()["queue_size"], inner.calls) == (1, [])
    second = call(engine, C, D)
    assert_answered(first, A)
    assert_answered(second, C, D)
    assert inner.calls == [ids_of(A, C, D)]


@WAYS
def test_a_task_that_is_cancelled_while_it_leads_leaves_nobody_waiting(
    inner: Held, make: Callable[..., Turned], way: str
) -> None:
    engine = make(min_batch_size=3)
    first = call(engine, A, way=way)
    inner.gate.clear()

    async def lead() -> None:
        await cancel_once(engine, inner.entered, B, C)
        inner.gate.set()

    asyncio.run(lead())
    assert_answered(first, A)
    assert inner.calls == [ids_of(A, B, C), ids_of(A)]
    assert engine.state()["pending_futures"] == 0


def test_a_task_that_is_cancelled_before_it_can_lead_is_not_sent(inner: Held, make: Callable[..., Turned]) -> None:
    engine = make(min_batch_size=3, max_batch_size=3)

    async def two() -> list[Completion]:
        tasks = [asyncio.ensure_future(engine.agenerate([mine])) for mine in (A, B)]
        await asyncio.to_thread(take, engine.joined, 2)
        # Blocks the loop, so that the tasks learn after it, and after the cancellation, that it had them sent.
        assert_all_same(engine.generate([B, C, D]), RecordingEngine().generate([B, C, D]))
        tasks[0].cancel()
        return await tasks[1]

    assert_all_same(asyncio.run(two()), RecordingEngine().generate([B]))
    assert inner.calls == [ids_of(B, C, D), ids_of(B)]
    assert engine.state()["pending_futures"] == 0


def test_nothing_is_left_of_a_batch_that_nobody_waits_for(inner: Held, make: Callable[..., Turned]) -> None:
    engine = make(min_batch_size=3)

    async def alone() -> None:
        task = asyncio.ensure_future(engine.agenerate([A]))
        await asyncio.to_thread(take, engine.joined)
        engine.cleanup(flush=True)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    asyncio.run(alone())
    assert (inner.calls, engine.state()["pending_futures"]) == ([], 0)


def test_a_caller_whose_loop_was_closed_holds_nobody_up(inner: Held, make: Callable[..., Turned]) -> None:
    engine = make(min_batch_size=4)
    loop = asyncio.new_event_loop()
    lost = loop.create_task(engine.agenerate([A]))
    loop.run_until_complete(asyncio.wait([lost], timeout=0.001))
    take(engine.joined)
    loop.close()
    second = call(engine, B)
    engine.cleanup(flush=True)
    assert_answered(second, B)
    lost._log_destroy_pending = False  # type: ignore[attr-defined]


def test_a_wrong_number_of_completions_is_an_error(inner: Held) -> None:
    inner.generate = lambda requests: RecordingEngine().generate([*requests, A])  # type: ignore[method-assign]
    with pytest.raises(ProtocolError, match="sent 2 requests and got 3 completions"):
        BatchingEngine(inner).generate([A, B])


# --- cleaning up ------------------------------------------------------------------------------------------------------


@WAYS
def test_cleanup_fails_those_who_wait(inner: Held, make: Callable[..., Turned], way: str) -> None:
    engine = make(min_batch_size=9)
    futures = [call(engine, mine, way=way) for mine in (A, B)]
    engine.cleanup(flush=False)
    for future in futures:
        error = future.exception(LIMIT_S)
        assert isinstance(error, BatchCancelledError)
        assert isinstance(error, EngineError)
        assert isinstance(error, CancelledError)  # torchrl's cleanup_batching
        assert "cleanup(flush=False)" in str(error)
    assert (inner.calls, engine.state()["pending_futures"]) == ([], 0)
    again = call(engine, *[C] * 9, way=way)
    assert_answered(again, *[C] * 9)


def test_cleanup_leaves_nothing_in_the_queue(inner: Held, make: Callable[..., Turned]) -> None:
    engine = make(min_batch_size=2)

    async def cancelled() -> None:
        task = asyncio.ensure_future(engine.agenerate([A]))
        await asyncio.to_thread(take, engine.joined)
        engine.cleanup(flush=False)
        # Before the task has learned of it.
        assert engine.state()["queue_size"] == 0
        with pytest.raises(BatchCancelledError):
            await task

    asyncio.run(cancelled())
    assert inner.calls == []


@WAYS
def test_cleanup_sends_those_who_wait(inner: Held, make: Callable[..., Turned], way: str) -> None:
    engine = make(min_batch_size=9)
    futures = [call(engine, mine, way=way) for mine in (A, B)]
    engine.cleanup(flush=True)
    assert engine.state()["queue_size"] == 0
    for future, mine in zip(futures, (A, B), strict=True):
        assert_answered(future, mine)
    assert inner.calls == [ids_of(A, B)]
    again = call(engine, *[C] * 9, way=way)
    assert_answered(again, *[C] * 9)


@pytest.mark.parametrize("flush", [True, False])
def test_cleanup_ends_while_a_batch_is_under_way(inner: Held, make: Callable[..., Turned], flush: bool) -> None:
    engine = make(min_batch_size=2)
    inner.gate.clear()
    under_way = call(engine, A, B)
    take(inner.entered)
    waiting = call(engine, C)
    in_thread(lambda: engine.cleanup(flush=flush)).result(LIMIT_S)
    assert not under_way.done()
    if not flush:
        assert isinstance(waiting.exception(LIMIT_S), BatchCancelledError)
    inner.gate.set()
    assert_answered(under_way, A, B)
    if flush:
        assert_answered(waiting, C)


@pytest.mark.parametrize("flush", [True, False])
def test_cleanup_of_an_empty_queue_does_nothing(inner: Held, flush: bool) -> None:
    engine = BatchingEngine(inner)
    engine.cleanup(flush=flush)
    engine.cleanup(flush=flush)
    assert inner.calls == []
    assert len(engine.generate([A])) == 1


@WAYS
def test_close_ends_those_who_wait_and_leaves_the_engine_open(
    inner: Held, make: Callable[..., Turned], way: str
) -> None:
    engine = make(min_batch_size=2)
    inner.gate.clear()
    under_way = call(engine, A, B, way=way)
    take(inner.entered)
    waiting = call(engine, C, way=way)
    engine.close()
    engine.close()
    with pytest.raises(BatchCancelledError, match=r"closed by close\(\)"):
        waiting.result(LIMIT_S)
    inner.gate.set()
    assert_answered(under_way, A, B)
    with pytest.raises(EngineError, match=r"closed by close\(\); make a new one"):
        engine.generate([A])
    with pytest.raises(EngineError, match=r"closed by close\(\); make a new one"):
        asyncio.run(engine.agenerate([A]))
    assert inner.closed == 0
    assert len(inner.generate([A])) == 1


# --- what it says of itself -------------------------------------------------------------------------------------------


def test_state_counts_rows(inner: Held, make: Callable[..., Turned]) -> None:
    engine = make(min_batch_size=3, max_batch_size=5)
    fixed = {"batching_enabled": True, "min_batch_size": 3, "max_batch_size": 5, "timeout": 1000.0}
    idle = {"queue_size": 0, "pending_futures": 0, "processing": False, "lock_state": "unlocked"}
    assert engine.state() == fixed | idle
    torchrl = LLMWrapperBase.get_batching_state(SimpleNamespace(batching=True))
    assert engine.state().keys() == torchrl.keys()
    inner.gate.clear()
    sent = call(engine, A, B, C)
    waiting = call(engine, C, D)
    take(inner.entered)
    busy = {"queue_size": 2, "pending_futures": 5, "processing": True, "lock_state": "locked"}
    assert engine.state() == fixed | busy
    inner.gate.set()
    sent.result(LIMIT_S)
    engine.cleanup(flush=True)
    waiting.result(LIMIT_S)
    assert engine.state() == fixed | idle


def test_everything_an_engine_has_is_the_wrapped_ones(inner: Held) -> None:
    engine = BatchingEngine(inner, min_batch_size=2)
    assert engine.info is inner.info
    options = {"version": "v8", "transport": "disk", "running": "continue"}
    assert engine.update_weights("/weights", **options) == "v8"
    assert asyncio.run(engine.aupdate_weights("/others", **options)) == "v8"
    assert inner.given == [("/weights", options), ("/others", options)]
    public = {name for name in vars(Engine) if not name.startswith("_")}
    assert public <= vars(BatchingEngine).keys()


COPIES: dict[str, Callable[[Turned], Turned]] = {
    "pickle": lambda engine: pickle.loads(pickle.dumps(engine)),
    "deepcopy": copy.deepcopy,
}


@pytest.mark.parametrize("way", COPIES)
def test_a_copy_keeps_the_options_and_not_the_queue(way: str) -> None:
    server = RecordingServer()
    try:
        engine = Turned(connect(server.url), min_batch_size=2, max_batch_size=7, timeout_s=900.0)
        waiting = call(engine, A)
        one = COPIES[way](engine)
        two = COPIES[way](one)
        for found in (one, two):
            assert type(found) is Turned
            assert (found.min_batch_size, found.max_batch_size, found.timeout_s) == (2, 7, 900.0)
            assert isinstance(found.engine, SGLangServer)
            assert found.engine is not engine.engine
            assert found.engine.url == server.url
            assert found.state()["queue_size"] == 0
            assert_answered(call(found, B, C), B, C)
        assert_answered(call(engine, D), D)
        assert_answered(waiting, A)
        assert server.sent_rows == [list(ids) for ids in ids_of(B, C, B, C, A, D)]
    finally:
        server.stop()


def test_it_says_its_options(inner: Held) -> None:
    assert repr(BatchingEngine(inner, min_batch_size=2)).endswith(
        "min_batch_size=2, max_batch_size=None, timeout_s=10.0)"
    )
