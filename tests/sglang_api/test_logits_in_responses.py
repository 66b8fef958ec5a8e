"""What is read of SGLang's answers when a request asked for logits, constraints or scores."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from helpers.fake_engine import (
    RecordingEngine,
    log_prob_of,
    make_info,
)
from helpers.sample_requests import (
    GIVEN,
    MASKED,
    PROMPT,
    PROMPTS,
    RESPONSE,
    TOP,
    Forbid,
    V,
    asks,
    assert_states,
    model_rows,
    read,
    request,
    rows_for,
    scores,
    spoiled,
)

from torchrl_sglang_hidden import AlignmentError, CapabilityError, ProtocolError
from torchrl_sglang_hidden.errors import (
    ConstraintError,
    SGLangHiddenError,
)
from torchrl_sglang_hidden.protocol import CHANNEL
from torchrl_sglang_hidden.protocol.shared_memory import DIRECTORY, SharedFiles
from torchrl_sglang_hidden.records import Request
from torchrl_sglang_hidden.sglang_api.payload import to_payload
from torchrl_sglang_hidden.sglang_api.responses import read_responses
from torchrl_sglang_hidden.spec.constraints import (
    ActionMask,
)
from torchrl_sglang_hidden.spec.logits import LogitsSpec


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
        raw_TV[index, token] = 20.0  # the fake engine prefers it
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
    """Both stock log-probs and those under constraints: of the tokens from ``score_from`` on, NaN for token 0."""
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
