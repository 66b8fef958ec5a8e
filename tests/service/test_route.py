"""The vector service over HTTP, with the fake engine in the place of SGLang's tokenizer manager.

What a client of the same engine gets must come out, to the last bit; what cannot be served must not reach the engine.
"""

from __future__ import annotations

import json
import threading
from collections.abc import AsyncGenerator
from typing import Any

import httpx
import pytest
import torch
from helpers.fake_engine import (
    CONTEXT_LENGTH,
    HIDDEN_SIZE,
    RecordingEngine,
    abort_a_row,
    lose_a_state_row,
    server_page,
)
from helpers.vector_site import MODEL, Service
from starlette.exceptions import HTTPException

from torchrl_sglang_hidden import HiddenSpec, Request
from torchrl_sglang_hidden.service import route
from torchrl_sglang_hidden.service.body import read_body

CHAT = [{"role": "user", "content": "w3"}]


@pytest.fixture
def service() -> Service:
    return Service()


def vectors(data: bytes, headers: httpx.Headers) -> torch.Tensor:
    shape = [int(size) for size in headers["Hidden-States-Shape"].split(",")]
    return torch.frombuffer(bytearray(data), dtype=torch.float32).reshape(shape)


# --- answers ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("segments", [("prompt",), ("response",), ("prompt", "response", "full")])
@pytest.mark.parametrize("pooling", ["mean", "last", "max", "sum"])
@pytest.mark.parametrize("layers", [-1, [2, -1]])
def test_the_answer_is_what_a_client_of_the_engine_gets(
    service: Service, segments: tuple[str, ...], pooling: Any, layers: Any
) -> None:
    rows = service.data(
        input=["w1 w2", [9, 8, 7], CHAT], segments=list(segments), pooling=pooling, layers=layers, max_new_tokens=4
    )
    spec = HiddenSpec(segments, pooling, layers)
    ids = [tuple(prompt) for prompt in service.manager.payloads[0]["input_ids"]]
    sent = [Request(prompt, {"max_new_tokens": 4}, return_log_probs=False, hidden=spec) for prompt in ids]
    expected = RecordingEngine(tokenizer=service.manager.tokenizer).generate(sent)
    assert ids[1] == (9, 8, 7)
    for row, completion in zip(rows, expected, strict=True):
        found = {segment: torch.tensor(vector) for segment, vector in row["hidden_states"].items()}
        assert found.keys() == completion.hidden.keys()
        for segment, pooled in completion.hidden.items():
            assert torch.equal(found[segment], pooled.vector)
            assert row["counts"][segment] == pooled.count
        assert row["text"] == completion.text
        assert row["token_ids"] == list(completion.response_ids)
        assert row["finish_reason"] == completion.finish_reason
        assert row["weight_version"] == "v7"


@pytest.mark.parametrize("way", ["header", "field"])
@pytest.mark.parametrize("layers", [-1, [2, -1]])
def test_bytes_are_the_numbers_of_the_json(service: Service, way: str, layers: Any) -> None:
    body = {"input": ["w1 w2", "w3"], "segments": ["prompt", "full"], "layers": layers, "max_new_tokens": 2}
    rows = service.data(**body)
    if way == "header":
        response = service.send(json=body, headers={"Accept": "Application/Octet-Stream"})
    else:
        response = service.ask(**body, encoding_format="bytes")
    assert response.headers["content-type"] == "application/octet-stream"
    assert response.headers["Hidden-States-Model"] == "tiny"
    assert response.headers["Hidden-States-Weight-Version"] == "v7"
    expected = [[row["hidden_states"][segment] for segment in ("prompt", "full")] for row in rows]
    assert vectors(response.content, response.headers).tolist() == expected


def test_the_field_wins_over_the_header(service: Service) -> None:
    headers = {"Accept": "application/octet-stream"}
    response = service.send(json={"input": "w1", "encoding_format": "float"}, headers=headers)
    assert response.json()["data"][0]["counts"] == {"prompt": 1}


def test_a_prompt_alone_costs_no_generation(service: Service) -> None:
    (row,) = service.data(input="w1 w2 w3")
    assert (row["text"], row["token_ids"], row["finish_reason"], row["completion_tokens"]) == (None, [], None, 0)
    assert row["prompt_tokens"] == row["counts"]["prompt"] == 3
    (params,) = service.manager.payloads[0]["sampling_params"]
    assert (params["max_new_tokens"], params["temperature"]) == (1, 0.0)


