"""`GroupReward`: a number for each rollout of a group, and whether it becomes the reward, or a part of it.

Knows nothing of how the number is found.
"""

from __future__ import annotations

import random
from abc import abstractmethod
from typing import Literal, TypeAlias, get_args

import torch
from tensordict.utils import NestedKey, unravel_key

from torchrl_sglang_hidden.errors import InputError, InputTypeError
from torchrl_sglang_hidden.rl.ablations import check_ablation
from torchrl_sglang_hidden.rl.groups import Group, GroupTransform

__all__ = ["Combine", "GroupReward", "check_number"]

Combine: TypeAlias = Literal["add", "replace"]
ABLATIONS = ("zero", "shuffle")


def check_number(name: str, value: float, *, above: float) -> float:
    """Return a number; refuse what is none, or too small."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise InputTypeError(f"{name}={value!r:.80}: expected a number above {above}")
    if not above < value < float("inf"):
        raise InputError(f"{name}={value}: expected a finite number above {above}")
    return float(value)


class GroupReward(GroupTransform):
    """Writes a score of each rollout in its group, and makes it, or adds it to, the reward of the rollout's last step.

    Args:
        group_size, fewest, why, group_key, reward_key, done_key: as in `GroupTransform`.
        state_key: where the pooled states stand.
        out_key: where the scores are written, unscaled, at every step, in shape and dtype of the rewards.
        scale: what a score is multiplied with in the reward.
        combine: whether it is added to the last step's reward, or replaces the rewards of all steps; None leaves the
            rewards alone.
        ablate: ``"zero"``: all scores are 0; ``"shuffle"``: each rollout has the score of another one of its group.
    """

    def __init__(
        self,
        group_size: int,
        *,
        fewest: int,
        why: str,
        state_key: NestedKey,
        out_key: NestedKey,
        scale: float,
        combine: Combine | None,
        group_key: NestedKey,
        reward_key: NestedKey,
        done_key: NestedKey,
        ablate: Literal["zero", "shuffle"] | None,
    ) -> None:
        super().__init__(
            group_size, fewest=fewest, why=why, group_key=group_key, reward_key=reward_key, done_key=done_key
        )
        if combine is not None and combine not in get_args(Combine):
            raise InputError(f"combine={combine!r:.80}: expected None or one of {get_args(Combine)}")
        check_ablation(ablate, ABLATIONS)
        self.state_key, self.out_key = unravel_key(state_key), unravel_key(out_key)
        self.in_keys = [self.state_key, self.group_key, self.reward_key, self.done_key]
        self.out_keys = [self.out_key, *([] if combine is None else [self.reward_key])]
        self.scale = check_number("scale", scale, above=0)
        self.combine, self.ablate = combine, ablate
        self._random = random.Random(0)

    @abstractmethod
    def _scores(self, group: Group) -> torch.Tensor:
        """Return the scores of a group's rollouts, float64 ``[G]``."""

    def _handle(self, groups: list[Group]) -> None:
        for group in groups:
            scores_G = self._scores(group)
            if self.ablate == "zero":
                scores_G = torch.zeros_like(scores_G)
            elif self.ablate == "shuffle":
                # A rotation leaves none its own, and every one has the same chance.
                scores_G = scores_G.roll(self._random.randrange(1, self.group_size))
            for rollout, score in zip(group.rollouts, scores_G, strict=True):
                steps, rewards = rollout.steps, rollout.rewards
                steps.set(self.out_key, score.to(rewards).expand(rewards.shape).clone())
                if self.combine is None:
                    continue
                changed = torch.zeros_like(rewards) if self.combine == "replace" else rewards.clone()
                changed[-1] += self.scale * score.to(rewards)
                steps.set(self.reward_key, changed)
