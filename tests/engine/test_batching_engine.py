"""`BatchingEngine` on a real server: threads that share a request get what they get alone, errors included."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import pytest
from helpers.engine_contract import assert_all_same, assert_same, request
from helpers.policy_checks import QUESTIONS, prompt_of

from torchrl_sglang_hidden import InputError, RequestRejectedError, SGLangServer, TokenIdError
from torchrl_sglang_hidden.engines.batching import BatchingEngine
from torchrl_sglang_hidden.records import Completion, Request

THREADS = 8
# Far over what any test here takes: nothing is sent because time is up.
TIMEOUT_S = 300.0


class Counting(SGLangServer):
    """Keeps the number of rows of every call."""

    def __init__(self, *args: Any, **options: Any) -> None:
        self.calls: list[int] = []
        super().__init__(*args, **options)

    def generate(self, requests: Sequence[Request]) -> list[Completion]:
        self.calls.append(len(requests))
        return super().generate(requests)

    async def agenerate(self, requests: Sequence[Request]) -> list[Completion]:
        self.calls.append(len(requests))
        return await super().agenerate(requests)


@pytest.fixture
def counting(smol: SGLangServer) -> Iterator[Counting]:
    with Counting(smol.url) as engine:
        yield engine


@pytest.fixture
def requests(chat_ids: Callable[[str], list[int]]) -> list[Request]:
    return [request(chat_ids(question)) for question in QUESTIONS[:THREADS]]


def all_at_once(engine: BatchingEngine, calls: Sequence[Sequence[Request]]) -> list[Future[list[Completion]]]:
    barrier = threading.Barrier(len(calls))

    def call(mine: Sequence[Request]) -> list[Completion]:
        barrier.wait(TIMEOUT_S)
        return engine.generate(mine)

    with ThreadPoolExecutor(len(calls)) as pool:
        return [pool.submit(call, mine) for mine in calls]


def test_each_thread_gets_its_own_answer(counting: Counting, smol: SGLangServer, requests: list[Request]) -> None:
    engine = BatchingEngine(counting, min_batch_size=THREADS, timeout_s=TIMEOUT_S)
    futures = all_at_once(engine, [[one] for one in requests])
    found = [future.result()[0] for future in futures]
    assert counting.calls == [THREADS]
    alone = [smol.generate([one])[0] for one in requests]
    assert_all_same(found, alone)
    assert len({one.response_ids for one in alone}) == THREADS


def test_each_task_gets_its_own_answer(counting: Counting, smol: SGLangServer, requests: list[Request]) -> None:
    engine = BatchingEngine(counting, min_batch_size=4, timeout_s=TIMEOUT_S)

    async def tasks() -> list[list[Completion]]:
        return await asyncio.gather(*(engine.agenerate([one]) for one in requests[:4]))

    found = [row for rows in asyncio.run(tasks()) for row in rows]
    assert counting.calls == [4]
    assert_all_same(found, smol.generate(requests[:4]))


# What the client refuses before it is sent, and what only the server can tell.
BAD: dict[str, tuple[Callable[[SGLangServer], Request], type[Exception], list[int]]] = {
    "foreign id": (lambda engine: request([5, engine.info.vocab_size]), TokenIdError, [THREADS - 1]),
    "bad grammar": (
        lambda engine: request(prompt_of(5, seed=1), regex="(unclosed"),
        RequestRejectedError,
        [1] * THREADS + [THREADS],
    ),
}


@pytest.mark.parametrize("bad", BAD)
def test_one_bad_row_does_not_reach_the_others(
    counting: Counting, smol: SGLangServer, requests: list[Request], bad: str
) -> None:
    make_bad, error, calls = BAD[bad]
    # The row that the client refuses never joins: the others must be enough for a batch.
    size = THREADS - 1 if issubclass(error, InputError) else THREADS
    engine = BatchingEngine(counting, min_batch_size=size, timeout_s=TIMEOUT_S)
    *futures, failed = all_at_once(engine, [[one] for one in requests[:-1]] + [[make_bad(smol)]])
    assert type(failed.exception()) is error
    for future, mine in zip(futures, requests[:-1], strict=True):
        assert_same(future.result()[0], smol.generate([mine])[0])
    assert sorted(counting.calls) == calls
    # The queue goes on.
    again = all_at_once(engine, [[one] for one in requests[:size]])
    assert_all_same([future.result()[0] for future in again], smol.generate(requests[:size]))


def test_a_split_call_is_answered_in_order(counting: Counting, smol: SGLangServer, requests: list[Request]) -> None:
    engine = BatchingEngine(counting, min_batch_size=2, max_batch_size=3, timeout_s=TIMEOUT_S)
    assert_all_same(engine.generate(requests), smol.generate(requests))
    assert counting.calls == [3, 3, 2]