def test_what_is_asked_reaches_sglang_by_its_names(service: Service) -> None:
    service.page |= {"enable_priority_scheduling": True, "enable_deterministic_inference": True}
    sampling = {"temperature": 0.5, "seed": 3, "stop": "w9"}
    service.data(input="w1", max_new_tokens=2, sampling_params=sampling, lora_path="a", priority=4, model="tiny")
    (payload,) = service.manager.payloads
    (params,) = payload["sampling_params"]
    assert {name: params[name] for name in ("max_new_tokens", "temperature", "sampling_seed", "stop")} == {
        "max_new_tokens": 2, "temperature": 0.5, "sampling_seed": 3, "stop": "w9",
    }  # fmt: skip
    assert (payload["lora_path"], payload["priority"], payload["return_logprob"]) == (["a"], 4, [False])


@pytest.mark.parametrize("name", ["tiny", MODEL])
def test_the_model_may_be_named(service: Service, name: str) -> None:
    response = service.ask(input="w1", model=name)
    assert response.json()["model"] == "tiny"


def test_the_engine_is_described_once(service: Service) -> None:
    for _ in range(3):
        service.data(input="w1")
    assert service.described == 1


def test_layers_that_are_not_checked_yet_are_warmed_up(service: Service) -> None:
    async def checked() -> dict[str, Any]:
        return server_page(**({"layers": (-1, 2)} if service.manager.payloads else {"layers": None}))

    service.service._server_info = checked
    service.data(input="w1", layers=2)
    assert len(service.manager.payloads) == 2


# --- refusals ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("body", "kind", "words"),
    [
        ({"input": [[5], [5, 96]]}, "TokenIdError", ["row 1", "96", "0..95"]),
        ({"input": [-1]}, "TokenIdError", ["row 0", "-1", "0..95"]),
        ({"input": [[5], []]}, "PromptLengthError", ["row 1", "0 tokens"]),
        ({"input": ["w1", ""]}, "PromptLengthError", ["row 1", "0 tokens"]),
        ({"input": [5, 6.5]}, "InputTypeError", ["row 0", "6.5", "integers"]),
        ({"input": [True]}, "InputTypeError", ["row 0", "True", "integers"]),
        ({"input": [[5], [5] * CONTEXT_LENGTH]}, "PromptLengthError", ["row 1", f"{CONTEXT_LENGTH} tokens", "58"]),
        ({"input": "w1", "max_new_tokens": 64}, "PromptLengthError", ["row 0", "64", "lower max_new_tokens to 63"]),
        ({"input": "w1", "layers": 3}, "CapabilityError", ["row 0", "[-1, 0, 2]", "not of [3]", "serve --layers"]),
        ({"input": "w1", "layers": 9}, "InputError", ["layers=9", "0..3"]),
        ({"input": "w1", "layers": [2, -2]}, "InputError", ["same layer"]),
        ({"input": "w1", "segments": ["response"]}, "InputError", ["row 0", "max_new_tokens=0", "'response'"]),
        ({"input": "w1", "model": "gpt"}, "InputError", ["'gpt'", "'tiny'"]),
        ({"input": "w1", "priority": 1}, "CapabilityError", ["priority=1", "--enable-priority-scheduling"]),
        ({"input": "w1", "image": "a"}, "InputError", ["image", "parts of messages"]),
        ({"input": "w1", "layer": 1}, "UnknownOptionError", ["'layer'", "'layers'?"]),
        (
            {"input": "w1", "max_new_tokens": 2, "sampling_params": {"seed": 1}},
            "CapabilityError",
            ["sampling_seed=1", "--enable-deterministic-inference"],
        ),
    ],
)
def test_a_bad_request_names_row_value_and_limit_and_reaches_nobody(
    service: Service, body: dict[str, Any], kind: str, words: list[str]
) -> None:
    response = service.ask(**body)
    assert response.status_code == 400
    error = response.json()["error"]
    assert (error["type"], error["code"]) == (kind, 400)
    assert [word for word in words if word not in error["message"]] == []
    assert service.manager.payloads == []


