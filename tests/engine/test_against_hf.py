"""A real server against Hugging Face on the same weights, float32.

1. Greedy tokens are Hugging Face's; log-probs agree to 1e-3 and pooled vectors to 1e-4 relative, in all input modes.
2. The same at temperature 1 and below it, by teacher forcing the sampled ids.
3. However a response ends, its tokens, log-probs and states end together.
4. Padding moves data and changes none.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from helpers.policy_checks import (
    CHUNKED_PREFILL_SIZE,
    LOG_PROB_ATOL,
    POOLINGS,
    QUESTIONS,
    SEGMENTS,
    STATE_RTOL,
    assert_greedy,
    assert_row,
    assert_rows,
    history_input,
    prompt_of,
    relative_error,
    rows_of,
    text_input,
    tokens_input,
)
from tensordict import TensorDict
from torchrl.data.llm import History
from torchrl.modules.llm.policies import ChatHistory
from transformers import PreTrainedTokenizerBase

from torchrl_sglang_hidden import SGLangHiddenWrapper, SGLangServer, ragged

Policy = Callable[..., SGLangHiddenWrapper]
ChatIds = Callable[[str], list[int]]

# --- 1. greedy, modes, batches, poolings ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("mode", "num_rows"),
    [("history", 1), ("history", 2), ("history", 17), ("text", 1), ("text", 5), ("tokens", 1), ("tokens", 5)],
)
def test_greedy_batches_in_every_mode(
    policy: Policy,
    tokenizer: PreTrainedTokenizerBase,
    chat_ids: ChatIds,
    smol_dir: str,
    mode: str,
    num_rows: int,
) -> None:
    questions = QUESTIONS[:num_rows]
    if mode == "history":
        batch, expected = history_input(questions), [chat_ids(question) for question in questions]
    elif mode == "text":
        batch, expected = text_input(questions), [tokenizer(question)["input_ids"] for question in questions]
    else:
        expected = [chat_ids(question) for question in questions]
        batch = tokens_input(expected)

    rows = assert_rows(policy(mode)(batch), smol_dir, SEGMENTS)

    assert [row.prompt_ids for row in rows] == expected
    for row in rows:
        assert_greedy(row, smol_dir, 8, tokenizer.eos_token_id)
        assert row.text == tokenizer.decode(row.response_ids, skip_special_tokens=True)
        assert row.finish_reason == ("stop" if row.response_ids[-1] == tokenizer.eos_token_id else "length")
        assert row.weight_version


@pytest.mark.parametrize("segments", [*[(name,) for name in SEGMENTS], SEGMENTS])
@pytest.mark.parametrize("pooling", POOLINGS)
def test_each_segment_alone_and_together(
    policy: Policy, smol_dir: str, pooling: str, segments: tuple[str, ...]
) -> None:
    prompts = [prompt_of(9, seed=1), prompt_of(30, seed=2)]
    out = policy(segments=segments, pooling=pooling)(tokens_input(prompts))
    assert_rows(out, smol_dir, segments, pooling)
    assert out["hidden_states", segments[0]].shape == (2, 576)
    assert out["hidden_states", f"{segments[0]}_count"].dtype == torch.int64
    for other in set(SEGMENTS) - set(segments):
        assert getattr(out["hidden_states"], other) is None


def test_every_field_is_written_and_fits_the_others(policy: Policy, tokenizer: PreTrainedTokenizerBase) -> None:
    out = policy("text")(text_input(QUESTIONS[:3]))
    for row, (prompt, response) in enumerate(zip(out["text"].prompt, out["text"].response, strict=True)):
        prompt_ids = out.get(("tokens", "prompt"), as_list=True)[row]
        response_ids = out.get(("tokens", "response"), as_list=True)[row]
        is_response = torch.arange(len(prompt_ids) + len(response_ids)) >= len(prompt_ids)
        log_probs = out.get(("log_probs", "full"), as_list=True)[row]
        assert prompt == QUESTIONS[row]
        assert out["text"].full[row] == prompt + response
        assert prompt_ids.dtype == response_ids.dtype == torch.int64
        assert out.get(("masks", "all_attention_mask"), as_list=True)[row].tolist() == [True] * len(is_response)
        assert torch.equal(out.get(("masks", "all_assistant_mask"), as_list=True)[row], is_response)
        assert torch.equal(log_probs.isnan(), ~is_response)
        assert torch.equal(log_probs[is_response], out.get(("log_probs", "response"), as_list=True)[row])
    assert out["log_probs"].prompt is None


def test_history_holds_the_answer_and_the_ids_that_were_used(
    policy: Policy, tokenizer: PreTrainedTokenizerBase, smol_dir: str
) -> None:
    out = policy("history")(history_input(QUESTIONS[:2]))
    rows = assert_rows(out, smol_dir, SEGMENTS)
    for row in range(2):
        turns = out["history"].full[row].tolist()
        assert [turn["role"] for turn in turns] == ["user", "assistant"]
        assert turns[0]["content"] == QUESTIONS[row]
        assert turns[1]["content"] == rows[row].text
        assert out["history"].response[row].content[-1] == rows[row].text


def test_a_second_turn_sends_the_whole_conversation(
    policy: Policy, tokenizer: PreTrainedTokenizerBase, smol_dir: str
) -> None:
    chat = [
        {"role": "user", "content": "My name is Ada."},
        {"role": "assistant", "content": "Hello Ada!"},
        {"role": "user", "content": "What is my name?"},
    ]
    batch = TensorDict(history=ChatHistory(prompt=History.from_chats([chat]), batch_size=1), batch_size=1)
    (row,) = assert_rows(policy("history")(batch), smol_dir, SEGMENTS)
    assert row.prompt_ids == tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_dict=False)
    assert_greedy(row, smol_dir, 8, tokenizer.eos_token_id)


@pytest.mark.parametrize("shape", [(), (2, 2)])
def test_batch_shapes(policy: Policy, smol_dir: str, shape: tuple[int, ...]) -> None:
    count = 1 if shape == () else 4
    flat = text_input(QUESTIONS[:count])
    expected = policy("text")(flat.clone())
    out = policy("text")(flat[0] if shape == () else flat.reshape(shape))
    assert out.batch_size == torch.Size(shape)
    assert out["hidden_states", "response"].shape == (*shape, 576)
    torch.testing.assert_close(
        out["hidden_states", "response"].reshape(count, 576),
        expected["hidden_states", "response"],
        rtol=1e-4,
        atol=1e-4,
    )


# --- 2. sampling ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("pooling", POOLINGS)
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_sampled_responses(policy: Policy, chat_ids: ChatIds, smol_dir: str, temperature: float, pooling: str) -> None:
    out = policy(pooling=pooling, temperature=temperature)(tokens_input([chat_ids("Tell me a story.")] * 6))
    rows = assert_rows(out, smol_dir, SEGMENTS, pooling, temperature)
    assert len({tuple(row.response_ids) for row in rows}) > 1, "six equal samples: this was not sampling"


# --- 3. ends ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("pooling", POOLINGS)
def test_one_token_responses(policy: Policy, smol_dir: str, pooling: str) -> None:
    prompts = [prompt_of(1, seed=3), prompt_of(8, seed=4), prompt_of(CHUNKED_PREFILL_SIZE + 7, seed=5)]
    rows = assert_rows(policy(pooling=pooling, max_new_tokens=1)(tokens_input(prompts)), smol_dir, SEGMENTS, pooling)
    for row in rows:
        assert len(row.response_ids) == 1
        assert row.finish_reason == "length"


def test_cut_by_max_new_tokens(policy: Policy, chat_ids: ChatIds, smol_dir: str) -> None:
    batch = tokens_input([chat_ids("Say hi.")])
    (row,) = assert_rows(policy(max_new_tokens=5)(batch), smol_dir, SEGMENTS)
    assert (len(row.response_ids), row.finish_reason) == (5, "length")


@pytest.mark.parametrize("pooling", POOLINGS)
def test_ended_by_eos(
    policy: Policy,
    chat_ids: ChatIds,
    tokenizer: PreTrainedTokenizerBase,
    smol_dir: str,
    pooling: str,
) -> None:
    batch = tokens_input([chat_ids("What is the capital of France?"), chat_ids("Say hi.")])
    ended, cut = assert_rows(policy(pooling=pooling, max_new_tokens=16)(batch), smol_dir, SEGMENTS, pooling)
    assert ended.response_ids[-1] == tokenizer.eos_token_id
    assert ended.response_ids.count(tokenizer.eos_token_id) == 1
    assert (ended.text, ended.finish_reason) == ("The capital of France is Paris.", "stop")
    assert (len(cut.response_ids), cut.finish_reason) == (16, "length")


# One token, part of one, across tokens, the first token; the greedy answer is "The capital of France is Paris."
@pytest.mark.parametrize(
    ("stop", "text"),
    [
        (" Paris", "The capital of France is"),
        ("ris", "The capital of France is Pa"),
        ("e is P", "The capital of Franc"),
        ("The", ""),
    ],
)
def test_ended_by_a_stop_string(
    policy: Policy,
    chat_ids: ChatIds,
    tokenizer: PreTrainedTokenizerBase,
    smol_dir: str,
    stop: str,
    text: str,
) -> None:
    batch = tokens_input([chat_ids("What is the capital of France?"), chat_ids("Say hi.")])
    stopped, cut = assert_rows(policy(max_new_tokens=12, stop_sequences=[stop])(batch), smol_dir, SEGMENTS)
    assert (stopped.text, stopped.finish_reason) == (text, "stop")
    assert stop in tokenizer.decode(stopped.response_ids)
    assert stop not in tokenizer.decode(stopped.response_ids[:-1])
    assert (len(cut.response_ids), cut.finish_reason) == (12, "length")


def test_ended_by_a_stop_id(
    policy: Policy, chat_ids: ChatIds, tokenizer: PreTrainedTokenizerBase, smol_dir: str
) -> None:
    (paris,) = tokenizer(" Paris")["input_ids"]
    batch = tokens_input([chat_ids("What is the capital of France?")])
    (row,) = assert_rows(policy(stop_token_ids=[paris])(batch), smol_dir, SEGMENTS)
    assert (row.response_ids[-1], row.response_ids.count(paris), row.finish_reason) == (paris, 1, "stop")


# --- 4. padding -------------------------------------------------------------------------------------------------------


def test_padded_and_unpadded_hold_the_same_data(
    policy: Policy, chat_ids: ChatIds, tokenizer: PreTrainedTokenizerBase, smol_dir: str
) -> None:
    # The first response ends with EOS, which is this tokenizer's pad as well: it must stay.
    prompts = [chat_ids("What is the capital of France?"), chat_ids("Hi"), prompt_of(3, seed=9)]
    rows = assert_rows(policy(max_new_tokens=12)(tokens_input(prompts)), smol_dir, SEGMENTS)
    padded = policy(max_new_tokens=12, pad_output=True)(tokens_input(prompts))

    prompt_BP, response_BT = padded["tokens", "prompt"], padded["tokens", "response"]
    attention_BS, assistant_BS = padded["masks", "all_attention_mask"], padded["masks", "all_assistant_mask"]
    widest_prompt, widest_response = prompt_BP.shape[1], response_BT.shape[1]
    assert widest_prompt == max(len(row.prompt_ids) for row in rows)
    assert widest_response == max(len(row.response_ids) for row in rows)
    assert torch.equal(padded["tokens", "full"], torch.cat([prompt_BP, response_BT], dim=1))
    for index, row in enumerate(rows):
        num_prompt, num_response = len(row.prompt_ids), len(row.response_ids)
        real = torch.zeros(widest_prompt + widest_response, dtype=torch.bool)
        real[widest_prompt - num_prompt : widest_prompt + num_response] = True
        sampled = real & (torch.arange(len(real)) >= widest_prompt)
        assert torch.equal(attention_BS[index], real)
        assert torch.equal(assistant_BS[index], sampled)
        assert padded["tokens", "full"][index][real].tolist() == row.full_ids
        assert prompt_BP[index][: widest_prompt - num_prompt].eq(tokenizer.pad_token_id).all()
        assert response_BT[index][num_response:].eq(tokenizer.pad_token_id).all()
        log_probs = padded["log_probs", "full"][index]
        torch.testing.assert_close(log_probs[sampled], row.log_probs_T, atol=1e-4, rtol=0)
        assert log_probs[real & ~sampled].isnan().all()
        for segment in SEGMENTS:
            assert int(padded["hidden_states", f"{segment}_count"][index]) == row.counts[segment]
            torch.testing.assert_close(
                padded["hidden_states", segment][index], row.vectors[segment], rtol=1e-4, atol=1e-4
            )


def test_prompts_of_a_padded_output_go_back_in_without_their_pads(
    policy: Policy, chat_ids: ChatIds, smol_dir: str
) -> None:
    prompts = [chat_ids("What is the capital of France?"), prompt_of(3, seed=9)]
    padded = policy(pad_output=True)(tokens_input(prompts))
    again = policy()(padded.select(("tokens", "prompt"), ("tokens", "padded"), ("masks", "all_attention_mask")))
    assert [row.prompt_ids for row in assert_rows(again, smol_dir, SEGMENTS)] == prompts


def test_without_hidden_states_the_key_is_absent(smol: SGLangServer, tokenizer: PreTrainedTokenizerBase) -> None:
    plain = SGLangHiddenWrapper(
        smol,
        tokenizer=tokenizer,
        input_mode="text",
        hidden=None,
        generate_kwargs={"max_new_tokens": 4, "temperature": 0},
    )
    out = plain(text_input(["2+2="]))
    assert "hidden_states" not in set(out.keys())
    assert ("hidden_states", "response") not in plain.out_keys
    assert len(out.get(("tokens", "response"), as_list=True)[0]) == 4


def test_one_row_stands_for_itself_in_a_batch(policy: Policy, smol_dir: str) -> None:
    """A row's numbers do not depend on its neighbours."""
    prompts = [prompt_of(12, seed=20 + row) for row in range(4)]
    together = rows_of(policy(max_new_tokens=4)(tokens_input(prompts)), SEGMENTS)
    for prompt, row in zip(prompts, together, strict=True):
        (alone,) = rows_of(policy(max_new_tokens=4)(tokens_input([prompt])), SEGMENTS)
        assert alone.response_ids == row.response_ids
        assert_row(alone, smol_dir)


