"""`prefer_tokens`: which ids history mode sends when there are some at ``tokens.prompt`` already.

1. Ids that decode to the chat are sent, exactly, however the tokenizer would have cut the text.
2. Ids that decode to the chat's beginning are kept, and the rest of the chat's text is tokenized after them.
3. Without torchrl's IncrementalTokenizer these are the ids that the last turn left at ``tokens.full``.
4. Any other ids, of another chat, are not used: the chat is tokenized.
5. Padding is taken off first. What is sent is what ``tokens.prompt`` says afterwards.
"""

from __future__ import annotations

import pickle
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from helpers.fake_engine import EOS_ID, PAD_ID, RecordingEngine, log_prob_of
from helpers.small_tokenizers import ID_OF, TEMPLATE, VOCABULARY, letter_by_letter, letters_tokenizer
from helpers.torchrl_pipelines import UserAsksOn
from hypothesis import given
from hypothesis import strategies as st
from tensordict import TensorDict, TensorDictBase, lazy_stack
from tokenizers import Tokenizer, decoders, normalizers
from torchrl.data.llm import History
from torchrl.envs import EnvBase
from torchrl.envs.llm import ChatEnv
from torchrl.envs.llm.transforms import IncrementalTokenizer
from torchrl.modules.llm.policies import ChatHistory, Tokens
from transformers import PreTrainedTokenizerFast

from torchrl_sglang_hidden import SGLangHiddenWrapper
from torchrl_sglang_hidden.errors import InputError, InputTypeError
from torchrl_sglang_hidden.policy.reading import make_reader

TOKENIZER = letters_tokenizer()
# What is sampled: "ab" and "cd" cut otherwise than the tokenizer would.
RESPONSE = [ID_OF["a"], ID_OF["b"], ID_OF["c"], ID_OF["d"], EOS_ID]
CHATS = ["abc", "us", "hello abcd?"]


def make(**options: Any) -> tuple[SGLangHiddenWrapper, RecordingEngine]:
    respond = options.pop("respond", lambda prompt_ids: RESPONSE)
    engine = RecordingEngine(tokenizer=TOKENIZER, respond=respond, context_length=512, max_prompt_tokens=500)
    return SGLangHiddenWrapper(engine, **{"tokenizer": TOKENIZER, "prefer_tokens": True, **options}), engine


def rendered(chat: Sequence[dict[str, str]]) -> str:
    return TOKENIZER.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)


