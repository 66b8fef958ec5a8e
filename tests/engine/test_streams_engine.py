"""The contract of streams on real engines, and what only they show: the numbers, stop strings, hanging up.

In-process, the contract of sessions runs here too.
"""

from __future__ import annotations

import asyncio
import gc
import time
from collections.abc import Callable, Iterator
from typing import Any

import httpx
import pytest
import torch
from helpers.hf_oracle import teacher_force
from helpers.policy_checks import LOG_PROB_ATOL, SEGMENTS, STATE_RTOL, prompt_of, relative_error
from helpers.session_contract import SessionContract
from helpers.stream_contract import StreamContract, assert_adds_up, collect
from transformers import PreTrainedTokenizerBase

from torchrl_sglang_hidden import HiddenSpec, RequestAbortedError, SGLangOffline, SGLangServer
from torchrl_sglang_hidden.engines import Engine
from torchrl_sglang_hidden.engines.streams import StreamChunk
from torchrl_sglang_hidden.protocol import CHANNEL
from torchrl_sglang_hidden.records import Completion, Request

# A request that goes on for minutes unless it is dropped, and how long that may take.
ENDLESS = {"temperature": 0.0, "max_new_tokens": 4000, "min_new_tokens": 4000}
DROPPED_WITHIN_S = 20
ALL = HiddenSpec(segments=SEGMENTS)


def endless() -> Request:
    return Request(tuple(prompt_of(6, seed=7)), sampling=ENDLESS, hidden=ALL)


class HangingUp:
    """A request that nobody reads any more is dropped. A subclass gives `engine`, and `open_pools`: how many requests
    that asked for states its scheduler works on."""

    def wait_until_dropped(self, open_pools: Callable[[], int]) -> None:
        limit = time.monotonic() + DROPPED_WITHIN_S
        while open_pools():
            assert time.monotonic() < limit

    @pytest.mark.parametrize("way", ["close", "error in with", "let go", "let go unread"])
    def test_of_a_stream(self, engine: Engine, open_pools: Callable[[], int], way: str) -> None:
        stream = engine.stream(endless())
        if way != "let go unread":
            next(stream)
            assert open_pools() == 1
        if way == "close":
            stream.close()
        elif way == "error in with":
            with pytest.raises(ZeroDivisionError), stream:
                1 / 0  # noqa: B018
        else:
            del stream
            gc.collect()
        self.wait_until_dropped(open_pools)

    @pytest.mark.parametrize("way", ["close", "cancel", "let go"])
    def test_of_an_awaited_stream(self, engine: Engine, open_pools: Callable[[], int], way: str) -> None:
        async def run() -> None:
            stream = await engine.astream(endless())
            await anext(stream)
            assert await asyncio.to_thread(open_pools) == 1
            if way == "close":
                await stream.aclose()
            elif way == "cancel":
                reading = asyncio.ensure_future(collect(stream))
                await asyncio.wait([reading], timeout=0.2)
                reading.cancel()
                with pytest.raises(asyncio.CancelledError):
                    await reading
            else:
                del stream
                gc.collect()
            await asyncio.to_thread(self.wait_until_dropped, open_pools)

        asyncio.run(run())

    def test_of_a_cancelled_call(self, engine: Engine, open_pools: Callable[[], int]) -> None:
        async def run() -> None:
            task = asyncio.ensure_future(engine.agenerate([endless()]))
            while await asyncio.to_thread(open_pools) == 0:
                assert not task.done()
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task

        asyncio.run(run())
        self.wait_until_dropped(open_pools)


@pytest.fixture
def http(smol: SGLangServer) -> Iterator[httpx.Client]:
    """SGLang's own interface, without this package's client."""
    with httpx.Client(base_url=smol.url, timeout=120, trust_env=False) as client:
        yield client


class TestServer(StreamContract, HangingUp):
    @pytest.fixture
    def engine(self, smol: SGLangServer) -> SGLangServer:
        return smol

    @pytest.fixture
    def open_pools(self, http: httpx.Client) -> Callable[[], int]:
        return lambda: http.get("/server_info").json()["internal_states"][0][CHANNEL]["open_pools"]


class InProcess(StreamContract, SessionContract, HangingUp):
    """Collected by the process that `in_process_log` starts, and not by name in this one."""

    @pytest.fixture
    def engine(self, in_process: SGLangOffline) -> SGLangOffline:
        return in_process

    @pytest.fixture
    def open_pools(self, engine: SGLangOffline) -> Callable[[], int]:
        def ask() -> int:
            states = engine._loop.run(engine.engine.tokenizer_manager.get_internal_state)
            return int(states[0][CHANNEL]["open_pools"])

        return ask


