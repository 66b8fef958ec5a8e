"""Scoring (``generate=False``) on a real server, against one Hugging Face forward pass over the same ids."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from helpers import hf_oracle
from helpers.policy_checks import (
    CHUNKED_PREFILL_SIZE,
    LOG_PROB_ATOL,
    POOLINGS,
    QUESTIONS,
    STATE_RTOL,
    prompt_of,
    relative_error,
    tokens_input,
)
from helpers.reference_pooling import pool
from tensordict import TensorDict, TensorDictBase, lazy_stack
from torchrl.data.llm import History
from torchrl.modules.llm.policies import ChatHistory, Text, Tokens, TransformersWrapper
from transformers import PreTrainedTokenizerBase

from torchrl_sglang_hidden import HiddenSpec, SGLangHiddenWrapper, SGLangServer

Policy = Callable[..., SGLangHiddenWrapper]
CHATS = [
    [
        {"role": "system", "content": "You are brief."},
        {"role": "user", "content": question},
        {"role": "assistant", "content": answer},
        *more,
    ]
    for question, answer, more in [
        ("What is the capital of France?", "Paris.", []),
        (
            "Hi",
            "Hello! How are you?",
            [{"role": "user", "content": "Well."}, {"role": "assistant", "content": "Good."}],
        ),
        (" ".join(QUESTIONS), "That is a lot of questions at once.", []),
    ]
]
# In float32 and without the assistant's words in `{% generation %}`, as most models' templates are.
TEMPLATE_WITH_MASK = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n"
    "{% if message.role == 'assistant' %}{% generation %}{{ message.content }}<|im_end|>{% endgeneration %}"
    "{% else %}{{ message.content }}<|im_end|>{% endif %}\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


@pytest.fixture
def scorer(smol: SGLangServer, tokenizer: PreTrainedTokenizerBase) -> Policy:
    def make(mode: str, **options: Any) -> SGLangHiddenWrapper:
        return SGLangHiddenWrapper(smol, tokenizer=tokenizer, input_mode=mode, generate=False, **options)

    return make


@torch.inference_mode()
def assert_scored(row: TensorDictBase, ids: Sequence[int], model_dir: str, pooling: str = "mean") -> None:
    """Check one unpadded row: every id's log-prob given the ids before it, and the states of all positions."""
    model = hf_oracle.load(model_dir)
    out = model(torch.tensor([list(ids)]), output_hidden_states=True)
    expected_N = out.logits[0, :-1].log_softmax(-1).gather(-1, torch.tensor(ids)[1:, None])[:, 0]
    log_probs_N = row["log_probs"].full
    assert row["tokens"].full.tolist() == list(ids)
    assert log_probs_N.dtype == torch.float32
    assert log_probs_N[0] == 0
    torch.testing.assert_close(log_probs_N[1:], expected_N, atol=LOG_PROB_ATOL, rtol=0)
    states_ND = out.hidden_states[-1][0]
    vector = pool(states_ND.double(), pooling).float()
    assert row["hidden_states"].full_count == len(ids)
    assert relative_error(row["hidden_states"].full, vector) < STATE_RTOL


def chats_input(chats: Sequence[list[dict[str, str]]] = CHATS) -> TensorDictBase:
    rows = [ChatHistory(full=History.from_chats([chat])[0], batch_size=()) for chat in chats]
    return lazy_stack([TensorDict(history=row, batch_size=()) for row in rows])


@pytest.mark.parametrize("pooling", POOLINGS)
def test_ragged_ids_of_any_length_are_scored_as_hugging_face_scores_them(
    scorer: Policy, smol_dir: str, pooling: str
) -> None:
    sequences = [prompt_of(n, seed=n) for n in (1, 2, 17, CHUNKED_PREFILL_SIZE, 3 * CHUNKED_PREFILL_SIZE + 5)]
    batch = lazy_stack([TensorDict(tokens=Tokens(full=torch.tensor(ids)), batch_size=()) for ids in sequences])
    policy = scorer("tokens", hidden=HiddenSpec(pooling=pooling))
    # Twice: the second finds every prefix in the engine's cache.
    for _ in range(2):
        out = policy(batch.copy())
        for row, ids in zip(out.unbind(0), sequences, strict=True):
            assert_scored(row, ids, smol_dir, pooling)
            assert row["masks"].all_attention_mask.all()
            assert "finish_reason" not in row


def test_text_is_scored(scorer: Policy, tokenizer: PreTrainedTokenizerBase, smol_dir: str) -> None:
    texts = QUESTIONS[:3]
    out = scorer("text")(TensorDict(text=Text(full=texts, batch_size=3), batch_size=3))
    for row, text in zip(out.unbind(0), texts, strict=True):
        assert_scored(row, tokenizer(text)["input_ids"], smol_dir)
        assert row["text"].full == text


