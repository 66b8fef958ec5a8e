"""`CrossRolloutBaseline`: what a rollout was worth before it was sampled, read from the states of the others.

The probe is fitted to rollouts of earlier writes alone, and a rollout's own states say nothing of its baseline, so that
this is independent of what it is subtracted from.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from tensordict import TensorDictBase
from tensordict.utils import NestedKey, unravel_key

from torchrl_sglang_hidden.errors import InputError, InputTypeError, MissingKeyError
from torchrl_sglang_hidden.rl.ablations import Shuffler, check_ablation
from torchrl_sglang_hidden.rl.groups import Group, GroupTransform, read_state
from torchrl_sglang_hidden.rl.ridge import Ridge, RidgeFit

__all__ = ["CrossRolloutBaseline"]

ABLATIONS = ("zero", "shuffle", "own")
_FEWEST = 8


class CrossRolloutBaseline(GroupTransform):
    """Subtracts from a rollout's return what a linear probe expects of its prompt, and writes the advantage.

    After POISE (Choi et al. 2026, "Your Language Model is Its Own Critic: Reinforcement Learning with Value Estimation
    from Actor's Internal States", arXiv:2605.07579): a light probe reads the prompt's state, the state at the end and
    statistics of the token entropies, is fitted online to recent rollouts, and gives a rollout its value from an
    *independent* rollout of the same prompt. The gradient stays unbiased: nothing that the baseline depends on depends
    on the rollout's own tokens. This package's choices: ridge regression over a window of recent rollouts, its strength
    by leaving out one; the target of a rollout's features is the mean return of the others in its group, which is what
    they are asked for later; the values from all G - 1 others are averaged; a value beyond the targets in the window is
    held at the nearest of them.

    It takes the place of TorchRL's ``MCAdvantage``: as the transform of a replay buffer it acts on what is written, or
    for a batch of whole groups ``baseline.inv(batch)``. Groups are predicted first and learned from after, each rollout
    once. ``state_dict`` has the window, and not the rollouts that wait for their group.

    Args:
        group_size: G, the rollouts of one prompt, at least 2.
        prompt_state_key: where the state of the prompt stands, ``[D]`` or ``[K, D]`` for each step; that of the first
            step is read.
        end_state_key: where the state stands whose last step's value is the rollout's end: pooled with
            ``HiddenSpec(pooling="last")``.
        entropy_key: where a number per token stands, ``[T]``, ragged or padded with NaN: the token entropies,
            ``("sampling", "entropy")`` with the option ``return_entropy``; or the log-probs of the sampled tokens,
            whose mean estimates the same. Mean and deviation over all turns' tokens are read. None: states alone.
        window: rollouts that the probe is fitted to, the newest.
        min_rollouts: as long as the window has fewer, the baseline is the mean return of the others in the group.
        baseline_key, advantage_key, value_target_key: what is written at every step, in shape and dtype of the rewards.
            The advantage is the rollout's return, the sum of its rewards, without its baseline, and is not divided by a
            deviation. The value target is the return, for losses that train a critic too, such as ``ClipPPOLoss``.
        group_key: a string or tensor that is the same in all rollouts of a group; ChatEnv's question.
        reward_key, done_key: as in ``MCAdvantage``.
        ablate: a control: ``"zero"``: no features, so that the baseline is the mean return of the window;
            ``"shuffle"``: the features of other rollouts; ``"own"``: the features and target are the rollout's own,
            which biases the gradient.

    Raises:
        InputError: G below 2, other numbers out of range; when it is called, states of another size than before, or not
            finite.
        InputTypeError: an argument or a leaf of another type.
        MissingKeyError: data without one of the keys.

    Example:
        >>> baseline = CrossRolloutBaseline(4, entropy_key=("sampling", "entropy"))
        >>> buffer = ReplayBuffer(storage=LazyStackStorage(64), transform=baseline, batch_size=64)
    """

    def __init__(
        self,
        group_size: int,
        *,
        prompt_state_key: NestedKey = ("hidden_states", "prompt"),
        end_state_key: NestedKey = ("hidden_states", "response"),
        entropy_key: NestedKey | None = None,
        window: int = 512,
        min_rollouts: int = 32,
        baseline_key: NestedKey = "baseline",
        advantage_key: NestedKey = "advantage",
        value_target_key: NestedKey = "value_target",
        group_key: NestedKey = "query",
        reward_key: NestedKey = ("next", "reward"),
        done_key: NestedKey = ("next", "done"),
        ablate: Literal["zero", "shuffle", "own"] | None = None,
    ) -> None:
        super().__init__(
            group_size,
            fewest=2,
            why="a rollout's value is read from another rollout",
            group_key=group_key,
            reward_key=reward_key,
            done_key=done_key,
        )
        for name, value in (("window", window), ("min_rollouts", min_rollouts)):
            if type(value) is not int:
                raise InputTypeError(f"{name}={value!r:.80}: expected an integer of at least {_FEWEST}")
        if not _FEWEST <= min_rollouts <= window:
            raise InputError(
                f"min_rollouts={min_rollouts}, window={window}: expected {_FEWEST} <= min_rollouts <= window"
            )
        check_ablation(ablate, ABLATIONS)
        self.prompt_state_key, self.end_state_key = unravel_key(prompt_state_key), unravel_key(end_state_key)
        self.entropy_key = None if entropy_key is None else unravel_key(entropy_key)
        self.baseline_key, self.advantage_key = unravel_key(baseline_key), unravel_key(advantage_key)
        self.value_target_key = unravel_key(value_target_key)
        read = [self.prompt_state_key, self.end_state_key, *([] if self.entropy_key is None else [self.entropy_key])]
        self.in_keys = [*read, self.group_key, self.reward_key, self.done_key]
        self.out_keys = [self.baseline_key, self.advantage_key, self.value_target_key]
        self.window, self.min_rollouts, self.ablate = window, min_rollouts, ablate
        self._shuffler = Shuffler()
        self._features_NF: torch.Tensor | None = None
        self._targets_N: torch.Tensor | None = None
        self._fit: RidgeFit | None = None

    @property
    def window_size(self) -> int:
        """How many rollouts are in the window; at `min_rollouts` the probe takes over from the others' mean return."""
        return 0 if self._targets_N is None else len(self._targets_N)

    def get_extra_state(self) -> dict[str, torch.Tensor]:
        """Return the window, for ``state_dict``."""
        if self._features_NF is None or self._targets_N is None:
            return {}
        return {"features": self._features_NF, "targets": self._targets_N}

    def set_extra_state(self, state: dict[str, torch.Tensor]) -> None:
        """Take the window of another baseline, from its ``state_dict``.

        Raises:
            InputError: features and targets that do not fit together.
        """
        features_NF, targets_N = state.get("features"), state.get("targets")
        if (features_NF is None) != (targets_N is None):
            raise InputError(f"a state with {sorted(state)}: expected both features and targets, or neither")
        if (
            features_NF is not None
            and targets_N is not None
            and ((features_NF.ndim, targets_N.ndim) != (2, 1) or len(features_NF) != len(targets_N))
        ):
            raise InputError(
                f"a state with features of shape {tuple(features_NF.shape)} and targets of {tuple(targets_N.shape)}; "
                "expected [N, F] and [N]"
            )
        self._features_NF = None if features_NF is None else features_NF[-self.window :].double()
        self._targets_N = None if targets_N is None else targets_N[-self.window :].double()
        self._num_features = None if features_NF is None else features_NF.shape[1]
        self._fit = None

    def _handle(self, groups: list[Group]) -> None:
        features = [self._ablated(group.features_GF) for group in groups]
        # All values first: the next group may be of the same prompt.
        for group, features_GF in zip(groups, features, strict=True):
            self._write(group, self._values(group, features_GF))
        self._learn(torch.cat(features), torch.cat([self._targets(group) for group in groups]))

    def _ablated(self, features_GF: torch.Tensor) -> torch.Tensor:
        if self.ablate == "zero":
            return torch.zeros_like(features_GF)
        return self._shuffler.shuffle(features_GF) if self.ablate == "shuffle" else features_GF

    def _values(self, group: Group, features_GF: torch.Tensor) -> torch.Tensor:
        """Return the baselines of a group's rollouts, float64 ``[G]``."""
        if self._features_NF is None or self._targets_N is None or len(self._targets_N) < self.min_rollouts:
            return _means_of_others(group.returns_G)
        if self._fit is None:
            self._fit = Ridge(self._features_NF).fit(self._targets_N[:, None])
        fit = RidgeFit(self._fit.strength, *(part.to(features_GF.device) for part in self._fit[1:]))
        low, high = float(self._targets_N.min()), float(self._targets_N.max())
        predicted_G = fit.predict(features_GF)[:, 0].clamp(low, high)
        return predicted_G if self.ablate == "own" else _means_of_others(predicted_G)

    def _targets(self, group: Group) -> torch.Tensor:
        """Return what the features of each rollout shall predict, float64 ``[G]``."""
        return group.returns_G if self.ablate == "own" else _means_of_others(group.returns_G)

    def _write(self, group: Group, values_G: torch.Tensor) -> None:
        returns_G = group.returns_G
        for index, rollout in enumerate(group.rollouts):
            value, target = values_G[index], returns_G[index]
            for key, number in (
                (self.baseline_key, value),
                (self.advantage_key, target - value),
                (self.value_target_key, target),
            ):
                rollout.steps.set(key, number.to(rollout.rewards).expand(rollout.rewards.shape).clone())

    def _learn(self, features_NF: torch.Tensor, targets_N: torch.Tensor) -> None:
        """Put rollouts into the window, the newest last."""
        if self._features_NF is not None and self._targets_N is not None:
            features_NF = torch.cat([self._features_NF.to(features_NF.device), features_NF])
            targets_N = torch.cat([self._targets_N.to(targets_N.device), targets_N])
        self._features_NF, self._targets_N = features_NF[-self.window :], targets_N[-self.window :].to(features_NF)
        self._fit = None

    def _read(self, steps: TensorDictBase) -> torch.Tensor:
        """Return what the probe reads of a rollout, float64 ``[F]``."""
        parts = [read_state(steps[0], self.prompt_state_key), read_state(steps[-1], self.end_state_key)]
        if self.entropy_key is not None:
            parts.append(self._entropy(steps, self.entropy_key).to(parts[0]))
        return torch.cat(parts)

    def _entropy(self, rollout: TensorDictBase, key: NestedKey) -> torch.Tensor:
        """Return mean and deviation of a number per token over all turns, float64 ``[2]``."""
        turns = []
        for step in rollout.unbind(0):
            value: Any = step.get(key, None)
            if value is None:
                raise MissingKeyError(f"no {key!r} in the data: sample with return_entropy=True, or name another key")
            turns.append(value.double().flatten())
        values_T = torch.cat(turns)
        values_T = values_T[~values_T.isnan()]
        if not len(values_T) or not values_T.isfinite().all():
            raise InputError(
                f"{key!r} of {self._name(rollout)!r:.80} has {len(values_T)} numbers, of which "
                f"{int((~values_T.isfinite()).sum())} are not finite; expected finite numbers of at least one token: "
                "leave the group out"
            )
        return torch.stack([values_T.mean(), values_T.std(correction=0)])


def _means_of_others(values_G: torch.Tensor) -> torch.Tensor:
    """Return for each number the mean of all others, float64 ``[G]``."""
    return (values_G.sum() - values_G) / (len(values_G) - 1)
