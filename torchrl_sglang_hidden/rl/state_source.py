"""Where the hidden vectors stand that a head reads, how large they are, and the module through which heads read them.

Knows nothing of actions or values.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, TypeAlias

import torch
from tensordict.utils import NestedKey, unravel_key
from torch import nn

from torchrl_sglang_hidden.errors import InputError, InputTypeError
from torchrl_sglang_hidden.policy.wrapper import SGLangHiddenWrapper
from torchrl_sglang_hidden.rl.encoder import pooled_keys, vector_shape
from torchrl_sglang_hidden.rl.transform import HiddenStateTransform

__all__ = ["StateInput", "StateSource", "States", "check_cells", "find_states"]

# What a builder is told of the hidden vectors: who writes them, or their size D.
States: TypeAlias = SGLangHiddenWrapper | HiddenStateTransform | int


class StateSource(NamedTuple):
    """Hidden vectors in a TensorDict: their key, and the shape of one, ``[D]`` or ``[K, D]``."""

    key: NestedKey
    shape: torch.Size


def find_states(states: States, state_key: NestedKey | None) -> StateSource:
    """Return where hidden vectors stand and how large they are.

    Args:
        states: the policy or transform that writes them, or their size D.
        state_key: their key. By default that of a transform's vectors, or of a policy's pooled prompts.

    Raises:
        InputError: a policy that pools no prompt, a key that the policy does not write, or a size without a key.
        InputTypeError: ``states`` of another kind.
    """
    if isinstance(states, HiddenStateTransform):
        return StateSource(states.out_keys[0] if state_key is None else unravel_key(state_key), states.shape)
    if isinstance(states, SGLangHiddenWrapper):
        return StateSource(_key_of_policy(states, state_key), vector_shape(states))
    if type(states) is not int:
        raise InputTypeError(
            f"states={states!r:.80} is a {type(states).__name__}; expected the SGLangHiddenWrapper or "
            "HiddenStateTransform that writes them, or their size D"
        )
    if states < 1:
        raise InputError(f"states={states}: expected a size of at least 1")
    if state_key is None:
        raise InputError(f"states={states} without state_key: a size does not say where they stand; give state_key")
    return StateSource(unravel_key(state_key), torch.Size((states,)))


def _key_of_policy(policy: SGLangHiddenWrapper, state_key: NestedKey | None) -> NestedKey:
    """Return the key of one of the vectors that a policy writes; by default that of the prompt."""
    written = pooled_keys(policy)
    prompt = unravel_key((policy.config.keys.hidden_states_key, "prompt"))
    if state_key is None:
        if prompt not in written:
            raise InputError(
                f"a policy that pools {written}: the value of a state reads the prompt, for the "
                "response is the action; use HiddenSpec(segments=('prompt',)), or name the vectors with state_key"
            )
        return prompt
    key = unravel_key(state_key)
    # Under another key stands what somebody made of them, such as normalised vectors.
    if isinstance(key, tuple) and key[0] == prompt[0] and key not in written:
        raise InputError(f"state_key={key!r}: expected one of {written}, which the policy writes")
    return key


class StateInput(nn.Module):
    """Turns hidden vectors ``[*batch, D]`` or ``[*batch, K, D]`` into features ``[*batch, D]`` or ``[*batch, K·D]``.

    Args:
        source: where they stand, for errors, and their shape.
        norm: whether each vector is normalised to mean 0 and variance 1 (Ba et al. 2016, without parameters). Pooled
            states of a trained model are long, and a head that reads them as they are begins with large outputs.
    """

    _like: torch.Tensor

    def __init__(self, source: StateSource, norm: bool) -> None:
        super().__init__()
        if not isinstance(norm, bool):
            raise InputTypeError(f"norm={norm!r:.80}: expected True or False")
        self.source = source
        # Follows `.double()` and the like, as the parameters of the layers behind this one do.
        self.register_buffer("_like", torch.empty(0), persistent=False)
        self.norm = nn.LayerNorm(source.shape[-1], elementwise_affine=False) if norm else nn.Identity()

    def forward(self, states: torch.Tensor) -> torch.Tensor:
        """Return the features, in the dtype that the module was given: float32, or what ``.to(dtype)`` says.

        Raises:
            InputError: vectors of another shape.
        """
        key, shape = self.source
        if states.shape[-len(shape) :] != shape:
            raise InputError(
                f"{key!r} has shape {tuple(states.shape)}; expected {('*batch', *shape)}: make the head for the policy "
                "or transform that wrote them"
            )
        features: torch.Tensor = self.norm(states.to(self._like.dtype)).flatten(-len(shape))
        return features


def check_cells(name: str, cells: Sequence[int]) -> list[int]:
    """Return the sizes of layers as a list; refuse what is no integer of at least 1."""
    if not isinstance(cells, Sequence) or isinstance(cells, str) or any(type(cell) is not int for cell in cells):
        raise InputTypeError(f"{name}={cells!r:.80}: expected a sequence of integers, such as (256, 256)")
    if any(cell < 1 for cell in cells):
        raise InputError(f"{name}={cells!r:.80}: expected sizes of at least 1")
    return list(cells)
