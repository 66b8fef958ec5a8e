"""The wire: what SGLang gets, what is read of its answers, and what is refused on both ways."""

from __future__ import annotations

import copy
import json
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from recorder import (
    ALL_SEGMENTS,
    RecordingEngine,
    log_prob_of,
    make_info,
    pooled_D,
    response_of,
    states_ND,
)

from torchrl_sglang_hidden import AlignmentError, CapabilityError, HiddenSpec, ProtocolError, RequestAbortedError
from torchrl_sglang_hidden.channel import CHANNEL, PROTOCOL, pack_options, unpack_options
from torchrl_sglang_hidden.errors import InputTypeError, PromptLengthError, SGLangHiddenError, TokenIdError
from torchrl_sglang_hidden.specs import POOLINGS, Pooling, Request
from torchrl_sglang_hidden.wire import check_requests, read_info, read_responses, to_payload

PROMPT = (9, 8, 7, 3)
RESPONSE = response_of(PROMPT)
ALL = HiddenSpec(ALL_SEGMENTS)
STOCK = {"pools_in_server": False}


def request(hidden: HiddenSpec | None = ALL, prompt_ids: tuple[Any, ...] = PROMPT, **sampling: Any) -> Request:
    return Request(prompt_ids, sampling=sampling, hidden=hidden)


def rows_for(requests: list[Request], **info: Any) -> list[dict[str, Any]]:
    engine = RecordingEngine(**info)
    return engine.answer(to_payload(requests, engine.info, binary=False))


def read(rows: Any, requests: list[Request] | None = None, **info: Any) -> list[Any]:
    return read_responses(requests or [request()], rows, make_info(**info))


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
                "custom_params": {
                    CHANNEL: {
                        "protocol": PROTOCOL,
                        "segments": "prompt,response,full",
                        "pooling": "mean",
                        "binary": False,
                    }
                },
            },
            {"top_k": 2},
        ],
        "return_logprob": [True, False],
    }
    assert json.loads(json.dumps(payload)) == payload
    assert dict(requests[0].sampling) == {"max_new_tokens": 3, "stop": ["a"]}


def test_a_payload_for_a_stock_server() -> None:
    requests = [request(), request(None), request(HiddenSpec())]
    payload = to_payload(requests, make_info(**STOCK), binary=False)
    assert payload["return_hidden_states"] == [True, False, True]
    assert [bool(salt) for salt in payload["cache_salt"]] == [True, False, False]
    assert all("custom_params" not in params for params in payload["sampling_params"])
    assert to_payload(requests, make_info(**STOCK), binary=False)["cache_salt"][0] != payload["cache_salt"][0]


def test_a_stock_payload_without_states_asks_for_none() -> None:
    payload = to_payload([request(None)], make_info(**STOCK), binary=False)
    assert payload.keys() == {"input_ids", "sampling_params", "return_logprob"}


@pytest.mark.parametrize("pooling", POOLINGS)
@pytest.mark.parametrize("binary", [True, False])
@pytest.mark.parametrize("segments", [("full",), ("response", "prompt"), ALL_SEGMENTS])
def test_options_round_trip(segments: Any, pooling: Pooling, binary: bool) -> None:
    options = json.loads(json.dumps({CHANNEL: pack_options(HiddenSpec(segments, pooling), binary=binary)}))
    read_back = unpack_options(options)
    assert read_back is not None
    assert (read_back.segments, read_back.pooling, read_back.binary) == (segments, pooling, binary)


# --- answers ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("way", ["base64", "raw", "stock"])
@pytest.mark.parametrize("pooling", POOLINGS)
@pytest.mark.filterwarnings("ignore:the server has no torchrl_sglang_hidden server half")
def test_an_answer_becomes_a_completion(way: str, pooling: Pooling) -> None:
    engine = RecordingEngine(binary=way == "raw", pools_in_server=way != "stock")
    (one,) = engine.generate([request(HiddenSpec(ALL_SEGMENTS, pooling))])
    assert (one.prompt_ids, one.response_ids) == (PROMPT, tuple(RESPONSE))
    assert one.text == " ".join(map(str, RESPONSE))
    assert (one.finish_reason, one.weight_version) == ("stop" if RESPONSE[-1] == 1 else "length", "v7")
    assert one.log_probs_T.tolist() == [log_prob_of(i) for i in RESPONSE]
    for segment, pooled in one.hidden.items():
        expected_D = pooled_D(states_ND(PROMPT, RESPONSE), segment, pooling, len(PROMPT))
        assert pooled.vector_D.dtype == torch.float32
        torch.testing.assert_close(pooled.vector_D.double(), expected_D, rtol=1e-5, atol=1e-6)


def test_raw_vectors_can_be_written_to() -> None:
    (one,) = RecordingEngine(binary=True).generate([request()])
    one.hidden["response"].vector_D.add_(1)


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
        torch.testing.assert_close(pooled.vector_D.double(), expected_D, rtol=1e-5, atol=1e-6)


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
    for segment, pooled in found.hidden.items():
        expected_D = pooled_D(states_ND(PROMPT, RESPONSE), segment, spec.pooling, len(PROMPT))
        torch.testing.assert_close(pooled.vector_D.double(), expected_D, rtol=1e-5, atol=1e-6)


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


