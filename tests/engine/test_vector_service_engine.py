"""`POST /v1/hidden_states` of a real server: Hugging Face's states to any HTTP client, and a server that lives on.

The API key is under test in `test_qwen3_untied.py`, whose server wants one.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import httpx
import pytest
import torch
from helpers import hf_oracle
from helpers.policy_checks import CHUNKED_PREFILL_SIZE, STATE_RTOL, prompt_of, relative_error
from transformers import PreTrainedTokenizerBase

from torchrl_sglang_hidden import HiddenSpec, Request, SGLangServer

ROUTE = "/v1/hidden_states"
TEXT = "The capital of France is"
CHAT = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Name a planet."}]
LAYERS = [7, -1]


@pytest.fixture(scope="module")
def http(smol: SGLangServer) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=smol.url, timeout=60, trust_env=False) as client:
        yield client


def ask(http: httpx.Client, **body: Any) -> httpx.Response:
    response = http.post(ROUTE, json=body)
    assert response.status_code == 200, response.text
    return response


def flush(http: httpx.Client) -> None:
    """Empty the prefix cache, so that an equal request is computed in the same way."""
    http.post("/flush_cache").raise_for_status()


def test_texts_messages_and_ids_have_hugging_faces_states(
    http: httpx.Client, tokenizer: PreTrainedTokenizerBase, smol_dir: str
) -> None:
    long = prompt_of(CHUNKED_PREFILL_SIZE + 9, seed=3)
    answer = ask(http, input=[TEXT, CHAT, long], layers=LAYERS).json()
    ids = [
        tokenizer(TEXT)["input_ids"],
        tokenizer.apply_chat_template(CHAT, add_generation_prompt=True, return_dict=False),
        long,
    ]
    assert answer["usage"]["prompt_tokens"] == sum(map(len, ids))
    for row, prompt in zip(answer["data"], ids, strict=True):
        truth = hf_oracle.teacher_force(smol_dir, prompt, [0], layers=(7,))
        assert row["counts"] == {"prompt": len(prompt)}
        for layer, vector in zip(LAYERS, row["hidden_states"]["prompt"], strict=True):
            assert relative_error(torch.tensor(vector), truth.pooled("prompt", "mean", layer)) < STATE_RTOL


@pytest.mark.parametrize("pooling", ["mean", "last"])
def test_states_of_what_is_generated(
    http: httpx.Client, tokenizer: PreTrainedTokenizerBase, smol_dir: str, pooling: str
) -> None:
    segments = ["response", "full"]
    body = {"input": [TEXT, CHAT], "segments": segments, "pooling": pooling, "max_new_tokens": 4}
    for row in ask(http, **body, sampling_params={"temperature": 0}).json()["data"]:
        prompt = [
            tokenizer(TEXT)["input_ids"],
            tokenizer.apply_chat_template(CHAT, add_generation_prompt=True, return_dict=False),
        ][row["index"]]
        truth = hf_oracle.teacher_force(smol_dir, prompt, row["token_ids"])
        assert row["token_ids"] == truth.argmax_T
        assert row["text"] == tokenizer.decode(row["token_ids"], skip_special_tokens=True)
        assert (row["finish_reason"], row["completion_tokens"]) == ("length", 4)
        assert row["counts"] == {"response": 4, "full": len(prompt) + 3}
        for segment in segments:
            found = torch.tensor(row["hidden_states"][segment])
            assert relative_error(found, truth.pooled(segment, pooling)) < STATE_RTOL


def test_every_bit_is_that_of_the_client_as_json_and_as_bytes(
    smol: SGLangServer, http: httpx.Client, tokenizer: PreTrainedTokenizerBase
) -> None:
    prompts = [tokenizer(TEXT)["input_ids"], prompt_of(20, seed=4)]
    sampling = {"max_new_tokens": 3, "temperature": 0.0}
    spec = HiddenSpec(("prompt", "full"))
    flush(http)
    client = smol.generate([Request(tuple(ids), sampling, return_log_probs=False, hidden=spec) for ids in prompts])
    body = {"input": prompts, "segments": ["prompt", "full"], "max_new_tokens": 3}
    flush(http)
    rows = ask(http, **body, sampling_params={"temperature": 0}).json()["data"]
    flush(http)
    raw = ask(http, **body, sampling_params={"temperature": 0}, encoding_format="bytes")
    assert raw.headers["Hidden-States-Shape"] == f"2,2,{smol.info.hidden_size}"
    numbers = torch.frombuffer(bytearray(raw.content), dtype=torch.float32).reshape(2, 2, -1)
    for row, completion, bits in zip(rows, client, numbers, strict=True):
        assert row["token_ids"] == list(completion.response_ids)
        assert row["weight_version"] == completion.weight_version
        for segment, vector in zip(spec.segments, bits, strict=True):
            pooled = completion.hidden[segment]
            assert row["counts"][segment] == pooled.count
            assert torch.equal(torch.tensor(row["hidden_states"][segment]), pooled.vector)
            assert torch.equal(vector, pooled.vector)


BAD = [
    {"input": [[5, 49152]]},
    {"input": [5, -1]},
    {"input": [[5], []]},
    {"input": ""},
    {"input": []},
    {"input": ["a", {"role": "user"}]},
    {"input": [5] * 8192},
    {"input": TEXT, "max_new_tokens": 10**9},
    {"input": TEXT, "layers": 30},
    {"input": TEXT, "segments": ["response"]},
    {"input": TEXT, "pooling": "median"},
    {"input": TEXT, "temperature": 0},
    {"input": TEXT, "lora_path": "nobody"},
    {"input": [{"role": "user", "content": [{"type": "image_url", "image_url": "a.png"}]}]},
    {"input": TEXT, "max_new_tokens": 2, "sampling_params": {"regex": "("}},
    {"input": TEXT, "max_new_tokens": 2, "sampling_params": {"stop": "\ud800"}},
    {"input": TEXT, "max_new_tokens": 2, "sampling_params": {"stop_token_ids": [10**12]}},
]


def test_the_server_lives_on_after_bad_requests(http: httpx.Client) -> None:
    before = ask(http, input=TEXT).json()["data"]
    for body in BAD:
        # httpx itself does not write half a surrogate pair.
        response = http.post(ROUTE, content=json.dumps(body), headers={"Content-Type": "application/json"})
        assert 400 <= response.status_code < 500, (body, response.text)
        assert response.json()["error"]["message"], body
    after = ask(http, input=TEXT).json()["data"]
    assert [row["counts"] for row in after] == [row["counts"] for row in before]
