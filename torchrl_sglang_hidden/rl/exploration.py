"""`ExplorationBonus`: a bonus for rollouts whose states are unlike those of the others in their group."""

from __future__ import annotations

from typing import Literal

import torch
from tensordict import TensorDictBase
from tensordict.utils import NestedKey

from torchrl_sglang_hidden.errors import InputError
from torchrl_sglang_hidden.rl.group_reward import Combine, GroupReward, check_number
from torchrl_sglang_hidden.rl.groups import Group, read_state
from torchrl_sglang_hidden.rl.projection import make_sparse_projection

__all__ = ["ExplorationBonus"]

# The least unit, over the states' own length. One response in batches of several sizes was found 3e-7 apart, by the
# rounding of float32: with a unit of this size it has a bonus of 0.01, and with one of 1e-6 of almost 1.
_LEAST_SPREAD = 1e-4


class ExplorationBonus(GroupReward):
    """Gives each rollout a bonus for what its states have that those of the others in its group have not.

    After RepExp (Tuyls et al. 2025, "Representation-Based Exploration for Language Models: From Test-Time to
    Post-Training", arXiv:2510.11686): the mean of a response's states, centred in the group, in a sparse random
    projection, and its elliptical norm, the bonus of linear bandits (Abbasi-Yadkori et al. 2011),

        ``sqrt(φᵢᵀ (λ I + Σ_{j≠i} φⱼ φⱼᵀ)⁻¹ φᵢ)``,

    over the group's other rollouts. Three things are this package's choice. λ is given in units of the group's mean
    squared ``‖φ‖²``: the bonus is the same whatever the length of a model's states. A group that spreads by less than
    1e-4 of its states' length is taken to spread so far: equal responses, which the rounding of float32 tells apart,
    have a bonus near 0; a server in bfloat16 rounds further than that. And the root is taken, as linear bandits have
    it; the authors' program (verl's recipe ``rep_exp``) adds the square, in the training runs that it comes with over
    all rollouts, the one itself too, with λ = 0.01 and a scale of 0.01, and gives no bonus to a group in which no
    rollout was right. Their ``scale`` and ``ridge`` are therefore no values for these. With λ far below 1 and more
    dimensions than rollouts every rollout's bonus nears ``sqrt(G - 1)``, and tells nothing.

    A transform for a replay buffer, which acts on what is written, before ``MCAdvantage`` in time, and so behind it in
    ``Compose``: ``Compose(MCAdvantage(8), ExplorationBonus(8))``. Or for a batch of whole groups: ``bonus.inv(batch)``.

    Args:
        group_size: G, the rollouts of one prompt, at least 3: centred, two are each other's opposites.
        state_key: where the means of the responses stand, ``[D]`` or ``[K, D]`` for each step. Of several turns it is
            the mean over all response tokens, by ``(…, "response_count")`` where that stands beside; else turns count
            alike.
        out_key: where the bonuses are written, unscaled, at every step, in shape and dtype of the rewards.
        project: d of the random projection; None for none.
        density: the share of its numbers that are not 0: ``1/sqrt(D)`` by default (Li et al. 2006); 1/3 is that of
            Achlioptas 2003. The same seed in every process.
        ridge: λ, in units of the mean squared length.
        scale: what the bonus is multiplied with in the reward.
        combine: ``"add"``: it is added to the last step's reward; ``"replace"``: it is the reward; None: the rewards
            stay as they are.
        group_key: a string or tensor that is the same in all rollouts of a group; ChatEnv's question.
        reward_key, done_key: as in ``MCAdvantage``.
        ablate: a control: ``"zero"``: no bonus; ``"shuffle"``: each rollout has the bonus of another one of its group.

    Raises:
        InputError: G below 3, numbers out of range; when it is called, states of several sizes, or not finite.
        InputTypeError: an argument or a leaf of another type.
        MissingKeyError: data without one of the keys.

    Example:
        >>> buffer = ReplayBuffer(
        ...     storage=LazyStackStorage(64), transform=Compose(MCAdvantage(8), ExplorationBonus(8)), batch_size=64
        ... )
    """

    def __init__(
        self,
        group_size: int,
        *,
        state_key: NestedKey = ("hidden_states", "response"),
        out_key: NestedKey = "exploration_bonus",
        project: int | None = 32,
        density: float | None = None,
        ridge: float = 0.1,
        scale: float = 0.1,
        combine: Combine | None = "add",
        group_key: NestedKey = "query",
        reward_key: NestedKey = ("next", "reward"),
        done_key: NestedKey = ("next", "done"),
        ablate: Literal["zero", "shuffle"] | None = None,
    ) -> None:
        super().__init__(
            group_size,
            fewest=3,
            why="centred, two states are each other's opposites",
            state_key=state_key,
            out_key=out_key,
            scale=scale,
            combine=combine,
            group_key=group_key,
            reward_key=reward_key,
            done_key=done_key,
            ablate=ablate,
        )
        self.ridge = check_number("ridge", ridge, above=0)
        # Drawn for one number now, so that bad arguments raise here and not in the first batch.
        make_sparse_projection(1, project, density)
        self.project, self.density = project, density

    def _scores(self, group: Group) -> torch.Tensor:
        features_Gd = self._projected(group.features_GF)
        centred_Gd = features_Gd - features_Gd.mean(0)
        least = _LEAST_SPREAD**2 * features_Gd.square().sum(-1).mean()
        unit = torch.maximum(centred_Gd.square().sum(-1).mean(), least)
        if not unit > 0:
            return torch.zeros_like(unit).expand(self.group_size)
        # With A = λ I + Σ φφᵀ over all, q = φᵀ A⁻¹ φ is a sum over the eigenvectors of the Gram matrix, and without the
        # rollout itself it is q / (1 - q) (Sherman and Morrison 1950). 1 - q is such a sum too: nothing cancels.
        values_G, vectors_GG = torch.linalg.eigh(centred_Gd @ centred_Gd.T)
        values_G = values_G.clamp(min=0)
        strength = self.ridge * unit
        within = vectors_GG.square() @ (values_G / (values_G + strength))
        outside = vectors_GG.square() @ (strength / (values_G + strength))
        bonuses_G: torch.Tensor = (within / outside).sqrt()
        return bonuses_G

    def _projected(self, states_GD: torch.Tensor) -> torch.Tensor:
        """Return the states in the random projection, float64 ``[G, d]``."""
        projection_Dd = make_sparse_projection(states_GD.shape[1], self.project, self.density)
        return states_GD if projection_Dd is None else states_GD @ projection_Dd.to(states_GD)

    def _read(self, rollout: TensorDictBase) -> torch.Tensor:
        """Return the mean of all response states of a rollout, float64 ``[D]``."""
        steps = rollout.unbind(0)
        states_TD = torch.stack([read_state(step, self.state_key) for step in steps])
        counts = [self._count(step) for step in steps]
        if any(count is None for count in counts):
            return states_TD.mean(0)
        weights_T = torch.stack([count.reshape(()) for count in counts if count is not None]).to(states_TD)
        if not weights_T.sum() > 0:
            raise InputError(
                f"{self.state_key!r} of {self._name(rollout)!r:.80}: counts of {weights_T.tolist()} states, whose mean "
                "is none; leave out the rows that failed"
            )
        mean_D: torch.Tensor = weights_T @ states_TD / weights_T.sum()
        return mean_D

    def _count(self, step: TensorDictBase) -> torch.Tensor | None:
        """Return how many states were pooled in a step; None where that is not said."""
        if not isinstance(self.state_key, tuple):
            return None
        count: torch.Tensor | None = step.get((*self.state_key[:-1], f"{self.state_key[-1]}_count"), None)
        return count
