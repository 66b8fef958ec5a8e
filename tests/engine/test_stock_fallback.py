"""A server without this package's half: stock `return_hidden_states`, the same numbers, and one warning."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import pytest
from helpers.completion_checks import assert_completion
from helpers.policy_checks import (
    CHUNKED_PREFILL_SIZE,
    POOLINGS,
    SEGMENTS,
    assert_rows,
    make_policy,
    prompt_of,
    rows_of,
    text_input,
    tokens_input,
)
from transformers import PreTrainedTokenizerBase

from torchrl_sglang_hidden import (
    ActionMask,
    AlignmentError,
    At,
    Between,
    CapabilityError,
    Each,
    Every,
    HiddenSpec,
    InputError,
    LastTokens,
    LogitsSpec,
    SGLangHiddenWrapper,
    SGLangServer,
    TokenMask,
    Window,
    launch,
)
from torchrl_sglang_hidden.records import Request
from torchrl_sglang_hidden.spec.spans import PromptSpan

Policy = Callable[..., SGLangHiddenWrapper]


@dataclass(frozen=True)
class Stock:
    engine: SGLangServer
    warnings_of_four_calls: list[warnings.WarningMessage]


@pytest.fixture(scope="module")
def stock(smol_dir: str, tokenizer: PreTrainedTokenizerBase) -> Iterator[Stock]:
    with pytest.MonkeyPatch.context() as environment:
        environment.setenv("TORCHRL_SGLANG_HIDDEN", "0")
        engine = launch(smol_dir, dtype="float32", chunked_prefill_size=CHUNKED_PREFILL_SIZE, sleep_on_idle=True)
    with engine:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            for policy in (make_policy(engine, tokenizer), make_policy(engine, tokenizer)):
                for _ in range(2):
                    policy(tokens_input([[5, 6]]))
        yield Stock(engine, caught)


@pytest.fixture
def stock_policy(stock: Stock, tokenizer: PreTrainedTokenizerBase) -> Policy:
    return functools.partial(make_policy, stock.engine, tokenizer)


def test_one_warning_once(stock: Stock) -> None:
    about_fallback = [w for w in stock.warnings_of_four_calls if "return_hidden_states" in str(w.message)]
    assert len(about_fallback) == 1
    assert "launch" in str(about_fallback[0].message)


@pytest.mark.parametrize("pooling", POOLINGS)
def test_same_numbers(stock_policy: Policy, smol_dir: str, pooling: str) -> None:
    batch = tokens_input([prompt_of(length, seed=length) for length in (1, 9, 30, 17)])
    assert_rows(stock_policy(pooling=pooling)(batch), smol_dir, SEGMENTS, pooling)


@pytest.mark.parametrize("pooling", POOLINGS)
def test_sampled_responses(stock_policy: Policy, smol_dir: str, pooling: str) -> None:
    batch = tokens_input([prompt_of(12, seed=40)] * 3)
    out = stock_policy(pooling=pooling, temperature=1.0)(batch)
    assert_rows(out, smol_dir, SEGMENTS, pooling, temperature=1.0)


@pytest.mark.parametrize("pooling", POOLINGS)
def test_one_token_responses(stock_policy: Policy, smol_dir: str, pooling: str) -> None:
    batch = tokens_input([prompt_of(7, seed=41), prompt_of(1, seed=42)])
    rows = assert_rows(stock_policy(pooling=pooling, max_new_tokens=1)(batch), smol_dir, SEGMENTS, pooling)
    assert [len(row.response_ids) for row in rows] == [1, 1]


def test_ended_by_eos(
    stock_policy: Policy, tokenizer: PreTrainedTokenizerBase, smol_dir: str, chat_ids: Callable
) -> None:
    batch = tokens_input([chat_ids("What is the capital of France?")])
    (row,) = assert_rows(stock_policy(max_new_tokens=12)(batch), smol_dir, SEGMENTS)
    assert (row.response_ids[-1], row.finish_reason) == (tokenizer.eos_token_id, "stop")
    assert row.text == "The capital of France is Paris."


@pytest.mark.parametrize("segments", [*[(name,) for name in SEGMENTS], SEGMENTS])
def test_the_same_prompt_again(stock_policy: Policy, smol_dir: str, segments: tuple[str, ...]) -> None:
    prompt = prompt_of(40, seed=43)
    stock_policy(segments=("response",))(tokens_input([prompt]))  # fills the prefix cache
    for _ in range(2):
        assert_rows(stock_policy(segments=segments)(tokens_input([prompt])), smol_dir, segments)


def test_shared_prefixes(stock_policy: Policy, smol_dir: str) -> None:
    # All three together stay under the chunk size, which limits what one step prefills, not one prompt.
    shared = prompt_of(12, seed=44)
    batch = tokens_input([shared + prompt_of(tail, seed=45 + tail) for tail in (1, 5, 9)])
    assert_rows(stock_policy()(batch), smol_dir, SEGMENTS)


@pytest.mark.parametrize("pooling", POOLINGS)
def test_responses_to_chunked_prompts(stock_policy: Policy, smol_dir: str, pooling: str) -> None:
    batch = tokens_input([prompt_of(length, seed=46 + length) for length in (4, CHUNKED_PREFILL_SIZE + 36)])
    out = stock_policy(segments=("response",), pooling=pooling)(batch)
    assert_rows(out, smol_dir, ("response",), pooling)


@pytest.mark.parametrize("segment", ["prompt", "full"])
def test_chunked_prompts_lose_rows_and_say_so(stock_policy: Policy, smol_dir: str, segment: str) -> None:
    """Stock SGLang keeps the states of a prompt's last chunk only."""
    last_chunk, num_new = 36, 4
    num_tokens = CHUNKED_PREFILL_SIZE + last_chunk
    generated = 0 if segment == "prompt" else num_new - 1
    batch = tokens_input([prompt_of(num_tokens, seed=47)])
    with pytest.raises(AlignmentError) as caught:
        stock_policy(segments=(segment,), max_new_tokens=num_new)(batch)
    assert f"{last_chunk + generated} rows" in str(caught.value)
    assert f"expected {num_tokens + generated}" in str(caught.value)
    assert "row 0" in str(caught.value)
    assert "launch" in str(caught.value)
    assert set(batch.keys(True, True)) == {("tokens", "prompt")}
    good = tokens_input([prompt_of(8, seed=48)])
    assert_rows(stock_policy(segments=(segment,))(good), smol_dir, (segment,))


