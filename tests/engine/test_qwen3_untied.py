"""A random Qwen3 whose head is its own matrix, on a server that wants an API key and has a small KV cache."""

from __future__ import annotations

import functools
from collections.abc import Callable

import oracle
import pytest
from checks import (
    CHUNKED_PREFILL_SIZE,
    POOLINGS,
    QUESTIONS,
    SEGMENTS,
    assert_rows,
    history_input,
    make_policy,
    prompt_of,
    text_input,
    tokens_input,
)
from transformers import AutoModelForCausalLM, PreTrainedTokenizerBase

from torchrl_sglang_hidden import AuthenticationError, PromptLengthError, SGLangHiddenWrapper, connect
from torchrl_sglang_hidden.engines.launch import LaunchedServer

Policy = Callable[..., SGLangHiddenWrapper]


@pytest.fixture
def qwen3(cramped_qwen3: LaunchedServer) -> LaunchedServer:
    return cramped_qwen3


@pytest.fixture
def qwen3_policy(qwen3: LaunchedServer, tokenizer: PreTrainedTokenizerBase) -> Policy:
    return functools.partial(make_policy, qwen3, tokenizer)


def test_the_head_is_untied(qwen3_dir: str) -> None:
    """Else this file would test what test_against_hf.py tests."""
    model = AutoModelForCausalLM.from_pretrained(qwen3_dir)
    head, embeddings = model.get_output_embeddings().weight, model.get_input_embeddings().weight
    assert not head.equal(embeddings)


@pytest.mark.parametrize("num_rows", [1, 2, 17])
def test_greedy_batches(qwen3_policy: Policy, qwen3_dir: str, num_rows: int) -> None:
    prompts = [prompt_of(2 + row, seed=row) for row in range(num_rows)]
    rows = assert_rows(qwen3_policy()(tokens_input(prompts)), qwen3_dir, SEGMENTS)
    for prompt, row in zip(prompts, rows, strict=True):
        assert row.response_ids == oracle.greedy(qwen3_dir, tuple(prompt), 8)


@pytest.mark.parametrize(("mode", "make_input"), [("history", history_input), ("text", text_input)])
def test_modes(qwen3_policy: Policy, qwen3_dir: str, mode: str, make_input: Callable) -> None:
    rows = assert_rows(qwen3_policy(mode)(make_input(QUESTIONS[:3])), qwen3_dir, SEGMENTS)
    for row in rows:
        assert row.response_ids == oracle.greedy(qwen3_dir, tuple(row.prompt_ids), 8)


@pytest.mark.parametrize("pooling", POOLINGS)
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_sampled_responses(qwen3_policy: Policy, qwen3_dir: str, pooling: str, temperature: float) -> None:
    batch = tokens_input([prompt_of(5, seed=30)] * 4)
    out = qwen3_policy(pooling=pooling, temperature=temperature, max_new_tokens=16)(batch)
    rows = assert_rows(out, qwen3_dir, SEGMENTS, pooling, temperature)
    assert len({tuple(row.response_ids) for row in rows}) > 1


@pytest.mark.parametrize("pooling", POOLINGS)
def test_chunked_and_cached_prompts(qwen3_policy: Policy, qwen3_dir: str, pooling: str) -> None:
    batch = tokens_input([prompt_of(length, seed=length) for length in (3, CHUNKED_PREFILL_SIZE * 2 + 5, 40)])
    for _ in range(2):
        out = qwen3_policy(pooling=pooling, max_new_tokens=3)(batch.clone())
        assert_rows(out, qwen3_dir, SEGMENTS, pooling)


@pytest.mark.parametrize("pooling", POOLINGS)
def test_one_token_responses(qwen3_policy: Policy, qwen3_dir: str, pooling: str) -> None:
    batch = tokens_input([prompt_of(1, seed=31), prompt_of(CHUNKED_PREFILL_SIZE + 1, seed=32)])
    rows = assert_rows(qwen3_policy(pooling=pooling, max_new_tokens=1)(batch), qwen3_dir, SEGMENTS, pooling)
    assert [len(row.response_ids) for row in rows] == [1, 1]


def test_rows_that_the_server_took_back_and_computed_again(
    qwen3: LaunchedServer, qwen3_policy: Policy, qwen3_dir: str
) -> None:
    retractions = qwen3.log_path.read_text().count("Retract requests")
    prompts = [prompt_of(12, seed=50 + row) for row in range(17)]
    assert len(prompts) * (12 + 40) > qwen3.info.max_prompt_tokens
    rows = assert_rows(qwen3_policy(max_new_tokens=40)(tokens_input(prompts)), qwen3_dir, SEGMENTS)
    assert [len(row.response_ids) for row in rows] == [40] * 17
    assert qwen3.log_path.read_text().count("Retract requests") > retractions, "nothing was taken back: tests nothing"


def test_longest_prompt_that_the_kv_cache_holds(qwen3: LaunchedServer, qwen3_policy: Policy, qwen3_dir: str) -> None:
    """The context has room for more; a prompt over the KV cache would wait in SGLang's queue for ever."""
    longest = qwen3.info.max_prompt_tokens
    assert longest < qwen3.info.context_length
    fits, too_long = prompt_of(longest, seed=33), prompt_of(longest + 1, seed=33)
    with pytest.raises(PromptLengthError, match=f"{longest + 1}.*{longest}"):
        qwen3_policy(max_new_tokens=1)(tokens_input([too_long]))
    assert_rows(qwen3_policy(max_new_tokens=1)(tokens_input([fits])), qwen3_dir, SEGMENTS)


# --- API key ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("key", [None, "wrong-key"])
def test_wrong_api_key(
    qwen3: LaunchedServer,
    qwen3_policy: Policy,
    tokenizer: PreTrainedTokenizerBase,
    cramped_key: str,
    key: str | None,
) -> None:
    with pytest.raises(AuthenticationError) as caught:
        make_policy(connect(qwen3.url, api_key=key), tokenizer)(tokens_input([[5, 6]]))
    assert qwen3.url in str(caught.value)
    assert cramped_key not in str(caught.value)
    assert len(qwen3_policy()(tokens_input([[5, 6]]))) == 1


def test_right_api_key(
    qwen3: LaunchedServer, tokenizer: PreTrainedTokenizerBase, cramped_key: str, qwen3_dir: str
) -> None:
    client = connect(qwen3.url, api_key=cramped_key)
    assert_rows(make_policy(client, tokenizer)(tokens_input([[5, 6]])), qwen3_dir, SEGMENTS)
    assert cramped_key not in repr(client)
