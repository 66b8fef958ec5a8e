"""Logits of every turn of a conversation reach the environment: a transform of `ChatEnv` rewards with them."""

from __future__ import annotations

import pytest
import torch
from helpers.logits_checks import LOGITS_ATOL, logits_of
from helpers.policy_checks import QUESTIONS
from helpers.torchrl_pipelines import chat_env, collector, flat
from tensordict import TensorDictBase
from torchrl.data import Composite, Unbounded
from torchrl.envs import Transform

from torchrl_sglang_hidden import DisallowedTokens, LogitsSpec, SGLangHiddenWrapper, SGLangServer

TURNS = 2
EOS_ID = 2


class Sureness(Transform):
    """Rewards a turn with how far the best token led the next best, on average over the answer; float32 ``[B, 1]``."""

    def _step(self, tensordict: TensorDictBase, next_tensordict: TensorDictBase) -> TensorDictBase:
        leads = [(row[:, 0] - row[:, 1]).mean() for row in tensordict.get(("logits", "response"), as_list=True)]
        return next_tensordict.set("reward", torch.stack(leads)[:, None])

    def transform_reward_spec(self, reward_spec: Composite) -> Composite:
        reward_spec["reward"] = Unbounded(shape=(*reward_spec.shape, 1))
        return reward_spec


@pytest.mark.parametrize("through", ["rollout", "collector"])
def test_a_transform_rewards_with_the_turns_logits(smol: SGLangServer, smol_dir: str, through: str) -> None:
    # Answers of several lengths, and no turn so short that its logits could be those of another.
    policy = SGLangHiddenWrapper(
        smol,
        logits=LogitsSpec(top_k=2),
        constraints=DisallowedTokens([EOS_ID], first_tokens=3),
        generate_kwargs={"max_new_tokens": 12, "temperature": 0},
    )
    env = chat_env(QUESTIONS[:2], batch_size=2, turns=TURNS, transforms=[Sureness()])
    if through == "rollout":
        turns = flat(env.rollout(TURNS, policy, break_when_any_done=False))
    else:
        batches = collector(env, policy, turns_per_batch=2 * TURNS, total_turns=2 * TURNS)
        turns = [turn for batch in batches for turn in flat(batch)]
        batches.shutdown()
    assert len(turns) == 2 * TURNS
    rewards = []
    for turn in turns:
        prompt_ids, response_ids = turn["tokens"].prompt.tolist(), turn["tokens"].response.tolist()
        logits_NV = logits_of(smol_dir, (*prompt_ids, *response_ids))
        expected = logits_NV[len(prompt_ids) - 1 : -1].topk(2)
        torch.testing.assert_close(turn["logits"].response, expected.values, atol=LOGITS_ATOL, rtol=0)
        lead = (expected.values[:, 0] - expected.values[:, 1]).mean()
        torch.testing.assert_close(turn["next", "reward"], lead[None], atol=2 * LOGITS_ATOL, rtol=0)
        rewards.append(float(lead))
    assert len(set(rewards)) == len(rewards)