def test_chats_are_scored_with_the_assistants_words_marked(
    scorer: Policy, tokenizer: PreTrainedTokenizerBase, smol_dir: str
) -> None:
    out = scorer("history")(chats_input())
    for row, chat in zip(out.unbind(0), CHATS, strict=True):
        ids = tokenizer.apply_chat_template(chat, return_dict=False)
        assert_scored(row, ids, smol_dir)
        spoken = tokenizer.decode(row["tokens"].full[row["masks"].all_assistant_mask])
        assert spoken == "".join(message["content"] for message in chat if message["role"] == "assistant")
        assert row["history"].full.content == [message["content"] for message in chat]


def test_the_users_template_marks_what_its_generation_block_says(
    scorer: Policy, tokenizer: PreTrainedTokenizerBase
) -> None:
    out = scorer("history", chat_template=TEMPLATE_WITH_MASK)(chats_input())
    for row, chat in zip(out.unbind(0), CHATS, strict=True):
        spoken = tokenizer.decode(row["tokens"].full[row["masks"].all_assistant_mask])
        assert spoken == "".join(f"{m['content']}<|im_end|>" for m in chat if m["role"] == "assistant")


@pytest.mark.parametrize("pad_output", [False, True])
@pytest.mark.parametrize("mode", ["history", "text", "tokens"])
def test_scores_equal_those_of_torchrls_transformers_wrapper(
    scorer: Policy, tokenizer: PreTrainedTokenizerBase, smol_dir: str, mode: str, pad_output: bool
) -> None:
    reference = TransformersWrapper(
        hf_oracle.load(smol_dir),
        tokenizer=tokenizer,
        input_mode=mode,
        generate=False,
        pad_output=pad_output,
        **({"chat_template": TEMPLATE_WITH_MASK} if mode == "history" else {}),
    )
    ours = scorer(mode, pad_output=pad_output, **({"chat_template": TEMPLATE_WITH_MASK} if mode == "history" else {}))
    if mode == "history":
        batch = chats_input()
    elif mode == "text":
        batch = TensorDict(text=Text(full=QUESTIONS[:3], batch_size=3), batch_size=3)
    else:
        ids = [tokenizer(question)["input_ids"] for question in QUESTIONS[:3]]
        batch = lazy_stack([TensorDict(tokens=Tokens(full=torch.tensor(row)), batch_size=()) for row in ids])
    found, expected = ours(batch.copy()), reference(batch.copy())
    for key in (("tokens", "full"), ("masks", "all_attention_mask"), ("log_probs", "full")):
        ours_rows, their_rows = found.get(key, as_list=True), expected.get(key, as_list=True)
        for row in range(3):
            mask = found.get(("masks", "all_attention_mask"), as_list=True)[row]
            assert ours_rows[row].shape == their_rows[row].shape
            torch.testing.assert_close(ours_rows[row][mask], their_rows[row][mask], atol=LOG_PROB_ATOL, rtol=0)
    if mode == "history":
        masks = [td.get(("masks", "all_assistant_mask"), as_list=True) for td in (found, expected)]
        assert all(torch.equal(a, b) for a, b in zip(*masks, strict=True))


@pytest.mark.parametrize("pad_output", [False, True])
def test_a_response_scores_as_it_was_sampled(policy: Policy, pad_output: bool) -> None:
    generator = policy("tokens", pad_output=pad_output, temperature=1.0, max_new_tokens=12)
    out = generator(tokens_input([prompt_of(n, seed=n) for n in (5, 40, 90)]))
    scored = generator.get_new_version(generate=False, inplace=False)(out)
    for row, score in zip(out.unbind(0), scored.unbind(0), strict=True):
        # The same places, also under padding: on the left of the prompt and on the right of the response.
        assert torch.equal(row["tokens"].full, score["tokens"].full)
        assert torch.equal(row["masks"].all_attention_mask, score["masks"].all_attention_mask)
        assert torch.equal(row["masks"].all_assistant_mask, score["masks"].all_assistant_mask)
        response = row["masks"].all_assistant_mask
        torch.testing.assert_close(
            row["log_probs"].full[response], score["log_probs"].full[response], atol=LOG_PROB_ATOL, rtol=0
        )
        assert torch.equal(score["log_probs"].full.isnan(), ~score["masks"].all_attention_mask)


def test_any_batch_shape_and_states_alone(scorer: Policy, smol_dir: str) -> None:
    sequences = [prompt_of(n, seed=n) for n in (3, 9, 4, 30)]
    rows = [TensorDict(tokens=Tokens(full=torch.tensor(ids)), batch_size=()) for ids in sequences]
    policy = scorer("tokens", return_log_probs=False, hidden=True)
    grid = policy(lazy_stack([lazy_stack(rows[:2]), lazy_stack(rows[2:])]))
    assert grid.batch_size == (2, 2)
    assert "log_probs" not in grid[0, 0]
    alone = policy(rows[3].copy())
    assert alone.batch_size == ()
    assert relative_error(alone["hidden_states"].full, grid[1, 1]["hidden_states"].full) < STATE_RTOL
