"""`make_value_head`: its key and size come from the policy, and GAE reads it."""

from __future__ import annotations

import pickle
from typing import Any

import pytest
import torch
from helpers.fake_engine import HIDDEN_SIZE
from helpers.policy_batches import batch_of, make
from helpers.word_env import PROMPT, WordEnv
from tensordict import TensorDict
from torch import nn
from torchrl.envs import TransformedEnv
from torchrl.modules import ValueOperator
from torchrl.objectives.value import GAE

from torchrl_sglang_hidden import Between, HiddenSpec, HiddenStateTransform, InputError, InputTypeError
from torchrl_sglang_hidden.rl import make_value_head

PROMPTS = HiddenSpec(("prompt",))
STATE = ("hidden_states", "prompt")

# The head computes in float32, the reference in float64.
FLOAT32 = {"rtol": 1e-4, "atol": 1e-5}


def transform(**policy_options: Any) -> HiddenStateTransform:
    options = {"hidden": PROMPTS, "generate_kwargs": {"max_new_tokens": 0}, **policy_options}
    return HiddenStateTransform(make("text", **options)[0], PROMPT, in_keys=["observation"])


def by_hand(critic: ValueOperator, states: torch.Tensor) -> torch.Tensor:
    """Return the values of a linear critic on normalised states."""
    linear = critic.module[1][0]
    centred = states.double() - states.double().mean(-1, keepdim=True)
    normed = centred / (centred.square().mean(-1, keepdim=True) + 1e-5).sqrt()
    return normed.flatten(-linear.in_features // HIDDEN_SIZE) @ linear.weight.double().T + linear.bias


def test_values_of_a_policys_prompts() -> None:
    policy, _ = make("text", hidden=HiddenSpec(("response", "prompt")))
    out = policy(batch_of("text"))
    critic = make_value_head(policy)
    assert isinstance(critic, ValueOperator)
    assert critic.in_keys == [STATE]
    value = critic(out)["state_value"]
    assert value.shape == (3, 1)
    assert value.dtype == torch.float32
    torch.testing.assert_close(value.double(), by_hand(critic, out[STATE]), **FLOAT32)


def test_of_several_layers_in_half_precision() -> None:
    policy, _ = make("text", hidden=HiddenSpec(("prompt",), layers=(0, -1), dtype=torch.bfloat16))
    out = policy(batch_of("text"))
    critic = make_value_head(policy)
    assert out[STATE].shape == (3, 2, HIDDEN_SIZE)
    assert critic.module[1][0].in_features == 2 * HIDDEN_SIZE
    torch.testing.assert_close(critic(out)["state_value"].double(), by_hand(critic, out[STATE]), rtol=1e-3, atol=1e-3)


def test_without_norm_and_with_layers() -> None:
    critic = make_value_head(5, state_key="x", num_cells=(7, 6), norm=False, out_key=("a", "v"))
    states = 100 * torch.randn(4, 3, 5)
    linears = [layer for layer in critic.module[1] if isinstance(layer, nn.Linear)]
    assert [(layer.in_features, layer.out_features) for layer in linears] == [(5, 7), (7, 6), (6, 1)]
    out = critic(TensorDict(x=states, batch_size=(4, 3)))
    torch.testing.assert_close(out["a", "v"], critic.module[1](states))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64, torch.int64])
def test_vectors_of_every_dtype_are_read_in_that_of_the_head(dtype: torch.dtype) -> None:
    critic = make_value_head(5, state_key="x")
    states = (10 * torch.randn(4, 5)).to(dtype)
    value = critic(TensorDict(x=states, batch_size=4))["state_value"]
    assert value.dtype == torch.float32
    torch.testing.assert_close(value, critic(TensorDict(x=states.float(), batch_size=4))["state_value"])
    assert critic.double()(TensorDict(x=states, batch_size=4))["state_value"].dtype == torch.float64
    assert list(critic.state_dict()) == list(make_value_head(5, state_key="x").double().state_dict())