def test_an_answer_of_too_many_bytes(service: Service, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(route, "MAX_VECTOR_BYTES", 3 * 4 * HIDDEN_SIZE)
    assert len(service.data(input=["w1"] * 3)) == 3
    response = service.ask(input=["w1"] * 2, segments=["prompt", "full"], max_new_tokens=1)
    assert response.status_code == 400
    assert f"4 vectors of {HIDDEN_SIZE} numbers" in response.json()["error"]["message"]
    assert len(service.manager.payloads) == 1


@pytest.mark.parametrize("content_type", ["application/x-www-form-urlencoded", "text/plain", None])
def test_a_body_that_does_not_say_that_it_is_json(service: Service, content_type: str | None) -> None:
    headers = {} if content_type is None else {"Content-Type": content_type}
    response = service.send(content=b'{"input": "w1"}', headers=headers)
    assert response.status_code == 415
    assert "expected application/json" in response.json()["error"]["message"]
    assert service.manager.payloads == []


@pytest.mark.parametrize("announced", [True, False])
def test_a_body_over_the_limit(service: Service, monkeypatch: pytest.MonkeyPatch, announced: bool) -> None:
    body = json.dumps({"input": "w1 " * 10}).encode()
    taken = [0]

    async def parts() -> AsyncGenerator[bytes, None]:
        for place in range(0, len(body), 5):
            taken[0] += 1
            yield body[place : place + 5]

    def send() -> httpx.Response:
        return service.send(content=body if announced else parts(), headers={"content-type": "application/json"})

    monkeypatch.setattr(route, "MAX_BODY_BYTES", len(body))
    assert send().status_code == 200
    limit = len(body) - 1 if announced else 10
    monkeypatch.setattr(route, "MAX_BODY_BYTES", limit)
    response = send()
    assert (response.status_code, response.json()["error"]["type"]) == (413, "InputError")
    assert f"over {limit} bytes, the limit of one request; send fewer rows" in response.text
    assert len(service.manager.payloads) == 1
    assert announced or taken[0] == 2 * -(-len(body) // 5), "a client that still sends would not see the answer"


@pytest.mark.parametrize("large", [True, False])
def test_a_large_body_is_read_beside_the_event_loop(
    service: Service, monkeypatch: pytest.MonkeyPatch, large: bool
) -> None:
    """While it is parsed, SGLang's other requests go on."""
    threads = []

    def read(*given: Any) -> Any:
        threads.append(threading.current_thread() is threading.main_thread())
        return read_body(*given)

    monkeypatch.setattr(route, "read_body", read)
    monkeypatch.setattr(route, "LARGE_BODY_BYTES", 100)
    service.data(input=["w1"] * (50 if large else 5))
    assert threads == [not large]


def test_json_with_a_charset_is_json(service: Service) -> None:
    headers = {"Content-Type": "Application/JSON; charset=utf-8"}
    assert service.send(content=b'{"input": "w1"}', headers=headers).status_code == 200


def test_the_route_is_for_posts(service: Service) -> None:
    assert service.send(method="GET").status_code == 405


# --- what goes wrong behind it ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("error", "status", "words"),
    [
        (ValueError("LoRA adapter 'a' is not loaded"), 400, "the engine refused the batch: LoRA adapter 'a'"),
        (HTTPException(503, "the scheduler is gone"), 503, "the engine aborted the batch: the scheduler is gone"),
    ],
)
def test_what_sglang_raises_has_a_status(service: Service, error: Exception, status: int, words: str) -> None:
    service.data(input="w1")
    service.manager.error = error
    response = service.ask(input="w1")
    assert response.status_code == response.json()["error"]["code"] == status
    assert words in response.json()["error"]["message"]
    service.manager.error = None
    service.data(input="w1")


@pytest.mark.parametrize(("fault", "status"), [(abort_a_row, 503), (lose_a_state_row, 500)])
def test_an_answer_that_does_not_add_up_is_an_error(service: Service, fault: Any, status: int) -> None:
    service.manager.engine.fault = fault
    response = service.ask(input=["w1 w2", "w3"])
    assert response.status_code == status
    assert "row 0" in response.json()["error"]["message"]


def test_without_the_server_half_in_place_it_says_so(service: Service) -> None:
    service.page = {"internal_states": [{}], "max_req_input_len": 59}
    response = service.ask(input="w1")
    assert (response.status_code, response.json()["error"]["type"]) == (400, "CapabilityError")
    assert "not in place" in response.json()["error"]["message"]


def test_an_error_may_say_what_no_encoding_carries(service: Service) -> None:
    response = service.send(content=b'{"inp\\ud800ut": "w1"}', headers={"Content-Type": "application/json"})
    assert response.status_code == 400
    assert json.loads(response.content)["error"]["type"] == "UnknownOptionError"
