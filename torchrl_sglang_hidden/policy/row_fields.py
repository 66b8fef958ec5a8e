"""What a row of a TensorDict says beside its prompt: masks of spans, allowed tokens, whether its states are returned.

Knows nothing of prompts.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from tensordict import TensorDictBase, is_leaf_nontensor, is_non_tensor, is_tensor_collection

from torchrl_sglang_hidden.errors import ConstraintError, InputError, InputTypeError, MissingKeyError
from torchrl_sglang_hidden.policy.action_masks import ActionMaskReader
from torchrl_sglang_hidden.policy.chat_template import read_variables
from torchrl_sglang_hidden.spec.constraints import ActionMask
from torchrl_sglang_hidden.spec.spans import PromptSpan, TokenMask, intervals_of

__all__ = [
    "TEMPLATE_VARIABLES_KEY",
    "WANTS_STATES_KEY",
    "keys_of",
    "read_action_mask",
    "read_template_variables",
    "read_token_mask",
    "read_wants_states",
]

TEMPLATE_VARIABLES_KEY = "chat_template_kwargs"
WANTS_STATES_KEY = "return_hidden_states"


def read_token_mask(row: TensorDictBase, span: TokenMask, placement: Sequence[bool]) -> PromptSpan:
    """Return the tokens of a `TokenMask` span.

    Args:
        row: a TensorDict without batch dimensions.
        span: says where the mask stands.
        placement: which places of the row's ids hold a token, True, and which a pad. The mask has as many places.

    Raises:
        MissingKeyError: the mask is not there.
        InputTypeError: it is no bool tensor.
        InputError: it has another length.
    """
    try:
        mask = row.get(span.key)
    except ValueError as error:  # a tensor where the key's path has a container
        raise InputTypeError(f"{span}: {error}; expected a tensor of torch.bool there") from error
    if mask is None:
        raise MissingKeyError(f"{span}: the TensorDict has no {span.key!r}; it has {keys_of(row)}: add it")
    if not isinstance(mask, torch.Tensor) or mask.dtype != torch.bool:
        is_a = f"tensor of {mask.dtype}" if isinstance(mask, torch.Tensor) else type(mask).__name__
        raise InputTypeError(f"{span}: there is a {is_a}; expected a tensor of torch.bool")
    if mask.shape != (len(placement),):
        raise InputError(
            f"{span}: the mask has shape {tuple(mask.shape)}, and the prompt's ids {(len(placement),)}; give both the "
            "same"
        )
    return intervals_of(mask[torch.tensor(placement)].tolist())


def read_wants_states(index: int, row: TensorDictBase) -> bool | None:
    """Return what a row says at `WANTS_STATES_KEY`, or None if it says nothing.

    Raises:
        InputTypeError: something that is not one bool.
    """
    flag = row.get(WANTS_STATES_KEY)
    if is_non_tensor(flag):
        flag = flag.data
    if isinstance(flag, torch.Tensor) and flag.dtype == torch.bool and flag.numel() == 1:
        flag = bool(flag)
    if flag is not None and not isinstance(flag, bool):
        raise InputTypeError(f"row {index}, {WANTS_STATES_KEY!r}: {flag!r:.80}; expected one bool per row")
    return flag


def read_template_variables(row: TensorDictBase) -> dict[str, Any]:
    """Return the chat template's variables that a row says at `TEMPLATE_VARIABLES_KEY`; an empty dict if none.

    Raises:
        InputTypeError: no dict, and no TensorDict, which a dict becomes that is written into one.
        InputError: a variable that has its value from elsewhere.
    """
    value = row.get(TEMPLATE_VARIABLES_KEY)
    if is_non_tensor(value):
        value = value.tolist()
    elif is_tensor_collection(value):
        value = {key: _plain(value.get(key)) for key in value.keys()}  # noqa: SIM118
    return read_variables(TEMPLATE_VARIABLES_KEY, value)


def _plain(value: Any) -> Any:
    """Return what a TensorDict holds as the Python value that was written into it."""
    if is_non_tensor(value) or isinstance(value, torch.Tensor):
        return value.tolist()
    if is_tensor_collection(value):
        return {key: _plain(value.get(key)) for key in value.keys()}  # noqa: SIM118
    return value


def read_action_mask(index: int, row: TensorDictBase, masks: ActionMaskReader) -> ActionMask:
    """Return the tokens that a row allows.

    Raises:
        MissingKeyError: the mask is not there.
        InputError, InputTypeError, ConstraintError: see `ActionMaskReader.read`.
    """
    name = f"row {index}, {masks.key!r}:"
    try:
        value = row.get(masks.key)
    except ValueError as error:  # a tensor where the key's path has a container
        raise InputTypeError(f"{name} cannot be read: {error}; action_mask_key reads a mask there") from error
    if value is None:
        raise MissingKeyError(f"{name} not there, and action_mask_key reads it; the row has {keys_of(row)}: add it")
    try:
        return masks.read(value.tolist() if is_non_tensor(value) else value)
    except (InputError, ConstraintError) as error:
        raise type(error)(f"{name} {error}") from error


def keys_of(row: TensorDictBase) -> list[str]:
    """Return the names of all leaves of a row, for an error that says what is there."""
    return sorted(map(str, row.keys(True, True, is_leaf=is_leaf_nontensor)))