def test_in_process(in_process_log: str) -> None:
    assert "InProcess::test_of_a_stream[let go unread] PASSED" in in_process_log
    assert "InProcess::test_of_a_cancelled_call PASSED" in in_process_log
    assert "InProcess::test_every_turn_goes_on_behind_all_before_it PASSED" in in_process_log


def read(engine: Engine, one: Request) -> tuple[list[StreamChunk], Completion]:
    stream = engine.stream(one)
    return list(stream), stream.completion


def test_the_numbers_of_a_stream_are_hugging_faces(
    smol: SGLangServer, smol_dir: str, chat_ids: Callable[[str], list[int]]
) -> None:
    one = Request(
        tuple(chat_ids("Name three colours of the rainbow, please.")),
        sampling={"temperature": 0.7, "max_new_tokens": 24},
        hidden=ALL,
    )
    chunks, completion = read(smol, one)
    assert_adds_up(chunks, completion)
    assert len(chunks) > 1
    truth = teacher_force(smol_dir, one.prompt_ids, completion.response_ids, temperature=0.7)
    found_T = torch.cat([chunk.log_probs_T for chunk in chunks if chunk.log_probs_T is not None])
    torch.testing.assert_close(found_T, truth.log_probs_T, atol=LOG_PROB_ATOL, rtol=0)
    for segment in SEGMENTS:
        error = relative_error(completion.hidden[segment].vector, truth.pooled(segment, "mean"))
        assert error < STATE_RTOL, f"{segment}: {error:.2e}"


def test_every_tokens_state_comes_at_the_end(smol: SGLangServer, smol_dir: str) -> None:
    one = Request(
        tuple(prompt_of(70, seed=8)),
        sampling={"temperature": 0.0, "max_new_tokens": 6},
        hidden=HiddenSpec(segments=("full",), pooling=None, tokens=True),
    )
    _, completion = read(smol, one)
    truth = teacher_force(smol_dir, one.prompt_ids, completion.response_ids)
    assert completion.token_rows is not None
    assert completion.token_rows.first == 0
    torch.testing.assert_close(completion.token_rows.rows_ND, truth.states_SD, atol=1e-2, rtol=1e-3)


# " capital of France" begins as the response does and then does not go on as it does; "apital" begins inside a token.
@pytest.mark.parametrize("stop", [" of", "apital", "capital of France", "capital of Francs", "Par", "The"])
def test_a_stop_string_is_never_shown(smol: SGLangServer, chat_ids: Callable[[str], list[int]], stop: str) -> None:
    one = Request(
        tuple(chat_ids("What is the capital of France?")),
        sampling={"temperature": 0.0, "max_new_tokens": 20, "stop": [stop]},
    )
    chunks, completion = read(smol, one)
    expected = smol.generate([one])[0]
    assert_adds_up(chunks, completion)
    assert completion.text == expected.text
    assert completion.response_ids == expected.response_ids
    assert stop not in completion.text


def test_half_a_character_is_never_shown(smol: SGLangServer, tokenizer: PreTrainedTokenizerBase) -> None:
    """Several tokens make one of these characters."""
    ids: list[int] = tokenizer("🎉🎉🎉日本語🎉", add_special_tokens=False)["input_ids"]
    assert len(ids) > 10
    one = Request(
        tuple(ids),
        sampling={"temperature": 0.0, "max_new_tokens": 16, "logit_bias": {str(i): 50.0 for i in set(ids)}},
    )
    chunks, completion = read(smol, one)
    assert_adds_up(chunks, completion)
    assert completion.text == smol.generate([one])[0].text
    assert "🎉" in completion.text
    assert len(chunks) > 1
    assert all("�" not in chunk.text for chunk in chunks[:-1])


def test_an_abort_in_the_middle_is_an_error(smol: SGLangServer, http: httpx.Client) -> None:
    stream = smol.stream(endless())
    next(stream)
    http.post("/abort_request", json={"abort_all": True}).raise_for_status()
    with pytest.raises(RequestAbortedError, match=r"finished with 'abort' after \d+ tokens"):
        list(stream)


def test_a_refusal_of_the_engines_own_is_an_error(smol: SGLangServer) -> None:
    """What this package does not look into: SGLang reads the pattern, and says what is wrong with it."""
    one: dict[str, Any] = {"max_new_tokens": 4, "regex": "a", "json_schema": "{}"}
    with pytest.raises(Exception, match=r"regex|json_schema|grammar") as raised:
        read(smol, Request((5, 6, 7), sampling=one))
    assert type(raised.value).__module__ == "torchrl_sglang_hidden.errors"
