"""Critics and actors on pooled prompt states, of rollouts on a real server.

1. V(s) is the head of the recorded vector, and GAE on it is the plain recursion, in one turn and in two.
2. Unshifted, GAE needs the states of ``"next"``: one more call of the policy on ``batch["next"]`` writes them.
3. Shifted, it needs none: it takes V of the next step. A rollout that is cut off has none at its end, and torchrl takes
   V of the last step there; an end that is terminal is exact. `add_next_states` is exact at both, and encodes the cut
   rows alone.
4. Losses built from an operator that holds the wrapper are those of its heads on the recorded states. They train the
   heads; the NaN of unmeasured log-probs reaches none of them.
5. ``log_prob`` of what was sampled is what was said of it while it was sampled.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from helpers import hf_oracle
from helpers.policy_checks import LOG_PROB_ATOL, QUESTIONS, STATE_RTOL, relative_error, tokens_input
from helpers.torchrl_pipelines import buffer, chat_env, collector
from tensordict import TensorDict, TensorDictBase
from tensordict.nn import TensorDictModule
from torch import nn
from torch.distributions import Categorical
from torchrl.data import Categorical as Choices
from torchrl.data import Composite, NonTensor, Unbounded
from torchrl.envs import EnvBase, Transform
from torchrl.modules import ActorValueOperator, ProbabilisticActor, ValueOperator
from torchrl.modules.llm.policies import Text
from torchrl.objectives import A2CLoss, ClipPPOLoss, LossModule
from torchrl.objectives.value import GAE

from torchrl_sglang_hidden import SGLangHiddenWrapper
from torchrl_sglang_hidden.rl import add_next_states, make_value_head

Policy = Callable[..., SGLangHiddenWrapper]
GAMMA, LMBDA = 0.9, 0.8
STATE = ("hidden_states", "prompt")
HIDDEN_SIZE, NUM_ACTIONS = 576, 3
LOSSES = (A2CLoss, ClipPPOLoss)
RECORDED = (STATE, "action", "action_log_prob", "advantage", "value_target")


class Verdict(Transform):
    """Rewards a turn by its action; the dialogue's end is terminal, or a cut."""

    def __init__(self, terminal: bool) -> None:
        super().__init__()
        self.terminal = terminal

    def _step(self, tensordict: TensorDictBase, next_tensordict: TensorDictBase) -> TensorDictBase:
        next_tensordict["reward"] = 1.0 + tensordict["action"].float().unsqueeze(-1)
        if self.terminal:
            next_tensordict["terminated"] = next_tensordict["done"].clone()
        return next_tensordict

    def transform_reward_spec(self, reward_spec: Composite) -> Composite:
        reward_spec["reward"] = Unbounded(shape=(*reward_spec.shape, 1))
        return reward_spec


class Walkers(EnvBase):
    """Walkers on a line, told in words where they stand; two steps to either side is the end."""

    def __init__(self, num_walkers: int = 2) -> None:
        super().__init__(batch_size=(num_walkers,))
        text = Composite(prompt=NonTensor(shape=(num_walkers,), example_data=""), shape=(num_walkers,))
        self.observation_spec = Composite(text=text, shape=(num_walkers,))
        self.action_spec = Choices(NUM_ACTIONS, shape=(num_walkers,))
        self.reward_spec = Unbounded(shape=(num_walkers, 1))
        self.places = torch.zeros(num_walkers)

    def _observe(self) -> Text:
        # Of differing lengths, from walker to walker and from step to step.
        prompts = [f"Walker {i} is at {int(place)}{'!' * i * abs(int(place))}" for i, place in enumerate(self.places)]
        return Text(prompt=prompts, batch_size=self.batch_size)

    def _reset(self, tensordict: TensorDictBase | None = None, **kwargs: Any) -> TensorDictBase:
        reset = None if tensordict is None else tensordict.get("_reset", None)
        self.places = torch.zeros_like(self.places) if reset is None else self.places * ~reset[:, 0]
        return TensorDict(text=self._observe(), batch_size=self.batch_size)

    def _step(self, tensordict: TensorDictBase) -> TensorDictBase:
        self.places = self.places + tensordict["action"] - 1
        done = (self.places.abs() >= 2)[:, None]
        reward = self.places[:, None].clone()
        return TensorDict(
            text=self._observe(), reward=reward, done=done, terminated=done.clone(), batch_size=self.batch_size
        )

    def _set_seed(self, seed: int | None) -> None:
        pass


