"""Constraints and logits that must not be sent, or cannot be kept: named errors, and the server goes on."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any

import httpx
import pytest
import torch
from helpers.logits_checks import assert_choices, check_choices, positioned
from helpers.policy_checks import prompt_of
from helpers.user_constraints import NoImmediateRepeat

from torchrl_sglang_hidden import (
    ActionMask,
    CapabilityError,
    ConstraintError,
    DisallowedTokens,
    InputError,
    LogitsSpec,
    SGLangServer,
    TemperatureScale,
    TokenIdError,
)
from torchrl_sglang_hidden.engines import endpoint
from torchrl_sglang_hidden.records import Request
from torchrl_sglang_hidden.sglang_api.payload import to_payload
from torchrl_sglang_hidden.spec.constraints import LinearSchedule


@pytest.fixture
def sent(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Record how many requests each payload for a server had."""
    counts: list[int] = []
    original = endpoint.to_payload

    def count(requests: Sequence[Request], *args: Any, **kwargs: Any) -> Any:
        counts.append(len(requests))
        return original(requests, *args, **kwargs)

    monkeypatch.setattr(endpoint, "to_payload", count)
    return counts


GOOD = Request((5, 6, 7), {"max_new_tokens": 8, "temperature": 1.0})
VOCAB = 49152
WORSE: dict[str, tuple[Callable[[], Request], type[Exception], str]] = {
    "nothing allowed": (
        lambda: replace(GOOD, constraints=(ActionMask([]),)),
        ConstraintError,
        "0 tokens are allowed; give at least 1",
    ),
    "a mask of False": (
        lambda: replace(GOOD, constraints=(ActionMask.from_mask(torch.zeros(VOCAB, dtype=torch.bool)),)),
        ConstraintError,
        "0 tokens are allowed",
    ),
    "all denied": (
        lambda: replace(GOOD, constraints=(DisallowedTokens(range(VOCAB)),)),
        ConstraintError,
        "row 1: .*all 49152 tokens",
    ),
    "allowed and denied": (
        lambda: replace(GOOD, constraints=(ActionMask([5, 6]), DisallowedTokens([6, 5, 9]))),
        ConstraintError,
        "row 1: ActionMask and DisallowedTokens together leave 0 of 49152 tokens for token 0",
    ),
    "allowed and denied at one place": (
        lambda: replace(
            GOOD, constraints=(ActionMask([5, 6], first_tokens=5), DisallowedTokens([6, 5], positions=(4, 7)))
        ),
        ConstraintError,
        "row 1: .*for token 4 of the response",
    ),
    "an id behind the vocabulary": (
        lambda: replace(GOOD, constraints=(ActionMask([5, VOCAB]),)),
        TokenIdError,
        r"row 1: ActionMask: id 49152 .*0\.\.49151",
    ),
    "an id to deny behind the vocabulary": (
        lambda: replace(GOOD, constraints=(DisallowedTokens([10**9]),)),
        TokenIdError,
        "row 1: DisallowedTokens: id 1000000000",
    ),
    "a negative id": (lambda: replace(GOOD, constraints=(ActionMask([-1]),)), TokenIdError, "-1"),
    "a temperature that is no number": (
        lambda: replace(GOOD, constraints=(TemperatureScale(math.nan),)),
        InputError,
        r"nan.*\[0\.01, 100\]",
    ),
    "a negative temperature": (
        lambda: replace(GOOD, constraints=(TemperatureScale([1.0, -2.0]),)),
        InputError,
        r"-2\.0.*\[0\.01, 100\]",
    ),
    "a schedule to nothing": (
        lambda: replace(GOOD, constraints=(TemperatureScale(LinearSchedule(1.0, 0.0)),)),
        InputError,
        r"0\.0.*\[0\.01, 100\]",
    ),
    "more than the vocabulary": (
        lambda: replace(GOOD, logits=LogitsSpec(top_k=VOCAB + 1)),
        InputError,
        "row 1: .*top_k=49153.*49152",
    ),
    "a column behind the vocabulary": (
        lambda: replace(GOOD, logits=LogitsSpec(token_ids=(5, VOCAB))),
        TokenIdError,
        "row 1: .*49152",
    ),
    "too many bytes": (
        lambda: Request(
            tuple(prompt_of(3000, 1)),
            {"max_new_tokens": 4000},
            logits=LogitsSpec(full=True, segments=("full",)),
        ),
        InputError,
        r"row 1: logits of 49152 columns for up to 6999 tokens are 1312 MiB, over the limit of 1024 MiB; ask for",
    ),
    "a constraint that the server has not": (
        lambda: replace(GOOD, constraints=(NoImmediateRepeat(),)),
        CapabilityError,
        r"row 1: .*'no_immediate_repeat'.*'action_mask'.*constraint_modules",
    ),
    "a processor that the server does not take": (
        lambda: replace(GOOD, processor='{"callable": "00"}'),
        CapabilityError,
        "row 1: .*--enable-custom-logit-processor",
    ),
    "constraints on a scored prompt without a response": (
        lambda: replace(GOOD, score_prompt=True, constraints=(ActionMask([5]),)),
        InputError,
        "row 1: .*without responses",
    ),
    "a part outside of the prompt": (
        lambda: replace(GOOD, score_prompt=True, constraints=(ActionMask([5]),), response_ranges=((1, 4),)),
        InputError,
        "row 1: .*response_ranges=",
    ),
    "a score behind the prompt": (lambda: replace(GOOD, score_prompt=True, score_from=3), InputError, "score_from=3"),
}