BAD_CHANNELS: dict[str, tuple[Callable[[dict[str, Any]], Any], type[SGLangHiddenError], str]] = {
    "other protocol": (
        lambda a: a.update(protocol=2),
        ProtocolError,
        r"protocol 2 and this client 1; install the same",
    ),
    "no protocol": (lambda a: a.pop("protocol"), ProtocolError, r"protocol None and this client 1"),
    "no data": (lambda a: a.pop("data"), ProtocolError, r"cannot be read"),
    "no base64": (lambda a: a.update(data="%%%%"), ProtocolError, r"cannot be read"),
    "cut base64": (lambda a: a.update(data=a["data"][:-3]), ProtocolError, r"cannot be read.*cut short"),
    "cut floats": (lambda a: a.update(data=a["data"][:-4]), ProtocolError, r"cannot be read.*cut short"),
    "cut vectors": (lambda a: a.update(data=a["data"][: 4 * 4 * 3]), ProtocolError, r"shape \(\d+,\), expected \(8,\)"),
    "data of numbers": (lambda a: a.update(data=7), ProtocolError, r"cannot be read"),
    "counts of text": (lambda a: a.update(counts=["4", "3", "6"]), ProtocolError, r"cannot be read"),
    "no counts": (lambda a: a.update(counts=None), ProtocolError, r"cannot be read"),
    "more counts than segments": (lambda a: a["segments"].pop(), ProtocolError, r"row 0"),
    "more segments than counts": (lambda a: a["segments"].append("x"), ProtocolError, r"row 0"),
    "no segments": (lambda a: a.update(segments=None), ProtocolError, r"row 0"),
    "too few rows": (
        lambda a: a["counts"].__setitem__(1, a["counts"][1] - 1),
        AlignmentError,
        r"row 0 .* rows of states for the 'response' segment of 4 prompt and \d response tokens, expected \d; ",
    ),
    "too many rows": (lambda a: a["counts"].__setitem__(0, 5), AlignmentError, r"5 rows .*'prompt'.*expected 4"),
    "another segment": (lambda a: a["segments"].__setitem__(0, "answer"), AlignmentError, r"0 rows .*'prompt'"),
}


@pytest.mark.parametrize("case", BAD_CHANNELS)
def test_states_that_do_not_add_up(case: str) -> None:
    spoil, error, words = BAD_CHANNELS[case]
    rows = rows_for([request()])
    with pytest.raises(error, match=words):
        read(spoiled(rows, lambda row: spoil(row["meta_info"][CHANNEL][0])))


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
STATUS = {
    "protocol": PROTOCOL, "vocab_size": 96, "hidden_size": 8, "context_length": 64, "captures": True, "normed": True,
    "open_pools": 0,
}  # fmt: skip


def server_info(*statuses: Any, **changes: Any) -> dict[str, Any]:
    states = [{} if status is None else {CHANNEL: status} for status in statuses]
    return {"internal_states": states, "max_req_input_len": 60, "enable_return_hidden_states": True, **changes}


def never(path: str) -> tuple[int, int, int]:
    raise AssertionError(f"asked for the model at {path}")


def test_a_server_with_the_server_half() -> None:
    info = read_info(MODEL_INFO, server_info(STATUS), never)
    assert (info.model_path, info.tokenizer_path, info.weight_version) == ("m", "t", "default")
    assert (info.vocab_size, info.hidden_size, info.context_length) == (96, 8, 64)
    assert info.max_prompt_tokens == 59
    assert info.pools_in_server
    assert info.returns_hidden_states


@pytest.mark.parametrize("info", [server_info(None), server_info(), {**server_info(), "internal_states": None}])
def test_a_stock_server_is_asked_for_its_model(info: Any) -> None:
    found = read_info(MODEL_INFO, info, lambda path: {"m": (50, 4, 32)}[path])
    assert (found.vocab_size, found.hidden_size, found.context_length) == (50, 4, 32)
    assert (found.max_prompt_tokens, found.pools_in_server) == (31, False)


def test_every_scheduler_must_have_the_server_half() -> None:
    assert read_info(MODEL_INFO, server_info(STATUS, STATUS), never).pools_in_server
    assert not read_info(MODEL_INFO, server_info(STATUS, None), never).pools_in_server
    assert not read_info(MODEL_INFO, server_info({**STATUS, "captures": False}), never).pools_in_server


def test_states_before_the_norm_are_not_returned() -> None:
    info = read_info(MODEL_INFO, server_info({**STATUS, "normed": False, "captures": False}), never)
    assert (info.pools_in_server, info.returns_hidden_states) == (False, False)


def test_a_shorter_context_of_the_server_counts() -> None:
    info = read_info(MODEL_INFO, server_info(STATUS, context_length=40), never)
    assert (info.context_length, info.max_prompt_tokens) == (40, 39)


@pytest.mark.parametrize("protocol", [0, 2, "1"])
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
