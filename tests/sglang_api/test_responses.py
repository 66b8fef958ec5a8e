"""The wire: what SGLang gets, what is read of its answers, and what is refused on both ways."""

from __future__ import annotations

import copy
import dataclasses
import json
import math
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.fake_engine import (
    ALL_SEGMENTS,
    WORDS,
    RecordingEngine,
    log_prob_of,
    logits_V,
    make_info,
    of_layer,
    pooled_D,
    response_of,
    states_ND,
)
from helpers.reference_pooling import Case, expected_count, token_places

from torchrl_sglang_hidden import AlignmentError, CapabilityError, HiddenSpec, ProtocolError, RequestAbortedError
from torchrl_sglang_hidden.errors import (
    ConstraintError,
    InputError,
    InputTypeError,
    PromptLengthError,
    SGLangHiddenError,
    SpanError,
    TokenIdError,
)
from torchrl_sglang_hidden.protocol import CHANNEL, PROTOCOL, Options, Status, pack_options, unpack_options
from torchrl_sglang_hidden.protocol.shared_memory import DIRECTORY, SharedFiles, is_shared
from torchrl_sglang_hidden.records import Completion, Request
from torchrl_sglang_hidden.reduce.pooling import Wanted
from torchrl_sglang_hidden.reduce.token_logits import WantedLogits
from torchrl_sglang_hidden.sglang_api import server_info as server_info_module
from torchrl_sglang_hidden.sglang_api.checks import check_requests
from torchrl_sglang_hidden.sglang_api.payload import logits_of as wanted_logits_of
from torchrl_sglang_hidden.sglang_api.payload import to_payload
from torchrl_sglang_hidden.sglang_api.responses import read_responses
from torchrl_sglang_hidden.sglang_api.server_info import ModelSizes, read_info, warm_up
from torchrl_sglang_hidden.spec.constraints import (
    ActionMask,
    ConstraintStep,
    DisallowedTokens,
    LinearSchedule,
    LogitConstraint,
    TemperatureScale,
)
from torchrl_sglang_hidden.spec.hidden import POOLINGS, Pooling
from torchrl_sglang_hidden.spec.logits import LogitsSpec
from torchrl_sglang_hidden.spec.spans import Between, LastTokens, PromptSpan, TokenMask

PROMPT = (9, 8, 7, 3)
RESPONSE = response_of(PROMPT)
ALL = HiddenSpec(ALL_SEGMENTS)
STOCK = {"pools_in_server": False, "layers": (-1,)}

# What the user wrote, and what it means for PROMPT.
SPANS = {"mask": TokenMask("m"), "tail": LastTokens(2)}
RESOLVED = {"mask": PromptSpan(((0, 1), (2, 3))), "tail": LastTokens(2)}


def request(
    hidden: HiddenSpec | None = ALL,
    prompt_ids: tuple[Any, ...] = PROMPT,
    spans: Any = None,
    lora: str | None = None,
    priority: int | None = None,
    **sampling: Any,
) -> Request:
    return Request(prompt_ids, sampling=sampling, hidden=hidden, spans=spans or {}, lora=lora, priority=priority)


def spanned(segments: Any = ("response",), pooling: Any = "mean", **more: Any) -> Request:
    """A request with spans, whose other fields are those of a `HiddenSpec`."""
    return request(HiddenSpec(segments, pooling, spans=SPANS, **more), spans=RESOLVED)


def rows_for(requests: list[Request], **info: Any) -> list[dict[str, Any]]:
    engine = RecordingEngine(**info)
    return engine.answer(to_payload(requests, engine.info, binary=False))


def read(rows: Any, requests: list[Request] | None = None, **info: Any) -> list[Any]:
    return read_responses(requests or [request()], rows, make_info(**info))


def assert_states(one: Completion, sent: Request, info: Any) -> None:
    """Segments, spans and token states are those of the recorder, in plain torch."""
    spec = sent.hidden
    assert spec is not None
    wanted = options_of(to_payload([sent], dataclasses.replace(info, pools_in_server=True), binary=False)).wanted
    hidden_ND = states_ND(one.prompt_ids, one.response_ids or [0])
    hidden_NKD = torch.stack([of_layer(hidden_ND, layer) for layer in wanted.layers], 1)
    case = Case(wanted, len(one.prompt_ids), one.response_ids or (0,), hidden_NKD)
    shaped: Callable[[torch.Tensor], torch.Tensor] = (
        (lambda states: states) if isinstance(spec.layers, tuple) else (lambda states: states.squeeze(-2))
    )
    assert tuple(one.hidden) == (() if spec.pooling is None else spec.segments)
    assert one.spans.keys() == spec.spans.keys()
    for what, pooled in {**one.hidden, **one.spans}.items():
        assert (pooled.count, pooled.vector.dtype) == (expected_count(case, what), torch.float32)
        torch.testing.assert_close(pooled.vector.double(), shaped(case.pooled(what)), rtol=1e-5, atol=1e-6)
    if spec.tokens:
        first, stop = token_places(case)
        assert one.token_rows.first == first
        assert torch.equal(one.token_rows.rows_ND, shaped(hidden_NKD[first:stop].to(wanted.row_dtype)))
    else:
        assert one.token_rows is None


def options_of(payload: dict[str, Any], row: int = 0) -> Options:
    options = unpack_options(json.loads(json.dumps(payload["sampling_params"][row]["custom_params"])))
    assert options is not None
    return options


# --- payloads ---------------------------------------------------------------------------------------------------------


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
            {"top_k": 2},
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


# --- answers ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("way", ["base64", "raw", "stock"])
@pytest.mark.parametrize("pooling", [*POOLINGS, None])
@pytest.mark.parametrize("tokens", [False, True])
@pytest.mark.parametrize("layers", [-1, (-1,), (0, -1), -2])
@pytest.mark.filterwarnings("ignore:the server has no torchrl_sglang_hidden server half")
def test_an_answer_becomes_a_completion(way: str, pooling: Any, tokens: bool, layers: Any) -> None:
    if way == "stock" and layers not in (-1, (-1,)):
        layers = (-1,)  # all that there is
    engine = RecordingEngine(binary=way == "raw", **(STOCK if way == "stock" else {}))
    specs = [
        HiddenSpec(segments, pooling, layers, tokens or pooling is None) for segments in (ALL_SEGMENTS, ("prompt",))
    ]
    sent = [request(spec) for spec in specs]
    if pooling is not None:
        sent.append(spanned((), pooling, layers=layers))
        sent.append(spanned(("response",), pooling, layers=layers, tokens=tokens))
    for one, given in zip(engine.generate(sent), sent, strict=True):
        assert (one.prompt_ids, one.response_ids) == (PROMPT, tuple(RESPONSE))
        assert one.text == " ".join(map(str, RESPONSE))
        assert (one.finish_reason, one.weight_version) == ("stop" if RESPONSE[-1] == 1 else "length", "v7")
        assert one.log_probs_T.tolist() == [log_prob_of(i) for i in RESPONSE]
        assert_states(one, given, engine.info)


@pytest.mark.parametrize("info", [{}, STOCK], ids=["server half", "stock"])
@pytest.mark.parametrize("spec", [HiddenSpec(("prompt",), tokens=True), HiddenSpec(("prompt",), "last"), None])
@pytest.mark.filterwarnings("ignore:the server has no torchrl_sglang_hidden server half")
def test_a_prompt_that_was_only_read_has_no_response(info: Any, spec: HiddenSpec | None) -> None:
    """SGLang's one token is dropped with all that belongs to it; what was asked of the prompt stays."""
    engine = RecordingEngine(**info)
    sent = Request(PROMPT, {"max_new_tokens": 0}, hidden=spec, score_prompt=True)
    (one,) = engine.generate([sent])
    assert (one.response_ids, one.text, one.finish_reason) == ((), "", "length")
    assert (one.log_probs_T.shape, len(one.prompt_log_probs_P)) == ((0,), len(PROMPT))
    if spec is not None:
        assert_states(one, sent, engine.info)
    (unscored,) = engine.generate([dataclasses.replace(sent, return_log_probs=False, score_prompt=False)])
    assert (unscored.log_probs_T, unscored.prompt_log_probs_P) == (None, None)


