"""Generation options: every name, every limit, and what SGLang gets of them."""

from __future__ import annotations

import json
from types import MappingProxyType
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from torchrl_sglang_hidden.errors import InputError, InputTypeError, UnknownOptionError
from torchrl_sglang_hidden.sglang_api.sampling import SGLANG_NAMES, override, standardize, to_sglang

# One good value of every option, by the name that a user may write.
GOOD: dict[str, Any] = {
    "custom_params": {"ids": [1, 2]},
    "max_new_tokens": 8, "max_tokens": 8, "min_new_tokens": 0, "temperature": 0.7, "top_p": 0.9, "top_k": 20,
    "min_p": 0.1, "frequency_penalty": 0.5, "presence_penalty": -0.5, "repetition_penalty": 1.1,
    "num_return_sequences": 1, "n": 1, "sampling_seed": 3, "seed": 3, "stop_sequences": ["a"], "stop": "a",
    "stop_strings": ["a"], "stop_regex": "a+", "stop_token_ids": [2], "eos_token_id": 2, "logit_bias": {"5": -1.0},
    "do_sample": True, "ignore_eos": True, "skip_special_tokens": False, "spaces_between_special_tokens": False,
    "no_stop_trim": True, "include_stop_str_in_output": True, "json_schema": "{}", "regex": "a", "ebnf": "root ::= a",
    "structural_tag": "{}", "return_hidden_states": True, "lora_path": "poet", "priority": -2,
    "action_mask": [5], "disallowed_tokens": (5, 6), "custom_logit_processor": "disallowed_tokens:{}",
}  # fmt: skip

ALIASES = {
    "max_tokens": "max_new_tokens",
    "stop": "stop_sequences",
    "stop_strings": "stop_sequences",
    "eos_token_id": "stop_token_ids",
    "seed": "sampling_seed",
    "include_stop_str_in_output": "no_stop_trim",
    "n": "num_return_sequences",
}

LIMITS: list[tuple[str, list[Any], list[Any], str]] = [
    ("max_new_tokens", [0, 1, 4096], [-1], "at least 0"),
    ("min_new_tokens", [0, 3], [-1], "at least 0"),
    ("temperature", [0, 0.0, 2.5], [-0.1, float("inf"), float("nan")], "at least 0"),
    ("top_p", [1e-6, 1, 1.0], [0, -0.1, 1.5, float("nan")], r"\(0, 1\]"),
    ("min_p", [0, 1], [-0.1, 1.1, float("nan")], r"\[0, 1\]"),
    ("top_k", [1, 50, -1], [0, -2, 2**31], r"1\.\.2147483647, or -1"),
    ("frequency_penalty", [-2, 2, 0.0], [-2.1, 2.1], r"\[-2, 2\]"),
    ("presence_penalty", [-2, 2, 0.0], [-2.1, 2.1], r"\[-2, 2\]"),
    ("repetition_penalty", [0.01, 2], [0, -1, 0.001, 2.1], r"\[0\.01, 2\]"),
    ("num_return_sequences", [1, 8], [0, -1], "at least 1"),
    ("sampling_seed", [0, -(2**63), 2**63 - 1], [2**63, -(2**63) - 1], "64 bits"),
    ("stop_sequences", ["a", ["a", "b"], ("a",)], ["", [""], ["a", 1]], "non-empty string"),
    ("stop_regex", ["a", ["a"]], ["", [None]], "non-empty string"),
    ("stop_token_ids", [0, [1, 2], (1,), {1}], [-1, [1, -1], [1.0], [True], ["1"]], "at least 0"),
    (
        "logit_bias",
        [{"5": 1}, {5: -1.5}],
        [{"x": 1}, {-5: 1}, {5: "1"}, {5: float("inf")}, {5: 2e9}],
        "dict of token id",
    ),
    ("json_schema", ["{}"], [""], "non-empty"),
    ("regex", ["a"], [""], "non-empty"),
    ("ebnf", ["a"], [""], "non-empty"),
    ("structural_tag", ["a"], [""], "non-empty"),
]

WRONG_TYPES: list[tuple[str, list[Any]]] = [
    *((name, ["1", True, 1.0, [1]]) for name in ("max_new_tokens", "min_new_tokens", "top_k", "sampling_seed", "n")),
    *((name, ["1", True, [1.0], 1j]) for name in ("temperature", "top_p", "min_p", "frequency_penalty")),
    *((name, ["1", False]) for name in ("presence_penalty", "repetition_penalty")),
    *((name, [1, 0, "yes"]) for name in ("do_sample", "ignore_eos", "skip_special_tokens", "no_stop_trim")),
    *((name, [1, True, {"a": 1}]) for name in ("stop_sequences", "stop_regex")),
    ("stop_token_ids", ["2", True, 2.0]),
    ("logit_bias", [[5, 1.0], "5"]),
    *((name, [1, {"type": "object"}]) for name in ("json_schema", "regex", "ebnf", "structural_tag")),
]


