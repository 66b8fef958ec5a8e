"""What is refused before anything is sent: logits, constraints and scoring."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from helpers.fake_engine import (
    make_info,
)
from helpers.sample_requests import (
    FULL,
    MASKED,
    PROMPTS,
    STOCK,
    Forbid,
    asks,
    scores,
)

from torchrl_sglang_hidden import CapabilityError
from torchrl_sglang_hidden.errors import (
    ConstraintError,
    InputError,
    SGLangHiddenError,
    TokenIdError,
)
from torchrl_sglang_hidden.records import Request
from torchrl_sglang_hidden.sglang_api.checks import check_requests
from torchrl_sglang_hidden.spec.constraints import (
    ActionMask,
    DisallowedTokens,
    LinearSchedule,
    TemperatureScale,
)
from torchrl_sglang_hidden.spec.logits import LogitsSpec

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
    """Exact to the byte: one row more is refused."""
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
    """Each row is under its own limit, but together they are over it. Exact to the byte."""
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
