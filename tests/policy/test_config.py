"""`PolicyConfig`: it agrees with the wrapper's signature, it is frozen, and it is what the wrapper stands on."""

from __future__ import annotations

import copy
import dataclasses
import inspect
import pickle
import re
from typing import Any

import pytest
import torch
from helpers.policy_batches import FULL_CONFIG

from torchrl_sglang_hidden import HiddenSpec, InputError, InputTypeError, SGLangHiddenWrapper, TokenIdError
from torchrl_sglang_hidden.policy.batching import BatchingConfig
from torchrl_sglang_hidden.policy.config import ARGUMENTS, PARTS, PolicyConfig
from torchrl_sglang_hidden.policy.outcomes import OutcomeConfig
from torchrl_sglang_hidden.policy.outputs import KeyConfig
from torchrl_sglang_hidden.policy.wrapper import SGLangHiddenWrapper as Wrapper

PARAMETERS = {
    name: parameter
    for name, parameter in inspect.signature(SGLangHiddenWrapper.__init__).parameters.items()
    if name not in ("self", "model")
}
RECORDS = (PolicyConfig, KeyConfig, BatchingConfig, OutcomeConfig)


def names_of(record: Any) -> list[str]:
    return [field.name for field in dataclasses.fields(record) if field.init and field.name not in PARTS]


def test_the_signature_and_the_fields_have_the_same_names() -> None:
    fields = [name for record in RECORDS for name in names_of(record)]
    assert len(fields) == len(set(fields))
    assert set(fields) == set(PARAMETERS) == ARGUMENTS == set(FULL_CONFIG) == set(PolicyConfig().arguments())
    assert all(parameter.kind is inspect.Parameter.KEYWORD_ONLY for parameter in PARAMETERS.values())


@pytest.mark.parametrize("name", PARAMETERS)
def test_the_signature_and_the_fields_have_the_same_defaults(name: str) -> None:
    default = PARAMETERS[name].default
    assert PolicyConfig.from_arguments(**{name: default}) == PolicyConfig()


@pytest.mark.parametrize("name", PARAMETERS)
def test_every_argument_is_kept_under_its_own_name(name: str) -> None:
    default, other = PolicyConfig().arguments(), FULL_CONFIG[name]
    if other == default[name]:
        other = {"generate": False, "chat_template": "{{ messages }}"}[name]
    needed = {"action_token_ids": {"action_mask_key": "mask"}, "extra_samples": {"num_samples": 2}}.get(name, {})
    changed = PolicyConfig(inplace=False).changed(**{name: other, **needed})
    assert changed.arguments() == {**default, "inplace": False, name: other, **needed}


@pytest.mark.parametrize("record", RECORDS)
def test_every_field_is_documented_once(record: Any) -> None:
    for name in (field.name for field in dataclasses.fields(record)):
        entries = [entry for other in (*RECORDS, Wrapper) for entry in re.findall(rf"^ +{name}: ", other.__doc__, re.M)]
        assert len(re.findall(rf"^ {{8}}{name}: ", record.__doc__, re.M)) == 1, name
        # The wrapper's outputs have names too: text, tokens, … but none of an argument.
        assert len(entries) == 1, name


def test_it_is_frozen_and_its_mappings_are_its_own() -> None:
    options = {"temperature": 0.5}
    config = PolicyConfig(generate_kwargs=options, tokenizer_kwargs=options)
    options["temperature"] = 9
    config.arguments()["generate_kwargs"]["temperature"] = 9
    assert config.generate_kwargs == config.tokenizer_kwargs == {"temperature": 0.5}
    for record in (config, config.keys, config.queue):
        with pytest.raises(dataclasses.FrozenInstanceError):
            setattr(record, dataclasses.fields(record)[0].name, None)


def test_copies_and_pickles_are_equal() -> None:
    config = PolicyConfig.from_arguments(**{**FULL_CONFIG, "tokenizer": None})
    for same in (copy.copy(config), copy.deepcopy(config), pickle.loads(pickle.dumps(config)), config.changed()):
        assert same == config
        assert same.arguments() == {**FULL_CONFIG, "tokenizer": None}


def test_values_of_several_forms_become_one() -> None:
    config = PolicyConfig.from_arguments(hidden=True, device="cpu", return_log_probs=None, generate_kwargs={"n": 2})
    assert (config.hidden, config.device, config.return_log_probs) == (HiddenSpec(), torch.device("cpu"), True)
    assert config.generate_kwargs == {"num_return_sequences": 2}
    assert (config.num_samples, config.num_responses, config.writes_inplace) == (None, 2, False)
    assert PolicyConfig.from_arguments(hidden=False, return_log_probs=False).hidden is None


