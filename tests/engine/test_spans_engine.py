"""Spans, token states and prompts alone through the policy, on the demo model, against Hugging Face."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from helpers import hf_oracle
from helpers.policy_checks import POOLINGS, STATE_RTOL, history_input, relative_error, tokens_input
from helpers.reference_pooling import pool
from tensordict import TensorDict, lazy_stack
from torchrl.data import LazyStackStorage, ReplayBuffer
from torchrl.data.llm import History
from torchrl.modules.llm.policies import ChatHistory, Tokens
from transformers import PreTrainedTokenizerBase

from torchrl_sglang_hidden import (
    Between,
    HiddenSpec,
    LastTokens,
    Role,
    SGLangHiddenWrapper,
    SGLangServer,
    SpanError,
    TokenMask,
    Turn,
)

CHAT = [
    {"role": "system", "content": "You are a helpful assistant. Answer shortly."},
    {"role": "user", "content": "Hi, I live in Paris."},
    {"role": "assistant", "content": "Hello! Nice city."},
    {"role": "user", "content": "Which country is that city in?"},
]


@pytest.fixture
def wrapper(smol: SGLangServer, tokenizer: PreTrainedTokenizerBase) -> Callable[..., SGLangHiddenWrapper]:
    def make(mode: str, hidden: Any, max_new_tokens: int = 12, **options: Any) -> SGLangHiddenWrapper:
        return SGLangHiddenWrapper(
            smol,
            tokenizer=tokenizer,
            input_mode=mode,
            hidden=hidden,
            generate_kwargs={"max_new_tokens": max_new_tokens, "temperature": 0},
            **options,
        )

    return make


def chats(*lists: Any) -> TensorDict:
    history = History.from_chats(list(lists))
    return TensorDict(history=ChatHistory(prompt=history, batch_size=len(lists)), batch_size=len(lists))


def row_of(out: TensorDict, row: int = 0) -> tuple[list[int], list[int]]:
    prompt = out.get(("tokens", "prompt"), as_list=True)[row].tolist()
    return prompt, out.get(("tokens", "response"), as_list=True)[row].tolist()


def words_of(tokenizer: PreTrainedTokenizerBase, ids: list[int], words: str, after: str = "") -> list[int]:
    """Return the positions of the tokens that overlap ``words``, found by adding up the tokens' own texts."""
    pieces = [tokenizer.decode([token_id]) for token_id in ids]
    text = "".join(pieces)
    assert text == tokenizer.decode(ids), "the pieces do not add up, so they place nothing"
    begin = text.index(words, text.index(after))
    edges = [0]
    for piece in pieces:
        edges.append(edges[-1] + len(piece))
    return [place for place in range(len(ids)) if edges[place] < begin + len(words) and edges[place + 1] > begin]


def assert_pooled(found_D: torch.Tensor, rows_ND: torch.Tensor, pooling: str = "mean") -> None:
    assert relative_error(found_D, pool(rows_ND.double(), pooling).float()) < STATE_RTOL


@pytest.mark.parametrize("pooling", POOLINGS)
def test_turns_roles_and_markers_of_a_chat(
    wrapper: Any, smol_dir: str, tokenizer: PreTrainedTokenizerBase, pooling: Any
) -> None:
    spans = {
        "question": Turn(-1),
        "first": Turn(1),
        "user": Role("user"),
        "system": Between("system\n", "<|im_end|>", "prompt"),
        "tail": LastTokens(4),
        "end": LastTokens(3, "prompt"),
    }
    policy = wrapper("history", HiddenSpec(("response",), pooling, spans=spans))
    out = policy(chats(CHAT, CHAT[:2]))
    hidden = out["hidden_states"]
    for row, chat in enumerate((CHAT, CHAT[:2])):
        prompt, response = row_of(out, row)
        truth = hf_oracle.teacher_force(smol_dir, prompt, response)
        rows = {"prompt": truth.rows("prompt"), "response": truth.rows("response")}
        said = [words_of(tokenizer, prompt, turn["content"], f"<|im_start|>{turn['role']}") for turn in chat]
        users = [place for turn, places in zip(chat, said, strict=True) if turn["role"] == "user" for place in places]
        expected = {
            "question": rows["prompt"][said[-1]],
            "first": rows["prompt"][said[1]],
            "user": rows["prompt"][users],
            "system": rows["prompt"][words_of(tokenizer, prompt, chat[0]["content"])],
            "tail": rows["response"][-4:],
            "end": rows["prompt"][-3:],
        }
        for name, rows_ND in expected.items():
            assert int(hidden.span_counts[name][row]) == len(rows_ND), name
            assert_pooled(hidden.spans[name][row], rows_ND, pooling)


