"""The tokenizers of the zoo are what they say: no other test would notice if one lost what it is there for."""

from __future__ import annotations

import pytest
from helpers.tokenizers_zoo import CHATML, ZOO, zoo_tokenizer

TEXTS = ["yes", "hello world", "q: yes", "é 😀 日本\n\n  x  ", "<think> no </think>", "go north,  go\tsouth"]
FRAMED = "<|im_start|>user\nhi<|im_end|>\n"


@pytest.mark.parametrize("name", ZOO)
def test_a_kind_is_what_it_says(name: str) -> None:
    kind, tokenizer = ZOO[name], zoo_tokenizer(name)
    plain = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in TEXTS]
    before = [] if kind.adds_before is None else tokenizer.convert_tokens_to_ids([kind.adds_before])
    after = [] if kind.adds_after is None else tokenizer.convert_tokens_to_ids([kind.adds_after])
    for text, ids in zip(TEXTS, plain, strict=True):
        assert tokenizer(text)["input_ids"] == [*before, *ids, *after]
    blank = tokenizer("hello", add_special_tokens=False)["input_ids"]
    assert tokenizer.convert_ids_to_tokens(blank)[0].startswith("▁") == kind.prefix_blank
    whole = [*TEXTS, FRAMED]
    assert (whole == [tokenizer.decode(tokenizer(text, add_special_tokens=False)["input_ids"]) for text in whole]) == (
        kind.lossless
    )


def test_the_kinds_differ_where_they_should() -> None:
    special = {name: zoo_tokenizer(name) for name in ZOO}
    one = special["one_special"]
    assert one.bos_token_id == one.eos_token_id == one.pad_token_id is not None
    assert special["no_pad"].pad_token_id is None is not special["no_pad"].eos_token_id
    none = special["no_special"]
    assert none.bos_token_id is none.eos_token_id is none.pad_token_id is None
    behind = special["added_behind"]
    think = behind.convert_tokens_to_ids("<think>")
    assert think >= behind.vocab_size
    assert behind.decode([think], skip_special_tokens=True) == "<think>", "not special"
    taken = special["blanks_taken"](FRAMED, add_special_tokens=False)["input_ids"]
    assert special["blanks_taken"].decode(taken) == FRAMED.rstrip()


def test_a_tokenizer_is_new_each_time_and_the_same() -> None:
    first, second = zoo_tokenizer("byte_level_bos", chat_template=CHATML), zoo_tokenizer("byte_level_bos")
    first.add_tokens(["<new>"])
    assert len(first) == len(second) + 1
    assert second.chat_template is None
    assert first.apply_chat_template([{"role": "user", "content": "hi"}], tokenize=False) == FRAMED
