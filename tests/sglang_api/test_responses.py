"""What is read of SGLang's answers: completions, and everything that does not add up."""

from __future__ import annotations

import base64
import dataclasses
import math
import struct
import zlib
from collections.abc import Callable
from typing import Any

import pytest
import torch
from helpers.fake_engine import (
    ALL_SEGMENTS,
    RecordingEngine,
    log_prob_of,
    make_info,
    pooled_D,
    states_ND,
)
from helpers.sample_requests import (
    PROMPT,
    RESPONSE,
    STOCK,
    Spoil,
    assert_states,
    read,
    request,
    rows_for,
    spanned,
    spoiled,
)

from torchrl_sglang_hidden import (
    AlignmentError,
    HiddenSpec,
    IncompleteWeightsError,
    ProtocolError,
    RequestAbortedError,
)
from torchrl_sglang_hidden.errors import (
    EngineError,
    SGLangHiddenError,
    SpanError,
)
from torchrl_sglang_hidden.protocol import CHANNEL
from torchrl_sglang_hidden.protocol.shared_memory import DIRECTORY, SharedFiles
from torchrl_sglang_hidden.records import Request
from torchrl_sglang_hidden.sglang_api.responses import read_responses, read_rows
from torchrl_sglang_hidden.spec.hidden import POOLINGS, Pooling
from torchrl_sglang_hidden.spec.spans import Between, LastTokens


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
    """The server tells the span's size; the policy checks it with its own tokenizer."""
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
    "a mixture of weights": (
        lambda row: row["meta_info"].update(weight_version="7-incomplete"),
        IncompleteWeightsError,
        r"row 0 .*weight_version='7-incomplete' is a mixture .*; update the weights again",
    ),
    "a token of a mixture": (
        lambda row: row["meta_info"].update(
            weight_version="8", weight_versions=[{"version": "7-incomplete", "start": 0, "end": 1}]
        ),
        IncompleteWeightsError,
        r"row 0 .*weight_version='7-incomplete' is a mixture .*; update the weights again",
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
        EngineError,
        r"row 0 .*: the log-prob of response token 0 \(id \d+\) is null, which is how JSON has NaN and -inf",
    ),
    "a log-prob without an id": (
        lambda row: row["meta_info"]["output_token_logprobs"].__setitem__(0, [-1.0]),
        ProtocolError,
        r"row 0",
    ),
    "an answer that is no row": (lambda row: row.clear(), ProtocolError, r"row 0.*lacks"),
    # What a fuzzer found: each was a bare error, or went on as if it were right.
    "an infinite id": (lambda row: row.update(output_ids=[math.inf]), ProtocolError, r"row 0.*list of integers"),
    "ids of fractions": (lambda row: row["output_ids"].__setitem__(0, 8.5), ProtocolError, r"list of integers"),
    "a true id": (lambda row: row["output_ids"].__setitem__(0, True), ProtocolError, r"list of integers"),
    "an id of digits": (lambda row: row["output_ids"].__setitem__(0, "8"), ProtocolError, r"list of integers"),
    "an id beyond all": (lambda row: row["output_ids"].__setitem__(0, 96), ProtocolError, r"has 96.*0\.\.95"),
    "an id below 0": (lambda row: row["output_ids"].__setitem__(0, -1), ProtocolError, r"has -1, .* 0\.\.95"),
    "ids of a text": (lambda row: row.update(output_ids="89"), ProtocolError, r"'89', expected a list"),
    "a text of null": (lambda row: row.update(text=None), ProtocolError, r"text is None, expected a string"),
    "a version of a number": (
        lambda row: row["meta_info"].update(weight_version=7), ProtocolError, r"weight_version is 7, expected a string"
    ),
    "a finish of a list": (
        lambda row: row["meta_info"].update(finish_reason={"type": ["stop"]}), ProtocolError, r"type is \['stop'\]"
    ),
    "a prompt of a fraction": (
        lambda row: row["meta_info"].update(prompt_tokens=4.0), ProtocolError, r"prompt_tokens is 4.0, expected an int"
    ),
    "versions below 0": (lambda row: versions_of(row, 0, -1), ProtocolError, r"end is -1, expected 0\.\."),
    "versions of too many tokens": (lambda row: versions_of(row, 0, 9), ProtocolError, r"end is 9, expected 0\.\."),
    "versions that end before they begin": (lambda row: versions_of(row, 1, 0), ProtocolError, r"tokens 1\.\.0"),
    "versions of infinity": (lambda row: versions_of(row, 0, math.inf), ProtocolError, r"end is inf, expected an int"),
    "log-probs of objects": (
        lambda row: row["meta_info"]["output_token_logprobs"].__setitem__(0, {"x": 1}), ProtocolError, r"cannot be read"
    ),
    "log-probs of null": (
        lambda row: row["meta_info"].update(output_token_logprobs=[None]), ProtocolError, r"cannot be read"
    ),
}  # fmt: skip


def versions_of(row: dict[str, Any], start: Any, end: Any) -> None:
    row["meta_info"]["weight_versions"] = [{"version": "v7", "start": start, "end": end}]