@pytest.mark.parametrize("what", WORSE)
def test_what_must_not_be_sent(smol: SGLangServer, smol_dir: str, sent: list[int], what: str) -> None:
    make, error, words = WORSE[what]
    with pytest.raises(error, match=words):
        smol.generate([GOOD, make()])
    assert sent == []
    check_choices(smol, [replace(GOOD, constraints=(ActionMask([5, 9]),), logits=LogitsSpec(top_k=2))], smol_dir)
    assert sent == [1]


@pytest.mark.parametrize("beside", ["a grammar", "min_new_tokens", "logit_bias"])
def test_nothing_is_left_together_with_what_sglang_takes(smol: SGLangServer, smol_dir: str, beside: str) -> None:
    """Only the server can find this out. Other rows of the batch are answered, and the server goes on."""
    options: dict[str, tuple[dict[str, Any], ActionMask]] = {
        "a grammar": ({"regex": "[0-9]{4}"}, ActionMask([1000, 1001])),
        "min_new_tokens": ({"min_new_tokens": 4}, ActionMask([2])),
        "logit_bias": ({"logit_bias": {"7": -1e9, "8": -1e9}}, ActionMask([7, 8])),
    }
    sampling, mask = options[beside]
    bad = Request(tuple(prompt_of(6, 9400)), {"max_new_tokens": 6, "temperature": 1.0, **sampling}, constraints=(mask,))
    good = positioned([prompt_of(1 + row, 9410 + row) for row in range(7)], 6, own=False)
    with ThreadPoolExecutor(2) as pool:
        failing = pool.submit(smol.generate, [bad, GOOD])
        answers = pool.submit(smol.generate, good)
        if beside == "logit_bias":
            # A bias is a number: what is left of it can be chosen from.
            assert set(failing.result()[0].response_ids) <= {7, 8}
        else:
            with pytest.raises(ConstraintError, match=r"row 0.*token 0 of the response: 0 tokens are left.*grammar"):
                failing.result()
        for request, completion in zip(good, answers.result(), strict=True):
            assert_choices(request, completion, smol_dir)


def test_an_unknown_name_that_reaches_the_server(smol: SGLangServer, smol_dir: str) -> None:
    """A client that does not ask which constraints the server has can send one: it is refused, and the server lives."""
    request = replace(GOOD, constraints=(NoImmediateRepeat(),))
    payload = to_payload([request], smol.info, binary=False)
    answer = httpx.post(f"{smol.url}/generate", json=payload, timeout=120)
    assert answer.status_code == 400
    assert "row 0: custom_params['torchrl_sglang_hidden'] cannot be read" in answer.json()["error"]["message"]
    assert "no_immediate_repeat" in answer.text
    check_choices(smol, [replace(GOOD, constraints=(ActionMask([5, 9]),))], smol_dir)