def test_text_mode(stock_policy: Policy, tokenizer: PreTrainedTokenizerBase) -> None:
    (row,) = rows_of(stock_policy("text")(text_input(["2+2="])), SEGMENTS)
    assert row.prompt_ids == tokenizer("2+2=")["input_ids"]


@pytest.mark.parametrize("pooling", POOLINGS)
def test_spans_and_token_states_without_the_server_half(stock: Stock, smol_dir: str, pooling: Any) -> None:
    for length in (9, 40):
        ids = tuple(prompt_of(length, 4000 + length))
        spans = {
            "tail": LastTokens(2), "places": PromptSpan(((1, 3), (5, 6))), "window": Window(1, 9), "every": Every(2),
            "past": Window(7, 9, pooling="max"), "single": PromptSpan(((1, 3), (5, 6)), pooling=None),
            "own": PromptSpan(((2, 8),), pooling="max"),
        }  # fmt: skip
        asked = {
            name: TokenMask("mask", pooling=span.pooling) if isinstance(span, PromptSpan) else span
            for name, span in spans.items()
        }
        spec = HiddenSpec(SEGMENTS, pooling, tokens=True, spans=asked)
        request = Request(ids, {"max_new_tokens": 4, "temperature": 0.0}, hidden=spec, spans=spans)
        for _ in range(2):
            [completion] = stock.engine.generate([request])
            assert_completion(request, completion, smol_dir, 30)


def test_a_prompt_alone_without_the_server_half(stock: Stock, smol_dir: str) -> None:
    request = Request(tuple(prompt_of(20, 4100)), {"max_new_tokens": 0}, hidden=HiddenSpec(("prompt",)))
    [completion] = stock.engine.generate([request])
    assert_completion(request, completion, smol_dir, 30)


def test_what_only_the_server_half_can_do_is_refused(stock: Stock) -> None:
    ids = (5, 6, 7)
    with pytest.raises(CapabilityError, match="layers=3"):
        stock.engine.generate([Request(ids, hidden=HiddenSpec(layers=3))])
    for marked in (Between("a", "b"), At("a"), Each("a")):
        with pytest.raises(CapabilityError, match="markers"):
            stock.engine.generate([Request(ids, hidden=HiddenSpec(spans={"x": marked}), spans={"x": marked})])
    with pytest.raises(InputError, match="30 layers"):
        stock.engine.generate([Request(ids, hidden=HiddenSpec(layers=30))])
    for asked, fields in {
        "logits": {"logits": LogitsSpec(top_k=1)},
        "constraints": {"constraints": (ActionMask((5, 6)),)},
    }.items():
        with pytest.raises(
            CapabilityError, match=f"row 0: {asked} are asked of a server without the server half.*launch"
        ):
            stock.engine.generate([Request(ids, {"max_new_tokens": 2}, **fields)])
    [completion] = stock.engine.generate([Request(ids, {"max_new_tokens": 2, "ignore_eos": True})])
    assert len(completion.response_ids) == 2