@pytest.mark.parametrize(("name", "value"), GOOD.items(), ids=GOOD)
def test_every_name_is_kept_under_its_standard_name(name: str, value: Any) -> None:
    assert standardize({name: value}) == {ALIASES.get(name, name): value}


@pytest.mark.parametrize(("alias", "standard"), ALIASES.items())
def test_an_alias_wins_over_the_standard_name(alias: str, standard: str) -> None:
    other = {"max_tokens": 5, "n": 1, "seed": 9, "eos_token_id": 7}.get(alias, GOOD[alias])
    assert standardize({standard: GOOD[standard], alias: other}) == {standard: other}
    assert standardize({alias: other, standard: GOOD[standard]}) == {standard: other}


@pytest.mark.parametrize(("name", "value"), [(name, value) for name, good, _, _ in LIMITS for value in good])
def test_values_at_their_limits(name: str, value: Any) -> None:
    assert standardize({name: value}) == {name: value}


@pytest.mark.parametrize(
    ("name", "value", "limit"), [(name, value, limit) for name, _, bad, limit in LIMITS for value in bad]
)
def test_values_beyond_their_limits(name: str, value: Any, limit: str) -> None:
    with pytest.raises(InputError, match=limit) as caught:
        standardize({name: value})
    assert f"{name}={value!r}" in str(caught.value)


@pytest.mark.parametrize(("name", "value"), [(name, value) for name, values in WRONG_TYPES for value in values])
def test_values_of_another_type(name: str, value: Any) -> None:
    with pytest.raises(InputTypeError) as caught:
        standardize({name: value})
    assert f"{ALIASES.get(name, name)}={value!r}: expected" in str(caught.value)


@pytest.mark.parametrize(
    ("name", "suggestion"),
    [
        ("temprature", "temperature"),
        ("max_new_token", "max_new_tokens"),
        ("topk", "top_k"),
        ("stop_string", "stop_strings"),
        ("maxtokens", "max_tokens"),
    ],
)
def test_an_unknown_name_gets_a_suggestion(name: str, suggestion: str) -> None:
    with pytest.raises(UnknownOptionError, match=rf"'{name}': did you mean '{suggestion}'"):
        standardize({name: 1})


@pytest.mark.parametrize("name", ["best_of", "beam_width", 7])
def test_a_name_like_no_other_gets_the_list(name: Any) -> None:
    with pytest.raises(UnknownOptionError) as caught:
        standardize({name: 1})
    assert repr(name) in str(caught.value)
    assert "known: " in str(caught.value) or "did you mean" in str(caught.value)


def test_no_option_is_the_engines_default() -> None:
    assert standardize(None) == standardize({}) == standardize({"temperature": None, "stop": None}) == {}


def test_the_input_is_left_alone() -> None:
    options = MappingProxyType({"max_tokens": 5, "temperature": None})
    assert standardize(options) == {"max_new_tokens": 5}
    assert dict(options) == {"max_tokens": 5, "temperature": None}
    standard = {"do_sample": False, "stop_sequences": ("a",), "stop_token_ids": {3, 2}}
    before = dict(standard)
    to_sglang(standard)
    assert standard == before


def test_greedy_and_a_temperature_contradict_each_other() -> None:
    with pytest.raises(InputError, match=r"do_sample=False contradicts temperature=0\.7.*leave one"):
        standardize({"do_sample": False, "temperature": 0.7})
    assert to_sglang(standardize({"do_sample": False, "temperature": 0})) == {"temperature": 0.0}
    assert to_sglang(standardize({"do_sample": True, "temperature": 0.7})) == {"temperature": 0.7}


def test_the_least_over_the_most() -> None:
    with pytest.raises(InputError, match=r"min_new_tokens=9 is over max_new_tokens=8; lower it"):
        standardize({"min_new_tokens": 9, "max_tokens": 8})
    assert standardize({"min_new_tokens": 8, "max_new_tokens": 8}) == {"min_new_tokens": 8, "max_new_tokens": 8}
    assert standardize({"min_new_tokens": 9}) == {"min_new_tokens": 9}


def test_two_grammars() -> None:
    with pytest.raises(InputError, match=r"json_schema and regex .*keep one"):
        standardize({"regex": "a", "json_schema": "{}"})


