"""The payload of a batch of requests, as SGLang and its server half get it."""

from __future__ import annotations

import dataclasses
import json
from typing import Any

import pytest
import torch
from helpers.fake_engine import (
    ALL_SEGMENTS,
    make_info,
)
from helpers.sample_requests import (
    EVERY,
    FULL,
    MASKED,
    PROMPTS,
    RESOLVED,
    SPANS,
    STOCK,
    TOP,
    asks,
    options_of,
    request,
    scores,
)

from torchrl_sglang_hidden import HiddenSpec
from torchrl_sglang_hidden.protocol import CHANNEL, Options, pack_options, unpack_options
from torchrl_sglang_hidden.records import READING, Request
from torchrl_sglang_hidden.reduce.wanted import Wanted
from torchrl_sglang_hidden.reduce.wanted_logits import WantedLogits
from torchrl_sglang_hidden.sglang_api.checks import check_requests
from torchrl_sglang_hidden.sglang_api.payload import logits_of as wanted_logits_of
from torchrl_sglang_hidden.sglang_api.payload import to_payload
from torchrl_sglang_hidden.spec.spans import PromptSpan, TokenMask


def test_a_payload_for_the_server_half() -> None:
    requests = [request(max_new_tokens=3, stop=["a"]), Request((5,), {"top_k": 2}, return_log_probs=False)]
    payload = to_payload(requests, make_info(), binary=False)
    assert payload == {
        "input_ids": [[9, 8, 7, 3], [5]],
        "sampling_params": [
            {
                "max_new_tokens": 3,
                "stop": ["a"],
                "custom_params": {CHANNEL: pack_options(Wanted(("prompt", "response", "full")), "text")},
            },
            {"top_k": 2, "max_new_tokens": 57},
        ],
        "return_logprob": [True, False],
    }
    assert json.loads(json.dumps(payload)) == payload
    assert dict(requests[0].sampling) == {"max_new_tokens": 3, "stop": ["a"]}


def test_everything_of_a_spec_reaches_the_server() -> None:
    spec = HiddenSpec(("full", "prompt"), "last", (-2, -1, 0), True, torch.bfloat16, spans=SPANS)
    payload = to_payload([request(spec, spans=RESOLVED)], make_info(), binary=False)
    wanted = Wanted(("full", "prompt"), "last", (2, -1, 0), RESOLVED, tokens=True, row_dtype=torch.bfloat16)
    assert options_of(payload) == Options(wanted, "text")


@pytest.mark.parametrize(
    ("dtype", "sent"),
    [(torch.float32, torch.float32), (torch.float64, torch.float32)]
    + [(dtype, dtype) for dtype in (torch.bfloat16, torch.float16)],
)
def test_rows_travel_no_wider_than_they_are(dtype: torch.dtype, sent: torch.dtype) -> None:
    payload = to_payload([request(HiddenSpec(tokens=True, dtype=dtype))], make_info(), binary=False)
    assert options_of(payload).wanted.row_dtype == sent


@pytest.mark.parametrize(
    ("tokens", "binary", "near", "way"),
    [
        (False, False, False, "text"),
        (False, False, True, "text"),
        (True, False, False, "text"),
        (True, False, True, "shared"),
        (True, True, True, "binary"),
        (False, True, False, "binary"),
    ],
)
def test_how_states_come_back(tokens: bool, binary: bool, near: bool, way: str) -> None:
    one, info = request(HiddenSpec(tokens=tokens)), make_info(shares_memory=near)
    assert options_of(to_payload([one], info, binary=binary)).way == way


def test_a_prompt_that_is_only_read_costs_one_token() -> None:
    one = request(HiddenSpec(("prompt",)), max_new_tokens=0, temperature=0.7, stop=["a"])
    (sampling,) = to_payload([one], make_info(), binary=False)["sampling_params"]
    assert {**sampling, "custom_params": None} == {"max_new_tokens": 1, "temperature": 0.0, "custom_params": None}
    assert one.sampling["max_new_tokens"] == 0


