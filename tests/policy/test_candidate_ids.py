"""A candidate's ids are those that it has behind its prompt, with every kind of tokenizer; else it is said."""

from __future__ import annotations

import math
import warnings
from typing import Any

import pytest
import torch
from helpers.fake_engine import RecordingEngine, log_prob_of
from helpers.tokenizers_zoo import CHATML, ZOO, zoo_tokenizer
from hypothesis import given
from hypothesis import strategies as st
from tensordict import TensorDictBase

from torchrl_sglang_hidden import CandidateActor, InputError, SGLangHiddenWrapper, ragged


def make(name: str, mode: str = "text", **options: Any) -> tuple[SGLangHiddenWrapper, RecordingEngine]:
    tokenizer = zoo_tokenizer(name, **options)
    engine = RecordingEngine(tokenizer=tokenizer, vocab_size=500, context_length=9999, max_prompt_tokens=9000)
    return SGLangHiddenWrapper(engine, tokenizer=tokenizer, input_mode=mode, hidden=None), engine


def sent(policy: SGLangHiddenWrapper, engine: RecordingEngine, td: TensorDictBase, texts: list[str]) -> list[list[int]]:
    """Score candidates without a warning and return what was sent of each, its prompt first."""
    first = len(engine.requests)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        policy.score(td, texts)
    return [list(request.prompt_ids) for request in engine.requests[first + len(td) * (len(texts) > 1) :]]


# Those that write nothing behind a prompt, which would then stand between it and a candidate.
NAMES = [name for name in ZOO if not ZOO[name].adds_after and name != "word_level"]


@pytest.mark.parametrize("name", NAMES)
def test_a_candidate_is_tokenized_with_its_prompt(name: str) -> None:
    policy, engine = make(name)
    tokenizer, texts = policy.tokenizer, [" yes", "yes", " no, the answer is no."]
    expected = [tokenizer("q:" + text)["input_ids"] for text in texts]
    assert sent(policy, engine, ragged(text=["q:"]), texts) == expected
    ids = tokenizer("q:")["input_ids"]
    assert sent(policy.get_new_version(input_mode="tokens"), engine, ragged(tokens=[ids]), texts) == expected


@pytest.mark.parametrize("name", ["sentencepiece_first", "sentencepiece_prepend", "blanks_taken"])
def test_one_blank_is_written_where_one_is_meant(name: str) -> None:
    policy, engine = make(name)
    with_blank, without = sent(policy, engine, ragged(text=["q:"]), [" yes", "yes"])
    words = policy.tokenizer.convert_ids_to_tokens(with_blank)
    assert words == ["<s>", "▁q", ":", "▁yes"]
    assert policy.tokenizer.decode(without[1:]) == "q:yes"


@pytest.mark.parametrize("name", ["byte_level", "byte_level_bos", "sentencepiece_first", "added_behind"])
def test_a_candidate_behind_a_chat(name: str) -> None:
    policy, engine = make(name, "history", chat_template=CHATML)
    chat = [{"role": "user", "content": "is it? " * 40}]
    text = policy.tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
    candidates = ["yes", "no, the answer is no.<|im_end|>"]
    expected = [policy.tokenizer(text + one, add_special_tokens=False)["input_ids"] for one in candidates]
    assert min(map(len, expected)) > 64
    assert sent(policy, engine, ragged(history=[chat]), candidates) == expected


@given(
    st.lists(st.sampled_from(["go", " north", ",", " 10", "\n", " é", "yes", "  ", "</s>", "."]), max_size=90),
    st.data(),
)
def test_the_end_of_a_long_prompt_is_enough(parts: list[str], data: st.DataObject) -> None:
    name = data.draw(st.sampled_from(["byte_level", "byte_level_bos", "sentencepiece_first", "sentencepiece_never"]))
    policy, engine = POLICIES[name]
    prompt, candidate = "".join(["q", *parts, ":"]), data.draw(st.sampled_from(["yes", " yes", " no, no", "north"]))
    expected = policy.tokenizer(prompt + candidate)["input_ids"]
    assert sent(policy, engine, ragged(text=[prompt]), [candidate]) == [expected]


POLICIES = {name: make(name) for name in NAMES}


def test_sampled_ids_that_no_text_gives_are_followed() -> None:
    policy, engine = make("sentencepiece_first", "tokens")
    letters = policy.tokenizer.convert_tokens_to_ids(["<s>", "▁", "y", "e", "s", ":"])
    assert policy.tokenizer("yes:")["input_ids"] != letters
    (whole,) = sent(policy, engine, ragged(tokens=[letters]), [" no"])
    assert whole == [*letters, *policy.tokenizer.convert_tokens_to_ids(["▁no"])]