@pytest.mark.parametrize("case", BAD_ANSWERS)
def test_answers_that_do_not_add_up(case: str) -> None:
    spoil, error, words = BAD_ANSWERS[case]
    rows = rows_for([request()])
    read(rows)
    with pytest.raises(error, match=words):
        read(spoiled(rows, spoil))


def count_of(place: int, count: Any) -> Callable[[dict[str, Any]], Any]:
    return lambda a: a["places"][place].__setitem__(2, count)


def resend(answer: dict[str, Any], fields: dict[str, Any], value: float) -> None:
    """Put a number first, with a right checksum."""
    data = bytearray(base64.b64decode(fields["data"]))
    data[:4] = struct.pack("<f", value)
    fields.update(data=base64.b64encode(data).decode(), crc32=zlib.crc32(data))


# The answer's places are the segments prompt, response, full, then the spans mask, tail.
BAD_CHANNELS: dict[str, tuple[Callable[[dict[str, Any]], Any], type[SGLangHiddenError], str]] = {
    "other protocol": (
        lambda a: a.update(protocol=3),
        ProtocolError,
        r"row 0 .*protocol 3 and this client 10; install",
    ),
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
    "rows of a fraction": (count_of(0, 4.0), ProtocolError, r"4.0 stands where a number of rows is expected"),
    "NaN": (lambda a: resend(a, a, math.nan), EngineError, r"row 0 .*: the states have NaN; .*bfloat16"),
    "NaN in a row": (lambda a: resend(a, a["rows"], math.nan), EngineError, r"row 0 .*: the states have NaN"),
    "rows of integers": (lambda a: a["rows"].update(dtype="int32"), ProtocolError, r"torch.int32, expected floats"),
    "rows of another dtype": (
        lambda a: a["rows"].update(dtype="float16", shape=[*a["rows"]["shape"][:2], 2 * a["rows"]["shape"][2]]),
        ProtocolError,
        r"row 0 .*rows of shape",
    ),
    "more rows than were asked for": (
        lambda a: a["rows"].update(shape=[10**12, *a["rows"]["shape"][1:]]),
        ProtocolError,
        r"that were asked for",
    ),
    "a digest of text": (lambda a: a.update(prompt_digest="x"), ProtocolError, r"prompt_digest is 'x'"),
    "a fault of null": (lambda a: a.update(faults={"tail": None}), ProtocolError, r"None stands where a text"),
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
    """Replace the token states by a sound answer over two positions only."""
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
    with pytest.raises(ProtocolError, match=r"row 0 .*(states of shape \(.*\), expected \[\.\.\., \d, 8\]|asked for)"):
        read(rows, [request(HiddenSpec(("response",), pooling, asked, tokens=True))])


@pytest.mark.parametrize("answer", [None, [], {}, "text", [1], [{}, {}]])
def test_an_answer_of_another_form(answer: Any) -> None:
    rows = rows_for([request()])
    with pytest.raises(ProtocolError, match=r"row 0"):
        read(spoiled(rows, lambda row: row["meta_info"].update({CHANNEL: answer})))


@pytest.mark.parametrize(
    "states",
    [
        None,
        [],
        7,
        [["a"]],
        [7],
        [{}],
        [[[[1.0] * 8]]],
        [[1.0] * 7],
        [math.inf],
        [[[1.0] * 8] * 4, {}],
        [[[1.0], [1.0, 2.0]]],
        [None],
        [[]],
        [[[]]],
        [1.0],
    ],
)
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


def test_the_answer_to_another_request() -> None:
    """A server, or what stands between, that mixes up two clients' rows."""
    requests = [request(), request(prompt_ids=(5, 6, 7, 8))]
    rows = rows_for(requests)
    names = [row["meta_info"]["id"] for row in rows]
    assert len(read_rows(requests, rows, make_info(), rids=names)) == 2
    with pytest.raises(ProtocolError, match=r"row 0.*answers 'recorded-1', and 'recorded-0' was sent"):
        read_rows(requests, rows[::-1], make_info(), rids=names)
    rows[1]["meta_info"]["id"] = None
    with pytest.raises(ProtocolError, match=r"row 1.*answers None, and 'recorded-1'"):
        read_rows(requests, rows, make_info(), rids=names)


def test_a_response_across_an_update_says_so() -> None:
    for versions, mixed in ((["v7"], False), (["v6", "v7"], True), (None, False)):
        rows = rows_for([request()])
        if versions is not None:
            spans = [{"version": name, "start": 2 * i, "end": 2 * i + 2} for i, name in enumerate(versions)]
            rows[0]["meta_info"]["weight_versions"] = spans
        (one,) = read(rows)
        assert (one.weight_version, one.mixed_weights) == ("v7", mixed)


@pytest.mark.parametrize("near", [True, False])
def test_rows_behind_one_that_failed_leave_nothing_in_shared_memory(near: bool) -> None:
    """Files that a server on another machine names are never touched."""
    files = SharedFiles()
    name = files.share(bytes(2**20))
    assert name is not None
    rows: list[Any] = [None, {"meta_info": {CHANNEL: [{"rows": {"shared": name}}]}}, {"meta_info": 7}, 7]
    with pytest.raises(ProtocolError, match="row 0"):
        read_responses([request()] * 4, rows, make_info(shares_memory=near))
    assert (DIRECTORY / name).exists() is not near
    files.close()
