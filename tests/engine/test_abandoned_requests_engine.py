"""Requests that nobody waits for any more, and samples that come late, on a real server: nothing of theirs stays."""

from __future__ import annotations

import asyncio
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace

import httpx
import pytest
from helpers.policy_checks import assert_rows, prompt_of, tokens_input
from transformers import PreTrainedTokenizerBase

from torchrl_sglang_hidden import (
    EngineTimeoutError,
    HiddenSpec,
    RequestAbortedError,
    SGLangHiddenWrapper,
    SGLangServer,
)
from torchrl_sglang_hidden.protocol import CHANNEL
from torchrl_sglang_hidden.records import Request
from torchrl_sglang_hidden.spec.hidden import SEGMENTS

# SGLang by itself sees after 2 to 4 seconds that a connection is gone.
SOON_S = 1.5
ENDLESS = {"temperature": 0.0, "max_new_tokens": 2000, "ignore_eos": True}


def endless(rows: int) -> list[Request]:
    return [
        Request(tuple(prompt_of(6, seed=row)), sampling=ENDLESS, hidden=HiddenSpec(SEGMENTS)) for row in range(rows)
    ]


@pytest.fixture
def open_pools(smol: SGLangServer) -> Iterator[Callable[[], int]]:
    """Yield a function that asks how many requests for states the scheduler works on."""
    with httpx.Client(base_url=smol.url, timeout=60, trust_env=False) as client:
        yield lambda: client.get("/server_info").json()["internal_states"][0][CHANNEL]["open_pools"]


def assert_dropped(open_pools: Callable[[], int]) -> None:
    limit = time.monotonic() + SOON_S
    while open_pools():
        assert time.monotonic() < limit


@pytest.mark.parametrize("way", ["sync", "async"])
def test_a_read_timeout_leaves_nothing_on_the_server(
    smol: SGLangServer, open_pools: Callable[[], int], way: str
) -> None:
    with SGLangServer(smol.url, read_timeout_s=8.0) as impatient:
        with pytest.raises(EngineTimeoutError):
            impatient.generate(endless(6)) if way == "sync" else asyncio.run(impatient.agenerate(endless(6)))
        assert_dropped(open_pools)
        # It can be used again, also where the machine is busy with other tests.
        assert len(impatient.generate([replace(endless(1)[0], sampling={"max_new_tokens": 2})])) == 1


def test_ctrl_c_leaves_nothing_on_the_server(smol: SGLangServer, open_pools: Callable[[], int]) -> None:
    def interrupt() -> None:
        while open_pools() < 3:
            pass
        os.kill(os.getpid(), signal.SIGINT)

    thread = threading.Thread(target=interrupt, daemon=True)
    thread.start()
    with pytest.raises(KeyboardInterrupt):
        smol.generate(endless(3))
    thread.join()
    assert_dropped(open_pools)


def test_a_cancelled_task_leaves_nothing_on_the_server(smol: SGLangServer, open_pools: Callable[[], int]) -> None:
    async def run() -> None:
        task = asyncio.ensure_future(smol.agenerate(endless(3)))
        while await asyncio.to_thread(open_pools) < 3:
            assert not task.done()
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        await asyncio.to_thread(assert_dropped, open_pools)

    asyncio.run(run())


def abort_in_the_middle(smol: SGLangServer, open_pools: Callable[[], int], rows: int) -> threading.Thread:
    """Abort everything once ``rows`` rows are left, which have sampled some tokens by then."""

    def abort() -> None:
        while open_pools() < rows + 1:
            pass
        while open_pools() > rows:
            pass
        httpx.post(f"{smol.url}/abort_request", json={"abort_all": True}, trust_env=False).raise_for_status()

    thread = threading.Thread(target=abort, daemon=True)
    thread.start()
    return thread


def test_an_abort_in_the_middle_of_eight_rows_loses_nothing(
    smol: SGLangServer, smol_dir: str, tokenizer: PreTrainedTokenizerBase, open_pools: Callable[[], int]
) -> None:
    """Half of the rows have finished by then; the others come back with their tokens, log-probs and states so far."""
    requests = [
        replace(one, sampling={**ENDLESS, "max_new_tokens": 4} if row < 4 else ENDLESS)
        for row, one in enumerate(endless(8))
    ]
    thread = abort_in_the_middle(smol, open_pools, 4)
    with pytest.raises(RequestAbortedError, match=r"row 4 .*finished with 'abort' after \d+ tokens") as caught:
        smol.generate(requests)
    thread.join()
    found = caught.value.completions
    assert [one.finish_reason for one in found] == ["length"] * 4 + ["abort"] * 4
    assert all(len(one.response_ids) == 4 for one in found[:4])
    assert all(one.response_ids for one in found[4:])

    policy = SGLangHiddenWrapper(
        smol, tokenizer=tokenizer, input_mode="tokens", hidden=HiddenSpec(SEGMENTS), on_error="nan",
        generate_kwargs=ENDLESS,
    )  # fmt: skip
    thread = abort_in_the_middle(smol, open_pools, 2)
    with_one_that_ends = [prompt_of(6, seed=1), prompt_of(9, seed=2)]
    ended = threading.Thread(target=smol.generate, args=([replace(requests[0], return_errors=True)],))
    ended.start()
    out = policy(tokens_input(with_one_that_ends))
    thread.join()
    ended.join()
    assert out["finish_reason"] == ["abort"] * 2
    assert out["error"][1].startswith("RequestAbortedError: row 1 ")
    assert_rows(out, smol_dir, SEGMENTS)
    assert not out.get(("masks", "all_assistant_mask"), as_list=True)[0].any()


def test_of_more_samples_than_wanted_the_first_are_kept(
    smol: SGLangServer, smol_dir: str, tokenizer: PreTrainedTokenizerBase, open_pools: Callable[[], int]
) -> None:
    """The late ones would go on for minutes."""
    stops = [tokenizer.encode(word)[0] for word in (" the", " a", " is", " to", " of", " and", ",", ".")]
    policy = SGLangHiddenWrapper(
        smol, tokenizer=tokenizer, input_mode="tokens", hidden=HiddenSpec(SEGMENTS), num_samples=2, extra_samples=3,
        generate_kwargs={"max_new_tokens": 2000, "temperature": 1.0, "stop_token_ids": stops},
    )  # fmt: skip
    out = policy(tokens_input([prompt_of(6, seed=1), prompt_of(9, seed=2)]))
    assert_dropped(open_pools)
    assert out.batch_size == (2, 2)
    assert {reason for row in out["finish_reason"] for reason in row} == {"stop"}
    assert_rows(out.reshape(-1), smol_dir, SEGMENTS)
