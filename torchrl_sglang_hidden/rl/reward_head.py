"""`make_reward_head`, a linear reward on hidden states, and `BradleyTerryLoss`, which fits it to pairs.

Knows nothing of how pairs are made.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from tensordict import TensorDict, TensorDictBase
from tensordict.nn import TensorDictModule, TensorDictModuleBase
from tensordict.utils import NestedKey, unravel_key
from torch import nn
from torchrl.modules import MLP
from torchrl.objectives import LossModule

from torchrl_sglang_hidden.errors import InputError, InputTypeError, MissingKeyError
from torchrl_sglang_hidden.rl.state_source import StateInput, States, check_cells, find_states

__all__ = ["BradleyTerryLoss", "make_reward_head"]


def make_reward_head(
    states: States,
    *,
    state_key: NestedKey | None = ("hidden_states", "response"),
    num_cells: Sequence[int] = (),
    norm: bool = True,
    out_key: NestedKey = "rewards",
    device: torch.device | str | None = None,
) -> TensorDictModule:
    """Make a reward model on hidden states: TorchRL's ``MLP``, by default one linear map.

    Ouyang et al. 2022 ("Training language models to follow instructions with human feedback", arXiv:2203.02155) put a
    linear head on the language model's last state. Here the language model stays as it is, and the state is one that
    the rollout has already. `BradleyTerryLoss` fits it to pairs. Its ablation is a head on the prompt's states, which
    cannot tell answers to one prompt apart.

    Of the states of tokens, ``[*batch, T, D]``, it makes the reward of each token, which TorchRL's
    ``GPT2RewardModel.compute_reward_loss`` reads beside ``input_ids``.

    Args:
        states: the policy that writes the vectors, which says their size; or their size D.
        state_key: where the vectors stand, by default those of the responses; the state of the last token with
            ``HiddenSpec(pooling="last")``.
        num_cells: sizes of the hidden layers; none is a linear head.
        norm: whether each vector is normalised to mean 0 and variance 1 before the first layer.
        out_key: where the rewards are written, float32 ``[*batch, 1]``. ``("next", "reward")`` makes it the reward of a
            collected batch.
        device: of the parameters.

    Returns:
        A module that reads float ``[*batch, D]``, or ``[*batch, K, D]`` for a tuple of K layers.

    Raises:
        InputError: a key that the policy does not write, sizes below 1; when it is called, vectors of another shape.
        InputTypeError: an argument of another type.

    Example:
        >>> head = make_reward_head(policy)
        >>> loss = BradleyTerryLoss(head)(pairs)["loss_reward"]
    """
    source = find_states(states, state_key)
    head = MLP(
        in_features=source.shape.numel(), out_features=1, num_cells=check_cells("num_cells", num_cells), device=device
    )
    return TensorDictModule(nn.Sequential(StateInput(source, norm), head), in_keys=[source.key], out_keys=[out_key])


class BradleyTerryLoss(LossModule):  # type: ignore[misc]
    """Fits a reward model to pairs of which one was preferred: ``-log sigmoid(r_chosen - r_rejected)``.

    Bradley and Terry 1952; Ouyang et al. 2022, equation 1. TorchRL has this loss for rewards of tokens beside their ids
    (``GPT2RewardModel.compute_reward_loss``), and none for one reward a response.

    Args:
        reward_network: writes one reward for each row, as `make_reward_head` makes it.
        chosen_key, rejected_key: where the rows of a pair stand, as in TorchRL's ``PairwiseDataset``.

    Returns:
        A TensorDict with ``loss_reward``, the mean over the pairs, and, detached, ``accuracy``: the share of pairs
        whose chosen row has the larger reward, ties counted half; and ``margin``, the mean difference.

    Raises:
        InputTypeError: a network that is no TensorDict module.
        MissingKeyError: a batch without one of the two sides.
        InputError: no pairs, rewards of different shapes, or a loss that is not finite.

    Example:
        >>> pairs = TensorDict(chosen_data=batch[best], rejected_data=batch[worst], batch_size=[len(best)])
        >>> BradleyTerryLoss(make_reward_head(policy))(pairs)["loss_reward"].backward()
    """

    reward_network: TensorDictModuleBase

    def __init__(
        self,
        reward_network: TensorDictModuleBase,
        *,
        chosen_key: NestedKey = "chosen_data",
        rejected_key: NestedKey = "rejected_data",
    ) -> None:
        super().__init__()
        if not isinstance(reward_network, TensorDictModuleBase):
            raise InputTypeError(
                f"reward_network is a {type(reward_network).__name__}; expected a TensorDict module, such as that of "
                "make_reward_head"
            )
        self.reward_network = reward_network
        self.chosen_key, self.rejected_key = unravel_key(chosen_key), unravel_key(rejected_key)
        self.in_keys = [
            (*_path(side), *_path(key))
            for side in (self.chosen_key, self.rejected_key)
            for key in reward_network.in_keys
        ]
        self.out_keys = ["loss_reward", "accuracy", "margin"]

    def forward(self, tensordict: TensorDictBase) -> TensorDictBase:
        """Return the loss of a batch of pairs."""
        chosen, rejected = self._rewards(tensordict, self.chosen_key), self._rewards(tensordict, self.rejected_key)
        if chosen.shape != rejected.shape or not chosen.numel():
            raise InputError(
                f"rewards of shape {tuple(chosen.shape)} at {self.chosen_key!r} and {tuple(rejected.shape)} at "
                f"{self.rejected_key!r}; expected one for each row of at least one pair: give both sides the same rows"
            )
        margins = chosen - rejected
        loss = -nn.functional.logsigmoid(margins).mean()
        if not loss.isfinite():
            raise InputError(
                f"a loss of {loss.item()}: states are not finite; leave out the pairs whose rows failed or asked for "
                "no states"
            )
        accuracy = ((margins > 0).double() + (margins == 0).double() / 2).mean()
        return TensorDict(loss_reward=loss, accuracy=accuracy.to(loss).detach(), margin=margins.detach().mean())

    def _rewards(self, tensordict: TensorDictBase, side: NestedKey) -> torch.Tensor:
        rows = tensordict.get(side, None)
        if rows is None:
            raise MissingKeyError(f"no {side!r} in the batch, which has one side of the pairs: name it")
        # A shallow copy: the rewards of this step are not left in the data.
        out: torch.Tensor = self.reward_network(rows.copy()).get(self.reward_network.out_keys[0])
        return out


def _path(key: NestedKey) -> tuple[str, ...]:
    return (key,) if isinstance(key, str) else tuple(key)