def test_an_explicit_default_key_follows_the_mode_as_the_default_does() -> None:
    config = PolicyConfig(input_mode="text", input_key=("text", "prompt"))
    assert config == PolicyConfig(input_mode="text")
    assert config.changed(generate=False).prompt_key == ("text", "full")
    assert PolicyConfig(input_key="mine").changed(generate=False).prompt_key == "mine"


@pytest.mark.parametrize(
    ("arguments", "changes", "expected"),
    [
        ({"generate_kwargs": {"n": 2}}, {"num_samples": 4}, {"num_samples": 4, "generate_kwargs": {}}),
        ({"num_samples": 2}, {"generate_kwargs": {"n": 3}}, {"num_samples": None}),
        ({"num_samples": 2}, {"generate_kwargs": {"top_k": 3}}, {"num_samples": 2}),
        ({"generate_kwargs": {"return_hidden_states": False}}, {"hidden": True}, {"hidden": HiddenSpec()}),
        ({"generate_kwargs": {"return_hidden_states": True}}, {"hidden": None}, {"hidden": None}),
        ({"min_batch_size": 2}, {"batching": False}, {"batching": False, "min_batch_size": None}),
        ({"batching": False}, {"max_batch_size": 3}, {"batching": None, "max_batch_size": 3}),
        ({"batching": True, "min_batch_size": 2}, {"min_batch_size": 3}, {"batching": True, "min_batch_size": 3}),
    ],
)
def test_what_has_two_names_follows_the_one_that_is_changed(
    arguments: dict[str, Any], changes: dict[str, Any], expected: dict[str, Any]
) -> None:
    changed = PolicyConfig.from_arguments(**arguments).changed(**changes).arguments()
    assert {name: changed[name] for name in expected} == expected


def test_a_change_that_cannot_work() -> None:
    with pytest.raises(TypeError, match="hiden"):
        PolicyConfig().changed(hiden=True)
    with pytest.raises(TypeError, match="keys"):
        PolicyConfig().changed(keys=KeyConfig())
    with pytest.raises(InputError, match="batching=False with min_batch_size=3"):
        PolicyConfig().changed(batching=False, min_batch_size=3)


@pytest.mark.parametrize("generate", [True, False])
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_samples": "three"}, "num_samples='three': expected an integer"),
        ({"num_samples": 0}, "num_samples=0: expected an integer of at least 1"),
        ({"num_samples": 2, "generate_kwargs": {"n": 3}}, "num_samples=2 and num_return_sequences=3 contradict"),
    ],
)
def test_samples_are_checked_whether_or_not_it_generates(
    arguments: dict[str, Any], message: str, generate: bool
) -> None:
    with pytest.raises(InputError, match=message):
        PolicyConfig(generate=generate, **arguments)


def test_the_number_of_samples_is_that_of_the_construction() -> None:
    for config in (PolicyConfig(), PolicyConfig(generate_kwargs={"n": 2}), PolicyConfig(num_samples=2, generate=False)):
        before = (config.num_responses, config.writes_inplace)
        config.generate_kwargs["num_return_sequences"] = 3
        for same in (config, copy.copy(config), copy.deepcopy(config), pickle.loads(pickle.dumps(config))):
            assert (same.num_responses, same.writes_inplace) == before
    assert dataclasses.replace(PolicyConfig(), num_samples=3).num_responses == 3
    assert dataclasses.replace(PolicyConfig(), num_samples=3).writes_inplace is False


@pytest.mark.parametrize(
    ("ids", "key", "error", "message"),
    [
        (["w1"], "mask", InputTypeError, "expected token ids"),
        ([], "mask", InputError, "0 actions"),
        ([4, 4], "mask", TokenIdError, r"action_token_ids=\[4, 4\]: ids are 0 or more, each once"),
        ([-1], "mask", TokenIdError, "ids are 0 or more, each once"),
        ([4, 5], None, InputError, "without action_mask_key"),
    ],
)
def test_action_ids_are_checked_before_there_is_an_engine(
    ids: list[Any], key: str | None, error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        PolicyConfig(action_token_ids=ids, action_mask_key=key)


def test_action_ids_have_one_form() -> None:
    for ids in ([8, 9], (8, 9), range(8, 10), torch.tensor([8, 9])):
        assert PolicyConfig(action_token_ids=ids, action_mask_key="mask").action_token_ids == (8, 9)


def test_equal_configurations_have_equal_hashes() -> None:
    full = PolicyConfig.from_arguments(**FULL_CONFIG)  # with a tokenizer object
    for config in (PolicyConfig(), full):
        assert {config: 1}[copy.copy(config)] == 1
        assert hash(config) == hash(config.changed())
    config = PolicyConfig()
    before = hash(config)
    config.generate_kwargs["temperature"] = 0.5
    assert hash(config) == before
    assert config != PolicyConfig()
