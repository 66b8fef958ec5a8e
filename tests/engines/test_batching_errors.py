"""`BatchingEngine`: whom an error reaches, and that nobody waits for what will never come."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Sequence

import pytest
from helpers.engine_contract import BAD_ROWS, assert_all_same
from helpers.fake_engine import Answer, RecordingEngine, response_of
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
    take,
)

from torchrl_sglang_hidden.engines.batching import BatchingEngine
from torchrl_sglang_hidden.errors import (
    AlignmentError,
    AuthenticationError,
    EngineError,
    EngineTimeoutError,
    EngineUnreachableError,
    InputError,
    ProtocolError,
    RequestAbortedError,
    RequestRejectedError,
    SGLangHiddenError,
)
from torchrl_sglang_hidden.records import Completion, Request


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
    """Return a function that refuses every call with a certain row in it."""

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
    with pytest.raises(RequestAbortedError, match=r"^row 1 \(request .*out of memory") as caught:
        second.result(LIMIT_S)
    assert_answered(first, A)
    assert_answered(third, D)
    assert inner.calls == [ids_of(A, B, C, D)], "what was sampled for the others was not thrown away"
    whole, aborted = caught.value.completions
    assert_all_same([whole], RecordingEngine().generate([B]))
    assert (aborted.error, aborted.finish_reason) == (caught.value, "abort")


def test_rows_of_an_error_are_counted_through_a_split_call(inner: Held) -> None:
    engine = BatchingEngine(inner, max_batch_size=2)
    inner.fault = abort(D)
    with pytest.raises(RequestAbortedError, match=r"^row 3 \(request .*out of memory") as caught:
        engine.generate([A, B, C, D, A, B])
    assert_all_same(caught.value.completions[:3], RecordingEngine().generate([A, B, C]))
    assert str(caught.value.completions[3].error) == str(caught.value)
    assert caught.value.completions[4:] == (None, None), "those were not sent"
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
    """Call, cancel the call once it is ready for that, and let what it was waiting for go on."""
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
