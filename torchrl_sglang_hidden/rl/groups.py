"""`GroupTransform`: what all transforms do that compare the rollouts of one prompt.

Knows nothing of what is computed of a group. A rollout is one trajectory, of one turn or several; G of them are a
group, which is handled when its last rollout is there, whichever batches they came in.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from tensordict import LazyStackedTensorDict, NonTensorData, TensorDict, TensorDictBase, lazy_stack
from tensordict.utils import NestedKey, unravel_key
from torchrl.envs.transforms import Compose, Transform

from torchrl_sglang_hidden.errors import InputError, InputTypeError, MissingKeyError

__all__ = ["Group", "GroupTransform", "read_state"]


class _Rollout(NamedTuple):
    """A trajectory ``[T]``, its rewards ``[T, …]``, one number a step, and what a part reads of it, float64 ``[F]``."""

    steps: TensorDictBase
    rewards: torch.Tensor
    features: torch.Tensor


class Group(NamedTuple):
    """The G rollouts of one prompt.

    Args:
        name: what tells the group from others, such as the prompt.
        rollouts: in the order in which they came.
    """

    name: Any
    rollouts: list[_Rollout]

    @property
    def features_GF(self) -> torch.Tensor:
        """What a part reads of the rollouts, float64 ``[G, F]``."""
        device = self.rollouts[0].features.device
        return torch.stack([rollout.features.to(device) for rollout in self.rollouts])

    @property
    def returns_G(self) -> torch.Tensor:
        """The sum of the rewards of each rollout, float64 ``[G]``."""
        device = self.rollouts[0].features.device
        return torch.stack([rollout.rewards.double().sum().to(device) for rollout in self.rollouts])


class GroupTransform(Transform):  # type: ignore[misc]
    """Collects the rollouts of each prompt, and handles a group once it is whole, as TorchRL's ``MCAdvantage`` does.

    As the transform of a replay buffer it acts when data are written: ``inv``. What is sampled passes unchanged.

    Args:
        group_size: G, the rollouts of one prompt.
        fewest: the least G with which the part makes sense, and `why` it does.
        group_key: where a string or a tensor stands that is the same in all rollouts of a group.
        reward_key: where the rewards stand, one number a step.
        done_key: where the ends of trajectories stand.
    """

    # TorchRL refuses to share a buffer between processes where the groups would come apart.
    requires_shared_write_state = True

    def __init__(
        self,
        group_size: int,
        *,
        fewest: int,
        why: str,
        group_key: NestedKey,
        reward_key: NestedKey,
        done_key: NestedKey,
    ) -> None:
        super().__init__()
        if type(group_size) is not int:
            raise InputTypeError(f"group_size={group_size!r:.80}: expected an integer of at least {fewest}")
        if group_size < fewest:
            raise InputError(f"group_size={group_size}: expected at least {fewest} rollouts of each prompt: {why}")
        self.group_size = group_size
        self.group_key, self.reward_key, self.done_key = (unravel_key(key) for key in (group_key, reward_key, done_key))
        self._queues: dict[Any, list[_Rollout]] = {}
        # Of what is read of a rollout; known with the first.
        self._num_features: int | None = None

    @property
    def queued_rollouts(self) -> int:
        """How many rollouts wait for the others of their group."""
        return sum(len(queue) for queue in self._queues.values())

    def clear_queues(self) -> None:
        """Drop the rollouts whose groups are not whole, such as those of old weights."""
        self._queues.clear()

    def forward(self, tensordict: TensorDictBase) -> TensorDictBase:
        """Return what was sampled as it is: it was handled when it was written."""
        return tensordict

    @abstractmethod
    def _read(self, steps: TensorDictBase) -> torch.Tensor:
        """Return what the part needs of one rollout, float64 ``[F]``; raise for what it cannot take."""

    @abstractmethod
    def _handle(self, groups: list[Group]) -> None:
        """Write into the rollouts of whole groups."""

    def _inv_call(self, tensordict: TensorDictBase | None) -> TensorDictBase | None:
        if tensordict is None or not tensordict.batch_size.numel():
            return self._nothing()
        # All is read before anything is kept: after an error the same data, mended, can be written again.
        rollouts = [
            (self._name(steps), _Rollout(steps, self._rewards(steps), self._read(steps)))
            for steps in self._rollouts(tensordict)
        ]
        self._num_features = self._check_sizes([len(rollout.features) for _, rollout in rollouts])
        groups = []
        for name, rollout in rollouts:
            queue = self._queues.setdefault(name, [])
            queue.append(rollout)
            if len(queue) == self.group_size:
                groups.append(Group(name, self._queues.pop(name)))
        if not groups:
            return self._nothing()
        self._handle(groups)
        return _join([rollout.steps for group in groups for rollout in group.rollouts])

    def _check_sizes(self, sizes: list[int]) -> int:
        """Return how many numbers are read of a rollout; refuse rollouts of which others are read than before."""
        expected = sizes[0] if self._num_features is None else self._num_features
        if set(sizes) != {expected}:
            raise InputError(
                f"{self.in_keys[0]!r}: {sorted(set(sizes))} numbers a rollout; expected {expected}, as in the first: "
                f"make another {type(self).__name__} for another model or choice of layers"
            )
        return expected

    def _nothing(self) -> TensorDictBase | None:
        """Return what says that no group is whole: None to a buffer, no rows to a transform that comes after."""
        container = self.__dict__["_container"]
        compose = None if container is None else container()
        if isinstance(compose, Compose) and compose.transforms[0] is not self:
            # MCAdvantage makes None of this, and takes no None.
            return TensorDict(batch_size=[0, 1])
        return None

    def _rollouts(self, tensordict: TensorDictBase) -> Iterator[TensorDictBase]:
        """Yield the trajectories of a batch whose last dimension is time, ``[T]`` each."""
        if not tensordict.ndim:
            raise InputError("a TensorDict without batch dimensions: expected trajectories, [T] or [*batch, T]")
        if tensordict.ndim > 1:
            for row in tensordict.unbind(0):
                yield from self._rollouts(row)
            return
        done_T = self._get(tensordict, self.done_key, "it says where trajectories end")
        ends = done_T.reshape(len(tensordict), -1).any(-1).nonzero().flatten().tolist()
        if not ends or ends[-1] != len(tensordict) - 1:
            raise InputError(
                f"a batch of {len(tensordict)} steps whose last one is not done at {self.done_key!r}; expected whole "
                "trajectories: collect them with yield_completed_trajectories=True, or until they are done"
            )
        start = 0
        for end in ends:
            yield tensordict[start : end + 1]
            start = end + 1

    def _name(self, rollout: TensorDictBase) -> Any:
        """Return what tells a rollout's group from others."""
        name = rollout[0].get(self.group_key, None)
        if isinstance(name, NonTensorData):
            name = name.data
        if name is None:
            raise MissingKeyError(
                f"no {self.group_key!r} in the data, which says whose rollouts belong together: name the key with "
                "group_key"
            )
        if isinstance(name, torch.Tensor):
            return tuple(name.flatten().tolist())
        if not isinstance(name, str):
            raise InputTypeError(f"{self.group_key!r} is a {type(name).__name__}; expected a string or a tensor")
        return name

    def _rewards(self, rollout: TensorDictBase) -> torch.Tensor:
        """Return the rewards of a rollout, ``[T, …]`` with one number a step."""
        rewards = self._get(rollout, self.reward_key, "a rollout's return is the sum of these")
        if rewards.numel() != len(rollout) or not rewards.is_floating_point():
            raise InputError(
                f"{self.reward_key!r} is {rewards.dtype} of shape {tuple(rewards.shape)} for {len(rollout)} steps; "
                "expected one floating number a step: sum a turn's rewards first"
            )
        if not rewards.isfinite().all():
            raise InputError(
                f"{self.reward_key!r} of {self._name(rollout)!r:.80} is {rewards.flatten().tolist()}; expected finite "
                "numbers: leave out the rows that failed"
            )
        return rewards

    def _get(self, tensordict: TensorDictBase, key: NestedKey, why: str) -> torch.Tensor:
        value: torch.Tensor | None = tensordict.get(key, None)
        if value is None:
            raise MissingKeyError(f"no {key!r} in the data: {why}; name its key, or add it")
        return value


