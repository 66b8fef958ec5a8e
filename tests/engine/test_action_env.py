"""A language model as the policy of an ordinary environment: its candidates are the actions, the environment's mask
says which it may choose, and torchrl's collectors and losses take it for any other actor.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from tensordict import NonTensorData, TensorDict, TensorDictBase, lazy_stack
from torchrl.collectors import Collector
from torchrl.data import Binary, Categorical, Composite, LazyTensorStorage, NonTensor, ReplayBuffer, Unbounded
from torchrl.envs import EnvBase, ExplorationType, SerialEnv, set_exploration_type
from torchrl.envs.utils import check_env_specs
from torchrl.modules import ValueOperator
from torchrl.objectives import A2CLoss, ClipPPOLoss
from torchrl.objectives.value import GAE

from torchrl_sglang_hidden import CandidateActor, SGLangHiddenWrapper
from torchrl_sglang_hidden.errors import InputError

Policy = Callable[..., SGLangHiddenWrapper]

ACTIONS = [" left", " right", " stay here"]
MOVES = (-1, 1, 0)
LENGTH = 4


class Corridor(EnvBase):
    """A walk from place 1 to the last of `LENGTH`: the prompt tells the place, the mask that walls are no way."""

    def __init__(self) -> None:
        super().__init__(batch_size=())
        self.observation_spec = Composite(
            prompt=NonTensor(shape=(), example_data=""),
            place=Unbounded(shape=(1,), dtype=torch.float32),
            action_mask=Binary(shape=(len(ACTIONS),), dtype=torch.bool),
        )
        self.action_spec = Categorical(len(ACTIONS), shape=())
        self.reward_spec = Unbounded(shape=(1,))
        self.place = 1

    def _observe(self) -> dict[str, object]:
        places = " ".join("you" if place == self.place else "-" for place in range(LENGTH))
        return {
            "prompt": NonTensorData(f"The corridor: {places} exit. To leave it, you go"),
            "place": torch.tensor([float(self.place)]),
            "action_mask": torch.tensor([self.place > 0, True, self.place != 2]),
        }

    def _reset(self, tensordict: TensorDictBase | None, **kwargs: object) -> TensorDictBase:
        self.place = 1
        return TensorDict(self._observe())

    def _step(self, tensordict: TensorDictBase) -> TensorDictBase:
        self.place = max(self.place + MOVES[int(tensordict["action"])], 0)
        done = self.place == LENGTH
        return TensorDict(
            {**self._observe(), "reward": torch.tensor([float(done)]), "done": torch.tensor([done])},
        )

    def _set_seed(self, seed: int | None) -> None:
        pass


@pytest.fixture
def scorer(policy: Policy) -> SGLangHiddenWrapper:
    return policy("text").get_new_version(hidden=None, input_key="prompt")


@pytest.fixture
def actor(scorer: SGLangHiddenWrapper) -> CandidateActor:
    return CandidateActor(scorer, ACTIONS, action_mask_key="action_mask", spec=Corridor().action_spec)


def critic() -> ValueOperator:
    return ValueOperator(torch.nn.Linear(1, 1), in_keys=["place"])


def assert_chosen(step: TensorDictBase, scorer: SGLangHiddenWrapper) -> None:
    """Check one step: its logits are of its own prompt, and its log-prob is of its action."""
    scores = scorer.score(step, ACTIONS, mask=step["action_mask"])
    torch.testing.assert_close(step["logits"], scores["logits"], atol=1e-3, rtol=0)
    assert torch.equal(step["logits_mask"], step["action_mask"])
    assert step["action_mask"][step["action"]]
    log_probs_A = step["logits"].log_softmax(-1)
    torch.testing.assert_close(step["action_log_prob"], log_probs_A[step["action"]])


def test_the_environment_is_sound() -> None:
    check_env_specs(Corridor())


def test_a_rollout(actor: CandidateActor, scorer: SGLangHiddenWrapper) -> None:
    rollout = Corridor().rollout(8, actor, break_when_any_done=False)
    assert rollout.batch_size == (8,)
    assert not rollout["action_mask"].all(), "no mask had a say: tests nothing"
    for step in rollout.unbind(0):
        assert_chosen(step, scorer)


def test_deterministic_exploration_takes_the_best_allowed_action(actor: CandidateActor) -> None:
    with set_exploration_type(ExplorationType.DETERMINISTIC):
        rollouts = [Corridor().rollout(6, actor) for _ in range(2)]
    for rollout in rollouts:
        assert torch.equal(rollout["action"], rollout["logits"].argmax(-1))
    assert torch.equal(rollouts[0]["action"], rollouts[1]["action"])


def test_several_environments_are_one_batch(actor: CandidateActor, scorer: SGLangHiddenWrapper) -> None:
    env = SerialEnv(3, Corridor)
    rollout = env.rollout(3, actor, break_when_any_done=False)
    assert rollout.batch_size == (3, 3)
    for row in rollout.unbind(0):
        for step in row.unbind(0):
            assert_chosen(step, scorer)


def test_a_collector(actor: CandidateActor, scorer: SGLangHiddenWrapper) -> None:
    collector = Collector(Corridor, actor, frames_per_batch=6, total_frames=12, auto_register_policy_transforms=False)
    batches = [batch.clone() for batch in collector]
    collector.shutdown()
    assert [batch.batch_size for batch in batches] == [(6,), (6,)]
    for batch in batches:
        for step in batch.unbind(0):
            assert_chosen(step, scorer)
    buffer = ReplayBuffer(storage=LazyTensorStorage(12), batch_size=4)
    for batch in batches:
        buffer.extend(batch.exclude("prompt", ("next", "prompt")))
    sample = buffer.sample()
    assert sample["logits"].shape == (4, len(ACTIONS))


@pytest.mark.parametrize("make_loss", [A2CLoss, ClipPPOLoss])
def test_losses_train_the_critic(actor: CandidateActor, make_loss: Callable[..., torch.nn.Module]) -> None:
    """No gradient reaches the served model; the rest of an actor-critic's loss is as with any other actor."""
    batch = Corridor().rollout(6, actor, break_when_any_done=False)
    value = critic()
    GAE(gamma=0.9, lmbda=0.9, value_network=value)(batch)
    loss = make_loss(actor, value)
    found = loss(batch)
    objective = found["loss_objective"]
    assert objective.isfinite()
    assert not objective.requires_grad
    found["loss_critic"].backward()
    assert sum(float(parameter.grad.abs().sum()) for parameter in loss.parameters() if parameter.grad is not None) > 0
    if make_loss is ClipPPOLoss:
        # The same model says the same of the same prompts.
        assert float(found["kl_approx"]) == pytest.approx(0, abs=1e-3)
        assert float(found["clip_fraction"]) == 0


def test_the_whole_policy_scores_a_stack_of_prompts(scorer: SGLangHiddenWrapper) -> None:
    steps = [TensorDict(prompt=NonTensorData(text)) for text in ("Go", "The way out is on the")]
    together = scorer.score(lazy_stack(steps), ACTIONS)
    for row, step in zip(together.unbind(0), steps, strict=True):
        alone = scorer.score(step, ACTIONS)
        torch.testing.assert_close(row["logits"], alone["logits"], atol=1e-3, rtol=0)


def test_an_environment_whose_mask_has_another_length_is_refused(scorer: SGLangHiddenWrapper) -> None:
    actor = CandidateActor(scorer, ACTIONS[:2], action_mask_key="action_mask")
    with pytest.raises(InputError, match=r"mask: shape \(3,\); expected \(2,\)"):
        Corridor().rollout(2, actor)