def operator(policy: SGLangHiddenWrapper) -> ActorValueOperator:
    """The wrapper as the common part, a head that chooses one of three actions, and a critic."""
    torch.manual_seed(0)
    actor = ProbabilisticActor(
        TensorDictModule(nn.Linear(HIDDEN_SIZE, NUM_ACTIONS), in_keys=[STATE], out_keys=["logits"]),
        in_keys=["logits"],
        distribution_class=Categorical,
        return_log_prob=True,
    )
    # Smaller than torch's own: pooled states of a trained model are long, and the policy would be one action.
    nn.init.normal_(actor[0].module.weight, std=1e-3)
    return ActorValueOperator(policy, actor, ValueOperator(nn.Linear(HIDDEN_SIZE, 1), in_keys=[STATE]))


@pytest.fixture
def dialogues(policy: Policy) -> Callable[..., tuple[ActorValueOperator, TensorDictBase]]:
    """An operator, and a batch ``[2, turns]`` that its policy collected: the LLM answers, the head chooses."""

    def collect(turns: int, terminal: bool = True) -> tuple[ActorValueOperator, TensorDictBase]:
        both = operator(policy("history", segments=("prompt", "response"), max_new_tokens=3))
        env = chat_env(QUESTIONS[:2], batch_size=2, turns=turns, transforms=[Verdict(terminal)])
        batches = collector(env, both.get_policy_operator(), turns_per_batch=2 * turns, total_turns=2 * turns)
        # LLMCollector leaves gradients on: an LLM has none, but the head's log-probs have, and PPO refuses those.
        with torch.no_grad():
            (batch,) = batches
        batches.shutdown()
        assert batch.shape == (2, turns)
        return both, batch

    return collect


def encoder_of(policy: SGLangHiddenWrapper) -> SGLangHiddenWrapper:
    """Return a policy that gives the same states of the same prompts and little else, for the states at ``"next"``."""
    rest = dict.fromkeys(["history_key", "text_key", "masks_key", "log_probs_key"])
    return policy.get_new_version(generate_kwargs={"max_new_tokens": 1}, **rest)


def estimate(batch: TensorDictBase, critic: Any, **options: Any) -> TensorDictBase:
    batch = batch.copy()
    GAE(gamma=GAMMA, lmbda=LMBDA, value_network=critic, **options)(batch)
    return batch


def dense(batch: TensorDictBase) -> TensorDictBase:
    """What losses read, numbers as plain tensors: PPO pads what it reads of a lazy stack, and cannot pad numbers."""
    out = batch.select(*RECORDED).contiguous()
    return out.set("history", batch.get("history"))


def gae_by_hand(batch: TensorDictBase, next_value_BT: torch.Tensor) -> torch.Tensor:
    """Advantages ``[B, T]`` of recorded values, rewards and ends."""
    value_BT, reward_BT = batch["state_value"][..., 0], batch["next", "reward"][..., 0]
    done_BT, terminated_BT = batch["next", "done"][..., 0], batch["next", "terminated"][..., 0]
    advantage_BT = torch.zeros_like(value_BT)
    for row in range(value_BT.shape[0]):
        later = 0.0
        for t in reversed(range(value_BT.shape[1])):
            bootstrap = 0.0 if terminated_BT[row, t] else float(next_value_BT[row, t])
            delta = float(reward_BT[row, t]) + GAMMA * bootstrap - float(value_BT[row, t])
            later = delta + GAMMA * LMBDA * (0.0 if done_BT[row, t] else later)
            advantage_BT[row, t] = later
    return advantage_BT


def assert_gae(batch: TensorDictBase, next_value_BT: torch.Tensor) -> None:
    advantage_BT = gae_by_hand(batch, next_value_BT)
    torch.testing.assert_close(batch["advantage"][..., 0], advantage_BT)
    torch.testing.assert_close(batch["value_target"][..., 0], advantage_BT + batch["state_value"][..., 0])


# --- 1. to 3. values and advantages -----------------------------------------------------------------------------------