def test_adapters_and_priority() -> None:
    requests = [request(lora="a", priority=3), request(priority=3)]
    payload = to_payload(requests, make_info(), binary=False)
    assert (payload["lora_path"], payload["priority"]) == (["a", None], 3)
    payload = to_payload([request(priority=0)], make_info(), binary=False)
    assert (payload["priority"], "lora_path" in payload) == (0, False)
    assert to_payload([request()], make_info(), binary=False).keys().isdisjoint({"priority", "lora_path"})


def test_prompts_that_are_scored() -> None:
    requests = [Request((5, 6), return_log_probs=False, score_prompt=True), Request((5,), return_log_probs=False)]
    payload = to_payload(requests, make_info(), binary=False)
    assert (payload["return_logprob"], payload["logprob_start_len"]) == ([True, False], [0, -1])


@pytest.mark.parametrize(
    ("one", "salted"),
    [
        (request(), True),
        (request(HiddenSpec(("full",))), True),
        (request(HiddenSpec()), False),
        (request(HiddenSpec(ALL_SEGMENTS, "last")), False),
        (request(HiddenSpec(("prompt",), "last", tokens=True)), True),
        (request(HiddenSpec(tokens=True)), False),
        (request(HiddenSpec(spans={"m": TokenMask("m")}), spans={"m": PromptSpan(((0, 1),))}), True),
        (request(HiddenSpec(spans={"m": TokenMask("m")}), spans={"m": PromptSpan(((3, 4),))}), False),
        (request(HiddenSpec((), "last", spans={"m": TokenMask("m")}), spans={"m": PromptSpan(((0, 4),))}), False),
        (request(HiddenSpec(("prompt",)), prompt_ids=(5,)), True),
    ],
)
def test_a_payload_for_a_stock_server(one: Request, salted: bool) -> None:
    """A request that needs rows of the prompt must not hit the prefix cache."""
    payload = to_payload([one, request(None)], make_info(**STOCK), binary=False)
    assert payload["return_hidden_states"] == [True, False]
    assert [bool(salt) for salt in payload["cache_salt"]] == [salted, False]
    assert all("custom_params" not in params for params in payload["sampling_params"])
    again = to_payload([one], make_info(**STOCK), binary=False)
    assert (again["cache_salt"][0] != payload["cache_salt"][0]) is salted


def test_a_stock_payload_without_states_asks_for_none() -> None:
    payload = to_payload([request(None)], make_info(**STOCK), binary=False)
    assert payload.keys() == {"input_ids", "sampling_params", "return_logprob"}


# What a request asks for, and what its payload says of logits; None for nothing.
COMBINATIONS: list[tuple[Request, WantedLogits | None, bool, int | None]] = [
    (asks(), None, True, None),
    (asks(spec=FULL), WantedLogits(FULL), True, None),
    (asks(*MASKED), WantedLogits(None, MASKED), True, None),
    (asks(*MASKED, spec=EVERY), WantedLogits(EVERY, MASKED, 1), True, None),
    # A schedule goes by the number that was asked for.
    (asks(*MASKED, sampling={"max_new_tokens": 12}), WantedLogits(None, MASKED, response_limit=12), True, None),
    (asks(*MASKED, response_limit=7), WantedLogits(None, MASKED, response_limit=128), True, None),
    (asks(spec=PROMPTS, sampling={"max_new_tokens": 0}), WantedLogits(PROMPTS, (), 1, response_limit=0), True, None),
    (scores(), None, True, 0),
    (scores(first=4), None, True, 3),
    (scores(spec=PROMPTS, first=4), WantedLogits(PROMPTS, (), 1), True, 3),
    (scores(*MASKED), WantedLogits(None, MASKED, 1, True, ((2, 6),)), False, None),
    (scores(*MASKED, first=1), WantedLogits(None, MASKED, 1, True, ((2, 6),)), False, None),
    (scores(*MASKED, first=4), WantedLogits(None, MASKED, 4, True, ((2, 6),)), False, None),
    (scores(*MASKED, first=4, spec=PROMPTS), WantedLogits(PROMPTS, MASKED, 1, True, ((2, 6),)), False, None),
    (dataclasses.replace(asks(*MASKED, spec=TOP), return_log_probs=False), WantedLogits(TOP, MASKED), False, None),
]