def test_a_span_between_markers() -> None:
    """Its size is the server's to say; the policy checks it with its own tokenizer."""
    spec = HiddenSpec((), spans={"b": Between("2", None)})
    sent = request(spec, spans=dict(spec.spans))
    engine = RecordingEngine(
        respond=lambda ids: [20, 21, 22, 33]
    )  # "20 21 22 33": behind the first 2 is no whole token
    (one,) = engine.generate([sent])
    assert one.spans["b"].count == 3
    expected_D = states_ND(PROMPT, [20, 21, 22, 33])[len(PROMPT) :].double().mean(0)
    torch.testing.assert_close(one.spans["b"].vector.double(), expected_D, rtol=1e-5, atol=1e-6)
    with pytest.raises(
        SpanError, match=r"row 0 \(request recorded-0\), span 'b': the marker '2' is not in the response"
    ):
        RecordingEngine(respond=lambda ids: [33]).generate([sent])


@pytest.mark.parametrize("info", [{}, STOCK], ids=["server half", "stock"])
@pytest.mark.filterwarnings("ignore:the server has no torchrl_sglang_hidden server half")
def test_a_response_that_is_shorter_than_a_span(info: Any) -> None:
    long = LastTokens(9)
    sent = request(HiddenSpec(spans={"long": long}), spans={"long": long})
    with pytest.raises(
        SpanError, match=r"row 0 .*, span 'long': LastTokens\(9\): the response has \d tokens; raise min"
    ):
        RecordingEngine(**info).generate([sent])
    fewer = LastTokens(9, allow_fewer=True)
    (one,) = RecordingEngine(**info).generate([request(HiddenSpec(spans={"long": fewer}), spans={"long": fewer})])
    assert one.spans["long"].count == len(RESPONSE)


def test_raw_vectors_can_be_written_to() -> None:
    (one,) = RecordingEngine(binary=True).generate([request()])
    one.hidden["response"].vector.add_(1)


