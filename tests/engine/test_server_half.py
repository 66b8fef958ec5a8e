"""The server half in SGLang's scheduler: inert for those who do not ask, nothing retained, right under pressure."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import pytest
from helpers.policy_checks import SEGMENTS, assert_rows, make_policy, prompt_of, tokens_input
from transformers import PreTrainedTokenizerBase

from torchrl_sglang_hidden import HiddenSpec, SGLangServer
from torchrl_sglang_hidden.protocol import CHANNEL, PROTOCOL, pack_options
from torchrl_sglang_hidden.reduce.wanted import Wanted

SPEC = HiddenSpec(segments=SEGMENTS)
GOOD = pack_options(Wanted(SEGMENTS), "text")


@pytest.fixture
def http(smol: SGLangServer) -> Iterator[httpx.Client]:
    """SGLang's own interface, without this package's client."""
    with httpx.Client(base_url=smol.url, timeout=120, trust_env=False) as client:
        yield client


def generate(http: httpx.Client, **payload: Any) -> Any:
    response = http.post("/generate", json=payload)
    response.raise_for_status()
    return response.json()


def open_pools(http: httpx.Client) -> int:
    return http.get("/server_info").json()["internal_states"][0][CHANNEL]["open_pools"]


def sampling(custom: object = None, max_new_tokens: int = 4) -> dict[str, Any]:
    # Not ignore_eos: SGLang then reserves all of max_new_tokens in its KV cache, and never retracts.
    params: dict[str, Any] = {"max_new_tokens": max_new_tokens, "min_new_tokens": max_new_tokens, "temperature": 0}
    return params if custom is None else {**params, "custom_params": custom}


def test_a_request_that_does_not_ask_sees_nothing_of_it(http: httpx.Client) -> None:
    asks = {CHANNEL: GOOD}
    prompts = [prompt_of(6, seed=1), prompt_of(7, seed=2)]
    quiet, asking = generate(http, input_ids=prompts, sampling_params=[sampling(), sampling(asks)])
    alone = generate(http, input_ids=[prompts[0]], sampling_params=[sampling()])[0]
    assert CHANNEL in asking["meta_info"]
    assert quiet["meta_info"].keys() == alone["meta_info"].keys()
    assert CHANNEL not in quiet["meta_info"]
    assert "hidden_states" not in asking["meta_info"]
    assert quiet["output_ids"] == alone["output_ids"]


@pytest.mark.parametrize(
    "custom",
    [
        {CHANNEL: "text"},
        {CHANNEL: {"protocol": PROTOCOL + 1, "options": GOOD["options"]}},
        {CHANNEL: {"protocol": PROTOCOL}},
        {CHANNEL: {"protocol": PROTOCOL, "options": "{"}},
        {CHANNEL: {"protocol": PROTOCOL, "options": 7}},
        {CHANNEL: {"protocol": PROTOCOL, "options": GOOD["options"].replace("mean", "median")}},
        {CHANNEL: {"protocol": PROTOCOL, "options": GOOD["options"].replace("prompt", "everything")}},
    ],
)
def test_options_that_make_no_sense_are_refused_and_harm_nobody(http: httpx.Client, custom: object) -> None:
    """A client of another version would otherwise get an answer without what it asked for."""
    prompts = [prompt_of(5, seed=3), prompt_of(6, seed=4)]
    answer = http.post("/generate", json={"input_ids": prompts, "sampling_params": [sampling(), sampling(custom)]})
    assert answer.status_code == 400
    assert "row 1" in answer.text
    assert len(generate(http, input_ids=prompts[:1], sampling_params=[sampling()])[0]["output_ids"]) == 4


def test_nothing_is_left_after_requests_finish_or_are_aborted(http: httpx.Client) -> None:
    assert open_pools(http) == 0
    asks = {CHANNEL: GOOD}
    rows = generate(http, input_ids=[prompt_of(6, seed=s) for s in (4, 5)], sampling_params=[sampling(asks)] * 2)
    assert all(CHANNEL in row["meta_info"] for row in rows)
    assert open_pools(http) == 0
    payload = {"rid": "to-abort", "input_ids": prompt_of(6, seed=6), "sampling_params": sampling(asks, 2000)}
    with http.stream("POST", "/generate", json={**payload, "stream": True}) as stream:
        chunks = stream.iter_lines()
        next(chunks)  # it runs
        assert open_pools(http) == 1
        http.post("/abort_request", json={"rid": "to-abort"}).raise_for_status()
        assert any('"abort"' in line for line in chunks)
    # The abort is answered before the scheduler's last step is done: a request behind it waits for that.
    generate(http, input_ids=[prompt_of(4, seed=7)], sampling_params=[sampling()])
    assert open_pools(http) == 0


def test_one_vector_travels_however_long_the_prompt(http: httpx.Client) -> None:
    asks = {CHANNEL: GOOD}

    def payload_bytes(num_prompt: int) -> int:
        params = sampling(asks, max_new_tokens=2)
        row = generate(http, input_ids=[prompt_of(num_prompt, seed=8)], sampling_params=[params])[0]
        return len(row["meta_info"][CHANNEL][0]["data"])

    assert payload_bytes(4) == payload_bytes(150) == 3 * 576 * 4 * 4 // 3  # three float32 vectors in base64


def test_many_callers_at_once(smol: SGLangServer, tokenizer: PreTrainedTokenizerBase, smol_dir: str) -> None:
    policy = make_policy(smol, tokenizer)
    prompts = [[prompt_of(10 + 5 * seed, seed), prompt_of(20, seed)] for seed in range(4)]
    with ThreadPoolExecutor(len(prompts)) as pool:
        outs = list(pool.map(lambda pair: policy(tokens_input(pair)), prompts))
    for pair, out in zip(prompts, outs, strict=True):
        assert [row.prompt_ids for row in assert_rows(out, smol_dir, SEGMENTS)] == pair
