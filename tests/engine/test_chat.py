"""Conversations of several turns on a real server: in every turn the engine gets the ids that the chat's template and
the tokenizer write, and answers, log-probs and states are those that Hugging Face gives for these ids.

What torchrl 0.14.1's `ChatEnv` cannot do, whatever the policy, and what to do instead:

- tokens mode cannot reset a batch whose prompts differ in length, nor step one that is ragged: give each chat an
  environment of its own, and the policy all of them at once;
- in tokens mode a step forgets that its tokens are padded: name the mask of the turn before as `attention_mask_key`;
- a system prompt cannot be put before histories of different lengths: write it into the chats;
- `IncrementalTokenizer` cannot step a ragged batch: pad, or give each chat an environment of its own.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from helpers import hf_oracle
from helpers.policy_checks import QUESTIONS, SEGMENTS, STATE_RTOL, assert_row, history_input, relative_error
from helpers.torchrl_pipelines import FOLLOW_UPS, UserAsksOn, chat_of, flat, unpadded
from tensordict import NonTensorData, NonTensorStack, TensorDict, TensorDictBase, lazy_stack
from torchrl.data.llm.history import _CHAT_TEMPLATES
from torchrl.envs.llm import ChatEnv
from torchrl.envs.llm.transforms import IncrementalTokenizer
from torchrl.modules.llm.policies import ChatHistory
from transformers import PreTrainedTokenizerBase

from torchrl_sglang_hidden import SGLangHiddenWrapper

MakePolicy = Callable[..., SGLangHiddenWrapper]
Chat = list[dict[str, str]]

SYSTEM = "You answer in French."
MINE = (
    "{% for message in messages %}{{ '### ' + message.role + '\n' + message.content + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}### answer\n{% endif %}"
)


def template_ids(tokenizer: PreTrainedTokenizerBase, chat: Chat, template: str | None = None) -> list[int]:
    return tokenizer.apply_chat_template(chat, add_generation_prompt=True, chat_template=template, return_dict=False)


def assert_turn(
    out: TensorDictBase, smol_dir: str, tokenizer: PreTrainedTokenizerBase, template: str | None = None
) -> None:
    """Check a turn in history mode: its ids are the template's, and its numbers equal Hugging Face's on these ids."""
    for row in flat(out):
        checked = unpadded(row)
        chat = chat_of(row["history"].prompt)
        assert checked.prompt_ids == template_ids(tokenizer, chat, template)
        assert row["text"].prompt == tokenizer.apply_chat_template(
            chat, add_generation_prompt=True, chat_template=template, tokenize=False
        )
        answer = {"role": "assistant", "content": tokenizer.decode(checked.response_ids, skip_special_tokens=True)}
        assert chat_of(row["history"].response) == [answer]
        assert chat_of(row["history"].full) == [*chat, answer]
        assert row["text"].response == answer["content"]
        assert_row(checked, smol_dir)


def asked(questions: Sequence[str]) -> TensorDict:
    return TensorDict(query=list(questions), batch_size=len(questions))


# --- history mode -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("system", "padded"), [(None, False), (SYSTEM, True)], ids=["ragged", "system-padded"])
def test_three_turns(
    policy: MakePolicy, smol_dir: str, tokenizer: PreTrainedTokenizerBase, system: str | None, padded: bool
) -> None:
    llm = policy("history", pad_output=padded, max_new_tokens=4)
    env = ChatEnv(batch_size=(2,), system_prompt=system).append_transform(UserAsksOn(FOLLOW_UPS))
    td = env.reset(asked(QUESTIONS[:2]))
    said: list[Chat] = [[] for _ in range(2)]
    for turn in range(3):
        td = llm(td)
        assert_turn(td, smol_dir, tokenizer)
        for row, chat in zip(flat(td), said, strict=True):
            message = {"role": "user", "content": FOLLOW_UPS[turn - 1] if turn else row["query"]}
            chat += [message] if turn or system is None else [{"role": "system", "content": SYSTEM}, message]
            assert chat_of(row["history"].prompt) == chat
            chat.append({"role": "assistant", "content": row["text"].response})
        td = env.step_mdp(env.step(td))


def test_histories_of_differing_lengths(policy: MakePolicy, smol_dir: str, tokenizer: PreTrainedTokenizerBase) -> None:
    llm = policy("history", max_new_tokens=4)
    chats: list[Chat] = [
        [{"role": "user", "content": "Hi"}],
        [
            {"role": "system", "content": SYSTEM},
            {"role": "user", "content": QUESTIONS[0]},
            {"role": "assistant", "content": "Paris."},
            {"role": "user", "content": "And of Italy?"},
        ],
        [{"role": "user", "content": QUESTIONS[4]}, {"role": "assistant", "content": "No."}],
    ]
    env = ChatEnv(batch_size=(3,)).append_transform(UserAsksOn(FOLLOW_UPS))
    td = env.reset(TensorDict(query=NonTensorStack(*map(NonTensorData, chats)), batch_size=3))
    assert [chat_of(row["history"].prompt) for row in flat(td)] == chats
    for turn in range(2):
        td = llm(td)
        assert [len(chat_of(row["history"].prompt)) for row in flat(td)] == [1 + 2 * turn, 4 + 2 * turn, 2 + 2 * turn]
        assert_turn(td, smol_dir, tokenizer)
        td = env.step_mdp(env.step(td))


@pytest.mark.parametrize(
    ("option", "template"),
    [
        ({"chat_template": MINE}, MINE),
        ({"chat_template_name": "chatml_format"}, _CHAT_TEMPLATES["chatml_format"]),
        ({"chat_template_name": "qwen"}, _CHAT_TEMPLATES["qwen"]),
    ],
    ids=["given", "chatml_format", "qwen"],
)
def test_templates(
    policy: MakePolicy, smol_dir: str, tokenizer: PreTrainedTokenizerBase, option: dict[str, str], template: str | None
) -> None:
    llm = policy("history", max_new_tokens=4).get_new_version(**option)
    env = ChatEnv().append_transform(UserAsksOn(FOLLOW_UPS))
    td = env.reset(asked(QUESTIONS[1:2]))
    for _ in range(2):
        td = llm(td)
        assert_turn(td, smol_dir, tokenizer, template)
        td = env.step_mdp(env.step(td))


def test_the_templates_differ(tokenizer: PreTrainedTokenizerBase) -> None:
    chat = [{"role": "user", "content": "Hi"}]
    templates = (None, MINE, _CHAT_TEMPLATES["chatml_format"])
    assert len({tuple(template_ids(tokenizer, chat, template)) for template in templates}) == 3


def test_the_full_history_is_the_next_prompt(
    policy: MakePolicy, smol_dir: str, tokenizer: PreTrainedTokenizerBase
) -> None:
    llm = policy("history", max_new_tokens=4)
    first = llm(history_input(QUESTIONS[:2]))
    assert_turn(first, smol_dir, tokenizer)
    second = llm(TensorDict(history=ChatHistory(prompt=first["history"].full, batch_size=2), batch_size=2))
    assert_turn(second, smol_dir, tokenizer)
    for row, answer in zip(flat(second), first["text"].response, strict=True):
        chat = chat_of(row["history"].prompt)
        assert chat[-1] == {"role": "assistant", "content": answer}
        # Nothing of it is the first call's.
        assert row["tokens"].prompt.shape[0] > first["hidden_states"].prompt_count.max()


# --- tokens mode ------------------------------------------------------------------------------------------------------


def test_chats_of_differing_lengths_in_tokens_mode(
    policy: MakePolicy, smol_dir: str, tokenizer: PreTrainedTokenizerBase
) -> None:
    llm = policy("tokens", max_new_tokens=4)
    envs = [ChatEnv(input_mode="tokens", tokenizer=tokenizer, system_prompt=SYSTEM) for _ in range(2)]
    tds = [env.reset(asked([question])) for env, question in zip(envs, QUESTIONS, strict=False)]
    texts = None
    for turn in range(3):
        out = llm(lazy_stack(tds))
        rows = flat(out)
        for row, question in zip(rows, QUESTIONS, strict=False):
            checked = unpadded(row)
            if not turn:
                chat = [{"role": "system", "content": SYSTEM}, {"role": "user", "content": question}]
                assert checked.prompt_ids == template_ids(tokenizer, chat, _CHAT_TEMPLATES["chatml_format"])
            else:
                assert checked.prompt_ids == texts[question], "the turn before, prompt and response"
            assert_row(checked, smol_dir)
        texts = {question: unpadded(row).full_ids for row, question in zip(rows, QUESTIONS, strict=False)}
        assert len({len(ids) for ids in texts.values()}) > 1
        tds = [env.step_mdp(env.step(td)) for env, td in zip(envs, out.unbind(0), strict=True)]


def test_padded_turns_in_tokens_mode(policy: MakePolicy, smol_dir: str, tokenizer: PreTrainedTokenizerBase) -> None:
    llm = policy("tokens", pad_output=True, max_new_tokens=12, stop="Paris").get_new_version(
        attention_mask_key=("masks", "all_attention_mask")
    )
    env = ChatEnv(batch_size=(2,), input_mode="tokens", tokenizer=tokenizer)
    td = llm(env.reset(asked(["What is the capital of France?", "What is the weather of today?"])))
    lengths = [len(unpadded(row).response_ids) for row in flat(td)]
    assert lengths[0] != lengths[1], "one of them is padded"
    before = [unpadded(row).full_ids for row in flat(td)]
    td = llm(env.step_mdp(env.step(td)))
    for row, ids in zip(flat(td), before, strict=True):
        assert unpadded(row).prompt_ids == ids
        assert_row(unpadded(row), smol_dir)


# --- prefer_tokens ----------------------------------------------------------------------------------------------------


def in_letters(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int]) -> list[int]:
    """The same text cut into single characters, special tokens as they are."""
    special = set(tokenizer.all_special_ids)
    return [
        piece
        for token_id in ids
        for piece in (
            [token_id]
            if token_id in special
            else (i for letter in tokenizer.decode([token_id]) for i in tokenizer(letter)["input_ids"])
        )
    ]


def test_ids_at_hand_are_what_the_engine_gets(
    policy: MakePolicy, smol_dir: str, tokenizer: PreTrainedTokenizerBase
) -> None:
    llm = policy("history", max_new_tokens=4).get_new_version(prefer_tokens=True)
    batch = history_input(QUESTIONS[:2]).to_lazystack(0)
    own = [template_ids(tokenizer, chat_of(row["history"].prompt)) for row in flat(batch)]
    at_hand = [in_letters(tokenizer, ids) for ids in own]
    assert all(len(ids) > len(others) for ids, others in zip(at_hand, own, strict=True))
    for row, ids in zip(batch.unbind(0), at_hand, strict=True):
        row.set(("tokens", "prompt"), torch.tensor(ids))
    out = llm(batch)
    for row, ids in zip(flat(out), at_hand, strict=True):
        checked = unpadded(row)
        assert checked.prompt_ids == ids
        assert_row(checked, smol_dir)


@pytest.mark.parametrize("padded", [False, True], ids=["one-chat", "padded"])
def test_turns_of_an_incremental_tokenizer(
    policy: MakePolicy, smol_dir: str, tokenizer: PreTrainedTokenizerBase, padded: bool
) -> None:
    questions = QUESTIONS[:2] if padded else QUESTIONS[:1]
    option: dict[str, Any]
    if padded:
        # torchrl's own shorthand tokenizes with torchrl's template.
        env, option = (
            ChatEnv(batch_size=(2,), tokenizer=tokenizer, with_tokenizer=True),
            {"chat_template_name": "chatml_format"},
        )
    else:
        env, option = ChatEnv().append_transform(UserAsksOn(FOLLOW_UPS)), {}
        env = env.append_transform(IncrementalTokenizer(tokenizer, chat_template=tokenizer.chat_template))
    template = _CHAT_TEMPLATES["chatml_format"] if padded else None
    llm = policy("history", pad_output=padded, max_new_tokens=4)
    llm = llm.get_new_version(prefer_tokens=True, **option)
    td = env.reset(asked(questions))
    began: list[list[int]] | None = None
    for _ in range(3):
        td = llm(td)
        for place, row in enumerate(flat(td)):
            checked = unpadded(row)
            chat = chat_of(row["history"].prompt)
            assert tokenizer.decode(checked.prompt_ids) == tokenizer.apply_chat_template(
                chat, add_generation_prompt=True, chat_template=template, tokenize=False
            )
            if began is None:
                assert checked.prompt_ids == template_ids(tokenizer, chat, template)
            else:
                assert checked.prompt_ids[: len(began[place])] == began[place], "as they were sampled"
            assert_row(checked, smol_dir)
        began = [unpadded(row).full_ids for row in flat(td)]
        td = env.step_mdp(env.step(td))


def test_a_response_that_the_tokenizer_would_write_otherwise(
    policy: MakePolicy, smol_dir: str, tokenizer: PreTrainedTokenizerBase
) -> None:
    letter = tokenizer.convert_tokens_to_ids("a")
    llm = policy("history", max_new_tokens=4, logit_bias={str(letter): 100.0}).get_new_version(prefer_tokens=True)
    env = ChatEnv().append_transform(UserAsksOn(FOLLOW_UPS))
    env = env.append_transform(IncrementalTokenizer(tokenizer, chat_template=tokenizer.chat_template))
    first = llm(env.reset(asked(QUESTIONS[:1])))
    sampled = [letter] * 4
    assert unpadded(first[0]).response_ids == sampled != tokenizer("aaaa")["input_ids"]
    full = unpadded(first[0]).full_ids
    asked_on = env.step_mdp(env.step(first))
    chat = chat_of(asked_on[0]["history"].prompt)
    second = unpadded(llm(asked_on)[0])
    assert second.prompt_ids[: len(full)] == full
    assert second.prompt_ids != template_ids(tokenizer, chat)
    assert tokenizer.decode(second.prompt_ids) == tokenizer.decode(template_ids(tokenizer, chat))
    # The log-probs are those of the biased distribution; the states are the model's.
    truth = hf_oracle.teacher_force(smol_dir, second.prompt_ids, second.response_ids)
    for segment in SEGMENTS:
        assert relative_error(second.vectors[segment], truth.pooled(segment, "mean")) < STATE_RTOL


def test_a_plain_environment_sends_each_turns_own_prompt(
    policy: MakePolicy, smol_dir: str, tokenizer: PreTrainedTokenizerBase
) -> None:
    llm = policy("history", max_new_tokens=4).get_new_version(prefer_tokens=True)
    env = ChatEnv(batch_size=(2,)).append_transform(UserAsksOn(FOLLOW_UPS))
    td = env.reset(asked(QUESTIONS[:2]))
    for _ in range(2):
        td = llm(td)
        assert_turn(td, smol_dir, tokenizer)
        td = env.step_mdp(env.step(td))
    assert ("tokens", "prompt") in td.keys(True, True), "the last turn's ids are carried over"