def test_a_stock_answer_after_a_retraction() -> None:
    """SGLang computes prompt and tokens again, and appends them as one nested entry."""
    one = request()
    rows = rows_for([one], **STOCK)
    meta, hidden_ND = rows[0]["meta_info"], states_ND(PROMPT, RESPONSE)
    again = hidden_ND[: len(PROMPT) + 1].tolist()
    meta["hidden_states"] = [meta["hidden_states"][0], again, *meta["hidden_states"][2:]]
    (found,) = read(rows, [one], **STOCK)
    for segment, pooled in found.hidden.items():
        expected_D = pooled_D(hidden_ND, segment, "mean", len(PROMPT))
        torch.testing.assert_close(pooled.vector.double(), expected_D, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("left", [1, 2, 3])
@pytest.mark.parametrize("segment", ["prompt", "full"])
def test_a_stock_answer_after_a_prefix_hit(segment: Any, left: int) -> None:
    one = request(HiddenSpec((segment,)))
    rows = rows_for([one], **STOCK)
    states = rows[0]["meta_info"]["hidden_states"]
    states[0] = states[0][-left:]
    expected = {"prompt": len(PROMPT), "full": len(PROMPT) + len(RESPONSE) - 1}[segment]
    found = expected - len(PROMPT) + left
    with pytest.raises(AlignmentError, match=rf"row 0 .*{found} rows .*'{segment}'.*expected {expected}; start the"):
        read(rows, [one], **STOCK)


@pytest.mark.parametrize("spec", [HiddenSpec(), HiddenSpec(ALL_SEGMENTS, "last")])
def test_a_prefix_hit_does_not_matter_to_the_last_rows(spec: HiddenSpec) -> None:
    one = request(spec)
    rows = rows_for([one], **STOCK)
    states = rows[0]["meta_info"]["hidden_states"]
    states[0] = states[0][-1:]
    (found,) = read(rows, [one], **STOCK)
    assert_states(found, one, make_info(**STOCK))


@pytest.mark.parametrize("left", [1, 2, 3])
@pytest.mark.parametrize("pooling", POOLINGS)
def test_a_prefix_hit_matters_to_the_spans_before_its_end(left: int, pooling: Pooling) -> None:
    one = spanned((), pooling)
    rows = rows_for([one], **STOCK)
    states = rows[0]["meta_info"]["hidden_states"]
    states[0] = states[0][-left:]
    if pooling == "last" and left > 1:  # position 2 alone
        (found,) = read(rows, [one], **STOCK)
        assert_states(found, one, make_info(**STOCK))
        return
    with pytest.raises(AlignmentError, match=r"row 0 .* 0 rows of states for the span 'mask' .* expected 2; start the"):
        read(rows, [one], **STOCK)


def test_a_prefix_hit_loses_token_states() -> None:
    one = request(HiddenSpec(("full",), None, tokens=True))
    rows = rows_for([one], **STOCK)
    states = rows[0]["meta_info"]["hidden_states"]
    states[0] = states[0][-2:]
    with pytest.raises(AlignmentError, match=r"row 0 .*expected the states of positions 0\.\."):
        read(rows, [one], **STOCK)


# What was done to a good answer of one row, and what is said of it.
Spoil = Callable[[dict[str, Any]], Any]
BAD_ANSWERS: dict[str, tuple[Spoil, type[SGLangHiddenError], str]] = {
    "no meta_info": (lambda row: row.pop("meta_info"), ProtocolError, r"row 0.*lacks 'meta_info'"),
    "no text": (lambda row: row.pop("text"), ProtocolError, r"row 0.*lacks 'text'"),
    "no ids": (lambda row: row.pop("output_ids"), ProtocolError, r"row 0.*lacks 'output_ids'"),
    "no weight version": (lambda row: row["meta_info"].pop("weight_version"), ProtocolError, "weight_version"),
    "ids of text": (lambda row: row.update(output_ids=["a"]), ProtocolError, r"row 0"),
    "not finished": (lambda row: row["meta_info"].update(finish_reason=None), ProtocolError, r"row 0"),
    "finish of no type": (lambda row: row["meta_info"].update(finish_reason={}), ProtocolError, r"row 0.*type"),
    "aborted": (
        lambda row: row["meta_info"].update(finish_reason={"type": "abort", "message": "no room"}),
        RequestAbortedError,
        r"row 0 \(request recorded-0\).*'abort' after \d tokens: no room",
    ),
    "truncated prompt": (
        lambda row: row["meta_info"].update(prompt_tokens=3),
        AlignmentError,
        r"row 0 .*prompt of 4 tokens .* took 3; .*without --allow-auto-truncate",
    ),
    "no tokens": (lambda row: row.update(output_ids=[]), AlignmentError, r"row 0 .*0 response tokens.* at least 1"),
    "no log-probs": (
        lambda row: row["meta_info"].pop("output_token_logprobs"),
        ProtocolError,
        r"row 0 .*log-probs were asked for",
    ),
    "too few log-probs": (
        lambda row: row["meta_info"]["output_token_logprobs"].pop(),
        AlignmentError,
        r"row 0 .*log-probs for \d output tokens",
    ),
    "log-probs of other ids": (
        lambda row: row["meta_info"]["output_token_logprobs"].reverse(),
        AlignmentError,
        r"row 0 .*other ids",
    ),
    "a log-prob of nothing": (
        lambda row: row["meta_info"]["output_token_logprobs"][0].__setitem__(0, None),
        ProtocolError,
        r"row 0",
    ),
    "a log-prob without an id": (
        lambda row: row["meta_info"]["output_token_logprobs"].__setitem__(0, [-1.0]),
        ProtocolError,
        r"row 0",
    ),
    "an answer that is no row": (lambda row: row.clear(), ProtocolError, r"row 0.*lacks"),
}


def spoiled(rows: list[dict[str, Any]], spoil: Spoil) -> list[dict[str, Any]]:
    rows = copy.deepcopy(rows)
    spoil(rows[0])
    return rows


@pytest.mark.parametrize("case", BAD_ANSWERS)
def test_answers_that_do_not_add_up(case: str) -> None:
    spoil, error, words = BAD_ANSWERS[case]
    rows = rows_for([request()])
    read(rows)
    with pytest.raises(error, match=words):
        read(spoiled(rows, spoil))


def count_of(place: int, count: Any) -> Callable[[dict[str, Any]], Any]:
    return lambda a: a["places"][place].__setitem__(2, count)


# The answer's places are the segments prompt, response, full, then the spans mask, tail.
BAD_CHANNELS: dict[str, tuple[Callable[[dict[str, Any]], Any], type[SGLangHiddenError], str]] = {
    "other protocol": (lambda a: a.update(protocol=3), ProtocolError, r"row 0 .*protocol 3 and this client 4; install"),
    "no data": (lambda a: a.pop("data"), ProtocolError, r"row 0 .*cannot be read"),
    "cut base64": (lambda a: a.update(data=a["data"][:-3]), ProtocolError, r"cannot be read.*cut short"),
    "no places": (lambda a: a.update(places=None), ProtocolError, r"cannot be read"),
    "a fault": (lambda a: a.update(faults={"tail": "too short"}), SpanError, r"row 0 .*, span 'tail': too short"),
    "too few rows": (
        count_of(1, len(RESPONSE) - 1),
        AlignmentError,
        r"row 0 .* rows of states for the 'response' segment of 4 prompt and \d response tokens, expected \d; send it",
    ),
    "too many rows": (count_of(0, 5), AlignmentError, r"5 rows .*'prompt'.*expected 4"),
    "negative rows": (count_of(0, -4), AlignmentError, r"-4 rows .*'prompt'.*expected 4"),
    "too few rows of a span": (count_of(3, 1), AlignmentError, r"1 rows .*span 'mask'.*expected 2"),
    "too many rows of a span": (count_of(4, 3), AlignmentError, r"3 rows .*span 'tail'.*expected 2"),
    "rows without a vector": (lambda a: a["places"][4].__setitem__(3, False), ProtocolError, r"cannot be read"),
    "another segment": (lambda a: a["places"][0].__setitem__(1, "answer"), AlignmentError, r"0 rows .*'prompt'"),
    "another span": (lambda a: a["places"][4].__setitem__(1, "head"), AlignmentError, r"0 rows .*'tail'"),
    "a span for a segment": (lambda a: a["places"][0].__setitem__(0, "span"), AlignmentError, r"0 rows .*'prompt'"),
    "no token states": (
        lambda a: a.pop("rows"),
        AlignmentError,
        r"row 0 .*expected the states of positions 0\.\.\d, 4 prompt and \d response tokens, and got none; send it",
    ),
    "token states from elsewhere": (
        lambda a: a["rows"].update(first=1),
        AlignmentError,
        r"row 0 .*and got those of \d positions from 1 on",
    ),
    "fewer token states": (lambda a: lose_rows(a), AlignmentError, r"row 0 .*and got those of 2 positions from 0 on"),
}


def lose_rows(answer: dict[str, Any]) -> None:
    """A sound answer over two positions only."""
    one = request(HiddenSpec(("prompt",), tokens=True), prompt_ids=PROMPT[:2])
    answer["rows"] = rows_for([one])[0]["meta_info"][CHANNEL][0]["rows"]


@pytest.mark.parametrize("case", BAD_CHANNELS)
def test_states_that_do_not_add_up(case: str) -> None:
    spoil, error, words = BAD_CHANNELS[case]
    one = spanned(ALL_SEGMENTS, tokens=True)
    rows = rows_for([one])
    read(rows, [one])
    with pytest.raises(error, match=words):
        read(spoiled(rows, lambda row: spoil(row["meta_info"][CHANNEL][0])), [one])


@pytest.mark.parametrize("empty", [0, -1])
def test_a_span_whose_size_is_not_known_has_rows(empty: int) -> None:
    spec = HiddenSpec((), spans={"b": Between(None, "x", unclosed="end")})
    one = request(spec, spans=dict(spec.spans))
    rows = rows_for([one])
    rows[0]["meta_info"][CHANNEL][0]["places"][0][2] = empty
    with pytest.raises(AlignmentError, match=rf"{empty} rows of states for the span 'b' .*, expected at least 1; send"):
        read(rows, [one])


@pytest.mark.parametrize("tokens", [False, True])
@pytest.mark.parametrize(("asked", "answered"), [((0, -1), -1), (-1, (0, -1)), ((0, -1), (0, 2, -1))])
def test_states_of_another_number_of_layers(asked: Any, answered: Any, tokens: bool) -> None:
    pooling = None if tokens else "mean"
    rows = rows_for([request(HiddenSpec(("response",), pooling, answered, tokens=True))])
    with pytest.raises(ProtocolError, match=r"row 0 .*: states of shape \(.*\), expected \[\.\.\., \d, 8\]"):
        read(rows, [request(HiddenSpec(("response",), pooling, asked, tokens=True))])


@pytest.mark.parametrize("answer", [None, [], {}, "text", [1], [{}, {}]])
def test_an_answer_of_another_form(answer: Any) -> None:
    rows = rows_for([request()])
    with pytest.raises(ProtocolError, match=r"row 0"):
        read(spoiled(rows, lambda row: row["meta_info"].update({CHANNEL: answer})))


@pytest.mark.parametrize("states", [None, [], 7, [["a"]], [[[1.0], [1.0, 2.0]]], [None], [[]], [[[]]], [1.0]])
def test_stock_states_of_another_form(states: Any) -> None:
    one = request()
    rows = rows_for([one], **STOCK)
    with pytest.raises((ProtocolError, AlignmentError), match=r"row 0"):
        read(spoiled(rows, lambda row: row["meta_info"].update(hidden_states=states)), [one], **STOCK)


@pytest.mark.parametrize("rows", [None, {}, "text", []])
def test_another_number_of_answers(rows: Any) -> None:
    with pytest.raises(ProtocolError, match=r"sent 1 requests and got"):
        read(rows)


@pytest.mark.parametrize("row", [None, 7, "text", []])
def test_a_row_of_another_form(row: Any) -> None:
    with pytest.raises(ProtocolError, match=r"row 0"):
        read([row])


# --- what an engine says of itself ------------------------------------------------------------------------------------

MODEL_INFO = {"model_path": "m", "tokenizer_path": "t", "weight_version": "default", "is_generation": True}
STATUS = Status(
    vocab_size=96, hidden_size=8, num_layers=4, context_length=64, layers=(-1,), because="", normed=True, shared="",
    open_pools=0, prefix_bytes=0, constraints=("action_mask",),
).pack()  # fmt: skip


def server_info(*statuses: Any, **changes: Any) -> dict[str, Any]:
    states = [{} if status is None else {CHANNEL: status} for status in statuses]
    return {"internal_states": states, "max_req_input_len": 60, "enable_return_hidden_states": True, **changes}


def never(path: str) -> ModelSizes:
    raise AssertionError(f"asked for the model at {path}")


def sizes_of(path: str) -> ModelSizes:
    return {"m": ModelSizes(vocab_size=50, hidden_size=4, num_layers=3, context_length=32)}[path]


def info_of(*statuses: Any, **changes: Any) -> Any:
    return read_info(MODEL_INFO, server_info(*statuses, **changes), sizes_of)


def test_a_server_with_the_server_half() -> None:
    info = read_info(MODEL_INFO, server_info({**STATUS, "layers": [0, 2, -1]}), never)
    assert (info.model_path, info.tokenizer_path, info.weight_version) == ("m", "t", "default")
    assert (info.vocab_size, info.hidden_size, info.num_layers, info.context_length) == (96, 8, 4, 64)
    assert (info.max_prompt_tokens, info.layers, info.no_states_because) == (59, (-1, 0, 2), "")
    assert (info.pools_in_server, info.returns_hidden_states, info.shares_memory) == (True, True, False)


@pytest.mark.parametrize("info", [server_info(None), server_info(), {**server_info(), "internal_states": None}])
def test_a_stock_server_is_asked_for_its_model(info: Any) -> None:
    found = read_info(MODEL_INFO, info, sizes_of)
    assert (found.vocab_size, found.hidden_size, found.num_layers, found.context_length) == (50, 4, 3, 32)
    assert (found.max_prompt_tokens, found.pools_in_server, found.layers) == (31, False, (-1,))
    assert (found.returns_hidden_states, found.no_states_because, found.shares_memory) == (True, "", False)


@pytest.mark.parametrize(
    ("layers", "pools", "found"),
    [
        ([[0, -1], [0, -1]], True, (-1, 0)),
        ([[0, 2, -1], [-1, 1, 2]], True, (-1, 2)),
        ([[0, -1], [-1]], True, (-1,)),
        ([[0, -1], []], False, (-1,)),
        ([[], []], False, (-1,)),
        ([[0, -1], None], True, (-1,)),
        ([None, None], True, (-1,)),
    ],
)
def test_every_scheduler_must_have_a_layer(layers: list[Any], pools: bool, found: tuple[int, ...]) -> None:
    """Of data-parallel ones any may get a request. One that has not run yet has its last to offer."""
    info = info_of(*({**STATUS, "layers": one} for one in layers))
    assert (info.pools_in_server, info.layers) == (pools, found)


def test_every_scheduler_must_have_the_server_half() -> None:
    assert info_of(STATUS, STATUS).pools_in_server
    for statuses in ((STATUS, None), (None, STATUS)):
        info = info_of(*statuses)
        assert (info.pools_in_server, info.layers, info.shares_memory) == (False, (-1,), False)


def test_a_server_says_why_it_gives_no_states() -> None:
    info = info_of({**STATUS, "layers": []}, {**STATUS, "layers": [], "because": "--enable-pdmux splits"})
    assert (info.pools_in_server, info.returns_hidden_states) == (False, True)
    assert info.no_states_because == "--enable-pdmux splits"
    only_last = info_of({**STATUS, "because": "Gemma 9 has no list of layers"})
    assert (only_last.pools_in_server, only_last.layers) == (True, (-1,))
    assert only_last.no_states_because == "Gemma 9 has no list of layers"


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"speculative_algorithm": "NGRAM"}, r"speculative decoding \(NGRAM\) gives rows of rejected tokens"),
        ({"pp_size": 2}, r"between pipeline stages \(pp_size=2\)"),
    ],
)
def test_stock_states_that_cannot_be_trusted(changes: Any, words: str) -> None:
    info = info_of(None, **changes)
    assert not info.returns_hidden_states
    assert re.search(words, info.no_states_because)


