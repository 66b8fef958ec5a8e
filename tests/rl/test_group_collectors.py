"""What a collector brings home from chats of two turns, through all parts over groups, against references."""

from __future__ import annotations

import pytest
import torch
from helpers.group_references import Probe, bonuses, closeness, rank
from helpers.policy_batches import make
from helpers.torchrl_pipelines import AnswerReward, chat_env, collector
from tensordict import TensorDictBase
from torchrl.data import LazyStackStorage, ReplayBuffer
from torchrl.envs.transforms import Compose

from torchrl_sglang_hidden import HiddenSpec, LastTokens
from torchrl_sglang_hidden.rl import CentroidReward, CrossRolloutBaseline, EffectiveRank, ExplorationBonus

GROUP, TURNS = 4, 2
END = ("hidden_states", "spans", "end")
CLOSE = {"rel": 1e-3, "abs": 1e-3}


def rows(step: TensorDictBase, segment: str) -> torch.Tensor:
    return step["token_hidden_states", segment].double()


def others(values: list[float]) -> list[float]:
    return [(sum(values) - value) / (len(values) - 1) for value in values]


def expected_of(group: list[list[TensorDictBase]], probe: Probe | None) -> dict[str, list[float]]:
    returns = [sum(float(step["next", "reward"]) for step in steps) for steps in group]
    values = others(returns if probe is None else [probe(features_of(steps)) for steps in group])
    means = torch.stack([torch.cat([rows(step, "response") for step in steps]).mean(0) for steps in group])
    ends = torch.stack([rows(steps[-1], "response")[-1] for steps in group])
    return {
        "baseline": values,
        "advantage": [one - value for one, value in zip(returns, values, strict=True)],
        "exploration_bonus": bonuses(means, 0.1),
        "centroid_reward": closeness(ends, 10, 1.0),
    }


def features_of(steps: list[TensorDictBase]) -> torch.Tensor:
    return torch.cat([rows(steps[0], "prompt").mean(0), rows(steps[-1], "response")[-1]])


def test_two_turns_through_all_parts() -> None:
    hidden = HiddenSpec(("prompt", "response"), tokens=True, spans={"end": LastTokens(1)})
    policy, _ = make("history", hidden=hidden, generate_kwargs={"max_new_tokens": 5})
    # The fake engine answers one question one way: groups are of different questions, told apart by a number.
    questions = [
        " ".join(f"w{1 + (number + word) % 9}" for word in range(1 + number % 4)) for number in range(2 * GROUP)
    ]
    env = chat_env(
        questions, batch_size=2 * GROUP, turns=TURNS, transforms=[AnswerReward()], follow_ups=("w3", "w4 w5")
    )
    baseline = CrossRolloutBaseline(GROUP, end_state_key=END, group_key="group", window=16, min_rollouts=8)
    chain = Compose(
        baseline,
        ExplorationBonus(GROUP, group_key="group", project=None, combine=None),
        CentroidReward(GROUP, group_key="group", state_key=END, combine=None),
    )
    buffer = ReplayBuffer(storage=LazyStackStorage(64), transform=chain, batch_size=4)
    turns = collector(env, policy, turns_per_batch=2 * GROUP * TURNS, total_turns=4 * GROUP * TURNS)
    seen: list[tuple[torch.Tensor, float]] = []
    try:
        for number, batch in enumerate(turns):
            assert batch.batch_size == (2 * GROUP, TURNS)
            batch["group"] = torch.arange(2 * GROUP)[:, None, None].expand(-1, TURNS, 1) // GROUP
            buffer.empty()
            buffer.extend(batch)
            assert len(buffer) == 2 * GROUP * TURNS
            probe = None
            if number:
                features, targets = zip(*seen, strict=True)
                probe = Probe(torch.stack(features), torch.tensor(targets).double())
            steps = list(EffectiveRank()(buffer[:]).unbind(0))
            rollouts = [steps[start : start + TURNS] for start in range(0, len(steps), TURNS)]
            for group in (rollouts[:GROUP], rollouts[GROUP:]):
                for key, numbers in expected_of(group, probe).items():
                    for turn in range(TURNS):
                        assert [float(one[turn][key]) for one in group] == pytest.approx(numbers, **CLOSE), key
                for one in [step for steps in group for step in steps]:
                    found = float(one["effective_rank"])
                    assert found == pytest.approx(rank(rows(one, "response")), rel=1e-3, nan_ok=True)
                returns = [sum(float(step["next", "reward"]) for step in one) for one in group]
                seen += [(features_of(one), target) for one, target in zip(group, others(returns), strict=True)]
        assert number == 1
        assert baseline.window_size == 16
    finally:
        turns.shutdown()
