"""Rollouts of several prompts as a collector gives them, with states, rewards and tokens that a test can compute.

rollouts = [rollout("a", turns=2, seed=0), rollout("a", turns=1, seed=1)]
batch = ragged(rollouts)        # [3], a lazy stack of steps, whose tokens differ in length
batch = dense(rollouts)         # [2, T], where all have as many turns
"""

from __future__ import annotations

import torch
from tensordict import NonTensorData, TensorDict, TensorDictBase, lazy_stack

SIZE = 6


def rollout(
    question: str,
    *,
    turns: int = 1,
    seed: int,
    size: int = SIZE,
    reward: float | None = None,
    reward_shape: tuple[int, ...] = (1,),
    dtype: torch.dtype = torch.float32,
) -> list[TensorDictBase]:
    """Return the steps of one rollout, without batch dimensions.

    Args:
        reward: of the last step; by default every step has a random one.
        reward_shape: of one step's, of one number.
        dtype: of the states.
    """
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator)

    # That of the first turn is the same in all rollouts of a question.
    start = torch.randn(size, generator=torch.Generator().manual_seed(sum(map(ord, question))))
    steps = []
    for turn in range(turns):
        last = turn == turns - 1
        tokens = 2 + (seed + turn) % 3
        value = normal(1) if reward is None else torch.tensor([float(reward) if last else 0.0])
        done = torch.tensor([last])
        steps.append(
            TensorDict(
                query=NonTensorData(question),
                tokens=torch.arange(tokens),
                sampling=TensorDict(entropy=normal(tokens).abs()),
                hidden_states=TensorDict(
                    prompt=(start if turn == 0 else normal(size)).to(dtype),
                    response=(3 + normal(size)).to(dtype),
                    response_count=torch.tensor(tokens),
                ),
                next=TensorDict(reward=value.reshape(reward_shape), done=done, terminated=done.clone()),
            )
        )
    return steps


def ragged(rollouts: list[list[TensorDictBase]]) -> TensorDictBase:
    """Return all steps one behind the other, ``[N]``, as a lazy stack."""
    return lazy_stack([step.clone() for steps in rollouts for step in steps])


def dense(rollouts: list[list[TensorDictBase]]) -> TensorDictBase:
    """Return a plain batch ``[B, T]``, without what is ragged."""
    return torch.stack(
        [torch.stack([step.clone().exclude("tokens", "sampling") for step in steps]) for steps in rollouts]
    )


def groups(
    questions: int, group_size: int, *, seed: int = 0, turns: int = 1, **options: object
) -> list[list[TensorDictBase]]:
    """Return ``group_size`` rollouts of each question, those of a question in turn with those of the others."""
    return [
        rollout(f"question {question}", turns=turns, seed=seed + 100 * number + question, **options)  # type: ignore[arg-type]
        for number in range(group_size)
        for question in range(questions)
    ]


def states_of(steps: list[TensorDictBase]) -> torch.Tensor:
    """Return the prompt's state of the first step and the response's of the last, float64 ``[2·D]``."""
    return torch.cat([steps[0]["hidden_states", "prompt"], steps[-1]["hidden_states", "response"]]).double()


def return_of(steps: list[TensorDictBase]) -> float:
    """Return the sum of a rollout's rewards."""
    return sum(float(step["next", "reward"].sum()) for step in steps)
