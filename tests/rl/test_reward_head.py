"""`make_reward_head` and `BradleyTerryLoss`: the formula, what they learn from pairs, and TorchRL's own loss."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from helpers.fake_engine import HIDDEN_SIZE
from helpers.policy_batches import batch_of, make
from tensordict import TensorDict, TensorDictBase
from tensordict.nn import TensorDictModule
from torch import nn
from torchrl.modules.models.llm import GPT2RewardModel

from torchrl_sglang_hidden import HiddenSpec, InputError, InputTypeError, MissingKeyError
from torchrl_sglang_hidden.rl import BradleyTerryLoss, make_reward_head

KEY = ("hidden_states", "response")


def pairs(states: torch.Tensor, other: torch.Tensor) -> TensorDictBase:
    return TensorDict(
        chosen_data=TensorDict(hidden_states=TensorDict(response=states)),
        rejected_data=TensorDict(hidden_states=TensorDict(response=other)),
        batch_size=[len(states)],
    ).auto_batch_size_(1)


def test_rewards_of_a_policys_responses() -> None:
    policy, _ = make("text", hidden=HiddenSpec(("response",), pooling="last"))
    out = policy(batch_of("text"))
    head = make_reward_head(policy)
    assert (head.in_keys, head.out_keys) == ([KEY], ["rewards"])
    found = head(out)["rewards"]
    linear = head.module[1][0]
    states = out[KEY].double()
    centred = states - states.mean(-1, keepdim=True)
    normed = centred / (centred.square().mean(-1, keepdim=True) + 1e-5).sqrt()
    torch.testing.assert_close(found.double(), normed @ linear.weight.double().T + linear.bias, rtol=1e-4, atol=1e-5)
    assert make_reward_head(policy, out_key=("next", "reward"))(out)["next", "reward"].shape == (3, 1)
    with pytest.raises(InputError, match="expected one of"):
        make_reward_head(policy, state_key=("hidden_states", "prompt"))


def test_the_loss_is_the_formula() -> None:
    torch.manual_seed(1)
    head = make_reward_head(5)
    chosen, rejected = torch.randn(7, 5), torch.randn(7, 5)
    batch = pairs(chosen, rejected)
    out = BradleyTerryLoss(head)(batch)
    margin = (head.module(chosen) - head.module(rejected)).double()[:, 0]
    torch.testing.assert_close(out["loss_reward"].double(), -(1 / (1 + (-margin).exp())).log().mean())
    assert float(out["accuracy"]) == pytest.approx(float((margin > 0).double().mean()))
    torch.testing.assert_close(out["margin"].double(), margin.mean())
    assert "rewards" not in batch["chosen_data"], "nothing is left in the data"
    tie = BradleyTerryLoss(head)(pairs(chosen, chosen))
    assert float(tie["accuracy"]) == 0.5


def test_gradients_reach_the_head() -> None:
    head = make_reward_head(5)
    loss = BradleyTerryLoss(head)
    loss(pairs(torch.randn(7, 5), torch.randn(7, 5)))["loss_reward"].backward()
    grads = [parameter.grad for parameter in head.parameters()]
    assert grads[0] is not None
    assert grads[0].abs().sum() > 0


def fitted(states: torch.Tensor, other: torch.Tensor) -> BradleyTerryLoss:
    loss = BradleyTerryLoss(make_reward_head(states.shape[-1], norm=False))
    optimizer = torch.optim.LBFGS(loss.parameters(), max_iter=50)

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        value = loss(pairs(states, other))["loss_reward"] + 1e-3 * sum(p.square().sum() for p in loss.parameters())
        value.backward()
        return value

    optimizer.step(closure)
    return loss


def test_it_learns_who_is_preferred_and_the_ablation_does_not() -> None:
    """The reward is planted in the response's states; the prompt's are the same for both answers."""
    for seed in range(5):
        generator = torch.Generator().manual_seed(seed)
        direction = torch.randn(6, generator=generator)
        left, right, prompts = (torch.randn(400, 6, generator=generator) for _ in range(3))
        better = ((left - right) @ direction > 0)[:, None]
        chosen, rejected = torch.where(better, left, right), torch.where(better, right, left)
        accuracy = fitted(chosen[:200], rejected[:200])(pairs(chosen[200:], rejected[200:]))["accuracy"]
        assert accuracy > 0.9
        assert fitted(prompts[:200], prompts[:200])(pairs(prompts[200:], prompts[200:]))["accuracy"] == 0.5


def test_rewards_of_tokens_in_torchrls_loss() -> None:
    """``GPT2RewardModel.compute_reward_loss`` compares the tokens from where a pair parts to its longer end."""
    head = make_reward_head(HIDDEN_SIZE, state_key=("token_hidden_states", "full"))
    ids = torch.tensor([[[5, 6, 7, 8]], [[5, 6, 9, 0]]])
    sides = [
        TensorDict(input_ids=side, token_hidden_states=TensorDict(full=torch.randn(1, 4, HIDDEN_SIZE)), batch_size=[1])
        for side in ids
    ]
    rewards = []
    for side in sides:
        rewards.append(head(side)["rewards"][..., 0])
        side["rewards"] = rewards[-1]

    class Side:
        def __init__(self, td: TensorDictBase) -> None:
            self.input_ids, self.rewards = td["input_ids"], td["rewards"]

    loss = GPT2RewardModel.compute_reward_loss(Side(sides[0]), Side(sides[1]), 0)
    expected = -nn.functional.logsigmoid((rewards[0] - rewards[1])[0, 2:4]).mean()
    torch.testing.assert_close(loss, expected)


def network() -> TensorDictModule:
    return make_reward_head(5)


@pytest.mark.parametrize(
    ("call", "kind", "words"),
    [
        (lambda: BradleyTerryLoss(nn.Linear(5, 1)), InputTypeError, "reward_network is a Linear; expected"),
        (lambda: BradleyTerryLoss(network())(TensorDict()), MissingKeyError, "no 'chosen_data' in the batch"),
        (lambda: BradleyTerryLoss(network())(pairs(torch.ones(2, 6), torch.ones(2, 6))), InputError, "expected .*5"),
        (
            lambda: BradleyTerryLoss(network())(pairs(torch.full((2, 5), torch.nan), torch.ones(2, 5))),
            InputError,
            "a loss of nan: states are not finite; leave out",
        ),
        (
            lambda: BradleyTerryLoss(network())(pairs(torch.ones(0, 5), torch.ones(0, 5))),
            InputError,
            "expected one for each row of at least one pair",
        ),
        (lambda: make_reward_head(0), InputError, "states=0"),
    ],
)
def test_bad_input(call: Any, kind: type[Exception], words: str) -> None:
    with pytest.raises(kind, match=words):
        call()
