"""`make_value_head`: the value of a state, read from its hidden vector.

Knows nothing of actions.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from tensordict.utils import NestedKey
from torch import nn
from torchrl.modules import MLP, ValueOperator

from torchrl_sglang_hidden.rl.state_source import StateInput, States, check_cells, find_states

__all__ = ["make_value_head"]


def make_value_head(
    states: States,
    *,
    state_key: NestedKey | None = None,
    num_cells: Sequence[int] = (),
    norm: bool = True,
    out_key: NestedKey = "state_value",
    device: torch.device | str | None = None,
) -> ValueOperator:
    """Make a critic on hidden states: TorchRL's ``ValueOperator`` over its ``MLP``.

    It reads the state before the action, ``("hidden_states", "prompt")``, which a rollout has already: no second pass
    over the language model.

    Args:
        states: the policy or `HiddenStateTransform` that writes the vectors, which says their key and size; or their
            size D.
        state_key: where the vectors stand, if not where ``states`` writes them: those that a ``VecNormV2`` normalised,
            or another segment.
        num_cells: sizes of the hidden layers; none is a linear critic.
        norm: whether each vector is normalised to mean 0 and variance 1 before the first layer. Leave it out for
            vectors that are normalised already.
        out_key: where the values are written, float32 ``[*batch, 1]``.
        device: of the parameters.

    Returns:
        A critic that reads float ``[*batch, D]``, or ``[*batch, K, D]`` for a tuple of K layers.

    Raises:
        InputError: a policy that pools no prompt, a key that it does not write, sizes below 1; when it is called,
            vectors of another shape.
        InputTypeError: an argument of another type.

    Example:
        >>> critic = make_value_head(policy)
        >>> GAE(gamma=0.99, lmbda=0.95, value_network=critic, shifted=True)(batch)
    """
    source = find_states(states, state_key)
    head = MLP(
        in_features=source.shape.numel(),
        out_features=1,
        num_cells=check_cells("num_cells", num_cells),
        device=device,
    )
    return ValueOperator(nn.Sequential(StateInput(source, norm), head), in_keys=[source.key], out_keys=[out_key])