@pytest.mark.parametrize(("one", "wanted", "log_probs", "start"), COMBINATIONS)
@pytest.mark.parametrize("near", [False, True])
def test_a_payload_of_logits_and_constraints(
    one: Request, wanted: WantedLogits | None, log_probs: bool, start: int | None, near: bool
) -> None:
    """Under constraints the prompt's log-probs are the server half's, and SGLang is asked for none."""
    check_requests([one], make_info())
    payload = json.loads(json.dumps(to_payload([one, asks()], make_info(shares_memory=near), binary=False)))
    assert wanted_logits_of(one) == wanted
    assert payload["return_logprob"] == [log_probs, True]
    assert payload.get("logprob_start_len") == (None if start is None else [start, -1])
    assert "custom_params" not in payload["sampling_params"][1]
    if wanted is None:
        assert "custom_params" not in payload["sampling_params"][0]
        return
    options = options_of(payload)
    assert (options.wanted, options.logits) == (Wanted((), None), wanted)
    assert options.way == ("shared" if near and wanted.spec is not None else "text")


def test_states_and_logits_in_one_payload() -> None:
    one = dataclasses.replace(request(), logits=TOP, constraints=MASKED)
    payload = to_payload([one], make_info(), binary=True)
    options = unpack_options(payload["sampling_params"][0]["custom_params"])
    assert (options.wanted, options.logits) == (Wanted(ALL_SEGMENTS), WantedLogits(TOP, MASKED))
    assert options.way == "binary"


def test_the_limit_of_a_scored_response_reaches_the_server() -> None:
    one = dataclasses.replace(scores(*MASKED), response_limit=7)
    assert options_of(to_payload([one], make_info(), binary=False)).logits.response_limit == 7


def test_what_a_processor_of_sglangs_own_reads_stays() -> None:
    one = asks(*MASKED, processor="{...}", sampling={"custom_params": {"theirs": 1}})
    payload = to_payload([one], make_info(), binary=False)
    assert payload["sampling_params"][0]["custom_params"].keys() == {"theirs", CHANNEL}
    assert one.sampling["custom_params"] == {"theirs": 1}


def test_sglangs_own_processors() -> None:
    payload = to_payload([asks(processor="{...}"), asks()], make_info(), binary=False)
    assert payload["custom_logit_processor"] == ["{...}", None]
    assert "custom_logit_processor" not in to_payload([asks()], make_info(), binary=False)


@pytest.mark.parametrize(
    ("length", "sampling", "expected"),
    [
        (10, {"max_new_tokens": 48}, {"max_new_tokens": 48}),
        (10, {"max_new_tokens": 54}, {"max_new_tokens": 48}),
        (10, {}, {"max_new_tokens": 48}),
        (10, {"max_new_tokens": 54, "min_new_tokens": 50}, {"max_new_tokens": 48, "min_new_tokens": 48}),
        (57, {"max_new_tokens": 7}, {"max_new_tokens": 1}),
        (58, {"max_new_tokens": 6}, {"max_new_tokens": 1}),
        (58, {"max_new_tokens": 0}, {**READING}),
    ],
)
def test_a_response_ends_where_prompt_and_response_can_be_scored(
    length: int, sampling: dict[str, int], expected: dict[str, Any]
) -> None:
    info = make_info()
    assert info.max_prompt_tokens == 58
    payload = to_payload([Request((6,) * length, sampling=sampling)], info, binary=False)
    assert payload["sampling_params"] == [expected]
