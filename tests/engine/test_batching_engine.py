"""Threads that share a request, on a real server: each gets what it gets alone.

They share it by `BatchingEngine`, errors included, or by TorchRL's `InferenceServer` in front of the policy, which
gives an error that is raised to every caller of its batch.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import pytest
from helpers.engine_contract import assert_all_same, assert_same, request
from helpers.policy_checks import (
    QUESTIONS,
    assert_row,
    history_input,
    make_policy,
    prompt_of,
    text_input,
    tokens_input,
)
from helpers.torchrl_pipelines import unpadded
from tensordict import TensorDictBase
from torchrl.modules.inference_server import InferenceServer, PolicyClientModule
from transformers import PreTrainedTokenizerBase

from torchrl_sglang_hidden import (
    InputError,
    PromptLengthError,
    RequestRejectedError,
    SGLangHiddenWrapper,
    SGLangServer,
    TokenIdError,
)
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


# --- TorchRL's InferenceServer --------------------------------------------------------------------------------------


def submitted(policy: SGLangHiddenWrapper, rows: Sequence[TensorDictBase]) -> tuple[InferenceServer, list[Any]]:
    """Return a server that has not begun, and the answers that threads wait for: they are one batch."""
    server = InferenceServer(policy)
    with ThreadPoolExecutor(len(rows)) as pool:
        return server, list(pool.map(PolicyClientModule(server).submit, rows))


@pytest.mark.parametrize(("mode", "padded"), [("history", False), ("text", True), ("tokens", False)])
def test_an_inference_server_answers_each_thread(
    mode: str,
    padded: bool,
    counting: Counting,
    smol_dir: str,
    tokenizer: PreTrainedTokenizerBase,
    chat_ids: Callable[[str], list[int]],
) -> None:
    batch = {
        "history": lambda: history_input(QUESTIONS[:THREADS]),
        "text": lambda: text_input(QUESTIONS[:THREADS]),
        "tokens": lambda: tokens_input([chat_ids(question) for question in QUESTIONS[:THREADS]]),
    }[mode]
    policy = make_policy(counting, tokenizer, mode, pad_output=padded, max_new_tokens=4)
    alone = [unpadded(row) for row in policy(batch()).unbind(0)]
    counting.calls.clear()
    rows = batch().unbind(0)
    server, answers = submitted(policy, rows)
    with server:
        found = [answer.result(TIMEOUT_S) for answer in answers]
    assert counting.calls == [THREADS]
    assert [set(row.keys()) for row in rows] == [{mode}] * THREADS, "a thread's own row is as it was"
    for row, expected in zip(found, alone, strict=True):
        assert int(row["policy_version"]) == 0
        shared = unpadded(row)
        assert_row(shared, smol_dir)
        for name in ("prompt_ids", "response_ids", "full_ids", "text", "finish_reason", "weight_version"):
            assert getattr(shared, name) == getattr(expected, name)


def test_an_inference_server_goes_on_after_an_error(
    counting: Counting, smol_dir: str, tokenizer: PreTrainedTokenizerBase
) -> None:
    rows = text_input(["The capital of France is", "", "Birds can"]).unbind(0)
    policy = make_policy(counting, tokenizer, "text", max_new_tokens=4)
    server, answers = submitted(policy, rows)
    with server:
        for answer in answers:
            with pytest.raises(PromptLengthError, match=r"row \d.* an empty string"):
                answer.result(TIMEOUT_S)
        good = PolicyClientModule(server)(rows[0])
    server, answers = submitted(policy.get_new_version(on_error="nan"), rows)
    with server:
        kept = [answer.result(TIMEOUT_S) for answer in answers]
    assert counting.calls == [1, 2], "nothing is sent of the batch that raised, nor of the row without a prompt"
    # Threads are answered by the row that they submitted, whatever the order of the batch.
    assert [row["finish_reason"] for row in kept] == ["length", "error", "length"]
    assert ["an empty string" in row["error"] for row in kept] == [False, True, False]
    for row in (good, kept[0], kept[2]):
        assert_row(unpadded(row), smol_dir)
    assert kept[0]["text"].response == good["text"].response