@pytest.mark.parametrize(("turns", "terminal"), [(1, True), (2, False)])
def test_gae_unshifted_on_encoded_next_states(dialogues: Any, smol_dir: str, turns: int, terminal: bool) -> None:
    both, batch = dialogues(turns, terminal)
    critic = both.get_value_head()
    encoder_of(both[0])(batch["next"])

    out = estimate(batch, critic)

    state_BTD, next_state_BTD = batch[STATE], batch["next", *STATE]
    assert torch.equal(critic(batch.copy())["state_value"], critic.module(state_BTD))
    # GAE stacks the two batches, and a row of a larger matrix product may differ in its last bits.
    torch.testing.assert_close(out["state_value"], critic.module(state_BTD))
    torch.testing.assert_close(out["next", "state_value"], critic.module(next_state_BTD))
    assert_gae(out, out["next", "state_value"][..., 0])
    # The state after a turn is the state before the next one, and of the prompt alone.
    for row in range(2):
        for t in range(turns - 1):
            assert relative_error(next_state_BTD[row, t], state_BTD[row, t + 1]) < STATE_RTOL
        ids = batch[row, -1]["next", "tokens", "prompt"].tolist()
        truth_D = hf_oracle.teacher_force(smol_dir, ids, [0]).pooled("prompt", "mean")
        assert relative_error(next_state_BTD[row, -1], truth_D) < STATE_RTOL


