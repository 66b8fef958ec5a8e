"""Agents of the builders learn a small task by TorchRL's PPO and A2C, and do not where what they need is taken away."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from helpers.guess_env import GuessEnv
from helpers.policy_batches import make
from helpers.word_env import PROMPT
from torchrl.envs import ExplorationType, TransformedEnv, set_exploration_type
from torchrl.modules import ConvNet
from torchrl.objectives import A2CLoss, ClipPPOLoss
from torchrl.objectives.value import GAE

from torchrl_sglang_hidden import HiddenSpec, HiddenStateTransform
from torchrl_sglang_hidden.rl import make_actor_critic

READS = {"hidden": HiddenSpec(("prompt",)), "generate_kwargs": {"max_new_tokens": 0}}


def learn(
    *,
    kind: Any = ClipPPOLoss,
    batches: int = 25,
    lr: float = 3e-3,
    ablate: Any = None,
    env_options: Any = None,
    **options: Any,
) -> float:
    """Train an agent, and return the mean reward of its most likely actions afterwards."""
    torch.manual_seed(0)
    encode = HiddenStateTransform(
        make("text", **READS)[0], PROMPT, in_keys=["observation"], cache_size=9, ablate=ablate
    )
    env = TransformedEnv(GuessEnv(**(env_options or {})), encode)
    env.set_seed(0)
    spec = env.observation_spec
    both = make_actor_critic(encode, env.action_spec, observation_spec=spec, num_cells=(64,), **options)
    actor, critic = both.get_policy_operator(), both.get_value_operator()
    loss = kind(actor, critic)
    optimizer = torch.optim.Adam(loss.parameters(), lr=3e-3)
    advantage = GAE(gamma=0.5, lmbda=0.9, value_network=critic, average_gae=True)
    for _ in range(batches):
        with torch.no_grad():
            batch = env.rollout(6, actor, break_when_any_done=False)
        advantage(batch)
        for _ in range(1 if kind is A2CLoss else 4):
            terms = loss(batch)
            optimizer.zero_grad()
            sum(term for name, term in terms.items() if name.startswith("loss_")).backward()
            optimizer.step()
    with torch.no_grad(), set_exploration_type(ExplorationType.DETERMINISTIC):
        return float(env.rollout(9, actor, break_when_any_done=False)["next", "reward"].mean())


def test_ppo_learns_what_the_words_ask_for() -> None:
    assert learn(action_mask_key="allowed") > 0.98


@pytest.mark.parametrize("ablate", ["zero", "shuffle"])
def test_it_learns_nothing_without_them(ablate: str) -> None:
    assert learn(action_mask_key="allowed", ablate=ablate) < 0.65


def test_a2c_learns_without_a_mask() -> None:
    assert learn(kind=A2CLoss, batches=80) > 0.95


@pytest.mark.parametrize("seen", ["pixels", "sight"])
def test_what_words_and_observation_say_together(seen: str) -> None:
    """Each of the two alone is right three times of four."""
    options: dict[str, Any] = {"env_options": {"needs_both": True}, "batches": 40}
    conv = ConvNet(in_features=3, num_cells=[4], kernel_sizes=[3], strides=[3]) if seen == "pixels" else None
    assert learn(observation_keys=[seen], conv=conv, **options) > 0.98
    assert learn(observation_keys=[seen], conv=conv, ablate="zero", **options) < 0.9
    assert learn(**options) < 0.9


def test_continuous_actions() -> None:
    assert learn(env_options={"continuous": True}, batches=40) > 0.85