@pytest.mark.parametrize("changes", [{"speculative_algorithm": None}, {"pp_size": 1}, {"pp_size": None}])
def test_stock_states_that_can(changes: Any) -> None:
    assert info_of(None, **changes).returns_hidden_states
    assert not info_of(None, **changes, enable_return_hidden_states=False).returns_hidden_states


def test_states_before_the_norm_are_not_returned() -> None:
    info = info_of({**STATUS, "normed": False, "layers": []})
    assert (info.pools_in_server, info.returns_hidden_states) == (False, False)


def test_memory_is_shared_with_a_server_on_this_machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server_info_module, "is_shared", lambda sign: is_shared(sign, tmp_path))
    here, there = {**STATUS, "shared": SharedFiles(tmp_path).sign}, {**STATUS, "shared": "elsewhere"}
    assert info_of(here).shares_memory
    assert info_of(here, here).shares_memory
    assert not info_of(here, there).shares_memory
    assert not info_of(here, {**here, "layers": []}).shares_memory


@pytest.mark.parametrize(
    ("statuses", "num_prompts"),
    [
        ([STATUS], None),
        ([None], None),
        ([], None),
        ([{**STATUS, "layers": []}], None),
        ([{**STATUS, "layers": None}], 1),
        ([{**STATUS, "layers": None}, {**STATUS, "layers": None}], 2),
        ([STATUS, {**STATUS, "layers": None}], 2),
        ([{"protocol": 1}], None),
    ],
)
def test_an_engine_that_has_not_run_yet_is_warmed_up(statuses: list[Any], num_prompts: int | None) -> None:
    payload = warm_up(server_info(*statuses))
    if num_prompts is None:
        assert payload is None
    else:
        assert payload == {
            "input_ids": [[0]] * num_prompts,
            "sampling_params": {"max_new_tokens": 1, "temperature": 0.0},
        }


def test_a_shorter_context_of_the_server_counts() -> None:
    info = read_info(MODEL_INFO, server_info(STATUS, context_length=40), never)
    assert (info.context_length, info.max_prompt_tokens) == (40, 39)


@pytest.mark.parametrize("protocol", [0, 1, 2, 3, 5, "4"])
def test_another_protocol(protocol: Any) -> None:
    with pytest.raises(ProtocolError, match=rf"{re.escape(repr(protocol))}.*this client {PROTOCOL}; install the same"):
        read_info(MODEL_INFO, server_info({**STATUS, "protocol": protocol}), never)


@pytest.mark.parametrize(
    ("model_info", "info"),
    [
        ({**MODEL_INFO, "is_generation": False}, server_info(STATUS)),
        (MODEL_INFO, server_info(STATUS, skip_tokenizer_init=True)),
    ],
)
def test_a_server_that_does_not_write_text(model_info: Any, info: Any) -> None:
    with pytest.raises(CapabilityError, match=r"'m' does not generate text; .*causal language model"):
        read_info(model_info, info, never)


@pytest.mark.parametrize("missing", ["model_path", "weight_version"])
def test_a_description_of_another_version(missing: str) -> None:
    model_info = {name: value for name, value in MODEL_INFO.items() if name != missing}
    with pytest.raises(ProtocolError, match=rf"lacks '{missing}'.*0\.5\.23"):
        read_info(model_info, server_info(STATUS), never)


# --- requests ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("prompt_ids", "error", "words"),
    [
        ((), PromptLengthError, r"row 1: the prompt has 0 tokens; SGLang needs at least 1"),
        ((5, 96), TokenIdError, r"row 1: token id 96 at position 1 .*vocabulary of 96; ids are 0\.\.95.*tokenizer\?"),
        ((-3, 5), TokenIdError, r"row 1: token id -3 at position 0 "),
        ((5, 6.0), InputTypeError, r"row 1: token id 6\.0 is a float; token ids are integers"),
        ((True,), InputTypeError, r"row 1: token id True is a bool"),
        ((torch.tensor(5),), InputTypeError, r"row 1: token id tensor\(5\) is a Tensor"),
        ((5,) * 59, PromptLengthError, r"row 1: .*59 tokens, over the engine's limit of 58 .*64\); shorten"),
    ],
)
def test_prompts_that_are_not_sent(prompt_ids: Any, error: type[SGLangHiddenError], words: str) -> None:
    with pytest.raises(error, match=words):
        check_requests([request(), request(prompt_ids=prompt_ids)], make_info())


def test_prompts_at_the_limits_are_sent() -> None:
    check_requests([request(prompt_ids=(0, 95)), request(prompt_ids=(5,) * 58, max_new_tokens=6)], make_info())


