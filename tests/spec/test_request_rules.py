"""The rules of single options: whatever the value is, a refusal is an error of this package that can be written."""

from __future__ import annotations

from typing import Any

import pytest

from torchrl_sglang_hidden.errors import InputError, SGLangHiddenError, TokenIdError
from torchrl_sglang_hidden.spec.request_rules import RULES, check_option, check_prompt_ids, check_token_ids

HUGE = 10**5000  # Python writes no integer of over 4300 digits
DEEP: list[Any] = []
for _ in range(100_000):
    DEEP = [DEEP]


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("max_new_tokens", -HUGE),
        ("temperature", HUGE),
        ("logit_bias", {HUGE: 1e300}),
        ("stop_token_ids", [HUGE, -1]),
        ("stop_sequences", DEEP),
        ("custom_params", {5: DEEP}),
    ],
    ids=lambda value: value if isinstance(value, str) else "value",  # what pytest itself cannot write
)
def test_a_value_that_cannot_be_written(name: str, value: Any) -> None:
    words = f"{name}=a {type(value).__name__} that cannot be written: .*expected"
    with pytest.raises(SGLangHiddenError, match=words):
        check_option(name, value, RULES[name])


@pytest.mark.parametrize("token_id", [HUGE, -HUGE], ids=["huge", "far below 0"])
def test_an_id_that_cannot_be_written(token_id: int) -> None:
    with pytest.raises(TokenIdError, match="row 0: token id a int that cannot be written at position 1"):
        check_prompt_ids("row 0:", [5, token_id], 10)
    with pytest.raises(TokenIdError, match="row 0: stop_token_ids has id a int that cannot be written, outside"):
        check_token_ids("row 0:", "stop_token_ids", [5, token_id], 10)


def test_other_values_are_shown() -> None:
    with pytest.raises(InputError, match=r"top_p=1\.5: top_p must be between 0 and 1, expected in \(0, 1\]"):
        check_option("top_p", 1.5, RULES["top_p"])