def test_gae_on_a_transforms_vectors() -> None:
    made = transform()
    batch = TransformedEnv(WordEnv([2, 100]), made).rollout(5, break_when_any_done=False)
    critic = make_value_head(made)
    GAE(gamma=0.9, lmbda=0.8, value_network=critic)(batch)
    torch.testing.assert_close(batch["state_value"].double(), by_hand(critic, batch["hidden_state"]), **FLOAT32)
    torch.testing.assert_close(
        batch["next", "state_value"].double(), by_hand(critic, batch["next", "hidden_state"]), **FLOAT32
    )


def test_other_places() -> None:
    policy, _ = make("text", hidden=HiddenSpec(("prompt", "full"), spans={"end": Between("w1", "w2")}))
    assert make_value_head(policy, state_key=("hidden_states", "full")).in_keys == [("hidden_states", "full")]
    assert make_value_head(policy, state_key=("hidden_states", "spans", "end")).in_keys == [
        ("hidden_states", "spans", "end")
    ]
    assert make_value_head(policy, state_key="normed").in_keys == ["normed"]
    assert make_value_head(transform()).in_keys == ["hidden_state"]
    assert make_value_head(transform(), state_key="hidden_state_norm").in_keys == ["hidden_state_norm"]
    own, _ = make("text", hidden=PROMPTS, hidden_states_key=("agent", "states"))
    assert make_value_head(own).in_keys == [("agent", "states", "prompt")]


def test_pickles() -> None:
    critic = make_value_head(5, state_key="x")
    states = TensorDict(x=torch.randn(2, 5), batch_size=2)
    copied = pickle.loads(pickle.dumps(critic))
    assert torch.equal(copied(states.clone())["state_value"], critic(states)["state_value"])


def test_a_vector_of_another_size() -> None:
    critic = make_value_head(5, state_key="x")
    with pytest.raises(InputError, match=r"'x' has shape \(2, 4\); expected \('\*batch', 5\)"):
        critic(TensorDict(x=torch.randn(2, 4), batch_size=2))
    layers = make_value_head(transform(hidden=HiddenSpec(("prompt",), layers=(0, -1))))
    with pytest.raises(InputError, match=r"has shape \(3, 8\); expected \('\*batch', 2, 8\)"):
        layers(TensorDict(hidden_state=torch.randn(3, 8), batch_size=3))


@pytest.mark.parametrize(
    ("hidden", "options", "words"),
    [
        (
            HiddenSpec(("response",)),
            {},
            r"pools \[\('hidden_states', 'response'\)\]: .*the response is the action; use",
        ),
        (None, {}, r"hidden=None .*returns no pooled states; use"),
        (PROMPTS, {"state_key": ("hidden_states", "full")}, r"state_key=\('hidden_states', 'full'\): expected one of"),
        (PROMPTS, {"num_cells": (0,)}, r"num_cells=\(0,\): expected sizes of at least 1"),
    ],
)
def test_refuses_what_a_policy_does_not_write(hidden: Any, options: dict[str, Any], words: str) -> None:
    policy, _ = make("text", hidden=hidden)
    with pytest.raises(InputError, match=words):
        make_value_head(policy, **options)


def test_refuses_a_policy_that_scores() -> None:
    policy, _ = make("text", hidden=PROMPTS, generate=False)
    with pytest.raises(InputError, match=r"pools \[\('hidden_states', 'full'\)\]: "):
        make_value_head(policy)


@pytest.mark.parametrize(
    ("states", "options", "kind", "words"),
    [
        (5, {}, InputError, "states=5 without state_key: .*give state_key"),
        (0, {"state_key": "x"}, InputError, "states=0: expected a size of at least 1"),
        ("x", {}, InputTypeError, "states='x' is a str; expected the SGLangHiddenWrapper"),
        (True, {"state_key": "x"}, InputTypeError, "states=True is a bool; expected"),
        (5, {"state_key": "x", "norm": "no"}, InputTypeError, "norm='no': expected True or False"),
        (5, {"state_key": "x", "num_cells": 64}, InputTypeError, "num_cells=64: expected a sequence of integers"),
        (5, {"state_key": "x", "num_cells": (6.0,)}, InputTypeError, r"num_cells=\(6.0,\): expected a sequence"),
    ],
)
def test_refuses_other_arguments(states: Any, options: dict[str, Any], kind: type[Exception], words: str) -> None:
    with pytest.raises(kind, match=words):
        make_value_head(states, **options)
