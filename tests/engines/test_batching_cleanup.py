"""`BatchingEngine`: cleaning up, closing, and what it says of itself."""

from __future__ import annotations

import asyncio
import copy
import pickle
from collections.abc import Callable
from concurrent.futures import CancelledError
from types import SimpleNamespace

import pytest
from helpers.fake_engine import RecordingServer
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
from torchrl.modules.llm.policies import LLMWrapperBase

from torchrl_sglang_hidden import SGLangServer, connect
from torchrl_sglang_hidden.engines import Engine
from torchrl_sglang_hidden.engines.batching import BatchingEngine
from torchrl_sglang_hidden.errors import (
    BatchCancelledError,
    EngineError,
)
from torchrl_sglang_hidden.weights.heads import PushedHeads

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
    inner.weight_version = lambda: "v9"  # type: ignore[method-assign]
    assert engine.weight_version() == "v9"
    options = {"version": "v8", "transport": "disk", "running": "continue"}
    assert engine.update_weights("/weights", **options) == "v8"
    assert asyncio.run(engine.aupdate_weights("/others", **options)) == "v8"
    assert inner.given == [("/weights", options), ("/others", options)]
    # What is counted is read from the engine's own meter.
    assert engine._meter is inner._meter
    counted = {"counters", "server_counters"}
    # These come down to `update_weights` and to the engine's own heads.
    heads = PushedHeads([])
    inner._pushed_heads = lambda: heads  # type: ignore[method-assign]
    assert engine._pushed_heads() is heads
    built = {"aupdate_weights", "push_head", "drop_head"}
    public = {name for name in vars(Engine) if not name.startswith("_")}
    assert public - counted - built <= vars(BatchingEngine).keys()


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