@pytest.mark.parametrize(
    ("name", "prompt", "text", "expected"),
    [
        ("byte_level", "the answer is ", "yes", "yes"),
        ("sentencepiece_first", "the answer is ", "yes", "yes"),
        ("sentencepiece_prepend", "the answer is ", "yes", "yes"),
    ],
)
def test_what_does_not_follow_is_said(name: str, prompt: str, text: str, expected: str) -> None:
    policy, engine = make(name)
    words = rf"row 1, candidate {text!r}: .*behind the prompt's own tokens.*by itself; let the prompt end before"
    with pytest.warns(UserWarning, match=words) as caught:
        policy.score(ragged(text=["q:", prompt]), [f" {text}", text])
    assert len(caught) == 1
    ids = list(engine.requests[-1].prompt_ids)
    behind = ids[len(policy.tokenizer(prompt)["input_ids"]) :]
    assert "".join(policy.tokenizer.convert_ids_to_tokens(behind)) == expected, "and no blank is added to it"


def test_several_that_do_not_follow_are_said_once() -> None:
    policy, _ = make("byte_level")
    with pytest.warns(UserWarning, match=r"row 0, candidate 'yes'.*or give ids\. So are 3 others\.") as caught:
        policy.score(ragged(text=["it is ", "is it "]), ["yes", "no"])
    assert len(caught) == 1


# --- normalisation and first tokens ----------------------------------------------------------------------------------


ACTIONS = [" go north", " go to the kitchen", " wait"]


@pytest.mark.parametrize("as_ids", [False, True])
def test_normalisation_is_twosomes(as_ids: bool) -> None:
    policy, _ = make("byte_level")
    ids = [policy.tokenizer(action)["input_ids"] for action in ACTIONS]
    candidates: Any = ids if as_ids else ACTIONS
    td = ragged(text=["q:"])
    joint = torch.tensor([sum(map(log_prob_of, row)) for row in ids])
    for normalize, by in (
        (None, [1, 1, 1]),
        ("token", [len(row) for row in ids]),
        ("word", [2, 4, 1]),
    ):
        scores = policy.score(td, candidates, normalize=normalize)
        torch.testing.assert_close(scores["logits"][0], joint / torch.tensor(by))
    torch.testing.assert_close(
        policy.score(td, candidates, normalize="token")["logits"],
        policy.score(td, candidates, reduction="mean")["logits"],
    )


def test_what_ends_a_candidate_is_no_word() -> None:
    policy, _ = make("byte_level")
    td, end = ragged(text=["q:"]), "<|im_end|>"
    scores = [policy.score(td, [f" go north{tail}"]) for tail in (end, f" {end}")]
    by_word = [policy.score(td, [f" go north{tail}"], normalize="word") for tail in (end, f" {end}")]
    for joint, normalized in zip(scores, by_word, strict=True):
        torch.testing.assert_close(normalized["logits"], joint["logits"] / 2)


def test_a_masked_candidate_is_not_normalised() -> None:
    policy, _ = make("byte_level")
    mask = torch.tensor([[True, False]])
    scores = policy.score(ragged(text=["q:"]), [" go", " "], normalize="word", mask=mask)
    assert scores["logits"][0, 1] == -math.inf


def test_an_actor_normalises() -> None:
    policy, _ = make("byte_level")
    td = ragged(text=["q:"])
    out = CandidateActor(policy, ACTIONS, normalize="word")(td.copy())
    torch.testing.assert_close(out["logits"], policy.score(td, ACTIONS, normalize="word")["logits"])


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"normalize": "words"}, r"normalize='words': expected one of \('token', 'word'\), or None"),
        (
            {"normalize": "word", "reduction": "mean"},
            "normalize='word' with reduction='mean'.*leave one of the two",
        ),
        ({"normalize": "token", "reduction": "first"}, "leave one of the two out"),
        ({"reduction": "last"}, "reduction='last': expected one of"),
        ({"normalize": "word"}, "row 0, candidate 1, ' ': 0 words.*use 'token'"),
    ],
)
def test_normalisation_that_cannot_be(options: dict[str, Any], words: str) -> None:
    policy, engine = make("byte_level")
    with pytest.raises(InputError, match=words):
        policy.score(ragged(text=["q:"]), [" go", " "], **options)
    assert engine.requests == []


def test_equal_first_tokens_are_said() -> None:
    policy, _ = make("byte_level")
    td = ragged(text=["q:"])
    words = r"row 0: the candidates 0 and 1, ' go north' and ' go to the kitchen', begin with the same token \d+, so"
    with pytest.warns(UserWarning, match=words):
        scores = policy.score(td, ACTIONS, reduction="first")
    assert scores["logits"][0, 0] == scores["logits"][0, 1]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        policy.score(td, ACTIONS, reduction="first", mask=torch.tensor([[True, False, True]]))
        policy.score(td, [" wait", " go", " go"], reduction="first")
        policy.score(td, ACTIONS)
