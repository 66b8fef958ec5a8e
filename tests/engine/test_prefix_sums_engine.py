"""What a prompt whose beginning is in the prefix cache costs, and that its pools are complete all the same.

``cached_tokens`` is SGLang's own count of the positions that it did not compute.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import closing
from dataclasses import replace
from typing import Any

import httpx
import pytest
from helpers.completion_checks import assert_completion
from helpers.policy_checks import CHUNKED_PREFILL_SIZE, prompt_of

from torchrl_sglang_hidden import HiddenSpec, LastTokens, SGLangServer, TokenMask
from torchrl_sglang_hidden.protocol import CHANNEL
from torchrl_sglang_hidden.records import Completion, Request
from torchrl_sglang_hidden.reduce.wanted import BLOCK
from torchrl_sglang_hidden.sglang_api.payload import to_payload
from torchrl_sglang_hidden.sglang_api.responses import read_responses
from torchrl_sglang_hidden.spec.hidden import Pooling
from torchrl_sglang_hidden.spec.spans import PromptSpan

SMOL_LAYERS = 30
PROMPT = HiddenSpec(("prompt",))
FULL = HiddenSpec(("full", "response"))
# What needs every row of a prompt, so that a value over its beginning must have been kept.
PREFIX_POOLINGS: tuple[Pooling, ...] = ("mean", "max", "sum")


class Asker:
    """Sends requests as the client does, checks the answers, and tells what was cached."""

    def __init__(self, server: SGLangServer, model_dir: str) -> None:
        self.server, self.model_dir = server, model_dir
        self.http = httpx.Client(base_url=server.url, timeout=120, trust_env=False)

    def send(self, requests: Sequence[Request]) -> tuple[list[Completion], list[int]]:
        rows = self.http.post("/generate", json=to_payload(requests, self.server.info, binary=False)).json()
        completions = read_responses(requests, rows, self.server.info)
        for request, completion in zip(requests, completions, strict=True):
            assert_completion(request, completion, self.model_dir, SMOL_LAYERS)
        return completions, [row["meta_info"]["cached_tokens"] for row in rows]

    def one(self, ids: Sequence[int], spec: HiddenSpec | None, max_new_tokens: int = 2, **spans: Any) -> Any:
        sampling = {"max_new_tokens": max_new_tokens, "temperature": 0.0}
        [completion], [cached] = self.send([Request(tuple(ids), sampling, hidden=spec, spans=spans)])
        return completion, cached

    def prefix_bytes(self) -> int:
        state = self.http.get("/server_info").json()["internal_states"][0][CHANNEL]
        return int(state["prefix_bytes"])


@pytest.fixture
def asker(smol: SGLangServer, smol_dir: str) -> Any:
    asker = Asker(smol, smol_dir)
    with closing(asker.http):
        # Other tests have used the cache and the sums.
        asker.http.post("/flush_cache").raise_for_status()
        yield asker


@pytest.mark.parametrize("length", [2, 24, BLOCK, BLOCK + 1, 2 * CHUNKED_PREFILL_SIZE + 9])
@pytest.mark.parametrize("spec", [PROMPT, FULL], ids=["prompt", "full"])
@pytest.mark.parametrize("pooling", PREFIX_POOLINGS)
def test_an_equal_prompt_costs_its_last_token(asker: Asker, length: int, spec: HiddenSpec, pooling: Pooling) -> None:
    ids, spec = prompt_of(length, 31000 + length), replace(spec, pooling=pooling)
    assert asker.one(ids, spec)[1] == 0
    assert asker.one(ids, spec)[1] == length - 1


@pytest.mark.parametrize("pooling", PREFIX_POOLINGS)
def test_a_group_of_samples_costs_one_prefill(asker: Asker, pooling: Pooling) -> None:
    """As in GRPO: the prompt is computed once, and one token of it again for each further sample."""
    ids = prompt_of(150, 32000)
    asker.one(ids, HiddenSpec(("prompt",), pooling), max_new_tokens=0)
    sampling = {"max_new_tokens": 4, "temperature": 1.0}
    spec = HiddenSpec(("prompt", "response", "full"), pooling)
    _, cached = asker.send([Request(tuple(ids), sampling, hidden=spec)] * 8)
    assert cached == [149] * 8


def test_a_shared_beginning_is_computed_once_up_to_a_block(asker: Asker) -> None:
    beginning = prompt_of(2 * BLOCK + 11, 33000)
    asker.one(beginning, PROMPT)
    _, cached = asker.one(beginning[:-1] + prompt_of(20, 33001), PROMPT)
    assert cached == len(beginning) - 1, "its sum before the last token was kept"
    _, cached = asker.one(beginning[: 2 * BLOCK + 5] + prompt_of(20, 33002), PROMPT)
    assert cached == 2 * BLOCK
    _, cached = asker.one(beginning[: BLOCK - 1] + prompt_of(20, 33003), PROMPT)
    assert cached == 0, "no sum is kept inside the first block"


@pytest.mark.parametrize("pooling", PREFIX_POOLINGS)
def test_the_next_turn_of_a_chat_costs_what_is_new(asker: Asker, pooling: Pooling) -> None:
    ids = prompt_of(40, 34000)
    first, _ = asker.one(ids, HiddenSpec(("full",), pooling), max_new_tokens=9)
    turn = [*ids, *first.response_ids, *prompt_of(10, 34001)]
    _, cached = asker.one(turn, HiddenSpec(("prompt", "full"), pooling))
    assert cached == len(ids) + 9 - 1, "all but the last sampled token, which was never read"


def test_a_beginning_that_nobody_asked_about_is_computed_again(asker: Asker) -> None:
    ids = prompt_of(50, 35000)
    asker.one(ids, None)
    assert asker.one(ids, None)[1] == 49
    assert asker.one(ids, PROMPT)[1] == 0
    assert asker.one(ids, PROMPT)[1] == 49


def test_a_sum_stands_for_a_mean_and_not_for_a_maximum(asker: Asker) -> None:
    """Each is as Hugging Face has it, whoever was here before; and what has no value of its own is computed again."""
    ids = prompt_of(BLOCK + 40, 35500)
    specs = {pooling: HiddenSpec(("prompt", "full"), pooling) for pooling in PREFIX_POOLINGS}
    assert asker.one(ids, specs["mean"])[1] == 0
    assert asker.one(ids, specs["sum"])[1] == len(ids) - 1
    assert asker.one(ids, specs["max"])[1] == 0
    assert [asker.one(ids, spec)[1] for spec in specs.values()] == [len(ids) - 1] * 3


def test_what_needs_no_early_rows_uses_the_cache(asker: Asker) -> None:
    ids = prompt_of(50, 36000)
    asker.one(ids, None)
    assert asker.one(ids, HiddenSpec(("response",)))[1] == 49
    assert asker.one(ids, HiddenSpec(("prompt", "full", "response"), "last"))[1] == 49
    tail = HiddenSpec((), spans={"tail": LastTokens(5, "prompt")})
    assert asker.one(ids, tail, tail=PromptSpan(((45, 50),)))[1] == 45
    middle = HiddenSpec(("response",), spans={"middle": TokenMask("mask")})
    assert asker.one(ids, middle, middle=PromptSpan(((20, 22), (30, 31))))[1] == 20


def test_rows_of_the_whole_prompt_are_computed_each_time(asker: Asker) -> None:
    ids = prompt_of(50, 37000)
    spec = HiddenSpec(("prompt",), tokens=True)
    assert [asker.one(ids, spec)[1] for _ in range(2)] == [0, 0]
    assert asker.one(ids, HiddenSpec(("response",), tokens=True))[1] == 49


def test_a_flush_forgets_the_sums(asker: Asker) -> None:
    """A sum that outlives its cached keys is still right, but one that outlives its weights is not."""
    ids = prompt_of(2 * BLOCK, 38000)
    asker.one(ids, PROMPT)
    assert asker.prefix_bytes() > 0
    asker.http.post("/flush_cache").raise_for_status()
    assert asker.prefix_bytes() == 0
    assert asker.one(ids, PROMPT)[1] == 0


def test_many_at_once_with_a_common_beginning(asker: Asker) -> None:
    beginning = prompt_of(100, 39000)
    asker.one(beginning, PROMPT)
    sampling = {"max_new_tokens": 3, "temperature": 0.0}
    specs = (
        PROMPT,
        FULL,
        HiddenSpec(("prompt",), "last"),
        HiddenSpec(("prompt", "full"), "max"),
        HiddenSpec(("full",), "sum"),
        None,
        HiddenSpec(("full",), None, tokens=True),
    )
    requests = [
        Request((*beginning[: 60 + 10 * (index % 5)], *prompt_of(1 + index, 39001 + index)), sampling, hidden=spec)
        for index in range(10)
        for spec in specs
    ]
    asker.send(requests)