@pytest.mark.parametrize("sampling", [{"stop_token_ids": [2, 96]}, {"logit_bias": {"96": 1.0}}])
def test_ids_among_the_options(sampling: dict[str, Any]) -> None:
    (name,) = sampling
    with pytest.raises(TokenIdError, match=rf"row 0: {name} has id 96, .* of 96; ids are 0\.\.95"):
        check_requests([request(**sampling)], make_info())


def test_a_response_across_an_update_says_so() -> None:
    for versions, mixed in ((["v7"], False), (["v6", "v7"], True), (None, False)):
        rows = rows_for([request()])
        if versions is not None:
            spans = [{"version": name, "start": 2 * i, "end": 2 * i + 2} for i, name in enumerate(versions)]
            rows[0]["meta_info"]["weight_versions"] = spans
        (one,) = read(rows)
        assert (one.weight_version, one.mixed_weights) == ("v7", mixed)


def test_a_seed_that_is_not_read_is_refused() -> None:
    check_requests([request(sampling_seed=3)], make_info())
    with pytest.raises(CapabilityError, match=r"row 1: sampling_seed=3, .*--enable-deterministic-inference"):
        check_requests([request(), request(sampling_seed=3)], make_info(honours_seeds=False))


# --- states that are asked for ----------------------------------------------------------------------------------------


GOOD_SPEC = HiddenSpec(ALL_SEGMENTS, layers=(0, -1, -2), spans=SPANS)


@pytest.mark.parametrize(
    ("one", "info", "error", "words"),
    [
        (
            request(),
            {**STOCK, "returns_hidden_states": False},
            CapabilityError,
            r"row 1: hidden states are asked of a server that was started without them; start the server with .*, or "
            r"pass hidden=None",
        ),
        (
            request(),
            {**STOCK, "returns_hidden_states": False, "no_states_because": "of speculation"},
            CapabilityError,
            r"without them, which gives none: of speculation; start",
        ),
        (
            request(HiddenSpec(layers=1)),
            {},
            CapabilityError,
            r"row 1: layers=1: the server gives the states of layers \[-1, 0, 2\]; start it with "
            r"launch\(layers=\(0, 1, 2\)\), or `serve --layers`",
        ),
        (request(HiddenSpec(layers=(0, -3))), {}, CapabilityError, r"layers=\(0, -3\): .*launch\(layers=\(0, 1, 2\)\)"),
        (
            request(HiddenSpec(layers=(-1, 0))),
            {"layers": (-1,), "no_states_because": "Gemma 9 is another"},
            CapabilityError,
            r"layers \[-1\] \(Gemma 9 is another\); start it",
        ),
        (
            request(HiddenSpec(layers=0)),
            STOCK,
            CapabilityError,
            r"layers=0: the server gives the states of layers \[-1\]",
        ),
        (request(HiddenSpec(layers=4)), {}, InputError, r"layers=4: the model has 4 layers; use 0\.\.3"),
        (request(HiddenSpec(layers=-5)), {}, InputError, r"layers=-5: the model has 4 layers"),
        (
            request(max_new_tokens=0),
            {},
            InputError,
            r"row 1: max_new_tokens=0 generates nothing, and segments=\('prompt', 'response', 'full'\), spans=\[\] "
            r"are not all of the prompt",
        ),
        (
            request(HiddenSpec((), spans={"r": LastTokens(1)}), spans={"r": LastTokens(1)}, max_new_tokens=0),
            {},
            InputError,
            r"spans=\['r'\] are not all of the prompt",
        ),
        (
            request(HiddenSpec(spans=SPANS)),
            {},
            InputError,
            r"row 1: spans \[\] are resolved, and \['mask', 'tail'\] are asked for",
        ),
        (request(HiddenSpec(), spans=RESOLVED), {}, InputError, r"spans \['mask', 'tail'\] are resolved, and \[\] are"),
        (
            request(HiddenSpec(spans={"m": TokenMask("m")}), spans={"m": PromptSpan(((0, 1), (4, 5)))}),
            {},
            SpanError,
            r"row 1, span 'm': ends at 5 in a prompt of 4 tokens",
        ),
        (
            request(HiddenSpec(spans={"b": Between("a", None)}), spans={"b": Between("a", None)}),
            STOCK,
            CapabilityError,
            r"row 1, span 'b': markers are found by the server half; start the server with",
        ),
    ],
)
def test_states_that_cannot_be_had(one: Request, info: Any, error: type[SGLangHiddenError], words: str) -> None:
    with pytest.raises(error, match=words):
        check_requests([request(None), one], make_info(**info))


@pytest.mark.parametrize(
    ("one", "info"),
    [
        (request(GOOD_SPEC, spans=RESOLVED), {}),
        (request(HiddenSpec(spans=SPANS), spans=RESOLVED), STOCK),
        (request(HiddenSpec(layers=(-1,))), {**STOCK, "returns_hidden_states": True}),
        (request(HiddenSpec()), {"returns_hidden_states": False}),
        (request(None), {**STOCK, "returns_hidden_states": False}),
        (request(HiddenSpec(("prompt",), tokens=True), max_new_tokens=0), {}),
        (
            request(HiddenSpec((), spans={"m": TokenMask("m")}), spans={"m": PromptSpan(((0, 4),))}, max_new_tokens=0),
            {},
        ),
        (request(HiddenSpec(spans={"b": Between("a", None)}), spans={"b": Between("a", None)}), {}),
    ],
)
def test_states_that_can_be_had(one: Request, info: Any) -> None:
    check_requests([one], make_info(**info))


def test_one_priority_for_a_batch() -> None:
    check_requests([request(priority=1), request(priority=1)], make_info())
    for other in (2, None):
        with pytest.raises(InputError, match=r"priorities .*, and SGLang takes one per batch; send them apart"):
            check_requests([request(priority=1), request(priority=other)], make_info())


def test_a_priority_that_is_not_read_is_refused() -> None:
    with pytest.raises(CapabilityError, match=r"priority=1, which this engine does not read; .*--enable-priority"):
        check_requests([request(priority=1)], make_info(honours_priorities=False))


def test_a_span_that_no_response_is_long_enough_for() -> None:
    def of(span: LastTokens, max_new_tokens: int) -> Request:
        spec = HiddenSpec(spans={"tail": span})
        return request(spec, spans={"tail": span}, max_new_tokens=max_new_tokens)

    with pytest.raises(SpanError, match=r"row 0, span 'tail': LastTokens\(9\) .* max_new_tokens=8; raise that"):
        check_requests([of(LastTokens(9), 8)], make_info())
    check_requests([of(LastTokens(8), 8), of(LastTokens(9, allow_fewer=True), 8)], make_info())


def test_a_prompt_that_is_only_read_must_leave_room_for_a_token() -> None:
    read_only = request(HiddenSpec(("prompt",)), prompt_ids=(5,) * 58, max_new_tokens=0)
    check_requests([read_only], make_info(context_length=59))
    with pytest.raises(PromptLengthError, match=r"row 0: 58 prompt tokens and max_new_tokens=1 are 59 together, over"):
        check_requests([read_only], make_info(context_length=58))


@pytest.mark.parametrize(
    "span", [LastTokens(2, "prompt"), Between("a", "b", "prompt"), TokenMask("m")], ids=lambda span: type(span).__name__
)
def test_a_span_that_is_not_resolved(span: Any) -> None:
    """It would be pooled over the response, with a count that fits."""
    one = Request((5, 6, 7), hidden=HiddenSpec(spans={"s": span}), spans={"s": span})
    with pytest.raises(InputTypeError, match=r"row 0, span 's': .* is not resolved; .*PromptSpan"):
        check_requests([one], make_info())


def test_one_layer_under_two_names() -> None:
    one = Request((5, 6, 7), hidden=HiddenSpec(layers=(-2, 2)))
    with pytest.raises(InputError, match=r"layers=\(-2, 2\): two of them are the same layer of 4"):
        check_requests([one], make_info())


