"""The options of `SGLangHiddenWrapper`: what overrides what, what raises, and that a new version loses nothing."""

from __future__ import annotations

import copy
import inspect
import pickle
from concurrent.futures import CancelledError, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.fake_engine import PAD_ID, WORDS, RecordingEngine, RecordingServer, tiny_tokenizer
from helpers.policy_batches import FULL_CONFIG, TOKENIZER, batch_of, flat, make, plain, tokens_batch
from tensordict import TensorDict, TensorDictBase
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import PreTrainedTokenizerFast

from torchrl_sglang_hidden import SGLangHiddenWrapper, SGLangServer
from torchrl_sglang_hidden.errors import (
    InputError,
    InputTypeError,
    MissingKeyError,
    PromptLengthError,
    SGLangHiddenError,
    TokenIdError,
    UnknownOptionError,
)
from torchrl_sglang_hidden.policy import requests
from torchrl_sglang_hidden.policy.config import PolicyConfig
from torchrl_sglang_hidden.sglang_api.sampling import standardize


def test_options_of_a_call_win_over_those_of_the_constructor() -> None:
    policy, engine = make(generate_kwargs={"max_tokens": 3, "temperature": 0.5, "stop": ["w1"]})
    policy(batch_of("text"), max_new_tokens=1, do_sample=False)
    policy(batch_of("text"))
    expected = [{"max_new_tokens": 1, "temperature": 0.0}, {"max_new_tokens": 3, "temperature": 0.5}]
    assert [dict(engine.requests[row].sampling) for row in (0, 3)] == [{**one, "stop": ["w1"]} for one in expected]
    assert all(len(row["tokens"].response) == 1 for row in flat(policy(batch_of("text"), max_new_tokens=1)))


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        ({"hiden": True}, TypeError, "hiden"),
        ({"input_mode": "prose"}, InputError, r"input_mode='prose': input_mode must be one of .*'history'"),
        ({"generate": 1}, InputTypeError, r"generate=1: expected True or False"),
        ({"generate": False, "return_log_probs": False, "hidden": None}, InputError, r"nothing to compute"),
        ({"pad_model_input": True}, InputError, r"pad_model_input=True: pads are never sent"),
        ({"layout": torch.sparse_coo}, InputError, r"layout=torch.sparse_coo: expected torch.strided"),
        ({"batching": False, "min_batch_size": 2}, InputError, r"batching=False with min_batch_size=2"),
        (
            {"batching": True, "min_batch_size": 3, "max_batch_size": 2},
            InputError,
            r"\(3\) must be <= max_batch_size \(2\)",
        ),
        ({"max_batch_size": 0}, InputError, r"max_batch_size=0"),
        ({"batching_timeout": 0, "batching": True}, InputError, r"timeout"),
        ({"chat_template": "x", "chat_template_name": "qwen"}, InputError, r"chat_template_name='qwen' are both given"),
        ({"chat_template_name": "nope"}, InputError, r"chat_template_name='nope': expected one of .*'chatml_format'"),
        ({"text_key": "a", "tokens_key": ("a", "b")}, InputError, r"\('a', 'b'\) is inside \('a',\)"),
        ({"num_samples": 0}, InputError, r"num_samples=0: expected an integer of at least 1"),
        ({"num_samples": True}, InputError, r"num_samples=True: expected an integer"),
        ({"num_samples": 2, "inplace": True}, InputError, r"inplace=True with num_samples=2"),
        ({"num_samples": 1, "inplace": "empty"}, InputError, r"inplace='empty' with num_samples=1"),
        ({"num_samples": 2, "generate_kwargs": {"n": 3}}, InputError, r"num_samples=2 and num_return_sequences=3"),
        ({"inplace": "yes"}, InputError, r"inplace='yes': expected True, False or 'empty'"),
        ({"inplace": 0}, InputError, r"inplace=0"),
        ({"inplace": 1}, InputError, r"inplace=1"),
        ({"generate_kwargs": {"temprature": 1}}, UnknownOptionError, r"'temprature': did you mean 'temperature'"),
        ({"tokenizer": "./no-such-tokenizer"}, InputError, r"no tokenizer can be read at './no-such-tokenizer'"),
        ({"text_key": "same", "tokens_key": "same"}, InputError, r"same"),
    ],
)
def test_arguments_that_cannot_work(options: dict[str, Any], error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        make(**options)


def test_a_tokenizer_of_another_model_is_refused(tmp_path: Path) -> None:
    tiny_tokenizer().save_pretrained(tmp_path)
    engine = RecordingEngine(tokenizer_path=str(tmp_path))
    SGLangHiddenWrapper(engine, tokenizer=tiny_tokenizer())
    words = {word: i for i, word in enumerate(reversed(WORDS))}
    other = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(WordLevel(words, unk_token="<unk>")), unk_token="<unk>")
    other.save_pretrained(tmp_path / "other")
    for given in (other, str(tmp_path / "other")):
        with pytest.raises(InputError, match=r"is not the engine's: 96 tokens have other ids"):
            SGLangHiddenWrapper(engine, tokenizer=given)
    # Where the engine's own cannot be read, its vocabulary's size still tells; a pad is never sent.
    small = RecordingEngine(vocab_size=90)
    with pytest.raises(InputError, match=r"6 ids are outside the engine's vocabulary of 90, such as 90 for 'w84'"):
        SGLangHiddenWrapper(small, tokenizer=tiny_tokenizer())
    with_pad = tiny_tokenizer()
    with_pad.add_special_tokens({"pad_token": "<pad>"})
    assert with_pad.pad_token_id == 96
    SGLangHiddenWrapper(engine, tokenizer=with_pad)