def test_a_role_that_one_row_does_not_have(wrapper: Any) -> None:
    policy = wrapper("history", HiddenSpec(spans={"said": Role("assistant")}))
    batch = chats(CHAT, CHAT[:2])
    with pytest.raises(SpanError, match=r"row 1.*'said'"):
        policy(batch)
    assert "hidden_states" not in batch[0]


@pytest.mark.parametrize("pooling", POOLINGS)
def test_between_markers_of_a_response(
    wrapper: Any, smol_dir: str, tokenizer: PreTrainedTokenizerBase, pooling: Any
) -> None:
    spans = {
        "inside": Between(" capital", "."),
        "before": Between(None, " capital"),
        "behind": Between(" capital", None),
        "unclosed": Between(" capital", "<never>", unclosed="end"),
    }
    policy = wrapper("history", HiddenSpec(("response",), pooling, spans=spans))
    out = policy(history_input(["What is the capital of France?"]))
    prompt, response = row_of(out)
    truth_ND = hf_oracle.teacher_force(smol_dir, prompt, response).rows("response")
    capital = words_of(tokenizer, response, " capital")
    stop = words_of(tokenizer, response, ".")
    expected = {
        "inside": range(capital[-1] + 1, stop[0]),
        "before": range(capital[0]),
        "behind": range(capital[-1] + 1, len(response)),
        "unclosed": range(capital[-1] + 1, len(response)),
    }
    for name, places in expected.items():
        assert int(out["hidden_states"].span_counts[name][0]) == len(places), name
        assert_pooled(out["hidden_states"].spans[name][0], truth_ND[list(places)], pooling)


def test_a_marker_that_was_not_said(wrapper: Any) -> None:
    policy = wrapper("history", HiddenSpec(spans={"thought": Between("<think>", "</think>")}))
    batch = history_input(["What is the capital of France?"])
    with pytest.raises(SpanError, match=r"row 0.*'thought'.*<think>"):
        policy(batch)
    assert "hidden_states" not in batch[0]


def test_a_response_shorter_than_its_span(wrapper: Any) -> None:
    batch = history_input(["What is the capital of France?"])
    with pytest.raises(SpanError, match=r"row 0.*'tail'.* 8 tokens"):
        wrapper("history", HiddenSpec(spans={"tail": LastTokens(9)}))(batch)
    spec = HiddenSpec(spans={"tail": LastTokens(9, allow_fewer=True)})
    out = wrapper("history", spec)(batch)
    assert out["hidden_states"].span_counts["tail"].tolist() == [8]


@pytest.mark.parametrize("pooling", POOLINGS)
def test_a_mask_of_the_tensordict(wrapper: Any, smol_dir: str, pooling: Any) -> None:
    rows = [([11, 12, 13, 14, 15], [0, 1, 1, 0, 1]), ([21, 22, 23], [1, 0, 0])]
    batch = lazy_stack(
        [
            TensorDict(tokens=Tokens(prompt=torch.tensor(ids)), marked=torch.tensor(mask, dtype=torch.bool))
            for ids, mask in rows
        ]
    )
    out = wrapper("tokens", HiddenSpec(("prompt",), pooling, spans={"marked": TokenMask("marked")}))(batch)
    for row, (ids, mask) in enumerate(rows):
        rows_ND = hf_oracle.teacher_force(smol_dir, ids, row_of(out, row)[1]).rows("prompt")
        assert_pooled(out["hidden_states"].spans["marked"][row], rows_ND[torch.tensor(mask, dtype=torch.bool)], pooling)