@pytest.mark.parametrize(("near", "limit"), [(False, "256"), (True, "1024")])
def test_token_states_have_a_limit(near: bool, limit: str) -> None:
    info = make_info(hidden_size=2**17, context_length=10**6, max_prompt_tokens=10**6, shares_memory=near)

    def ask(spec: HiddenSpec, num_prompt: int) -> None:
        check_requests([Request((5,) * num_prompt, {"max_new_tokens": 8}, hidden=spec)], info)

    with pytest.raises(InputError, match=rf"row 0: tokens=True for up to 3008 positions .* limit of {limit} MiB; ask"):
        ask(HiddenSpec(("full",), tokens=True), 3000)
    ask(HiddenSpec(("response",), tokens=True), 3000)
    ask(HiddenSpec(("full",), tokens=True, dtype=torch.bfloat16), 800 if not near else 3000)
    ask(HiddenSpec(("full",)), 3000)


@pytest.mark.parametrize("near", [True, False])
def test_rows_behind_one_that_failed_leave_nothing_in_shared_memory(near: bool) -> None:
    """Of a server elsewhere nothing here is touched, whatever it names."""
    files = SharedFiles()
    name = files.share(bytes(2**20))
    assert name is not None
    rows: list[Any] = [None, {"meta_info": {CHANNEL: [{"rows": {"shared": name}}]}}, {"meta_info": 7}, 7]
    with pytest.raises(ProtocolError, match="row 0"):
        read_responses([request()] * 4, rows, make_info(shares_memory=near))
    assert (DIRECTORY / name).exists() is not near
    files.close()


# --- logits and constraints -------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Forbid(LogitConstraint, name="wire_forbid"):
    """A user's own: takes the token away that the model likes best, or fails."""

    fails: bool = False

    def apply(self, logits_V: torch.Tensor, step: ConstraintStep) -> torch.Tensor:
        if self.fails:
            raise LookupError("no table")
        logits_V[logits_V.argmax()] = -math.inf
        return logits_V


V = len(WORDS)
FULL = LogitsSpec(full=True)
TOP = LogitsSpec(top_k=3)
PROMPTS = LogitsSpec(top_k=3, segments=("prompt",))
EVERY = LogitsSpec(full=True, segments=("full",))
MASKED = (ActionMask((6, 7, 8)), TemperatureScale(2.0))
GIVEN = (9, 8, 7, 6, 8, 7)


def asks(*constraints: LogitConstraint, spec: LogitsSpec | None = None, ids: Any = PROMPT, **fields: Any) -> Request:
    sampling = fields.pop("sampling", {})
    return Request(ids, sampling, logits=spec, constraints=constraints, **fields)


def scores(*constraints: LogitConstraint, first: int = 0, spec: LogitsSpec | None = None, ids: Any = GIVEN) -> Request:
    """A sequence that is scored; a constraint acts on all of it behind its first two tokens."""
    responses = ((2, len(ids)),) if constraints and len(ids) > 2 else ((1, len(ids)),) if constraints else ()
    return asks(
        *constraints, spec=spec, ids=ids, score_prompt=True, score_from=first, response_ranges=responses,
        sampling={"max_new_tokens": 0}, return_log_probs=False,
    )  # fmt: skip


def model_rows(ids: Any) -> torch.Tensor:
    """What the made-up head says of tokens 1, 2, …"""
    return torch.stack([logits_V(ids[: place + 1]) for place in range(len(ids) - 1)])


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


