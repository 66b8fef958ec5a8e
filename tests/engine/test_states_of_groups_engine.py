"""Baselines, bonuses, rewards and ranks on states: from a collector's rollouts to a step of GRPO, on a real server.

Every number is computed again in float64 from the states that Hugging Face has of the same tokens. Two conversations of
two turns each are sampled four times; the second collection is predicted by the probe that the first one fitted.
"""

from __future__ import annotations

import zlib

import pytest
import torch
from helpers import hf_oracle
from helpers.group_references import Probe, bonuses, closeness, rank
from helpers.policy_checks import QUESTIONS
from helpers.torchrl_pipelines import AnswerReward, chat_env, collector
from helpers.weight_changes import load_trainer
from tensordict import TensorDictBase
from torchrl.data import Composite, LazyStackStorage, ReplayBuffer, Unbounded
from torchrl.data.replay_buffers.samplers import SamplerWithoutReplacement
from torchrl.envs.transforms import Compose
from torchrl.modules.llm import TransformersWrapper
from torchrl.objectives.llm import GRPOLoss
from transformers import PreTrainedTokenizerBase

from torchrl_sglang_hidden import HiddenSpec, LastTokens, SGLangHiddenWrapper, SGLangServer
from torchrl_sglang_hidden.rl import CentroidReward, CrossRolloutBaseline, EffectiveRank, ExplorationBonus

GROUP, TURNS = 4, 2
CHATS = [QUESTIONS[5], QUESTIONS[9]]
ROWS = GROUP * len(CHATS)
END = ("hidden_states", "spans", "end")
# Of states that agree to 1e-4; the probe and the kernels amplify this.
CLOSE = {"rel": 0.02, "abs": 0.01}


class TokenReward(AnswerReward):
    """Rewards of the shape that GRPOLoss wants, ``[B, 1, 1]``, that hardly ever tie."""

    def __init__(self) -> None:
        super().__init__(lambda text: zlib.crc32(text.encode()) % 1000 / 1000)

    def _step(self, tensordict: TensorDictBase, next_tensordict: TensorDictBase) -> TensorDictBase:
        out = super()._step(tensordict, next_tensordict)
        return out.set("reward", out["reward"].unsqueeze(-1))

    def transform_reward_spec(self, reward_spec: Composite) -> Composite:
        reward_spec["reward"] = Unbounded(shape=(*reward_spec.shape, 1, 1))
        return reward_spec


class Conversation:
    """One rollout, with Hugging Face's states of it."""

    def __init__(self, steps: list[TensorDictBase], smol_dir: str) -> None:
        self.steps = steps
        self.truths = []
        for step in steps:
            tokens = step["tokens"]
            self.truths.append(hf_oracle.teacher_force(smol_dir, tokens.prompt.tolist(), tokens.response.tolist()))
        self.total = sum(float(step["next", "reward"]) for step in steps)
        rows = [truth.rows("response").double() for truth in self.truths]
        self.mean = torch.cat(rows).mean(0)
        self.end = rows[-1][-1]
        self.features = torch.cat([self.truths[0].rows("prompt").double().mean(0), self.end])
        self.ranks = [rank(row) for row in rows]


def groups_of(batch: TensorDictBase, smol_dir: str) -> list[list[Conversation]]:
    """Return the rollouts of a buffer's content, in the order in which they were written."""
    steps = list(batch.unbind(0))
    rollouts = [steps[start : start + TURNS] for start in range(0, len(steps), TURNS)]
    assert all(rollout[-1]["next", "done"].all() and not rollout[0]["next", "done"].any() for rollout in rollouts)
    made = [Conversation(rollout, smol_dir) for rollout in rollouts]
    groups = [made[start : start + GROUP] for start in range(0, len(made), GROUP)]
    assert all(len({one.steps[0]["query"] for one in group}) == 1 for group in groups)
    return groups


def others(values: list[float]) -> list[float]:
    return [(sum(values) - value) / (len(values) - 1) for value in values]


def test_from_rollouts_to_a_step(smol: SGLangServer, smol_dir: str, tokenizer: PreTrainedTokenizerBase) -> None:
    policy = SGLangHiddenWrapper(
        smol,
        tokenizer=tokenizer,
        hidden=HiddenSpec(("prompt", "response"), tokens=True, spans={"end": LastTokens(1, segment="response")}),
        generate_kwargs={"max_new_tokens": 8, "temperature": 1.0},
    )
    baseline = CrossRolloutBaseline(GROUP, end_state_key=END, window=16, min_rollouts=8)
    bonus, centroid = (
        ExplorationBonus(GROUP, project=None, combine=None),
        CentroidReward(GROUP, state_key=END, combine=None),
    )
    buffer = ReplayBuffer(
        storage=LazyStackStorage(2 * ROWS * TURNS),
        sampler=SamplerWithoutReplacement(),
        transform=Compose(baseline, bonus, centroid),
        batch_size=4,
    )
    env = chat_env(CHATS, batch_size=ROWS, turns=TURNS, repeats=GROUP, transforms=[TokenReward()])
    turns = collector(env, policy, turns_per_batch=ROWS * TURNS, replay_buffer=buffer)
    seen: list[tuple[torch.Tensor, float]] = []
    try:
        batches = iter(turns)
        for collection in range(2):
            buffer.empty()
            next(batches)
            assert len(buffer) == ROWS * TURNS
            assert baseline.window_size == (collection + 1) * ROWS
            batch = EffectiveRank()(buffer[:])
            probe = None
            if seen:
                features, targets = zip(*seen, strict=True)
                probe = Probe(torch.stack(features), torch.tensor(targets).double())
            for group in groups_of(batch, smol_dir):
                returns = [one.total for one in group]
                values = others([probe(one.features) for one in group] if probe else returns)
                expected = {
                    "baseline": values,
                    "advantage": [one - value for one, value in zip(returns, values, strict=True)],
                    "exploration_bonus": bonuses(torch.stack([one.mean for one in group]), 0.1),
                    "centroid_reward": closeness(torch.stack([one.end for one in group]), 10, 1.0),
                }
                for key, numbers in expected.items():
                    for turn in range(TURNS):
                        found = [float(one.steps[turn][key]) for one in group]
                        assert found == pytest.approx(numbers, **CLOSE), (collection, key)
                for one in group:
                    assert [float(step["effective_rank"]) for step in one.steps] == pytest.approx(
                        one.ranks, rel=1e-3, nan_ok=True
                    )
                seen += [(one.features, target) for one, target in zip(group, others(returns), strict=True)]
    finally:
        turns.shutdown()

    # On policy every ratio is 1: the loss is the mean advantage of the tokens, and its gradient is the trainer's.
    sample = buffer.sample()
    model = load_trainer(smol_dir).eval()
    trainer = TransformersWrapper(model, tokenizer=tokenizer, input_mode="tokens", generate=False)
    losses = GRPOLoss(trainer, entropy_bonus=False)(sample)
    tokens = [len(ids) for ids in sample.get(("tokens", "response"), as_list=True)]
    advantages = sample["advantage"].flatten().tolist()
    mean = sum(count * one for count, one in zip(tokens, advantages, strict=True)) / sum(tokens)
    assert losses.loss_objective.item() == pytest.approx(-mean, abs=1e-3)
    losses.loss_objective.backward()
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    assert norm.isfinite()
    assert norm > 0
    torch.optim.SGD(model.parameters(), lr=1e-3).step()