@pytest.mark.parametrize("pad_output", [False, True])
def test_token_states_fit_the_tokens(wrapper: Any, smol_dir: str, pad_output: bool) -> None:
    segments = ("prompt", "response", "full")
    policy = wrapper("tokens", HiddenSpec(segments, tokens=True), max_new_tokens=4, pad_output=pad_output)
    prompts = [[11, 12, 13, 14, 15], [21, 22, 23]]
    out = policy(tokens_input(prompts))
    mask = out.get(("masks", "all_attention_mask"), as_list=True)
    for row, ids in enumerate(prompts):
        states = {name: out.get(("token_hidden_states", name), as_list=True)[row] for name in segments}
        tokens = {name: out.get(("tokens", name), as_list=True)[row] for name in segments}
        # The last sampled token is never fed back.
        assert {name: len(rows) for name, rows in states.items()} == {
            "prompt": len(tokens["prompt"]),
            "response": len(tokens["response"]),
            "full": len(tokens["full"]) - 1,
        }
        response = tokens["response"][mask[row][len(tokens["prompt"]) :]].tolist()
        truth = hf_oracle.teacher_force(smol_dir, ids, response)
        left = len(tokens["prompt"]) - len(ids)
        assert relative_error(states["prompt"][left:], truth.rows("prompt")) < STATE_RTOL
        assert relative_error(states["response"][: len(response)], truth.rows("response")) < STATE_RTOL
        full = states["full"][left : left + len(ids) + len(response) - 1]
        assert relative_error(full, truth.rows("full")) < STATE_RTOL


def test_token_states_in_a_replay_buffer(wrapper: Any) -> None:
    policy = wrapper("tokens", HiddenSpec(("response",), None, tokens=True), max_new_tokens=4)
    buffer = ReplayBuffer(storage=LazyStackStorage(8), batch_size=3)
    for prompts in ([[11, 12, 13], [21, 22]], [[31]]):
        buffer.extend(policy(tokens_input(prompts)))
    sample = buffer.sample()
    rows = sample.get(("token_hidden_states", "response"), as_list=True)
    assert [row.shape[-1] for row in rows] == [576] * 3
    assert "hidden_states" not in sample[0]


@pytest.mark.parametrize("pooling", POOLINGS)
def test_a_prompt_alone_is_encoded(wrapper: Any, smol_dir: str, pooling: Any) -> None:
    policy = wrapper("tokens", HiddenSpec(("prompt",), pooling, layers=-1), max_new_tokens=0)
    prompts = [[11, 12, 13, 14, 15], [21, 22, 23], [31]]
    out = policy(tokens_input(prompts))
    for row, ids in enumerate(prompts):
        truth_ND = hf_oracle.teacher_force(smol_dir, ids, [0]).rows("prompt")
        assert_pooled(out["hidden_states", "prompt"][row], truth_ND, pooling)
    assert [row_of(out, row) for row in range(3)] == [(ids, []) for ids in prompts]
    assert out["text"].response == ["", "", ""]


def test_rows_that_say_for_themselves(wrapper: Any) -> None:
    """Stock SGLang's flag, per row of the TensorDict: the others get NaN and a count of 0, and stay dense."""
    batch = tokens_input([[11, 12], [21, 22, 23], [31]])
    for row, wants in zip(batch.unbind(0), (True, False, True), strict=True):
        row["return_hidden_states"] = torch.tensor(wants)
    out = wrapper("tokens", HiddenSpec(("prompt", "response")), max_new_tokens=3)(batch)
    assert out["hidden_states", "prompt_count"].tolist() == [2, 0, 1]
    assert torch.isnan(out["hidden_states", "response"]).all(-1).tolist() == [False, True, False]


def test_the_flag_of_a_call_and_of_the_constructor(wrapper: Any) -> None:
    plain = wrapper("tokens", None, max_new_tokens=3)
    assert "hidden_states" not in plain(tokens_input([[11, 12]]))[0]
    asked = plain(tokens_input([[11, 12]]), return_hidden_states=True)
    assert asked["hidden_states", "response_count"].tolist() == [3]
    always = plain.get_new_version(generate_kwargs={"max_new_tokens": 3, "return_hidden_states": True})
    assert always(tokens_input([[11, 12]]))["hidden_states", "response"].shape == (1, 576)