@pytest.mark.parametrize(("turns", "terminal"), [(1, True), (1, False), (2, True), (2, False)])
def test_gae_shifted_without_next_states(dialogues: Any, turns: int, terminal: bool) -> None:
    both, batch = dialogues(turns, terminal)
    critic = both.get_value_head()

    out = estimate(batch, critic, shifted=True)

    value_BT = out["state_value"][..., 0]
    torch.testing.assert_close(value_BT, critic.module(batch[STATE])[..., 0])
    assert_gae(out, torch.cat([value_BT[:, 1:], value_BT[:, -1:]], 1))
    encoder_of(both[0])(batch["next"])
    exact = estimate(batch, critic)["advantage"]
    assert torch.allclose(out["advantage"], exact, rtol=1e-3, atol=1e-3) is terminal
    torch.testing.assert_close(estimate(batch, critic, shifted=True)["advantage"], exact, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("terminal", [True, False])
def test_gae_on_added_next_states(dialogues: Any, terminal: bool) -> None:
    both, batch = dialogues(turns=2, terminal=terminal)
    encoder, asked = encoder_of(both[0]), []
    exact = batch.copy()
    encoder(exact["next"])

    def encode(rows: TensorDictBase) -> TensorDictBase:
        asked.append(len(rows))
        return encoder(rows)

    critic = make_value_head(both[0])
    out = estimate(add_next_states(batch, encoder=encode), critic)

    torch.testing.assert_close(out["advantage"], estimate(exact, critic)["advantage"], rtol=1e-3, atol=1e-3)
    assert asked == ([] if terminal else [2])


def test_the_value_operator_itself_values_the_next_states(policy: Policy) -> None:
    both = operator(policy("text", segments=("prompt",), max_new_tokens=1))
    with torch.no_grad():
        batch = Walkers().rollout(4, both, break_when_any_done=False)
        value_operator = both.get_value_operator()
        value_operator(batch["next"])

    out = estimate(batch, None)

    assert batch.shape == (2, 4)
    critic = both.get_value_head()
    torch.testing.assert_close(out["state_value"], critic.module(batch[STATE]))
    torch.testing.assert_close(out["next", "state_value"], critic.module(batch["next", *STATE]))
    assert_gae(out, out["next", "state_value"][..., 0])


# --- 4. losses --------------------------------------------------------------------------------------------------------


def terms_by_hand(both: ActorValueOperator, batch: TensorDictBase, kind: type[LossModule]) -> dict[str, torch.Tensor]:
    """The losses' terms of the recorded states, actions, log-probs, advantages and targets."""
    state_BTD, advantage_BT = batch[STATE], batch["advantage"][..., 0]
    chosen = Categorical(logits=both.get_policy_head()[0].module(state_BTD))
    log_prob_BT = chosen.log_prob(batch["action"])
    gain_BT = log_prob_BT * advantage_BT
    if kind is ClipPPOLoss:
        ratio_BT = (log_prob_BT - batch["action_log_prob"]).exp()
        gain_BT = torch.minimum(ratio_BT * advantage_BT, ratio_BT.clamp(0.8, 1.2) * advantage_BT)
    value_BT1 = both.get_value_head().module(state_BTD)
    return {
        "loss_objective": -gain_BT.mean(),
        "loss_critic": nn.functional.smooth_l1_loss(value_BT1, batch["value_target"]),
        "loss_entropy": -0.01 * chosen.entropy().mean(),
    }


def loss_of(both: ActorValueOperator, kind: type[LossModule], built_from: str) -> LossModule:
    if built_from == "operator":
        return kind(both.get_policy_operator(), both.get_value_operator())
    return kind(both.get_policy_head(), both.get_value_head())


@pytest.mark.parametrize("kind", LOSSES)
@pytest.mark.parametrize("built_from", ["operator", "heads"])
def test_losses_train_the_heads(dialogues: Any, kind: type[LossModule], built_from: str) -> None:
    both, batch = dialogues(turns=2)
    batch = estimate(batch, both.get_value_head(), shifted=True)
    unmeasured = torch.cat([row.isnan() for row in batch.view(-1).get(("log_probs", "full"), as_list=True)])
    assert unmeasured.any()
    loss = loss_of(both, kind, built_from)
    heads = dict(both.named_parameters())
    assert len(heads) == 4
    before = {name: head.detach().clone() for name, head in heads.items()}
    optimizer = torch.optim.Adam(loss.parameters(), lr=1e-2)

    # The second step is off policy: a ratio of 1 would hide a wrong log-prob.
    for _ in range(2):
        terms = loss(dense(batch))
        expected = terms_by_hand(both, batch, kind)
        for name, term in expected.items():
            torch.testing.assert_close(terms[name], term, rtol=1e-3, atol=1e-4)
        optimizer.zero_grad()
        sum(terms[name] for name in expected).backward()
        gradients = {name: head.grad.clone() for name, head in heads.items()}
        expected_gradients = torch.autograd.grad(sum(expected.values()), list(heads.values()))
        for (name, gradient), truth in zip(gradients.items(), expected_gradients, strict=True):
            assert gradient.norm() > 0, name
            assert relative_error(gradient, truth) < 1e-2, name
        optimizer.step()
    assert all((heads[name] != before[name]).any() for name in heads)


@pytest.mark.parametrize("kind", LOSSES)
def test_losses_of_the_operator_on_an_ordinary_environment(policy: Policy, kind: type[LossModule]) -> None:
    both = operator(policy("text", segments=("prompt",), max_new_tokens=1))
    with torch.no_grad():
        batch = Walkers().rollout(3, both.get_policy_operator(), break_when_any_done=False)
    batch = estimate(batch, both.get_value_head(), shifted=True)

    terms = loss_of(both, kind, "operator")(batch)

    for name, term in terms_by_hand(both, batch, kind).items():
        torch.testing.assert_close(terms[name], term, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("kind", LOSSES)
def test_losses_of_a_buffers_samples(dialogues: Any, kind: type[LossModule]) -> None:
    both, batch = dialogues(turns=2)
    batch = estimate(batch, both.get_value_head(), shifted=True)
    stored = buffer(batch_size=4)
    stored.extend(batch.reshape(-1))

    sample = dense(stored.sample())

    assert sample.shape == (4,)
    terms = loss_of(both, kind, "heads")(sample)
    for name, term in terms_by_hand(both, batch, kind).items():
        torch.testing.assert_close(terms[name], term)


# --- 5. log-probs of given sequences ----------------------------------------------------------------------------------


@pytest.mark.parametrize("padded", [False, True])
def test_log_prob_of_what_was_sampled(policy: Policy, chat_ids: Callable[[str], list[int]], padded: bool) -> None:
    # At temperature 1: log-probs of given sequences are those of the model's own distribution.
    sampler = policy("tokens", pad_output=padded, max_new_tokens=4, temperature=1.0)
    sampled = sampler(tokens_input([chat_ids(question) for question in QUESTIONS[:3]]))
    scorer = sampler.get_new_version(generate=False)

    found = scorer.log_prob(sampled, as_list=True)

    said = sampled.get(("log_probs", "response"), as_list=True)
    assert len(found) == 3
    for found_T, said_T in zip(found, said, strict=True):
        torch.testing.assert_close(found_T, said_T[~said_T.isnan()], atol=LOG_PROB_ATOL, rtol=0)
    assert scorer.log_prob(sampled, as_padded_tensor=True).isfinite().all()
