"""The policy tokenizes with a copy that nobody else changes: not a trainer's thread, not its own calls."""

from __future__ import annotations

import copy
import pickle
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import pytest
from helpers.fake_engine import RecordingEngine
from helpers.tokenizers_zoo import CHATML, ZOO, zoo_tokenizer
from transformers import ByT5Tokenizer, PreTrainedTokenizerBase

from torchrl_sglang_hidden import SGLangHiddenWrapper, ragged
from torchrl_sglang_hidden.errors import InputError, InputTypeError
from torchrl_sglang_hidden.policy.tokenizer import OwnTokenizer

TEXTS = ["hello, how are you? <|im_end|> 😀  yes ", "no", "one two three four five six seven"]
LONG = "go north, go south, " * 30


def make(tokenizer: PreTrainedTokenizerBase, mode: str = "text", **options: Any) -> Any:
    engine = RecordingEngine(vocab_size=500, context_length=9999, max_prompt_tokens=9000)
    return SGLangHiddenWrapper(engine, tokenizer=tokenizer, input_mode=mode, hidden=None, **options), engine


@contextmanager
def trainer(tokenizer: PreTrainedTokenizerBase) -> Iterator[None]:
    """Run a thread that tokenizes as trainers do, with truncation and padding, all the time."""
    stop, started = threading.Event(), threading.Event()

    def train() -> None:
        while not stop.is_set():
            tokenizer([LONG, "no"], padding=True, truncation=True, max_length=32)
            started.set()

    thread = threading.Thread(target=train)
    thread.start()
    started.wait()
    try:
        yield
    finally:
        stop.set()
        thread.join()


@pytest.mark.parametrize("name", ZOO)
def test_a_copy_tokenizes_as_the_original(name: str) -> None:
    given = zoo_tokenizer(name)
    own = OwnTokenizer(given, {})
    expected = [given(text)["input_ids"] for text in TEXTS]
    if given.pad_token is not None:
        given(TEXTS, padding="max_length", truncation=True, max_length=2)
    else:
        given(TEXTS, truncation=True, max_length=2)
    assert given.backend_tokenizer.truncation is not None, "the state that would be met"
    for copied in (own, OwnTokenizer(given, {}), pickle.loads(pickle.dumps(own)), copy.deepcopy(own)):
        assert [list(copied.encode(text).ids) for text in TEXTS] == expected
        assert copied.plain.get_vocab() == given.get_vocab()
        assert copied.plain.backend_tokenizer.truncation is copied.plain.backend_tokenizer.padding is None
    assert given.backend_tokenizer.truncation is not None, "nor is the user's state changed"


def test_a_tokenizer_of_pythons_own() -> None:
    given = ByT5Tokenizer()
    own = OwnTokenizer(given, {"padding": "max_length", "max_length": 9})
    assert own.encode("abc").ids == tuple(given("abc")["input_ids"])
    assert own.encode("abc").after == 1
    assert own.plain is not given


def test_a_trainers_thread_truncates_and_the_policy_does_not() -> None:
    tokenizer = zoo_tokenizer("byte_level", chat_template=CHATML)
    policy, engine = make(tokenizer, "history")
    expected = len(tokenizer(CHATML_OF_LONG, add_special_tokens=False)["input_ids"])
    assert expected > 100
    with trainer(tokenizer):
        for _ in range(40):
            policy(ragged(history=[[{"role": "user", "content": LONG}]]))
    assert {len(request.prompt_ids) for request in engine.requests} == {expected}


CHATML_OF_LONG = f"<|im_start|>user\n{LONG}<|im_end|>\n<|im_start|>assistant\n"


def test_a_trainers_thread_and_candidates() -> None:
    tokenizer = zoo_tokenizer("byte_level")
    policy, _ = make(tokenizer)
    candidate = " go to the kitchen, open the fridge, take the bread" * 2
    expected = len(tokenizer(candidate)["input_ids"])
    assert expected > 16
    with trainer(tokenizer):
        found = {int(policy.score(ragged(text=["q:"]), [candidate])["num_tokens"][0, 0]) for _ in range(20)}
    assert found == {expected}