def test_options_of_a_call_that_cannot_work() -> None:
    policy, engine = make()
    with pytest.raises(UnknownOptionError, match="temprature"):
        policy(batch_of("text"), temprature=1)
    with pytest.raises(InputError, match="num_return_sequences=2 in a call"):
        policy(batch_of("text"), n=2)
    assert engine.requests == []


@pytest.mark.parametrize(
    ("mode", "batch", "error", "words"),
    [
        ("text", TensorDict(a=torch.ones(1), batch_size=1), MissingKeyError, r"no \('text', 'prompt'\).* has \['a'\]"),
        ("text", batch_of("text", ["w1", ""]), PromptLengthError, r"row 1, .*0 tokens; SGLang needs at least 1"),
        ("text", TensorDict(text={"prompt": torch.ones(1)}, batch_size=1), InputTypeError, r"row 0, .*Tensor.*string"),
        ("history", batch_of("text"), MissingKeyError, r"\('history', 'prompt'\)"),
        ("tokens", TensorDict(tokens=torch.ones(1, 2).long(), batch_size=1), InputTypeError, r"Tokens"),
        ("tokens", tokens_batch([6, 7], [96, 5]), TokenIdError, r"row 1: token id 96 at position 0"),
        ("tokens", tokens_batch([6, 7], [5, -1]), TokenIdError, r"row 1: token id -1 at position 1"),
        ("tokens", TensorDict(tokens={"prompt": torch.ones(1, 2)}, batch_size=1), InputTypeError, r"row 0.*float32"),
        ("tokens", TensorDict(tokens={"prompt": torch.ones(1).long()}, batch_size=1), InputTypeError, r"\[P\]"),
        ("tokens", TensorDict(tokens={"prompt": torch.ones(1, 0).long()}, batch_size=1), PromptLengthError, r"row 0"),
        ("tokens", tokens_batch([5] * 59), PromptLengthError, r"row 0: .*59 tokens, over the engine's limit of 58"),
        ("tokens", tokens_batch([PAD_ID], of_tokens={"padded": True}), PromptLengthError, r"row 0: .*0 tokens"),
        ("text", "w1", InputTypeError, r"'w1' is a str; the policy reads a TensorDict"),
    ],
)
def test_inputs_that_are_not_sent(mode: str, batch: Any, error: type[SGLangHiddenError], words: str) -> None:
    policy, engine = make(mode)
    before = plain(batch) if isinstance(batch, TensorDictBase) else None
    with pytest.raises(error, match=words):
        policy(batch)
    assert engine.requests == []
    assert before is None or plain(batch) == before


def test_a_new_version_loses_nothing() -> None:
    policy, engine = make(engine=RecordingEngine(tokenizer=TOKENIZER, takes_images=True), **FULL_CONFIG)
    assert set(FULL_CONFIG) == set(inspect.signature(SGLangHiddenWrapper.__init__).parameters) - {"self", "model"}
    assert policy.config.arguments() == FULL_CONFIG
    again = policy.get_new_version()
    assert again is not policy
    assert (again.config, again.model) == (policy.config, engine)
    assert (again.in_keys, again.out_keys) == (policy.in_keys, policy.out_keys)


