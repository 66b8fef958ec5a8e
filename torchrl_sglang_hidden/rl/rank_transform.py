"""`EffectiveRank`: in how many directions the states of one response's tokens spread, as a leaf of the batch."""

from __future__ import annotations

import torch
from tensordict import LazyStackedTensorDict, TensorDictBase
from tensordict.utils import NestedKey, unravel_key
from torchrl.envs.transforms import Transform

from torchrl_sglang_hidden.errors import InputError, InputTypeError, MissingKeyError
from torchrl_sglang_hidden.rl.measures import effective_rank

__all__ = ["EffectiveRank"]


class EffectiveRank(Transform):  # type: ignore[misc]
    """Writes the effective rank of the token states of every row, a diagnostic of collapse during training.

    The definition is that of `effective_rank` (Roy and Vetterli 2007): the exponential of the entropy of the singular
    values, over the tokens of one response. A response that repeats itself has a low one. Its controls are
    ``centre=False`` and the rank of shuffled tokens, which is the same: the order of tokens does not matter to it.

    A function of a batch, ``rank(batch)``; the ``postproc`` of a collector; or a replay buffer's transform, which
    measures what is sampled, and with ``append_transform(rank, invert=True)`` what is written. It is no environment's:
    there the states of tokens come with the action, and not with the observation.

    Args:
        state_key: where the token states stand, ragged or padded ``[*batch, T, D]``, or ``[*batch, T, K, D]``:
            ``HiddenSpec(tokens=True)``. Rows of zeros are padding.
        out_key: where the ranks go.
        centre: whether the mean over the tokens is taken off first, which otherwise is the largest direction.

    Writes:
        ``out_key``: float32 ``[*batch]``, from 1 to min(T, D), or ``[*batch, K]`` for K layers; 0 where all states are
        equal. NaN where a row has fewer than 2 tokens, or NaN in their place.

    Raises:
        MissingKeyError: the batch has no token states.
        InputTypeError: ``centre`` or the states are of another type.
        InputError: states of another shape.

    Example:
        >>> EffectiveRank()(batch)["effective_rank"]
        tensor([7.5, 3.2])
    """

    def __init__(
        self,
        state_key: NestedKey = ("token_hidden_states", "response"),
        out_key: NestedKey = "effective_rank",
        *,
        centre: bool = True,
    ) -> None:
        super().__init__(in_keys=[state_key], out_keys=[out_key])
        if not isinstance(centre, bool):
            raise InputTypeError(f"centre={centre!r:.80}: expected True or False")
        self.state_key, self.out_key, self.centre = unravel_key(state_key), unravel_key(out_key), centre

    def forward(self, tensordict: TensorDictBase) -> TensorDictBase:
        """Write the ranks into a batch of any shape, and return it."""
        return tensordict.set(self.out_key, self._ranks(tensordict))

    def _call(self, tensordict: TensorDictBase) -> TensorDictBase:
        # What TorchRL calls when data are written, where the transform is inverted.
        return self.forward(tensordict)

    def _ranks(self, tensordict: TensorDictBase) -> torch.Tensor:
        # Row by row down every dimension: a lazy stack's leaves are ragged, and a stack may hold another.
        if tensordict.ndim and isinstance(tensordict, LazyStackedTensorDict):
            return torch.stack([self._ranks(row) for row in tensordict.unbind(0)])
        states = tensordict.get(self.state_key, None)
        if states is None:
            raise MissingKeyError(
                f"no {self.state_key!r} in the batch: ask for the states of tokens with HiddenSpec(tokens=True), or "
                "name the key"
            )
        if not isinstance(states, torch.Tensor) or not states.is_floating_point():
            kind = str(states.dtype) if isinstance(states, torch.Tensor) else type(states).__name__
            raise InputTypeError(f"{self.state_key!r} is a {kind}; expected floating states [*batch, T, D]")
        dims = states.ndim - tensordict.ndim
        if dims not in (2, 3):
            raise InputError(
                f"{self.state_key!r} has shape {tuple(states.shape)} in a batch of {tuple(tensordict.batch_size)}; "
                "expected [*batch, T, D] or [*batch, T, K, D]: name the states of tokens"
            )
        rows = states.detach().flatten(0, tensordict.ndim - 1) if tensordict.ndim else states.detach().unsqueeze(0)
        layers = rows if dims == 3 else rows.unsqueeze(-2)
        ranks = torch.tensor([[self._rank(layer_TD) for layer_TD in row.unbind(1)] for row in layers])
        # Not -1 for K: a batch may have no rows.
        ranks = ranks.reshape(*tensordict.batch_size, layers.shape[2]).to(states.device)
        return ranks if dims == 3 else ranks[..., 0]

    def _rank(self, states_TD: torch.Tensor) -> float:
        real_TD = states_TD[(states_TD != 0).any(-1)]
        if len(real_TD) < 2 or real_TD.isnan().any():
            return float("nan")
        return effective_rank(real_TD, centre=self.centre)