@pytest.mark.parametrize(
    ("options", "sglang"),
    [
        ({}, {}),
        ({"do_sample": False}, {"temperature": 0.0}),
        ({"do_sample": True}, {}),
        ({"n": 1}, {}),
        ({"max_tokens": 5, "seed": 2}, {"max_new_tokens": 5, "sampling_seed": 2}),
        ({"stop": "a"}, {"stop": "a"}),
        ({"stop_strings": ("a", "b")}, {"stop": ["a", "b"]}),
        ({"eos_token_id": 2}, {"stop_token_ids": [2]}),
        ({"stop_token_ids": {9, 3}}, {"stop_token_ids": [3, 9]}),
        ({"logit_bias": {5: 1}}, {"logit_bias": {"5": 1.0}}),
        ({"include_stop_str_in_output": True}, {"no_stop_trim": True}),
        ({"lora_path": "poet", "priority": 1, "return_hidden_states": False, "top_k": 3}, {"top_k": 3}),
        ({"custom_params": {"ids": [1]}}, {"custom_params": {"ids": [1]}}),
        # The same token, and at one temperature whoever is in the batch.
        ({"top_k": 1, "temperature": 0.5}, {"top_k": 1, "temperature": 0.0}),
        ({"top_k": 2, "temperature": 0.5}, {"top_k": 2, "temperature": 0.5}),
        ({"action_mask": [1], "disallowed_tokens": [2], "custom_logit_processor": "x", "top_k": 3}, {"top_k": 3}),
    ],
)
def test_what_sglang_gets(options: dict[str, Any], sglang: dict[str, Any]) -> None:
    assert to_sglang(standardize(options)) == sglang


@pytest.mark.parametrize(("name", "value"), GOOD.items(), ids=GOOD)
def test_only_sglangs_own_names_reach_it(name: str, value: Any) -> None:
    assert set(to_sglang(standardize({name: value}))) <= SGLANG_NAMES


def test_every_name_of_sglang_can_be_given() -> None:
    standard = {name: value for name, value in GOOD.items() if name in SGLANG_NAMES}
    assert set(standard) == SGLANG_NAMES


GRAMMARS = {"json_schema", "regex", "ebnf", "structural_tag"}
COMPATIBLE = sorted(set(GOOD) - GRAMMARS - set(ALIASES))


@given(names=st.sets(st.sampled_from(COMPATIBLE)), grammar=st.sampled_from([None, *sorted(GRAMMARS)]))
def test_any_combination_survives_json_and_a_second_pass(names: set[str], grammar: str | None) -> None:
    given_names = names | ({grammar} if grammar else set())
    standard = standardize({name: GOOD[name] for name in given_names})
    assert standardize(standard) == standard
    sglang = to_sglang(standard)
    assert json.loads(json.dumps(sglang)) == sglang


@pytest.mark.parametrize(
    ("defaults", "call", "result"),
    [
        ({"temperature": 0.7, "top_k": 5}, {"top_k": 2}, {"temperature": 0.7, "top_k": 2}),
        ({"max_new_tokens": 9}, {"max_tokens": 2}, {"max_new_tokens": 2}),
        ({"stop_sequences": ["a"]}, {"stop": "b"}, {"stop_sequences": "b"}),
        ({"temperature": 0.7}, {"do_sample": False}, {"do_sample": False}),
        ({"do_sample": False}, {"temperature": 0.7}, {"temperature": 0.7}),
        ({"regex": "a"}, {"json_schema": "{}"}, {"json_schema": "{}"}),
        ({"temperature": 0.7, "top_k": 5}, {"temperature": None}, {"top_k": 5}),
        ({"max_new_tokens": 9}, {"max_tokens": None}, {}),
        ({"top_k": 5}, {}, {"top_k": 5}),
        (
            {"action_mask": [1], "disallowed_tokens": [2]},
            {"action_mask": [3]},
            {"action_mask": [3], "disallowed_tokens": [2]},
        ),
    ],
)
def test_a_call_overrides_the_defaults(defaults: Any, call: Any, result: Any) -> None:
    before = dict(defaults)
    assert override(defaults, call) == result
    assert defaults == before


@pytest.mark.parametrize(
    ("defaults", "call"),
    [
        ({}, {"temprature": 1}),
        ({}, {"temperature": -1}),
        ({"max_new_tokens": 4}, {"min_new_tokens": 5}),
        ({"temperature": 0.7}, {"do_sample": False, "temperature": 0.7}),
    ],
)
def test_a_call_that_cannot_be_served(defaults: Any, call: Any) -> None:
    with pytest.raises(InputError):
        override(defaults, call)


def test_bool_is_no_int_inside_a_list_of_ids_or_a_bias() -> None:
    with pytest.raises(InputError):
        standardize({"stop_token_ids": [True]})
    with pytest.raises(InputError):
        standardize({"logit_bias": {5: True}})
