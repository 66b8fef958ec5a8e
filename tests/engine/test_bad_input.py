"""Bad input against a real server: a named error with value, limit and remedy, and the same server lives on.

Several of these end the whole server when they reach it (a foreign id, an empty prompt), so every test here is followed
by a good call to the same server.
"""

from __future__ import annotations

import socket
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.policy_checks import assert_greedy, prompt_of, rows_of, text_input, tokens_input
from tensordict import TensorDict, TensorDictBase
from torchrl.modules.llm.policies import Text, Tokens
from transformers import PreTrainedTokenizerBase

from torchrl_sglang_hidden import (
    EngineUnreachableError,
    HiddenSpec,
    InputError,
    InputTypeError,
    LaunchError,
    MissingKeyError,
    PromptLengthError,
    RequestRejectedError,
    SGLangHiddenWrapper,
    SGLangServer,
    TokenIdError,
    UnknownOptionError,
    launch,
)

Policy = Callable[..., SGLangHiddenWrapper]

VOCAB_SIZE = 49152
CONTEXT_LENGTH = 8192


@pytest.fixture(autouse=True)
def server_answers_afterwards(policy: Policy, smol_dir: str) -> Iterator[None]:
    yield
    prompt = prompt_of(6, seed=1)
    (row,) = rows_of(policy(max_new_tokens=3, segments=("response",))(tokens_input([prompt])), ("response",))
    assert_greedy(row, smol_dir, 3)
    assert row.counts == {"response": 3}


def plain(batch: TensorDictBase) -> list[dict[str, Any]]:
    """Return everything that a TensorDict holds, row by row, as values that can be compared."""
    rows = batch.unbind(0) if batch.batch_dims else [batch]
    found = [{str(key): row[key] for key in row.keys(True, True)} for row in rows]
    return [
        {key: value.tolist() if isinstance(value, torch.Tensor) else value for key, value in row.items()}
        for row in found
    ]


def assert_refused(
    policy: SGLangHiddenWrapper,
    batch: TensorDictBase,
    error: type[Exception] | tuple[type[Exception], ...],
    *words: str,
    **call: Any,
) -> None:
    before = plain(batch)
    with pytest.raises(error) as caught:
        policy(batch, **call)
    for word in words:
        assert word in str(caught.value)
    assert plain(batch) == before


# --- ids --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bad", [VOCAB_SIZE, VOCAB_SIZE + 1000, 2**40, -1, -100])
def test_ids_the_model_does_not_have(policy: Policy, bad: int) -> None:
    batch = tokens_input([[5, 6], [7, bad, 8], [9]])
    assert_refused(policy(), batch, TokenIdError, str(bad), str(VOCAB_SIZE), "row 1")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bool])
def test_ids_that_are_no_integers(policy: Policy, dtype: torch.dtype) -> None:
    batch = TensorDict(tokens=Tokens(prompt=torch.tensor([[1.5, 2.0]]).to(dtype), batch_size=1), batch_size=1)
    assert_refused(policy(), batch, InputError, str(dtype))


def test_one_bad_row_sends_no_row(policy: Policy) -> None:
    batch = tokens_input([prompt_of(4, seed=2)] * 16 + [[VOCAB_SIZE]])
    assert_refused(policy(), batch, TokenIdError, str(VOCAB_SIZE), "row 16")


# --- lengths ----------------------------------------------------------------------------------------------------------


def test_empty_prompt_among_good_ones(policy: Policy) -> None:
    empty = torch.empty(0, dtype=torch.int64).tolist()
    batch = tokens_input([[5, 6], [7]])
    batch[1].set("tokens", Tokens(prompt=torch.tensor(empty, dtype=torch.int64), batch_size=()))
    assert_refused(policy(), batch, PromptLengthError, "row 1")


def test_empty_text(policy: Policy) -> None:
    assert_refused(policy("text"), text_input(["2+2=", ""]), PromptLengthError, "row 1")


def test_empty_batches(policy: Policy) -> None:
    no_tokens = TensorDict(tokens=Tokens(prompt=torch.empty(0, 4, dtype=torch.int64), batch_size=0), batch_size=0)
    assert_refused(policy(), no_tokens, PromptLengthError)
    no_text = TensorDict(text=Text(prompt=[], batch_size=0), batch_size=0)
    assert_refused(policy("text"), no_text, InputError)


@pytest.mark.parametrize("num_tokens", [CONTEXT_LENGTH, CONTEXT_LENGTH + 100])
def test_prompts_over_the_context_length(policy: Policy, num_tokens: int) -> None:
    batch = tokens_input([[5, 6], prompt_of(num_tokens, seed=3)])
    assert_refused(policy(), batch, PromptLengthError, str(num_tokens), str(CONTEXT_LENGTH), "row 1")


def test_text_over_the_context_length(policy: Policy) -> None:
    assert_refused(
        policy("text"), text_input(["word " * (CONTEXT_LENGTH + 10)]), PromptLengthError, str(CONTEXT_LENGTH)
    )


# --- keys and types ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["history", "text", "tokens"])
def test_missing_key(policy: Policy, mode: str) -> None:
    unrelated = TensorDict(observation=torch.zeros(2, 3), batch_size=2)
    assert_refused(policy(mode), unrelated, MissingKeyError, mode, "observation")
    assert issubclass(MissingKeyError, KeyError)


