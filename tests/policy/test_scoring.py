"""Scoring over the fake engine: what is read as the sequence, what is sent, and where the scores are written."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from helpers.fake_engine import (
    EOS_ID,
    HIDDEN_SIZE,
    PAD_ID,
    RecordingEngine,
    bos_tokenizer,
    log_prob_of,
    states_ND,
    tiny_tokenizer,
)
from hypothesis import given
from hypothesis import strategies as st
from tensordict import TensorDict, TensorDictBase, lazy_stack
from torchrl.data.llm import History
from torchrl.modules.llm.policies import ChatHistory, Masks, Text, Tokens

from torchrl_sglang_hidden import HiddenSpec, SGLangHiddenWrapper
from torchrl_sglang_hidden.errors import InputError, InputTypeError, MissingKeyError
from torchrl_sglang_hidden.sglang_api.payload import to_payload

TOKENIZER = tiny_tokenizer()
SEQUENCES = [[6, 7, 8, 9], [10], [11, 12, EOS_ID]]


def make(mode: str = "tokens", **options: Any) -> tuple[SGLangHiddenWrapper, RecordingEngine]:
    engine = RecordingEngine(tokenizer=TOKENIZER)
    return SGLangHiddenWrapper(engine, tokenizer=TOKENIZER, input_mode=mode, generate=False, **options), engine


def ragged(sequences: list[list[int]], shape: tuple[int, ...] | None = None) -> TensorDictBase:
    rows: list[TensorDictBase] = [TensorDict(tokens=Tokens(full=torch.tensor(ids)), batch_size=()) for ids in sequences]
    for size in reversed((len(rows),) if shape is None else shape):
        rows = [lazy_stack(rows[start : start + size]) for start in range(0, len(rows), size)]
    return rows[0]


def padded(rows: list[list[int]], masks: list[list[int]] | None = None) -> TensorDict:
    tokens = Tokens(full=torch.tensor(rows), padded=True, batch_size=len(rows))
    td = TensorDict(tokens=tokens, batch_size=len(rows))
    if masks is not None:
        td["masks"] = Masks(all_attention_mask=torch.tensor(masks).bool(), padded=True, batch_size=len(rows))
    return td


def scores(ids: list[int]) -> list[float]:
    return [0.0, *(log_prob_of(i) for i in ids[1:])]


def flat(td: TensorDictBase) -> list[TensorDictBase]:
    return [row for part in td.unbind(0) for row in flat(part)] if td.ndim else [td]


def test_one_prefill_is_asked_for_and_nothing_of_a_generation() -> None:
    policy, engine = make(
        generate_kwargs={"temperature": 0.7, "max_new_tokens": 9, "stop": ["w1"]},
        hidden=HiddenSpec(("prompt", "response")),
    )
    policy(ragged(SEQUENCES))
    payload = to_payload(engine.requests, engine.info, binary=False)
    assert payload["input_ids"] == SEQUENCES
    assert payload["logprob_start_len"] == [0, 0, 0]
    assert payload["return_logprob"] == [True, True, True]
    for request in engine.requests:
        assert request.sampling == {"max_new_tokens": 1, "temperature": 0.0}
        assert request.hidden == HiddenSpec(("prompt",))


@given(
    sequences=st.lists(st.lists(st.integers(6, 95), min_size=1, max_size=6), min_size=1, max_size=4),
    pad_output=st.booleans(),
    grid=st.booleans(),
)
def test_every_token_has_its_score_in_its_place(sequences: list[list[int]], pad_output: bool, grid: bool) -> None:
    policy, _ = make(pad_output=pad_output)
    shape = (1, len(sequences)) if grid else (len(sequences),)
    out = policy(ragged(sequences, shape))
    assert out.batch_size == shape
    width = max(map(len, sequences))
    for row, ids in zip(flat(out), sequences, strict=True):
        left = width - len(ids) if pad_output else 0
        assert row["tokens"].full.tolist() == [PAD_ID] * left + ids
        assert row["masks"].all_attention_mask.tolist() == [False] * left + [True] * len(ids)
        found = row["log_probs"].full
        assert found[:left].isnan().all()
        assert found[left:].tolist() == scores(ids)
        assert [row[key].padded for key in ("tokens", "masks", "log_probs")] == [pad_output] * 3
        assert (row["log_probs"].response, row["log_probs"].prompt, row["tokens"].prompt) == (None, None, None)
        hidden = row["hidden_states"]
        torch.testing.assert_close(hidden.full, states_ND(ids, [0]).double().mean(0).float())
        assert hidden.full_count == len(ids)
        assert (hidden.prompt, hidden.response) == (None, None)


def test_ids_given_padded_on_both_sides_keep_their_places() -> None:
    rows = [[PAD_ID, 6, 7, EOS_ID, PAD_ID], [8, 9, 10, 11, 12], [PAD_ID, PAD_ID, 13, EOS_ID, PAD_ID]]
    masks = [[0, 1, 1, 1, 0], [1, 1, 1, 1, 1], [0, 0, 1, 1, 0]]
    real = [[6, 7, EOS_ID], [8, 9, 10, 11, 12], [13, EOS_ID]]
    for pad_output in (True, False):
        policy, engine = make(pad_output=pad_output)
        out = policy(padded(rows, masks))
        assert [list(request.prompt_ids) for request in engine.requests] == real
        for index, row in enumerate(flat(out)):
            keep = torch.tensor(masks[index]).bool()
            assert row["tokens"].full.tolist() == (rows[index] if pad_output else real[index])
            found = row["log_probs"].full
            assert (found[keep] if pad_output else found).tolist() == scores(real[index])
            assert int(found.isnan().sum()) == (int((~keep).sum()) if pad_output else 0)


def test_a_mask_of_the_users_own_and_assistant_words_are_carried_over() -> None:
    td = padded([[PAD_ID, 6, 7, 8], [9, 10, 11, 12]])
    td["attention_mask"] = torch.tensor([[0, 1, 1, 1], [1, 1, 1, 1]])
    td["masks"] = Masks(all_assistant_mask=torch.tensor([[0, 0, 1, 1], [0, 1, 0, 1]]).bool(), batch_size=2)
    policy, engine = make()
    out = policy(td)
    assert [list(request.prompt_ids) for request in engine.requests] == [[6, 7, 8], [9, 10, 11, 12]]
    found = [row["masks"].all_assistant_mask.tolist() for row in flat(out)]
    assert found == [[False, True, True], [False, True, False, True]]


def test_padding_that_may_be_a_token_is_refused() -> None:
    policy, engine = make()
    with pytest.raises(InputError, match=r"row 1, .* ends with the pad id 1, which may be padding or a token"):
        policy(padded([[PAD_ID, 6, 7], [8, 9, PAD_ID]]))
    assert engine.requests == []
    # The left side cannot be mistaken.
    policy(padded([[PAD_ID, 6, 7], [8, 9, 10]]))
    assert [list(request.prompt_ids) for request in engine.requests] == [[6, 7], [8, 9, 10]]
    with pytest.raises(InputError, match=r"of shape \(3,\), and \('masks', 'all_attention_mask'\) of \(2,\)"):
        policy(padded([[PAD_ID, 6, 7], [8, 9, 10]], [[1, 1], [1, 1]]))


def test_a_chat_is_scored_whole_with_the_assistants_words_marked() -> None:
    chats = [
        [{"role": "user", "content": "w1 w2"}, {"role": "assistant", "content": "w3"}],
        [
            {"role": "user", "content": "w4"},
            {"role": "assistant", "content": "w5 w6"},
            {"role": "user", "content": "w7"},
        ],
    ]
    rows = [ChatHistory(full=History.from_chats([chat])[0], batch_size=()) for chat in chats]
    policy, engine = make("history")
    out = policy(lazy_stack([TensorDict(history=row, batch_size=()) for row in rows]))
    for row, chat, request in zip(flat(out), chats, engine.requests, strict=True):
        text = TOKENIZER.apply_chat_template(chat, tokenize=False)
        assert row["text"].full == text
        assert list(request.prompt_ids) == TOKENIZER(text)["input_ids"]
        assert row["history"].full.content == [message["content"] for message in chat]
        spoken = TOKENIZER.decode(row["tokens"].full[row["masks"].all_assistant_mask])
        assert spoken == " ".join(message["content"] for message in chat if message["role"] == "assistant")
    with pytest.raises(InputError, match=r"tokenizer_kwargs=.*assistant mask does not fit"):
        policy.get_new_version(tokenizer=bos_tokenizer(), tokenizer_kwargs={"add_special_tokens": True})(out)


def test_the_assistants_words_are_found_where_others_say_the_same() -> None:
    # "w2" is in the question, "assistant" in every header, and the first answer is the start of the second.
    chat = [
        {"role": "user", "content": "w2 w3"}, {"role": "assistant", "content": "w2"},
        {"role": "user", "content": "w2"}, {"role": "assistant", "content": "w2 assistant"},
    ]  # fmt: skip
    td = TensorDict(history=ChatHistory(full=History.from_chats([chat])[0], batch_size=()), batch_size=())
    row = make("history")[0](td)
    ids, mask = row["tokens"].full, row["masks"].all_assistant_mask
    turns = "<|start|> user w2 w3 <|end|> <|start|> assistant w2 <|end|>"
    turns += " <|start|> user w2 <|end|> <|start|> assistant w2 assistant <|end|>"
    assert TOKENIZER.decode(ids) == turns
    assert mask.nonzero().flatten().tolist() == [7, 15, 16]
    rewriting = "{% for m in messages %}{{ m.content | upper }} {% endfor %}"
    with pytest.raises(InputError, match=r"rewrites the assistant's message 1, .*\{% generation %\}"):
        make("history", chat_template=rewriting)[0](td)
    marking = "{% for m in messages %}{%- generation %}{{ m.content }} {% endgeneration -%}{% endfor %}"
    row = make("history", chat_template=marking)[0](td)
    assert row["masks"].all_assistant_mask.all(), "the template says which tokens"


def test_what_a_policy_wrote_in_place_is_scored() -> None:
    # The prompts' own mask is still there, and is not the sequences'.
    engine = RecordingEngine(tokenizer=TOKENIZER)
    policy = SGLangHiddenWrapper(engine, tokenizer=TOKENIZER, input_mode="tokens", pad_output=True)
    td = TensorDict(
        tokens=Tokens(prompt=torch.tensor([[PAD_ID, 6, 7], [8, 9, 10]]), batch_size=2),
        attention_mask=torch.tensor([[0, 1, 1], [1, 1, 1]]),
        batch_size=2,
    )
    out = policy(td)
    full, mask = out["tokens"].full.clone(), out["masks"].all_attention_mask.clone()
    scored = policy.get_new_version(generate=False)(out)
    assert torch.equal(scored["tokens"].full, full)
    assert torch.equal(scored["log_probs"].full.isnan(), ~mask)
    with pytest.raises(InputTypeError, match=r"\('masks', 'all_attention_mask'\) cannot be read"):
        make()[0](
            TensorDict(tokens=Tokens(full=torch.ones(1, 2).long(), batch_size=1), masks=torch.ones(1), batch_size=1)
        )


def test_text_is_scored_and_the_prompt_key_is_not_read() -> None:
    policy, engine = make("text")
    out = policy(TensorDict(text=Text(full=["w1 w2", "w3"], batch_size=2), batch_size=2))
    assert [list(request.prompt_ids) for request in engine.requests] == TOKENIZER(["w1 w2", "w3"])["input_ids"]
    assert out["text"].full == ["w1 w2", "w3"]
    with pytest.raises(MissingKeyError, match=r"no \('text', 'full'\).* it has \[.*'text', 'prompt'"):
        policy(TensorDict(text=Text(prompt=["w1"], batch_size=1), batch_size=1))


def test_states_without_log_probs_and_log_probs_without_states() -> None:
    policy, engine = make(return_log_probs=False, hidden=True)
    out = policy(ragged(SEQUENCES))
    others = {"text", "tokens", "masks", "weight_version"}
    assert set(out.keys()) == others | {"hidden_states"}
    assert set(policy.out_keys) == others | {("hidden_states", "full"), ("hidden_states", "full_count")}
    assert out["hidden_states"].full.shape == (3, HIDDEN_SIZE)
    assert "logprob_start_len" not in to_payload(engine.requests, engine.info, binary=False)
    policy, engine = make(hidden=False)
    out = policy(ragged(SEQUENCES))
    assert set(out.keys()) == {"text", "tokens", "masks", "log_probs", "weight_version"} == set(policy.out_keys)
    assert all(request.hidden is None for request in engine.requests)


def test_options_of_a_call_sample_nothing_and_raise() -> None:
    policy, engine = make()
    with pytest.raises(InputError, match="scores and samples nothing; leave temperature out"):
        policy(ragged(SEQUENCES), temperature=1)
    assert engine.requests == []


def test_the_engines_first_log_prob_is_never_a_number() -> None:
    _, engine = make()
    policy, engine = make()
    completions = []
    generate = engine.generate
    engine.generate = lambda requests: completions.extend(generate(requests)) or completions  # type: ignore[method-assign]
    policy(ragged(SEQUENCES))
    assert all(math.isnan(completion.prompt_log_probs_P[0]) for completion in completions)
