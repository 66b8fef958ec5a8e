"""Special tokens that the tokenizer adds to a text, and pads: each read as what it is, in text and tokens mode."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from helpers.fake_engine import RecordingEngine
from helpers.policy_batches import tokens_batch
from helpers.tokenizers_zoo import CHATML, ZOO, zoo_tokenizer
from tensordict import TensorDict, TensorDictBase
from torchrl.modules.llm.policies import Tokens

from torchrl_sglang_hidden import SGLangHiddenWrapper, ragged
from torchrl_sglang_hidden.errors import InputError

BOS_TEMPLATE = "{{ bos_token }}" + CHATML
CHAT = [{"role": "user", "content": "hello"}]


def make(name: str, mode: str, **options: Any) -> tuple[SGLangHiddenWrapper, RecordingEngine]:
    tokenizer = zoo_tokenizer(name, **options.pop("of_tokenizer", {}))
    engine = RecordingEngine(tokenizer=tokenizer, vocab_size=500, **options.pop("of_engine", {}))
    return SGLangHiddenWrapper(engine, tokenizer=tokenizer, input_mode=mode, hidden=None, **options), engine


def sent(engine: RecordingEngine) -> list[list[int]]:
    return [list(request.prompt_ids) for request in engine.requests]


# --- text ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [name for name in ZOO if ZOO[name].adds_before])
def test_a_text_that_begins_with_bos_has_it_once(name: str) -> None:
    policy, engine = make(name, "text", generate_kwargs={"max_new_tokens": 1})
    tokenizer, bos = policy.tokenizer, ZOO[name].adds_before
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of word_piece's [SEP]
        policy(ragged(text=[f"{bos}hello", "hello"]))
    begun, bare = sent(engine)
    added = tokenizer(f"{bos}hello", add_special_tokens=False)["input_ids"]
    assert begun == [*added, *bare[len(bare) - (ZOO[name].adds_after is not None) :]]
    assert begun.count(tokenizer.convert_tokens_to_ids(bos)) == 1


@pytest.mark.parametrize("generate", [True, False])
@pytest.mark.parametrize("blank", [" ", "\n"])
def test_a_blank_before_bos_is_said(blank: str, generate: bool) -> None:
    policy, engine = make("byte_level_bos", "text", generate=generate)
    with pytest.warns(UserWarning, match=r"row 1, .* begins with a blank before '<\|begin_of_text\|>'.*remove"):
        policy(ragged(text=["hello", f"{blank}<|begin_of_text|>hello"], full=not generate))
    assert sent(engine)[1].count(0) == 2


def test_a_text_that_ends_with_what_is_added_has_it_once() -> None:
    policy, engine = make("unigram", "text", generate=False)
    policy(ragged(text=["hello</s>", "hello"], full=True))
    assert sent(engine)[0] == sent(engine)[1]


def test_a_tokenizer_that_ends_every_prompt_warns() -> None:
    policy, _ = make("unigram", "text")
    with pytest.warns(UserWarning, match="writes '</s>' behind every prompt.*add_special_tokens': False"):
        policy(ragged(text=["hello"]))
    quiet = policy.get_new_version(tokenizer_kwargs={"add_special_tokens": False})
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        quiet(ragged(text=["hello"]))


def test_a_chat_with_bos_is_scored_again_by_its_text() -> None:
    policy, engine = make("byte_level_bos", "history", of_tokenizer={"chat_template": BOS_TEMPLATE})
    tokenizer = policy.tokenizer
    engine._respond = lambda ids: [*tokenizer("hi", add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]
    out = policy(ragged(history=[CHAT]))
    ids = out.get(("tokens", "full"), as_list=True)[0].tolist()
    assert ids.count(tokenizer.bos_token_id) == 1
    scorer = policy.get_new_version(generate=False, input_mode="text", inplace=False)
    # The text has no EOS, as nothing that was said has.
    words = rf"row 0, \('text', 'full'\).* {len(ids) - 1} ids.*not the {len(ids)} .*input_mode='tokens'"
    with pytest.warns(UserWarning, match=words):
        again = scorer(out)
    assert sent(engine)[-1] == ids[:-1]
    assert again["text"].full == out["text"].full
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        policy.get_new_version(generate=False, input_mode="tokens", inplace=False)(out)
        assert sent(engine)[-1] == ids
        engine._respond = lambda ids: tokenizer("hi", add_special_tokens=False)["input_ids"]
        scorer(policy(ragged(history=[CHAT])))  # cut by its length: the text is all there is


def test_a_users_own_container_beside_a_text_is_no_rollout() -> None:
    policy, engine = make("byte_level", "text", generate=False)
    td = ragged(text=["hello"], full=True)
    td["tokens"] = torch.zeros(1, 3)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        policy.get_new_version(inplace=False)(td)
    assert len(engine.requests) == 1


# --- pads ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("prompts", [[[0, 304], [0, 120, 265]], [[0, 304, 7], [120, 265, 7]], [[120, 265, 0], [7]]])
@pytest.mark.parametrize("samples", [None, 2])
def test_a_policys_own_output_is_its_input_again(prompts: list[list[int]], samples: int | None) -> None:
    """BOS, EOS and PAD are one token here, as in GPT-2; what is a pad is said by the mask of the output."""
    policy, engine = make("one_special", "tokens", pad_output=True, num_samples=samples)
    first = policy(ragged(tokens=prompts))
    rows = {tuple(ids) for ids in prompts}
    assert set(map(tuple, sent(engine))) == rows
    num = len(engine.requests)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        policy(first)
    assert set(map(tuple, sent(engine)[num:])) == rows


def test_a_padded_full_is_read_by_its_mask() -> None:
    policy, engine = make("one_special", "tokens", pad_output=True)
    out = policy(ragged(tokens=[[0, 304], [0, 120, 265]]))
    full = [
        [*request.prompt_ids, *ids[ids != 0].tolist()]
        for request, ids in zip(engine.requests, out.get(("tokens", "response"), as_list=True), strict=True)
    ]
    again = policy.get_new_version(input_key=("tokens", "full"), inplace=False)
    again(out)
    assert [ids[: len(whole)] for ids, whole in zip(sent(engine)[2:], full, strict=True)] == full


@pytest.mark.parametrize("full", [False, True])
def test_a_mask_of_other_ids_is_not_read(full: bool) -> None:
    policy, engine = make("one_special", "tokens", pad_output=True, inplace=True)
    out = policy(ragged(tokens=[[0, 304], [0, 120, 265]]))
    new = tokens_batch([0, 5, 6], [0, 0, 8], of_tokens={"padded": True})
    if full:  # of the turn before, as the mask is
        new["tokens"].full = out["tokens"].full
    td = TensorDict({"tokens": new["tokens"], "masks": out["masks"]}, batch_size=2)
    policy(td)
    assert sent(engine)[2:] == [[5, 6], [8]], "as before: pads on the left"


@pytest.mark.parametrize("inplace", [True, False])
def test_a_tensor_of_the_users_is_no_mask_of_the_turn(inplace: bool) -> None:
    policy, engine = make("byte_level", "tokens", inplace=inplace)
    out = policy(tokens_batch([5, 6], [7, 8], masks=torch.ones(2, 3, dtype=torch.bool)))
    assert sent(engine) == [[5, 6], [7, 8]]
    assert out[0]["masks"].all_attention_mask[:2].all()


IDS, MASK = [[9, 9, 0], [9, 0, 0]], [[True, True, False], [True, False, False]]


@pytest.mark.parametrize("as_int", [False, True])
@pytest.mark.parametrize("mode", ["dict", "container"])
def test_a_mask_beside_the_ids_is_read(mode: str, as_int: bool) -> None:
    policy, engine = make("byte_level", "tokens", inplace=False)
    mask = torch.tensor(MASK).int() if as_int else torch.tensor(MASK)
    beside: Any = TensorDict({"prompt": torch.tensor(IDS), "attention_mask": mask}, batch_size=2)
    key: Any = None
    if mode == "container":
        beside, key = TensorDict({"ids": torch.tensor(IDS), "attention_mask": mask}, batch_size=2), ("tokens", "ids")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        policy.get_new_version(input_key=key)(TensorDict({"tokens": beside}, batch_size=2))
    assert sent(engine) == [[9, 9], [9]]


def test_two_masks_that_differ_are_refused() -> None:
    policy, _ = make("byte_level", "tokens")
    beside = TensorDict({"prompt": torch.tensor(IDS), "attention_mask": torch.tensor(MASK)}, batch_size=2)
    other = torch.ones(2, 3, dtype=torch.bool)
    with pytest.raises(
        InputError, match=r"row 0.*'attention_mask' and \('tokens', 'attention_mask'\).*differ; leave one"
    ):
        policy(TensorDict({"tokens": beside, "attention_mask": other}, batch_size=2))
    policy.get_new_version(attention_mask_key=None)(TensorDict({"tokens": beside}, batch_size=2))


def dense(*rows: list[int]) -> TensorDictBase:
    return TensorDict({"tokens": Tokens(prompt=torch.tensor(rows), batch_size=len(rows))}, batch_size=len(rows))


@pytest.mark.parametrize(
    ("name", "rows", "words"),
    [
        ("byte_level", ([5, 6, 7], [0, 0, 8]), "row 1 begins with 2 times the id 0"),
        ("byte_level", ([5, 6, 7], [8, 0, 0]), "row 1 ends with 2 times the id 0"),
        ("byte_level", ([5, 6, 7], [8, 9, 0]), "row 1 ends with 1 times the id 0"),
        ("byte_level", ([0, 0, 8],), "row 0 begins with 2 times"),
        ("one_special", ([0, 6, 7], [0, 0, 8]), "row 1 begins with 2 times"),
        ("one_special", ([5, 6, 7], [0, 7, 8]), "row 1 begins with 1 times"),
        ("one_special", ([5, 6, 0], [7, 0, 0]), "row 1 ends with 2 times"),
        ("no_pad", ([5, 6, 7], [8, 1, 1]), "row 1 ends with 2 times the id 1"),
    ],
)
def test_ids_that_look_padded_warn(name: str, rows: Any, words: str) -> None:
    policy, engine = make(name, "tokens")
    with pytest.warns(UserWarning, match=f"{words}.*no mask says.*give a bool mask"):
        policy(dense(*rows))
    assert sent(engine) == list(rows), "and are sent as they are"


@pytest.mark.parametrize(
    ("name", "td"),
    [
        ("one_special", dense([0, 6, 7], [0, 5, 8])),
        ("one_special", dense([6, 7, 0], [5, 8, 9])),
        ("byte_level", ragged(tokens=[[0, 0, 7], [8]])),
        ("byte_level", dense([5, 0, 7], [8, 9, 4])),
        ("byte_level", tokens_batch([0, 0, 8], [5, 6, 7], attention_mask=torch.ones(2, 3, dtype=torch.bool))),
        ("byte_level", tokens_batch([0, 0, 8], [5, 6, 7], of_tokens={"padded": True})),
    ],
)
def test_ids_that_do_not_look_padded_do_not_warn(name: str, td: TensorDictBase) -> None:
    policy, _ = make(name, "tokens")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        policy(td)