def read_state(step: TensorDictBase, key: NestedKey) -> torch.Tensor:
    """Return the pooled state of one step, float64 ``[D]``; ``[K·D]`` of several layers.

    Raises:
        MissingKeyError: it is not there.
        InputTypeError: no floating tensor, or the states of tokens.
        InputError: it is not finite.
    """
    state: Any = step.get(key, None)
    if state is None:
        raise MissingKeyError(
            f"no {key!r} in the data: pool this segment, such as with HiddenSpec(segments=('prompt', 'response')), or "
            "name the key"
        )
    if not isinstance(state, torch.Tensor) or not state.is_floating_point():
        kind = str(state.dtype) if isinstance(state, torch.Tensor) else type(state).__name__
        raise InputTypeError(f"{key!r} is a {kind}; expected a floating tensor [D] for each step: name one segment")
    if not state.isfinite().all():
        raise InputError(
            f"{key!r}: {int((~state.isfinite()).sum())} of {state.numel()} numbers are not finite; leave out the rows "
            "that failed or asked for no states"
        )
    flat_D: torch.Tensor = state.detach().double().flatten()
    return flat_D


def _join(rollouts: list[TensorDictBase]) -> TensorDictBase:
    """Return trajectories one behind the other, ``[N]``; lazily where they are, or where their leaves are ragged."""
    if any(isinstance(rollout, LazyStackedTensorDict) for rollout in rollouts) or _are_ragged(rollouts):
        return lazy_stack([step for rollout in rollouts for step in rollout.unbind(0)])
    return torch.cat(rollouts)


def _are_ragged(rollouts: list[TensorDictBase]) -> bool:
    """Return whether leaves differ in shape, as tokens do in trajectories of one step, each dense by itself."""
    shapes = [{key: leaf.shape[1:] for key, leaf in rollout.items(True, True)} for rollout in rollouts]
    return any(other != shapes[0] for other in shapes[1:])