def test_calls_with_other_settings_do_not_meet() -> None:
    tokenizer = zoo_tokenizer("byte_level")
    short, few = make(tokenizer, tokenizer_kwargs={"truncation": True, "max_length": 5})
    whole, many = make(tokenizer)
    expected = len(tokenizer(LONG)["input_ids"])
    threads = [
        threading.Thread(target=lambda policy=policy: [policy(ragged(text=[LONG])) for _ in range(20)])
        for policy in (short, whole, short, whole)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert {len(request.prompt_ids) for request in few.requests} == {5}
    assert {len(request.prompt_ids) for request in many.requests} == {expected}
    assert (len(few.requests), len(many.requests)) == (40, 40)


def test_calls_of_one_policy_do_not_meet() -> None:
    """Prompts are cut, as the options say, and candidates are not: both tokenize at once."""
    tokenizer = zoo_tokenizer("byte_level")
    policy, engine = make(tokenizer, tokenizer_kwargs={"truncation": True, "max_length": 5})
    candidate = " go to the kitchen, open the fridge" * 4
    expected = {5 + len(tokenizer(candidate)["input_ids"])}
    with ThreadPoolExecutor(4) as pool:
        calls = [pool.submit(policy, ragged(text=[LONG])) for _ in range(40)]
        calls += [pool.submit(policy.score, ragged(text=[LONG]), [candidate]) for _ in range(40)]
        for call in calls:
            call.result()
    assert {len(request.prompt_ids) for request in engine.requests} == {5} | expected


def test_the_users_tokenizer_is_still_the_policys() -> None:
    tokenizer = zoo_tokenizer("byte_level", chat_template=CHATML)
    policy, engine = make(tokenizer, "history")
    assert policy.tokenizer is policy.get_new_version().tokenizer is tokenizer
    assert policy.get_new_version().config == policy.config
    # What is set on it later is followed, as it is in TorchRL's wrappers.
    policy.tokenizer.chat_template = "{{ messages[0]['content'] }}"
    policy(ragged(history=[[{"role": "user", "content": "hello"}]]))
    assert list(engine.requests[-1].prompt_ids) == tokenizer("hello")["input_ids"]
    tokenizer.add_tokens(["hello"])
    policy(ragged(history=[[{"role": "user", "content": "hello"}]]))
    assert engine.requests[-1].prompt_ids == (len(tokenizer) - 1,)


def test_copies_are_cheap() -> None:
    tokenizer = zoo_tokenizer("byte_level")
    policy, _ = make(tokenizer)
    assert len(pickle.dumps(policy.config)) < len(pickle.dumps(tokenizer)) + 8000, "the vocabulary once"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(copy, "deepcopy", None)  # writes and reads the whole vocabulary
        version = policy.get_new_version()
    assert version.config.own_tokenizer.plain is not policy.config.own_tokenizer.plain


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        ({"nonsense": 1}, InputError, r"tokenizer_kwargs=\{'nonsense': 1\}.*does not take \['nonsense'\]; leave"),
        ({"truncation_side": "left"}, InputError, "does not take.*a side is an attribute of the tokenizer"),
        ({"text_pair": "a"}, InputError, "does not take"),
        ({"truncation": "x"}, InputError, "refuses them.*leave them out"),
        ({"padding": True}, InputError, "refuses them: Asking to pad.*leave them out"),
        ({"return_overflowing_tokens": True}, InputError, r"returns \[\[.*form of its output"),
        ({"is_split_into_words": True}, InputError, "refuses them"),
        ("x", InputTypeError, "tokenizer_kwargs='x': expected a dict"),
    ],
)
def test_options_that_a_tokenizer_does_not_take(options: Any, error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        make(zoo_tokenizer("no_pad"), tokenizer_kwargs=options)


def test_truncation_of_a_chat_is_refused_and_of_a_text_shows() -> None:
    tokenizer = zoo_tokenizer("byte_level_bos", chat_template=CHATML)
    cut = {"truncation": True, "max_length": 4}
    with pytest.raises(InputError, match=r"4\} with input_mode='history': truncation cuts.*whole messages"):
        make(tokenizer, "history", tokenizer_kwargs=cut)
    policy, engine = make(tokenizer, tokenizer_kwargs=cut)
    with pytest.raises(InputError, match="truncation cuts the chat's frame"):
        policy.get_new_version(input_mode="history")
    make(tokenizer, "history", tokenizer_kwargs={"truncation": False, "max_length": 4})
    out = policy(ragged(text=["one two three four five", "no"]))
    assert out["text"].prompt == ["one two three", "no"]
    for row, request in zip(out["text"].prompt, engine.requests, strict=True):
        assert tuple(tokenizer(row)["input_ids"]) == request.prompt_ids
    tokenizer.truncation_side = "left"
    out = policy.get_new_version()(ragged(text=["one two three four five"]))
    assert out["text"].prompt == [" three four five"]