def asked(question: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": question}]


def own_ids(chat: Sequence[dict[str, str]]) -> list[int]:
    return TOKENIZER(rendered(chat))["input_ids"]


def row(chat: Sequence[dict[str, str]], ids: Any = None, key: Any = "tokens", **of_tokens: Any) -> TensorDictBase:
    td = TensorDict(history=ChatHistory(prompt=History.from_chats([list(chat)])[0], batch_size=()), batch_size=())
    if ids is not None:
        td.set(key, Tokens(prompt=torch.tensor(ids), batch_size=(), **of_tokens))
    return td


def sent(engine: RecordingEngine) -> list[list[int]]:
    return [list(request.prompt_ids) for request in engine.requests]


def recorded(out: TensorDictBase, name: str = "prompt") -> list[list[int]]:
    return [ids.tolist() for ids in out.get(("tokens", name), as_list=True)]


def test_letters_are_another_way_to_cut_the_same_text() -> None:
    for question in CHATS:
        text = rendered(asked(question))
        assert letter_by_letter(text) != own_ids(asked(question))
        assert TOKENIZER.decode(letter_by_letter(text)) == TOKENIZER.decode(own_ids(asked(question))) == text


# --- which ids --------------------------------------------------------------------------------------------------------


def test_the_ids_at_hand_are_sent_in_a_ragged_batch() -> None:
    policy, engine = make()
    at_hand = [letter_by_letter(rendered(asked(question))) for question in CHATS]
    assert len({len(ids) for ids in at_hand}) == len(CHATS)
    out = policy(lazy_stack([row(asked(q), ids) for q, ids in zip(CHATS, at_hand, strict=True)]))
    assert sent(engine) == recorded(out) == at_hand
    assert [r["text"].prompt for r in out.unbind(0)] == [rendered(asked(question)) for question in CHATS]
    for ids in recorded(out, "full"):
        assert ids[-len(RESPONSE) :] == RESPONSE


@pytest.mark.parametrize("shape", [(), (1,), (2, 2)])
def test_every_shape(shape: tuple[int, ...]) -> None:
    policy, engine = make()
    rows = [row(asked(q), letter_by_letter(rendered(asked(q)))) for q in [*CHATS, "he"][: torch.Size(shape).numel()]]
    batch = lazy_stack([lazy_stack(rows[:2]), lazy_stack(rows[2:])]) if len(shape) == 2 else lazy_stack(rows)
    policy(batch if shape else rows[0])
    assert sent(engine) == [r["tokens"].prompt.tolist() for r in rows]


def test_each_row_for_itself() -> None:
    policy, engine = make()
    text = rendered(asked("abc"))
    policy(lazy_stack([row(asked("abc"), letter_by_letter(text)), row(asked("us")), row(asked("he"), [ID_OF["a"]])]))
    assert sent(engine) == [letter_by_letter(text), own_ids(asked("us")), own_ids(asked("he"))]


@pytest.mark.parametrize(
    "ids",
    [
        letter_by_letter(rendered(asked("abcd"))),
        letter_by_letter(rendered(asked("abc")) + "ab"),
        letter_by_letter(rendered(asked("abc")).replace("\n", " ")),
        own_ids(asked("us")),
        [],
        [PAD_ID],
        [len(VOCABULARY)],
        [-1],
        [*letter_by_letter(rendered(asked("abc")))[:3], 4000],
    ],
)
def test_ids_of_another_chat_are_not_used(ids: list[int]) -> None:
    policy, engine = make()
    empty = torch.tensor(ids, dtype=torch.int64)
    out = policy(lazy_stack([row(asked("abc")).set("tokens", Tokens(prompt=empty, batch_size=()))]))
    assert sent(engine) == recorded(out) == [own_ids(asked("abc"))]


def test_without_the_option_ids_at_hand_are_not_used() -> None:
    policy, engine = make(prefer_tokens=False)
    policy(lazy_stack([row(asked("abc"), letter_by_letter(rendered(asked("abc"))))]))
    assert sent(engine) == [own_ids(asked("abc"))]


def test_the_beginning_of_a_chat_is_kept_as_it_was_sampled() -> None:
    policy, engine = make()
    chat = [*asked("abc"), {"role": "assistant", "content": "abcd"}]
    began = own_ids(asked("abc")) + RESPONSE
    for later, rest in (([], "\n<|start|>assistant\n"), (asked("us"), None)):
        whole = chat + later
        rest = rest or rendered(whole)[len(TOKENIZER.decode(began)) :]
        policy(lazy_stack([row(whole, began)]))
        found = sent(engine)[-1]
        assert found == began + TOKENIZER(rest)["input_ids"]
        assert found != own_ids(whole)
        assert TOKENIZER.decode(found) == rendered(whole)


def test_a_beginning_that_cannot_go_on_is_not_kept() -> None:
    # This tokenizer writes a word mark before every text, so that a rest of a word gets one too.
    tokenizer = letters_tokenizer()
    add_mark = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
    add_mark.normalizer = normalizers.Prepend(" ")
    add_mark.decoder = decoders.Sequence([decoders.Fuse(), decoders.Strip(" ", 1, 0)])
    marked = PreTrainedTokenizerFast(
        tokenizer_object=add_mark, chat_template=TEMPLATE, eos_token="<|end|>", pad_token="<|end|>"
    )
    policy, engine = make(tokenizer=marked)
    whole = marked(rendered(asked("abc")), add_special_tokens=False)["input_ids"]
    policy(lazy_stack([row(asked("abc"), whole[:4])]))
    assert sent(engine) == [whole]


# --- padding ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("left", "right"), [(0, 0), (3, 0), (0, 2), (2, 4)])
@pytest.mark.parametrize("padded", [True, None])
def test_padding_is_not_sent(left: int, right: int, padded: bool | None) -> None:
    policy, engine = make()
    ids = letter_by_letter(rendered(asked("abc")))
    policy(lazy_stack([row(asked("abc"), [PAD_ID] * left + ids + [PAD_ID] * right, padded=padded)]))
    assert sent(engine) == [ids]


@pytest.mark.parametrize(("left", "right"), [(0, 0), (3, 0), (0, 2), (2, 4)])
def test_padding_around_a_turn_that_ended_with_the_pad_id(left: int, right: int) -> None:
    policy, engine = make()
    began = own_ids(asked("abc")) + RESPONSE
    assert began[-1] == PAD_ID
    chat = [*asked("abc"), {"role": "assistant", "content": "abcd"}]
    policy(lazy_stack([row(chat, [PAD_ID] * left + began + [PAD_ID] * right)]))
    assert sent(engine) == [began + TOKENIZER("\n<|start|>assistant\n")["input_ids"]]


def test_a_chat_that_begins_with_the_pad_id() -> None:
    policy, engine = make(tokenizer=letters_tokenizer(pad_token="<|start|>"))
    ids = letter_by_letter(rendered(asked("abc")))
    assert ids[0] == policy.padding_value
    policy(lazy_stack([row(asked("abc"), ids)]))
    assert sent(engine) == [ids]


# --- environments -----------------------------------------------------------------------------------------------------


def turns_of(env: EnvBase, policy: SGLangHiddenWrapper, questions: list[str], turns: int) -> list[TensorDictBase]:
    """Return the policy's output of each turn, with ``tokens.prompt`` of its input at ``given``."""
    td = env.reset(TensorDict(query=questions, batch_size=len(questions)))
    outputs = []
    for _ in range(turns):
        given = [r.get(("tokens", "prompt"), None) for r in td.unbind(0)]
        td = policy(td)
        outputs.append(([None if ids is None else ids.tolist() for ids in given], td.clone()))
        td = env.step_mdp(env.step(td))
    return outputs


def chat_of(td: TensorDictBase) -> list[dict[str, str]]:
    chat = td["history"].prompt
    return [{"role": role, "content": content} for role, content in zip(chat.role, chat.content, strict=True)]


@pytest.mark.parametrize("padded", [True, False])
def test_a_plain_environment_keeps_what_was_sampled(padded: bool) -> None:
    policy, engine = make(pad_output=padded)
    env = ChatEnv(batch_size=(2,), tokenizer=TOKENIZER).append_transform(UserAsksOn(["us", "he?"]))
    outputs = turns_of(env, policy, ["abc", "hello abcd?"], 3)
    assert outputs[1][0] != [None, None], "the last turn's tokens are carried over: the case is there"
    for turn, (_, out) in enumerate(outputs):
        chats = [chat_of(r) for r in out.unbind(0)]
        assert [len(chat) for chat in chats] == [1 + 2 * turn] * 2
        ids = sent(engine)[2 * turn : 2 * turn + 2]
        assert [TOKENIZER.decode(found) for found in ids] == [rendered(chat) for chat in chats]
        before = sent(engine)[2 * turn - 2 : 2 * turn] if turn else [[], []]
        for found, last, chat in zip(ids, before, chats, strict=True):
            if turn:
                assert found[: len(last) + len(RESPONSE)] == last + RESPONSE
            assert (found != own_ids(chat)) == bool(turn)


@pytest.mark.parametrize("questions", [["abc"], ["abc", "hello abcd?"]])
@pytest.mark.parametrize("user", [False, True])
def test_an_incremental_tokenizers_ids_are_sent_and_recorded(questions: list[str], user: bool) -> None:
    # torchrl's transform cannot step a ragged batch (tokenizer.py:516 reads it as one tensor), whatever the policy.
    policy, engine = make(pad_output=len(questions) > 1)
    env = ChatEnv(batch_size=(len(questions),), tokenizer=TOKENIZER)
    if user:
        env = env.append_transform(UserAsksOn(["us", "he?"]))
    env = env.append_transform(IncrementalTokenizer(TOKENIZER, chat_template=TEMPLATE))
    outputs = turns_of(env, policy, questions, 3)
    for turn, (given_ids, out) in enumerate(outputs):
        for place, r in enumerate(out.unbind(0)):
            ids = sent(engine)[turn * len(questions) + place]
            assert TOKENIZER.decode(ids) == rendered(chat_of(r))
            # The ids of the environment, without padding, whose last EOS may be padding too.
            kept = given_ids[place][next(i for i, token in enumerate(given_ids[place]) if token != PAD_ID) :]
            while kept[-1] == PAD_ID:
                kept.pop()
            assert ids[: len(kept)] == kept
            assert r["tokens"].prompt[r["masks"].all_attention_mask[: r["tokens"].prompt.shape[-1]]].tolist() == ids
            if turn:
                assert RESPONSE[0] in ids, "the response, as it was sampled"
                assert ids != own_ids(chat_of(r))


def test_sampled_log_probs_stay_with_the_sampled_ids() -> None:
    policy, _ = make()
    out = policy(lazy_stack([row(asked("abc"), letter_by_letter(rendered(asked("abc"))))]))
    assert out["log_probs"].response[0].tolist() == [log_prob_of(token_id) for token_id in RESPONSE]


# --- any ids ----------------------------------------------------------------------------------------------------------

CONTENT = st.text(alphabet="abcdelorstu ?", min_size=1, max_size=12)


@given(data=st.data(), questions=st.lists(CONTENT, min_size=1, max_size=3))
def test_whatever_is_at_hand_the_chat_is_sent(data: st.DataObject, questions: list[str]) -> None:
    chats = [asked(question) for question in questions]
    rows, at_hand = [], []
    for chat in chats:
        text = rendered(chat)
        full = data.draw(st.sampled_from([letter_by_letter(text), own_ids(chat)]))
        cut = data.draw(st.integers(0, len(full)))
        extra = data.draw(st.lists(st.integers(0, len(VOCABULARY) - 1), max_size=2))
        at_hand.append(full[:cut] + extra)
        rows.append(row(chat).set("tokens", Tokens(prompt=torch.tensor(at_hand[-1], dtype=torch.int64), batch_size=())))
    policy, engine = make()
    policy(lazy_stack(rows))
    for chat, ids, found in zip(chats, at_hand, sent(engine), strict=True):
        assert TOKENIZER.decode(found) == rendered(chat)
        if ids and ids[0] != PAD_ID and ids[-1] != PAD_ID:
            begins = rendered(chat).startswith(TOKENIZER.decode(ids))
            assert (found[: len(ids)] if begins else found) == (ids if begins else own_ids(chat))


# --- the option -------------------------------------------------------------------------------------------------------


def test_another_tokens_key() -> None:
    policy, engine = make(tokens_key=("llm", "ids"))
    ids = letter_by_letter(rendered(asked("abc")))
    out = policy(lazy_stack([row(asked("abc"), ids, key=("llm", "ids"))]))
    assert sent(engine) == [ids]
    assert out["llm", "ids"].prompt[0].tolist() == ids


def test_the_option_is_kept() -> None:
    policy, _ = make()
    assert policy.prefer_tokens is policy.config.prefer_tokens is policy.get_new_version().prefer_tokens is True
    assert policy.get_new_version(prefer_tokens=False).config.prefer_tokens is False
    assert SGLangHiddenWrapper(RecordingEngine(), tokenizer=TOKENIZER).prefer_tokens is False
    reader = pickle.loads(pickle.dumps(make_reader(policy.config)))
    assert (reader.prefer_tokens, reader.tokens_key) == (True, "tokens")


def test_no_tokens_to_prefer() -> None:
    with pytest.raises(InputError, match=r"prefer_tokens=True.*tokens_key, which is None"):
        make(tokens_key=None)


@pytest.mark.parametrize(
    ("tokens", "message"),
    [
        (TensorDict(prompt=torch.ones(3)), r"\('tokens', 'prompt'\): of dtype torch.float32"),
        (TensorDict(prompt=torch.ones(1, 3, dtype=torch.int64)), r"Tensor of shape \(1, 3\)"),
        (torch.ones(3), r"\('tokens', 'prompt'\) cannot be read(.|\n)*expected a Tokens there, for prefer_tokens"),
    ],
)
def test_what_is_no_ids(tokens: Any, message: str) -> None:
    policy, engine = make()
    batch = lazy_stack([row(asked("abc")).set("tokens", tokens)])
    with pytest.raises(InputTypeError, match=message):
        policy(batch)
    assert engine.requests == []