@pytest.mark.parametrize(
    "changes",
    [
        {"pad_output": False},
        {"hidden": None},
        {"generate_kwargs": {"top_k": 2}},
        {"text_key": "t"},
        {"num_samples": None, "extra_samples": 0, "inplace": "empty"},
        {"generate": False},
        {"layout": None},
        {"logits": None, "constraints": ()},
        {"action_mask_key": "a", "action_token_ids": None},
    ],
)
def test_a_new_version_changes_only_what_is_said(changes: dict[str, Any]) -> None:
    policy, _ = make(engine=RecordingEngine(tokenizer=TOKENIZER, takes_images=True), **FULL_CONFIG)
    assert policy.get_new_version(**changes).config.arguments() == {**FULL_CONFIG, **changes}
    assert policy.config.arguments() == FULL_CONFIG


@pytest.mark.parametrize("mode", ["history", "text", "tokens"])
def test_the_default_input_key_follows_mode_and_generate(mode: str) -> None:
    policy, _ = make(mode)
    scorer = policy.get_new_version(generate=False)
    assert (scorer.input_key, scorer.in_keys) == ((mode, "full"), [(mode, "full")])
    assert scorer.get_new_version(generate=True).config == policy.config
    # What torchrl's RetrieveKL passes.
    changes = {"generate": False, "return_log_probs": True, "log_probs_key": ("gen", "log_probs"), "pad_output": True}
    gen = policy.get_new_version(**changes, input_mode="tokens", input_key=("tokens", "full"))
    assert {key: gen.config.arguments()[key] for key in changes} == changes
    assert (gen.input_mode, gen.input_key) == ("tokens", ("tokens", "full"))


def test_the_number_of_samples_has_two_names() -> None:
    named, _ = make(generate_kwargs={"n": 2, "top_k": 3})
    assert (named.num_samples, named.inplace) == (2, False)
    assert named.get_new_version().num_samples == 2
    assert named.get_new_version(num_samples=4).num_samples == 4
    assert named.get_new_version(num_samples=4).generate_kwargs == {"top_k": 3}
    assert named.get_new_version(num_samples=None).num_samples is None
    assert make(num_samples=2)[0].get_new_version(generate_kwargs={"num_return_sequences": 3}).num_samples == 3
    assert make(num_samples=2)[0].get_new_version(generate_kwargs={"top_k": 3}).num_samples == 2
    one, _ = make(generate_kwargs={"n": 1})
    assert (one.num_samples, one.inplace) == (None, True)


def test_concurrent_callers_share_a_request() -> None:
    policy, engine = make("tokens", min_batch_size=2, batching_timeout=30.0)
    assert policy.batching
    assert policy.model is engine
    with ThreadPoolExecutor(2) as pool:
        outs = list(pool.map(policy, [tokens_batch([6, 7]), tokens_batch([8])]))
    assert len(engine.payloads) == 1
    assert [[list(row["tokens"].prompt) for row in flat(out)] for out in outs] == [[[6, 7]], [[8]]]
    assert policy.get_new_version().get_batching_state()["min_batch_size"] == 2
    assert policy.get_batching_state()["queue_size"] == 0
    unbatched, _ = make()
    assert (unbatched.batching, unbatched.get_batching_state()) == (False, {"batching_enabled": False})


def test_a_copy_and_a_pickle_lose_nothing() -> None:
    server = RecordingServer()
    options = {**FULL_CONFIG, "min_batch_size": 2, "input_mode": "text", "input_key": None}
    # The server says of itself that its model takes text alone.
    options |= {"action_mask_key": None, "action_token_ids": None, "pixel_values_key": None}
    try:
        policy = SGLangHiddenWrapper(SGLangServer(server.url), **options)
        policy.register_collector(server)
        for same in (copy.deepcopy(policy), pickle.loads(pickle.dumps(policy))):
            assert same.model is not policy.model
            assert (policy.collector, same.collector) == (server, None)
            assert same._engine.engine is same.model
            assert {**same.config.arguments(), "tokenizer": None} == {**policy.config.arguments(), "tokenizer": None}
            assert same.tokenizer.get_vocab() == TOKENIZER.get_vocab()
            out = same(batch_of("text"))
            assert out.batch_size == (3, 2)
    finally:
        server.stop()