@pytest.mark.parametrize("scored", [False, True])
@pytest.mark.parametrize("mode", ["history", "text", "tokens"])
def test_ragged_rows_answer_as_if_sent_alone(
    policy: Policy, tokenizer: PreTrainedTokenizerBase, mode: str, scored: bool
) -> None:
    questions = [QUESTIONS[0], "Why?", QUESTIONS[2] * 3]
    rows = {
        "history": [[{"role": "user", "content": question}] for question in questions],
        "text": questions,
        "tokens": [tokenizer(question)["input_ids"] for question in questions],
    }[mode]
    asked = policy(mode).get_new_version(generate=not scored)
    together = asked(ragged(**{mode: rows}, full=scored))
    alone = [asked(ragged(**{mode: [row]}, full=scored))[0] for row in rows]
    assert len({len(row["tokens"].full) for row in alone}) == 3, "of three lengths"
    for one, row in zip(alone, together.unbind(0), strict=True):
        assert row["tokens"].full.tolist() == one["tokens"].full.tolist()
        assert row["text"].full == one["text"].full
        torch.testing.assert_close(
            row["log_probs"].full, one["log_probs"].full, atol=LOG_PROB_ATOL, rtol=0, equal_nan=True
        )
        assert relative_error(row["hidden_states"].full, one["hidden_states"].full) < STATE_RTOL
        assert row["hidden_states"].full_count == one["hidden_states"].full_count
