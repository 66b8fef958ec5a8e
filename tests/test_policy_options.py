"""The options of `SGLangHiddenWrapper`: what overrides what, what raises, and that a new version loses nothing."""

from __future__ import annotations

import inspect
from typing import Any

import pytest
import torch
from recorder import PAD_ID, RecordingEngine
from tensordict import TensorDict, TensorDictBase
from test_policy import ALL, TOKENIZER, batch_of, flat, make, plain, tokens_batch

from torchrl_sglang_hidden import SGLangHiddenWrapper
from torchrl_sglang_hidden.errors import (
    InputError,
    InputTypeError,
    MissingKeyError,
    PromptLengthError,
    SGLangHiddenError,
    TokenIdError,
    UnknownOptionError,
)


def test_options_of_a_call_win_over_those_of_the_constructor() -> None:
    policy, engine = make(generate_kwargs={"max_tokens": 3, "temperature": 0.5, "stop": ["w1"]})
    policy(batch_of("text"), max_new_tokens=1, do_sample=False)
    policy(batch_of("text"))
    expected = [{"max_new_tokens": 1, "temperature": 0.0}, {"max_new_tokens": 3, "temperature": 0.5}]
    assert [dict(engine.requests[row].sampling) for row in (0, 3)] == [{**one, "stop": ["w1"]} for one in expected]
    assert all(len(row["tokens"].response) == 1 for row in flat(policy(batch_of("text"), max_new_tokens=1)))


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        ({"hiden": True}, TypeError, "hiden"),
        ({"input_mode": "prose"}, InputError, r"input_mode='prose': expected one of .*'history'"),
        ({"generate": False}, InputError, r"generate=False: this version generates only"),
        ({"inplace": "yes"}, InputError, r"inplace='yes': expected True, False or 'empty'"),
        ({"inplace": 0}, InputError, r"inplace=0"),
        ({"inplace": 1}, InputError, r"inplace=1"),
        ({"generate_kwargs": {"temprature": 1}}, UnknownOptionError, r"'temprature': did you mean 'temperature'"),
        ({"generate_kwargs": {"n": 2}}, InputError, r"num_return_sequences=2"),
        ({"tokenizer": "./no-such-tokenizer"}, InputError, r"no tokenizer can be read at './no-such-tokenizer'"),
        ({"text_key": "same", "tokens_key": "same"}, InputError, r"same"),
    ],
)
def test_arguments_that_cannot_work(options: dict[str, Any], error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        make(**options)


def test_options_of_a_call_that_cannot_work() -> None:
    policy, engine = make()
    with pytest.raises(UnknownOptionError, match="temprature"):
        policy(batch_of("text"), temprature=1)
    with pytest.raises(InputError, match="logits_only=True"):
        policy(batch_of("text"), logits_only=True)
    assert engine.requests == []


@pytest.mark.parametrize(
    ("mode", "batch", "error", "words"),
    [
        ("text", TensorDict(a=torch.ones(1), batch_size=1), MissingKeyError, r"no \('text', 'prompt'\).* has \['a'\]"),
        ("text", batch_of("text", ["w1", ""]), PromptLengthError, r"row 1, .*0 tokens; SGLang needs at least 1"),
        ("text", TensorDict(text={"prompt": torch.ones(1)}, batch_size=1), InputTypeError, r"row 0, .*Tensor.*string"),
        ("history", batch_of("text"), MissingKeyError, r"\('history', 'prompt'\)"),
        ("tokens", TensorDict(tokens=torch.ones(1, 2).long(), batch_size=1), InputTypeError, r"Tokens"),
        ("tokens", tokens_batch([6, 7], [96, 5]), TokenIdError, r"row 1: token id 96 at position 0"),
        ("tokens", tokens_batch([6, 7], [5, -1]), TokenIdError, r"row 1: token id -1 at position 1"),
        ("tokens", TensorDict(tokens={"prompt": torch.ones(1, 2)}, batch_size=1), InputTypeError, r"row 0.*float32"),
        ("tokens", TensorDict(tokens={"prompt": torch.ones(1).long()}, batch_size=1), InputTypeError, r"\[P\]"),
        ("tokens", TensorDict(tokens={"prompt": torch.ones(1, 0).long()}, batch_size=1), PromptLengthError, r"row 0"),
        ("tokens", tokens_batch([5] * 59), PromptLengthError, r"row 0: .*59 tokens, over the engine's limit of 58"),
        ("tokens", tokens_batch([PAD_ID], of_tokens={"padded": True}), PromptLengthError, r"row 0: .*0 tokens"),
        ("text", "w1", InputTypeError, r"'w1' is a str; the policy reads a TensorDict"),
    ],
)
def test_inputs_that_are_not_sent(mode: str, batch: Any, error: type[SGLangHiddenError], words: str) -> None:
    policy, engine = make(mode)
    before = plain(batch) if isinstance(batch, TensorDictBase) else None
    with pytest.raises(error, match=words):
        policy(batch)
    assert engine.requests == []
    assert before is None or plain(batch) == before


FULL_CONFIG: dict[str, Any] = {
    "tokenizer": TOKENIZER, "input_mode": "tokens", "input_key": ("my", "ids"), "attention_mask_key": ("my", "mask"),
    "generate": True, "generate_kwargs": {"max_new_tokens": 3, "stop_sequences": ["w1"]},
    "tokenizer_kwargs": {"padding": True}, "pad_output": True, "inplace": "empty", "device": torch.device("cpu"),
    "chat_template_name": "chatml_format", "chat_template": "x", "return_log_probs": False, "history_key": "h",
    "text_key": None, "tokens_key": ("a", "b"), "masks_key": "m", "log_probs_key": None, "hidden": ALL,
    "hidden_states_key": "s",
}  # fmt: skip


def test_a_new_version_loses_nothing() -> None:
    policy, engine = make(**FULL_CONFIG)
    assert set(FULL_CONFIG) == set(inspect.signature(SGLangHiddenWrapper.__init__).parameters) - {"self", "model"}
    assert policy.config == FULL_CONFIG
    again = policy.get_new_version()
    assert again is not policy
    assert (again.config, again.model) == (policy.config, engine)
    assert (again.in_keys, again.out_keys) == (policy.in_keys, policy.out_keys)


@pytest.mark.parametrize(
    "changes",
    [{"pad_output": False}, {"hidden": None}, {"generate_kwargs": {"top_k": 2}}, {"text_key": "t"}, {"inplace": False}],
)
def test_a_new_version_changes_only_what_is_said(changes: dict[str, Any]) -> None:
    policy, _ = make(**FULL_CONFIG)
    assert policy.get_new_version(**changes).config == {**FULL_CONFIG, **changes}
    assert policy.config == FULL_CONFIG


def test_a_new_version_in_another_mode_reads_there() -> None:
    policy, _ = make("text")
    assert policy.get_new_version(input_mode="tokens").input_key == ("tokens", "prompt")
    assert make("text", input_key="mine")[0].get_new_version(input_mode="tokens").input_key == "mine"
    with pytest.raises(TypeError, match="hiden"):
        policy.get_new_version(hiden=True)


def test_a_new_version_of_another_engine() -> None:
    other = RecordingEngine(tokenizer=TOKENIZER)
    assert make("text")[0].get_new_version(model=other).model is other


def test_the_configuration_is_a_copy() -> None:
    options = {"temperature": 0.5}
    policy, _ = make(generate_kwargs=options)
    options["temperature"] = 9
    policy.config["generate_kwargs"]["temperature"] = 9
    assert policy.generate_kwargs == {"temperature": 0.5}