def test_the_sizes_switch_batching_on_and_batching_switches_it_off() -> None:
    batched, _ = make(min_batch_size=2, max_batch_size=4)
    off = batched.get_new_version(batching=False)
    assert (off.batching, off.config.queue.min_batch_size, off.config.queue.max_batch_size) == (False, None, None)
    on = off.get_new_version(max_batch_size=4)
    assert on.get_batching_state()["min_batch_size"] == 1
    with pytest.raises(InputError, match="batching=False with min_batch_size=3"):
        batched.get_new_version(batching=False, min_batch_size=3)
    with pytest.raises(InputTypeError, match="batching='no': expected True, False or None"):
        make(batching="no")
    with pytest.raises(InputError, match="batching timeout of nan"):
        make(batching_timeout=float("nan"))


def test_a_shallow_copy_that_goes_ends_nobodys_wait() -> None:
    policy, engine = make("tokens", min_batch_size=2, batching_timeout=3600.0)
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(policy, tokens_batch([6, 7]))
        while policy.get_batching_state()["queue_size"] == 0:
            assert not waiting.done()
        copy.copy(policy).__del__()
        policy(tokens_batch([8]))
        assert waiting.result(30)["tokens"].prompt.tolist() == [[6, 7]]
    assert len(engine.payloads) == 1


@pytest.mark.parametrize("flush", [True, False])
def test_cleanup_ends_the_waiting(flush: bool) -> None:
    policy, _ = make("tokens", min_batch_size=2, batching_timeout=3600.0)
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(policy, tokens_batch([6, 7]))
        while policy.get_batching_state()["queue_size"] == 0:
            assert not waiting.done()
        policy.cleanup_batching(flush=flush)
        if flush:
            assert waiting.result(30)["tokens"].prompt.tolist() == [[6, 7]]
        else:
            with pytest.raises(CancelledError, match="the queue was emptied"):
                waiting.result(30)


def test_the_layout_is_of_ragged_output() -> None:
    assert make()[0].layout is torch.strided
    assert make(layout=torch.jagged)[0].layout is torch.jagged
    assert make(pad_output=True)[0].layout is None


def test_a_new_version_in_another_mode_reads_there() -> None:
    policy, _ = make("text")
    assert policy.get_new_version(input_mode="tokens").input_key == ("tokens", "prompt")
    assert make("text", input_key="mine")[0].get_new_version(input_mode="tokens").input_key == "mine"
    with pytest.raises(TypeError, match="hiden"):
        policy.get_new_version(hiden=True)


def test_a_new_version_of_another_engine() -> None:
    other = RecordingEngine(tokenizer=TOKENIZER)
    assert make("text")[0].get_new_version(model=other).model is other


def test_the_configuration_is_a_copy() -> None:
    options = {"temperature": 0.5}
    policy, _ = make(generate_kwargs=options)
    options["temperature"] = 9
    policy.config.arguments()["generate_kwargs"]["temperature"] = 9
    assert policy.generate_kwargs == {"temperature": 0.5}


@pytest.mark.parametrize("shaping", [{}, {"num_samples": 2}, {"generate_kwargs": {"n": 2}}])
def test_options_can_be_changed_but_not_the_shape_of_the_output(shaping: dict[str, Any]) -> None:
    policy, engine = make(**shaping)
    before = (policy.num_samples, policy.inplace)
    policy.generate_kwargs["temperature"] = 0.25
    policy(batch_of("text"))
    # With samples, the prompts go ahead, and sample nothing.
    assert {request.sampling["temperature"] for request in engine.requests[-3:]} == {0.25}
    policy.generate_kwargs["num_return_sequences"] = 3
    assert (policy.num_samples, policy.inplace) == before
    with pytest.raises(InputError, match="num_return_sequences=3"):
        policy(batch_of("text"))


def test_a_changed_number_of_samples_names_the_remedy() -> None:
    policy, _ = make()
    policy.generate_kwargs["num_return_sequences"] = 3
    with pytest.raises(InputError, match=r"num_return_sequences=3 in a call, and no num_samples .*get_new_version"):
        policy(batch_of("text"))


@pytest.mark.parametrize("generate", [True, False])
def test_the_options_of_a_call_are_standardised_once(generate: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    monkeypatch.setattr(requests, "standardize", lambda options: seen.append(options) or standardize(options))
    call = requests.read_call(PolicyConfig(generate=generate), {"return_hidden_states": False}, vocab_size=40)
    assert (call.hidden, seen) == (None, [{"return_hidden_states": False}])
