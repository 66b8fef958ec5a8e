"""`CentroidReward`: a reward without a judge, from how near a rollout ends to where most of its group end."""

from __future__ import annotations

from typing import Literal

import torch
from tensordict import TensorDictBase
from tensordict.utils import NestedKey

from torchrl_sglang_hidden.errors import InputError, InputTypeError
from torchrl_sglang_hidden.rl.group_reward import Combine, GroupReward, check_number
from torchrl_sglang_hidden.rl.groups import Group, read_state

__all__ = ["CentroidReward"]

# Distances of states that differ by the rounding of float32 alone; as a bandwidth these would tell noise apart.
_LEAST_BANDWIDTH = 1e-9


class CentroidReward(GroupReward):
    """Rewards a rollout by how near its terminal state is to the robust centroid of its group's.

    After Latent-GRPO (Zhang et al. 2026, "Silence the Judge: Reinforcement Learning with Self-Verifier via Latent
    Geometric Clustering", arXiv:2601.08427), which finds that the terminal states of right answers lie close together
    and those of wrong ones apart. Its parts are: terminal states, a projection onto the sphere, a centroid that is
    estimated again and again with less weight for outliers, and a dense reward from the distance to it. The kernel and
    its width are this package's choice: a state at the cosine distance d from the centroid has the weight, and in the
    end the reward, ``exp(-d / (bandwidth · median d of the group))``, in (0, 1], whatever the length of the states and
    however alike a model's states are. It is a vote: where most of a group are wrong, it rewards the wrong.

    A transform for a replay buffer, which acts on what is written, before ``MCAdvantage`` in time, and so behind it in
    ``Compose``: ``Compose(MCAdvantage(8), CentroidReward(8))``. Or for a batch of whole groups: ``reward.inv(batch)``.

    Args:
        group_size: G, the rollouts of one prompt, at least 3: of two, both are equally near.
        state_key: where the state stands whose last step's value is a rollout's terminal state, ``[D]`` or ``[K, D]``
            for each step: pooled with ``HiddenSpec(pooling="last")``.
        out_key: where the scores are written, at every step, in shape and dtype of the rewards.
        iterations: how often the centroid is estimated again after the plain mean; ``0`` is the ablation of robustness.
        bandwidth: the width of the kernel, in medians.
        scale: what the score is multiplied with in the reward.
        combine: ``"replace"``: it is the reward of the last step, and the others' are 0; ``"add"``: it is added to the
            last step's; None: the rewards stay as they are.
        group_key: a string or tensor that is the same in all rollouts of a group; ChatEnv's question.
        reward_key, done_key: as in ``MCAdvantage``.
        ablate: a control: ``"zero"``: all scores are 0; ``"shuffle"``: each rollout has the score of another one of its
            group.

    Raises:
        InputError: G below 3, numbers out of range; when it is called, states of several sizes, zeros, or not finite.
        InputTypeError: an argument or a leaf of another type.
        MissingKeyError: data without one of the keys.

    Example:
        >>> buffer = ReplayBuffer(
        ...     storage=LazyStackStorage(64), transform=Compose(MCAdvantage(8), CentroidReward(8)), batch_size=64
        ... )
    """

    def __init__(
        self,
        group_size: int,
        *,
        state_key: NestedKey = ("hidden_states", "response"),
        out_key: NestedKey = "centroid_reward",
        iterations: int = 10,
        bandwidth: float = 1.0,
        scale: float = 1.0,
        combine: Combine | None = "replace",
        group_key: NestedKey = "query",
        reward_key: NestedKey = ("next", "reward"),
        done_key: NestedKey = ("next", "done"),
        ablate: Literal["zero", "shuffle"] | None = None,
    ) -> None:
        super().__init__(
            group_size,
            fewest=3,
            why="of two, both are equally near to their centroid",
            state_key=state_key,
            out_key=out_key,
            scale=scale,
            combine=combine,
            group_key=group_key,
            reward_key=reward_key,
            done_key=done_key,
            ablate=ablate,
        )
        if type(iterations) is not int:
            raise InputTypeError(f"iterations={iterations!r:.80}: expected an integer of at least 0")
        if iterations < 0:
            raise InputError(f"iterations={iterations}: expected an integer of at least 0")
        self.iterations = iterations
        self.bandwidth = check_number("bandwidth", bandwidth, above=0)

    def _read(self, steps: TensorDictBase) -> torch.Tensor:
        state_D = read_state(steps[-1], self.state_key)
        if not state_D.any():
            raise InputError(f"{self.state_key!r}: a state is all zeros, and has no direction; leave its row out")
        return state_D

    def _scores(self, group: Group) -> torch.Tensor:
        states_GD = group.features_GF
        units_GD = states_GD / states_GD.norm(dim=-1, keepdim=True)
        weights_G: torch.Tensor = units_GD.new_ones(len(units_GD))
        for _ in range(self.iterations + 1):
            centroid_D = weights_G @ units_GD
            centroid_D = centroid_D / centroid_D.norm().clamp(min=torch.finfo(torch.float64).tiny)
            # Half the squared distance, and not 1 - cosine, which would cancel.
            distances_G = (units_GD - centroid_D).square().sum(-1) / 2
            width = self.bandwidth * distances_G.quantile(0.5).clamp(min=_LEAST_BANDWIDTH)
            weights_G = (-distances_G / width).exp()
        return weights_G