def test_missing_field(policy: Policy) -> None:
    no_prompt = TensorDict(text=Text(response=["4"], batch_size=1), batch_size=1)
    assert_refused(policy("text"), no_prompt, MissingKeyError, "prompt")


def test_ints_for_text(policy: Policy) -> None:
    batch = TensorDict(text=Text(prompt=[1, 2], batch_size=2), batch_size=2)
    assert_refused(policy("text"), batch, InputTypeError)


def test_tensor_for_text(policy: Policy) -> None:
    batch = TensorDict(text=torch.zeros(2, 3, dtype=torch.int64), batch_size=2)
    assert_refused(policy("text"), batch, InputTypeError)


def test_text_for_tokens(policy: Policy) -> None:
    batch = TensorDict(tokens=Text(prompt=["2+2="], batch_size=1), batch_size=1)
    assert_refused(policy("tokens"), batch, InputTypeError)


def test_text_for_history(policy: Policy) -> None:
    batch = TensorDict(history=Text(prompt=["2+2="], batch_size=1), batch_size=1)
    assert_refused(policy("history"), batch, InputTypeError)


def test_no_tensordict_at_all(policy: Policy) -> None:
    with pytest.raises(InputTypeError, match="str"):
        policy("text")("2+2=")


# --- options ----------------------------------------------------------------------------------------------------------


def test_unknown_generate_option(policy: Policy) -> None:
    with pytest.raises(UnknownOptionError, match=r"temprature.*temperature"):
        policy(temprature=0.5)


def test_unknown_option_of_one_call(policy: Policy) -> None:
    assert_refused(policy(), tokens_input([[5, 6]]), UnknownOptionError, "temprature", temprature=0.5)


def test_unknown_constructor_keyword(smol: SGLangServer) -> None:
    with pytest.raises(TypeError, match="hiden"):
        SGLangHiddenWrapper(smol, input_mode="tokens", hiden=HiddenSpec())


@pytest.mark.parametrize(
    ("option", "value"),
    [("temperature", -1.0), ("max_new_tokens", 0), ("top_p", 1.5)],
)
def test_option_values_outside_their_limits(policy: Policy, option: str, value: float) -> None:
    with pytest.raises(InputError, match=str(value)):
        policy(**{option: value})(tokens_input([[5, 6]]))


@pytest.mark.parametrize(
    "options",
    [
        {"top_k": 2**31, "temperature": 1.0},
        {"logit_bias": {5: 1e300}, "temperature": 1.0},
        {"repetition_penalty": 1e-38, "temperature": 1.0},
        {"stop_token_ids": [VOCAB_SIZE], "min_new_tokens": 1},
        {"logit_bias": {VOCAB_SIZE: 1.0}},
    ],
)
def test_options_that_would_overflow_in_the_scheduler(policy: Policy, options: dict[str, Any]) -> None:
    assert_refused(policy(), tokens_input([[5, 6]]), InputError, **options)


def test_more_new_tokens_than_the_context_has(policy: Policy) -> None:
    batch = tokens_input([[5, 6]])
    errors = (InputError, RequestRejectedError)
    assert_refused(policy(max_new_tokens=CONTEXT_LENGTH), batch, errors, str(CONTEXT_LENGTH))


def test_unknown_input_mode(smol: SGLangServer) -> None:
    with pytest.raises(InputError, match=r"prose.*history"):
        SGLangHiddenWrapper(smol, input_mode="prose")


def test_no_engine_at_all() -> None:
    with pytest.raises(InputTypeError, match=r"7.*URL"):
        SGLangHiddenWrapper(7)


# --- the way to the engine --------------------------------------------------------------------------------------------


@pytest.fixture
def dead_url() -> str:
    with socket.socket() as bound:
        bound.bind(("127.0.0.1", 0))
        port = bound.getsockname()[1]
    return f"http://127.0.0.1:{port}"


def test_dead_url(dead_url: str, tokenizer: PreTrainedTokenizerBase) -> None:
    batch = tokens_input([[5, 6]])
    before = plain(batch)
    with pytest.raises(EngineUnreachableError) as caught:
        SGLangHiddenWrapper(dead_url, tokenizer=tokenizer, input_mode="tokens")(batch)
    assert dead_url in str(caught.value)
    assert isinstance(caught.value, ConnectionError)
    assert plain(batch) == before


@pytest.mark.parametrize("url", ["", "not a url", "ftp://127.0.0.1:1"])
def test_no_url(url: str) -> None:
    with pytest.raises(InputError):
        SGLangHiddenWrapper(url)


def test_model_directory_that_does_not_exist(tmp_path: Path) -> None:
    missing = tmp_path / "no-such-model"
    with pytest.raises((InputError, LaunchError)) as caught, launch(str(missing)):
        pass
    assert str(missing) in str(caught.value)


def test_model_directory_that_is_not_one(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("no model here")
    with pytest.raises((InputError, LaunchError)) as caught, launch(str(tmp_path)):
        pass
    assert str(tmp_path) in str(caught.value)
    assert "config.json" in str(caught.value)