@pytest.mark.parametrize("binary", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("asked", [{"full": True}, {"top_k": 4}, {"token_ids": (7, 6)}])
@pytest.mark.parametrize("stage", ["raw", "processed"])
def test_logits_become_a_completion(binary: bool, dtype: torch.dtype, asked: Any, stage: Any) -> None:
    spec = LogitsSpec(**asked, stage=stage, segments=("prompt", "response"), dtype=dtype)
    sent = dataclasses.replace(request(temperature=0.5), logits=spec, constraints=(ActionMask((6, 7, 8)),))
    (one,) = RecordingEngine(binary=binary).generate([sent])
    assert set(one.response_ids) <= {6, 7, 8}
    assert one.logits.values_NC.dtype == one.prompt_logits.values_NC.dtype == dtype
    rows_NV = model_rows([*PROMPT, *one.response_ids])
    num_given, num_response = len(PROMPT) - 1, len(one.response_ids)
    raw_TV = rows_NV[num_given:]
    for index, token in enumerate(RESPONSE):
        raw_TV[index, token] = 20.0  # the recorder prefers it
    masked_TV = raw_TV.masked_fill(~ActionMask((6, 7, 8)).allowed(V), -math.inf) / 0.5
    for found, expected_NV, rows in (
        (one.prompt_logits, rows_NV[:num_given], num_given),
        (one.logits, raw_TV if stage == "raw" else masked_TV, num_response),
    ):
        assert found.values_NC.shape == (rows, spec.num_columns(V))
        if spec.top_k is not None:
            assert torch.equal(found.values_NC, expected_NV.topk(4).values.to(dtype))
            assert torch.equal(found.token_ids_NC[:, 0], expected_NV.argmax(-1))
        else:
            columns = range(V) if spec.token_ids is None else spec.token_ids
            assert torch.equal(found.values_NC, expected_NV[:, list(columns)].to(dtype))
            assert found.token_ids_NC is None
    if stage == "processed" and spec.full and dtype == torch.float32:
        log_probs_TV = one.logits.values_NC.log_softmax(-1)
        assert torch.allclose(log_probs_TV.gather(1, torch.tensor(one.response_ids)[:, None])[:, 0], one.log_probs_T)
    assert_states(one, sent, make_info())


@pytest.mark.parametrize("segments", [("response",), ("prompt",)])
def test_segments_that_were_not_asked_for_are_not_there(segments: Any) -> None:
    (one,) = RecordingEngine().generate([asks(spec=LogitsSpec(top_k=2, segments=segments))])
    assert (one.logits is None, one.prompt_logits is None) == (segments == ("prompt",), segments == ("response",))


@pytest.mark.parametrize(
    "spec", [LogitsSpec(full=True, segments=("full",), dtype=torch.bfloat16), LogitsSpec(top_k=2, segments=("full",))]
)
def test_a_prompt_of_one_token_has_no_rows_before_it(spec: LogitsSpec) -> None:
    (one,) = RecordingEngine().generate([asks(spec=spec, ids=(9,))])
    assert (one.prompt_logits.values_NC.shape, one.prompt_logits.values_NC.dtype) == (
        (0, spec.num_columns(V)),
        spec.dtype,
    )
    ids_NC = one.prompt_logits.token_ids_NC
    assert (ids_NC is None) if spec.full else ((ids_NC.shape, ids_NC.dtype) == ((0, 2), torch.int64))
    assert len(one.logits.values_NC) == len(one.response_ids)


@pytest.mark.parametrize("first", [0, 1, 2, 4, 5])
@pytest.mark.parametrize("spec", [None, PROMPTS])
def test_log_probs_of_a_given_sequence(first: int, spec: LogitsSpec | None) -> None:
    """Stock ones, and those under constraints: of the tokens from ``score_from`` on, NaN for the very first."""
    sent = [scores(*constraints, first=first, spec=spec) for constraints in ((), MASKED)]
    stock, masked = RecordingEngine().generate(sent)
    expected = [math.nan, *(log_prob_of(i) for i in GIVEN[1:])][first:]
    torch.testing.assert_close(stock.prompt_log_probs_P, torch.tensor(expected), equal_nan=True)
    rows_NV = model_rows(GIVEN)
    rows_NV[1:] = rows_NV[1:].masked_fill(~ActionMask((6, 7, 8)).allowed(V), -math.inf) / 2  # tokens 2 …
    found_N = rows_NV.log_softmax(-1)[range(len(GIVEN) - 1), list(GIVEN[1:])]
    expected_N = torch.cat([torch.tensor([math.nan]), found_N])[first:]
    torch.testing.assert_close(masked.prompt_log_probs_P, expected_N, equal_nan=True)
    assert masked.prompt_log_probs_P.dtype == stock.prompt_log_probs_P.dtype == torch.float32
    assert (masked.response_ids, masked.log_probs_T, masked.logits) == ((), None, None)
    assert (masked.prompt_logits is None) is (spec is None)


def test_a_token_that_the_constraints_take_away() -> None:
    (one,) = RecordingEngine().generate([scores(ActionMask((6, 8)))])
    assert (one.prompt_log_probs_P == -math.inf).tolist() == [False, False, True, False, False, True]


@pytest.mark.parametrize("constraints", [(), MASKED])
def test_a_sequence_of_one_token_has_no_log_prob(constraints: Any) -> None:
    one = Request((9,), {"max_new_tokens": 0}, False, score_prompt=True, constraints=constraints, response_ranges=())
    payload = to_payload([one], make_info(), binary=False)
    (found,) = read_responses([one], RecordingEngine().answer(payload), make_info())
    assert (found.prompt_log_probs_P.shape, found.prompt_log_probs_P.isnan().all().item()) == ((1,), True)


# What is done to a good answer under constraints, with logits of all tokens; and what is said of it.
BAD_LOGITS: dict[str, tuple[Callable[[dict[str, Any]], Any], type[SGLangHiddenError], str]] = {
    "a fault": (
        lambda a: a.update(fault="token 2 of the response: 0 tokens are left"),
        ConstraintError,
        r"row 0 \(request recorded-0\): token 2 of the response: 0 tokens are left",
    ),
    "too few constrained": (
        lambda a: a.update(constrained=a["constrained"] - 1),
        AlignmentError,
        r"row 0 .*: the constraints were applied to 4 of 5 response tokens; .*leave --sampling-backend at its default",
    ),
    "too many constrained": (lambda a: a.update(constrained=9), AlignmentError, r"applied to 9 of 5 response tokens"),
    "none": (
        lambda a: a.pop("constrained"),
        ProtocolError,
        r"row 0 .*: logits or constraints were asked for and are not in the answer; send it again",
    ),
    "no logits": (
        lambda a: [a.pop("logits"), a.pop("logits_ids")],
        AlignmentError,
        r"row 0 .*: logits of shape None for 5 response tokens and 3 columns; send it again",
    ),
    "no prompt logits": (
        lambda a: [a.pop("prompt_logits"), a.pop("prompt_logits_ids")],
        AlignmentError,
        r"logits of shape None for 3 prompt tokens and 3 columns",
    ),
    "the prompt's for the response's": (
        lambda a: a.update(logits=a["prompt_logits"], logits_ids=a["prompt_logits_ids"]),
        AlignmentError,
        r"logits of shape \(3, 3\) for 5 response tokens and 3 columns",
    ),
    "no ids": (lambda a: a.pop("logits_ids"), ProtocolError, r"row 0 .*: the response logits came without their token"),
    "ids of another shape": (
        lambda a: a.update(logits_ids=a["prompt_logits_ids"]),
        ProtocolError,
        r"row 0 .*: the states cannot be read",
    ),
}


@pytest.mark.parametrize("case", BAD_LOGITS)
def test_logits_that_do_not_add_up(case: str) -> None:
    spoil, error, words = BAD_LOGITS[case]
    one = asks(*MASKED, spec=LogitsSpec(top_k=3, segments=("full",)), sampling={"max_new_tokens": 5})
    rows = rows_for([one])
    assert len(rows[0]["output_ids"]) == 5
    read(rows, [one])
    with pytest.raises(error, match=words):
        read(spoiled(rows, lambda row: spoil(row["meta_info"][CHANNEL][0])), [one])


def test_refused_logits_leave_nothing_in_shared_memory() -> None:
    files = SharedFiles()
    name = files.share(bytes(2**20))
    assert name is not None
    one = dataclasses.replace(request(), logits=TOP)
    rows = rows_for([one])
    rows[0]["meta_info"][CHANNEL][0].update(refused="no room", rows={"shared": name})
    with pytest.raises(CapabilityError, match=r"^row 0 \(request recorded-0\): no room$"):
        read_responses([one], rows, make_info(shares_memory=True))
    assert not (DIRECTORY / name).exists()
    files.close()


def test_columns_with_ids_that_were_not_asked_for() -> None:
    one = asks(spec=TOP, sampling={"max_new_tokens": 5})
    other = dataclasses.replace(one, logits=LogitsSpec(token_ids=(4, 5, 6)))
    with pytest.raises(ProtocolError, match=r"row 0 .*: the response logits came with their token ids"):
        read(rows_for([one]), [other])


@pytest.mark.parametrize("spoil", [lambda a: a.pop("log_probs"), lambda a: a.update(log_probs=short_log_probs())])
def test_log_probs_under_constraints_that_do_not_add_up(spoil: Any) -> None:
    one = scores(*MASKED, first=1)
    rows = rows_for([one])
    read(rows, [one])
    with pytest.raises(AlignmentError, match=r"row 0 .*: (None|3) log-probs under constraints for 5 prompt tokens; s"):
        read(spoiled(rows, lambda row: spoil(row["meta_info"][CHANNEL][0])), [one])


def short_log_probs() -> Any:
    return rows_for([scores(*MASKED, first=3)])[0]["meta_info"][CHANNEL][0]["log_probs"]


def test_a_users_constraint_that_fails_in_the_server() -> None:
    (one,) = RecordingEngine().generate([asks(Forbid())])
    assert one.response_ids != tuple(RESPONSE)
    with pytest.raises(
        ConstraintError,
        match=r"row 0 \(request recorded-0\): wire_forbid failed at token 0 of the response: LookupError\('no table'\)",
    ):
        RecordingEngine().generate([asks(Forbid(fails=True))])


def test_the_constraints_of_all_schedulers_are_those_that_all_have() -> None:
    assert info_of(STATUS).constraints == ("action_mask",)
    several = {**STATUS, "constraints": ["b", "a", "c"]}
    assert info_of(several, {**several, "constraints": ["c", "b"]}).constraints == ("b", "c")
    assert info_of(several, {**several, "constraints": []}).constraints == ()
    assert info_of(None).constraints == info_of({**several, "layers": []}).constraints == ()
    assert info_of(STATUS).takes_processors is False
    assert info_of(STATUS, enable_custom_logit_processor=True).takes_processors


REFUSED: dict[str, tuple[Request, dict[str, Any], type[SGLangHiddenError], str]] = {
    "processors": (
        asks(processor="{...}"),
        {},
        CapabilityError,
        r"row 1: custom_logit_processor is given, and the server takes none .*--enable-custom-logit-processor .*, or "
        r"use ActionMask, DisallowedTokens",
    ),
    "no server half for logits": (
        asks(spec=FULL),
        {**STOCK, "no_states_because": "speculation"},
        CapabilityError,
        r"row 1: logits are asked of a server without the server half \(speculation\); start it with torchrl_",
    ),
    "no server half for constraints": (
        asks(*MASKED),
        STOCK,
        CapabilityError,
        r"row 1: constraints are asked of a server without the server half; start it with .*\.launch",
    ),
    "a constraint that the server does not have": (
        asks(*MASKED, Forbid()),
        {"constraints": ("action_mask", "temperature_scale")},
        CapabilityError,
        r"row 1: the server has no code of the constraint 'wire_forbid'; it has \['action_mask', 'temperature_scale'\]"
        r"\. Start it .*launch\(constraint_modules=\('my\.module',\)\), or `serve --constraints`",
    ),
    "score_from behind the end": (
        scores(first=6),
        {},
        InputError,
        r"row 1: score_from=6: the prompt's tokens are 0\.\.5",
    ),
    "score_from before the start": (scores(first=-1), {}, InputError, r"score_from=-1: the prompt's tokens are 0\.\.5"),
    "an id outside the vocabulary": (
        asks(ActionMask((5, 96))),
        {},
        TokenIdError,
        r"row 1: ActionMask: id 96 is outside the vocabulary of 96; ids are 0\.\.95",
    ),
    "masks that leave nothing": (
        asks(ActionMask((5, 6)), DisallowedTokens((5, 6), positions=(127,))),
        {"context_length": 1000},
        ConstraintError,
        r"row 1: ActionMask and DisallowedTokens together leave 0 of 96 tokens for token 127 of the response; allow",
    ),
    "masks that leave nothing in a given response": (
        scores(ActionMask((5, 6)), DisallowedTokens((5, 6), positions=(3,))),
        {},
        ConstraintError,
        r"row 1: .*leave 0 of 96 tokens for token 3 of the response",
    ),
    "no responses": (
        dataclasses.replace(scores(*MASKED), response_ranges=()),
        {},
        InputError,
        r"row 1: constraints on a scored prompt without responses: nothing says which of its tokens they act on",
    ),
    "responses out of order": (
        dataclasses.replace(scores(*MASKED), response_ranges=((4, 5), (1, 2))),
        {},
        InputError,
        r"row 1: response_ranges=\(\(4, 5\), \(1, 2\)\): expected parts of the prompt, in order and apart",
    ),
    "responses that overlap": (
        dataclasses.replace(scores(*MASKED), response_ranges=((1, 4), (3, 5))),
        {},
        InputError,
        r"in order and apart",
    ),
    "a response of no tokens": (
        dataclasses.replace(scores(*MASKED), response_ranges=((1, 1),)),
        {},
        InputError,
        r"response_ranges=\(\(1, 1\),\): expected parts",
    ),
    "a response that begins at token 0": (
        dataclasses.replace(scores(*MASKED), response_ranges=((0, 3),)),
        {},
        InputError,
        r"response_ranges=\(\(0, 3\),\): they are within tokens 1\.\.6, for nothing is before token 0",
    ),
    "a response beyond the end": (
        dataclasses.replace(scores(*MASKED), response_ranges=((1, 2), (4, 7))),
        {},
        InputError,
        r"they are within tokens 1\.\.6",
    ),
    "too many constraints": (
        asks(*[TemperatureScale(2.0)] * 65),
        {},
        InputError,
        r"row 1: 65 constraints, over the limit of 64; put masks together$",
    ),
    "more columns than tokens": (
        asks(spec=LogitsSpec(top_k=97)),
        {},
        InputError,
        r"row 1: LogitsSpec\(top_k=97\): the vocabulary has 96 tokens; lower it",
    ),
    "a column outside the vocabulary": (
        asks(spec=LogitsSpec(token_ids=(0, 96, 5))),
        {},
        TokenIdError,
        r"row 1: LogitsSpec\(token_ids=…\): id 96 is outside the vocabulary of 96; ids are 0\.\.95",
    ),
    "logits of no response": (
        asks(spec=FULL, sampling={"max_new_tokens": 0}),
        {},
        InputError,
        r"row 1: max_new_tokens=0 generates nothing, and LogitsSpec\(segments=\('response',\)\) are not all of the "
        r"prompt; ask for segments=\('prompt',\)",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_asked_of_logits_and_cannot_be_had(case: str) -> None:
    one, info, error, words = REFUSED[case]
    with pytest.raises(error, match=words):
        check_requests([asks(), one], make_info(**info))


@pytest.mark.parametrize(
    ("one", "info"),
    [
        (asks(processor="{...}"), {"takes_processors": True}),
        (asks(processor="{...}"), {**STOCK, "takes_processors": True}),
        (asks(ActionMask((0, 95)), TemperatureScale(LinearSchedule(2.0, 1.0)), Forbid()), {}),
        (asks(ActionMask((5,)), DisallowedTokens((5,), positions=(4,)), sampling={"max_new_tokens": 4}), {}),
        (asks(*[TemperatureScale(2.0)] * 64), {}),
        (asks(spec=LogitsSpec(top_k=96)), {}),
        (asks(spec=LogitsSpec(token_ids=(95, 0))), {}),
        (asks(spec=PROMPTS, sampling={"max_new_tokens": 0}), {}),
        (scores(first=5), STOCK),
        (dataclasses.replace(scores(*MASKED), response_ranges=((1, 2), (2, 6))), {}),
        (scores(ActionMask((5,)), DisallowedTokens((5,), positions=(4,))), {}),  # its response has 4 tokens
    ],
)
def test_what_is_asked_of_logits_and_can_be_had(one: Request, info: Any) -> None:
    check_requests([one], make_info(**info))


@pytest.mark.parametrize(("near", "limit"), [(False, 256), (True, 1024)])
@pytest.mark.parametrize(
    ("spec", "num_bytes"),
    [
        (LogitsSpec(full=True), 4 * 2**20),
        (LogitsSpec(full=True, dtype=torch.bfloat16), 2 * 2**20),
        (LogitsSpec(top_k=2**18), 8 * 2**18),
        (LogitsSpec(top_k=2**18, dtype=torch.bfloat16), 6 * 2**18),
        (LogitsSpec(token_ids=range(2**18)), 4 * 2**18),
    ],
    ids=lambda value: str(value)[:40],
)
def test_logits_have_a_limit(near: bool, limit: int, spec: LogitsSpec, num_bytes: int) -> None:
    """To the byte: a row more is too many."""
    info = make_info(vocab_size=2**20, context_length=10**6, max_prompt_tokens=10**6, shares_memory=near)
    most = limit * 2**20 // num_bytes
    for num_new, num_prompt, segments in (
        (most, 9, ("response",)),
        (7, most + 1, ("prompt",)),
        (most - 8, 9, ("full",)),
        (most - 8, 9, ("prompt", "response")),
    ):
        asked = dataclasses.replace(spec, segments=segments)
        good, ids = {"max_new_tokens": num_new}, (5,) * num_prompt
        check_requests([asks(spec=asked, ids=ids, sampling=good)], info)
        if segments == ("prompt",):
            bad = asks(spec=asked, ids=(*ids, 5), sampling=good)
        else:
            bad = asks(spec=asked, ids=ids, sampling={"max_new_tokens": num_new + 1})
        columns, remedy = spec.num_columns(2**20), "" if near else ", or run on the server's machine"
        words = (
            rf"row 0: logits of {columns} columns for up to {most + 1} tokens are \d+ MiB, over the limit of {limit} "
            rf"MiB; ask for fewer tokens, top_k or token_ids, or dtype=torch\.bfloat16{remedy}$"
        )
        with pytest.raises(InputError, match=words):
            check_requests([bad], info)


def test_the_logits_of_a_batch_have_a_limit() -> None:
    """Each row is under its own; together they would not find room. To the byte."""
    info = make_info(vocab_size=2**20, context_length=10**7, max_prompt_tokens=10**6, shares_memory=True)

    def row(mib: int) -> Request:
        return asks(spec=FULL, sampling={"max_new_tokens": mib // 4})

    most = [row(1024), row(512), row(508), asks(spec=LogitsSpec(token_ids=(3,)), sampling={"max_new_tokens": 2**20})]
    check_requests([*most, asks()], info)
    with pytest.raises(
        InputError,
        match=r"^the logits of 5 rows are up to 2048 MiB, over the limit of 2048 MiB for one batch; send fewer rows",
    ):
        check_requests([*most, asks(spec=LogitsSpec(token_ids=(3,)), sampling={"max_new_tokens": 1})], info)


def test_the_limit_counts_sglangs_own_number_of_tokens() -> None:
    info = make_info(vocab_size=2**20, context_length=10**6, max_prompt_tokens=10**6)
    with pytest.raises(InputError, match=r"for up to 128 tokens are 512 MiB"):
        check_requests([asks(spec=FULL)], info)
