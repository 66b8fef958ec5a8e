"""The attributes that programs written for TorchRL's wrappers read: which exist here, and that they are true.

The names are read from the source of TorchRL's wrappers, so that a new TorchRL with another attribute is noticed.
"""

from __future__ import annotations

import inspect
import re
from typing import Any

import pytest
import torch
from helpers.policy_batches import ALL, TOKENIZER, batch_of, make
from torchrl.modules.llm.policies import sglang_wrapper, transformers_wrapper, vllm_wrapper

from torchrl_sglang_hidden import SGLangHiddenWrapper

# Attributes of one of TorchRL's wrappers that cannot be here, and why.
MISSING = {
    "sampling_params": "vLLM's own class; generate_kwargs has the options",
    "outputs": "of vLLM's internal record of an answer, not of the wrapper",
    "_remote_wrapper": "of the Ray proxy, which wraps any wrapper",
    "_in_get_dist_call": "how TorchRL's get_dist runs a local model",
    "_model_type": "vLLM's: synchronous or asynchronous; every engine here is one `Engine`",
    "_batch_queue": "the queue is the engines' BatchingEngine: get_batching_state",
    "_batching_lock": "the queue is the engines' BatchingEngine: get_batching_state",
    "_futures": "the queue is the engines' BatchingEngine: get_batching_state",
    "_device": "device says it",
}
VALUES: dict[str, Any] = {
    "attention_mask_key": "attention_mask", "batching": False, "chat_template": None, "chat_template_name": None,
    "chat_template_kwargs": {},
    "collector": None, "device": None, "generate": True, "generate_kwargs": {}, "history_key": "history",
    "in_keys": [("text", "prompt")], "inplace": True, "input_key": ("text", "prompt"), "input_mode": "text",
    "layout": torch.strided, "log_probs_key": "log_probs", "masks_key": "masks", "num_samples": None,
    "pad_model_input": None, "pad_output": False, "prefer_tokens": False, "chat": "render",
    "mark_end_of_turn": False, "literal_content": False, "return_history": False,
    "return_log_probs": True, "return_masks": True, "return_text": True, "return_tokens": True, "text_key": "text",
    "tokenizer": TOKENIZER, "tokenizer_kwargs": {}, "tokens_key": "tokens", "hidden": ALL,
    "on_error": "raise", "extra_samples": 0,
    "_batching_timeout": 10.0, "_max_batch_size": None, "_min_batch_size": None,
    # Tokens are the actions, and have no key a loss could take: see `Distributions`.
    "log_prob_keys": [], "dist_params_keys": [], "dist_sample_keys": [],
}  # fmt: skip

ARGUMENT_NAMES = sorted(inspect.signature(SGLangHiddenWrapper.__init__).parameters.keys() - {"self", "model"})


def attributes_of_torchrls_wrappers() -> set[str]:
    found = set()
    for module in (sglang_wrapper, vllm_wrapper, transformers_wrapper):
        source = inspect.getsource(module)
        found |= set(re.findall(r"\bself\.(\w+)(?:: [^=\n]+)? = ", source))
        found |= set(re.findall(r"@property\n    def (\w+)\(", source))
    return found


def test_every_attribute_is_here_or_named_as_missing() -> None:
    policy, _ = make("text")
    names = attributes_of_torchrls_wrappers()
    assert {"return_text", "return_history", "pad_output", "collector"} <= names
    missing = {name for name in names if not hasattr(policy, name)}
    assert missing == MISSING.keys() & names == MISSING.keys()


@pytest.mark.parametrize("name", VALUES)
def test_attributes_are_true(name: str) -> None:
    policy, _ = make("text")
    assert getattr(policy, name) == VALUES[name]


@pytest.mark.parametrize("mode", ["history", "text", "tokens"])
@pytest.mark.parametrize("left_out", ["text_key", "tokens_key", "masks_key", "history_key", None])
def test_return_flags_say_what_is_written(mode: str, left_out: str | None) -> None:
    policy, _ = make(mode, **({} if left_out is None else {left_out: None}))
    out = policy(batch_of(mode))
    for flag, key in (("text", "text"), ("tokens", "tokens"), ("masks", "masks"), ("history", "history")):
        written = getattr(policy, f"{flag}_key") is not None and out[0].get((key, "full"), None) is not None
        if flag == "masks":
            written = policy.masks_key is not None and out[0].get(("masks", "all_attention_mask"), None) is not None
        assert getattr(policy, f"return_{flag}") is written


@pytest.mark.parametrize("name", ["padding_value", "return_text", "return_tokens", "return_masks", "return_history"])
def test_what_follows_from_arguments_is_read_only(name: str) -> None:
    policy, _ = make("text")
    before = getattr(policy, name)
    with pytest.raises(AttributeError):
        setattr(policy, name, None)
    assert getattr(policy, name) == before


@pytest.mark.parametrize("name", ["config", *ARGUMENT_NAMES])
def test_attributes_are_read_only(name: str) -> None:
    policy, _ = make("text")
    before = getattr(policy, name)
    message = re.escape(f"use get_new_version({'num_samples' if name == 'config' else name}=…)")
    for value in (None, 3, torch.nn.Linear(1, 1)):
        with pytest.raises(AttributeError, match=message):
            setattr(policy, name, value)
    assert getattr(policy, name) == before


def test_a_refused_write_leaves_the_policy_as_it_was() -> None:
    policy, _ = make("text")
    before = policy.config
    other = policy.get_new_version(num_samples=2, text_key="t").config
    with pytest.raises(AttributeError, match=re.escape("use get_new_version(num_samples=…)")):
        policy.config = other
    assert policy.config is before
    assert policy(batch_of("text")).batch_size == (3,)


def test_every_argument_is_an_attribute() -> None:
    policy, _ = make("text")
    assert [name for name in ("model", *ARGUMENT_NAMES) if not hasattr(policy, name)] == []
    policy, _ = make("text", min_batch_size=1, max_batch_size=7, batching_timeout=2.5)
    assert (policy.min_batch_size, policy.max_batch_size, policy.batching_timeout) == (1, 7, 2.5)
