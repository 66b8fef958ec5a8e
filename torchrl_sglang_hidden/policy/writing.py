"""Writing outputs to a TensorDict: the input, one that a call names, or a new one.

Knows nothing of what the outputs are.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from tensordict import LazyStackedTensorDict, TensorDictBase, is_non_tensor, is_tensor_collection
from tensordict.utils import NestedKey

from torchrl_sglang_hidden.errors import InputError, InputTypeError

__all__ = ["resolve_target", "write"]


def resolve_target(
    tensordict: TensorDictBase,
    tensordict_out: TensorDictBase | None,
    inplace: bool | str,
    keys: Sequence[NestedKey],
    batch_size: torch.Size,
) -> TensorDictBase | None:
    """Return the TensorDict to write to, None for a new one. Called before the engine works for the call.

    Args:
        tensordict: the input.
        tensordict_out: the TensorDict that the call names, or None.
        inplace: True, False or ``"empty"``; read where the call names none.
        keys: the keys that will be written.
        batch_size: the output's.

    Raises:
        InputTypeError: ``tensordict_out`` is no TensorDict.
        InputError: the target is locked, has another batch size, or something else in the place of a key's container.
    """
    target = tensordict_out
    if target is None:
        if inplace is False:
            return None
        target = tensordict if inplace is True else tensordict.empty()
    if not isinstance(target, TensorDictBase):
        raise InputTypeError(f"tensordict_out={target!r:.80} is a {type(target).__name__}; expected a TensorDict")
    if target.is_locked:
        raise InputError("the TensorDict to write to is locked; unlock_() it, or use inplace=False")
    _check_paths_free(target, keys)
    if target.batch_size != batch_size:
        given, wanted = tuple(target.batch_size), tuple(batch_size)
        raise InputError(f"tensordict_out has batch size {given} and the output has {wanted}; give both the same")
    return target


def write(
    target: TensorDictBase,
    out: TensorDictBase,
    keys: Sequence[NestedKey],
    owned: Sequence[NestedKey],
    layout: torch.layout | None,
) -> TensorDictBase:
    """Write an output into a target of its batch size, and return the target.

    Args:
        target: what `resolve_target` returned.
        out: the output.
        keys: the keys to write.
        owned: every key that this wrapper can write. Keys that this call does not write are deleted, so that the
            results of the previous turn are not mistaken for new ones.
        layout: of the nested tensor that a ragged leaf becomes where the target holds no ragged stacks.
    """
    _write_rows(target, out, keys, layout)
    for key in owned:
        if key not in keys and target.get(key) is not None:
            target.del_(key)
    return target


def _write_rows(
    target: TensorDictBase, out: TensorDictBase, keys: Sequence[NestedKey], layout: torch.layout | None
) -> None:
    # Row by row where both hold rows: to stack each output, for the target to take it apart again, takes longer.
    stacks = (target, out)
    if all(isinstance(stack, LazyStackedTensorDict) and stack.stack_dim == 0 for stack in stacks):
        for target_row, out_row in zip(target.tensordicts, out.tensordicts, strict=True):
            _write_rows(target_row, out_row, keys, layout)
        return
    # set, not update: update would merge into a TensorClass of the previous step and keep its stale fields.
    for key in keys:
        _write(target, out, key, layout)


def _write(target: TensorDictBase, out: TensorDictBase, key: NestedKey, layout: torch.layout | None) -> None:
    try:
        value = out.get(key)
    except RuntimeError:  # rows of several lengths
        if isinstance(target, LazyStackedTensorDict) and target.stack_dim == 0:
            for target_row, out_row in zip(target.tensordicts, out.unbind(0), strict=True):
                _write(target_row, out_row, key, layout)
            return
        value = out.get(key, as_nested_tensor=True, layout=layout or torch.jagged)
    target.set(key, value)


def _check_paths_free(target: TensorDictBase, keys: Sequence[NestedKey]) -> None:
    """Refuse a target where a key's path leads through something that is no TensorDict."""
    while target.ndim:
        target = target[0]
    for key in keys:
        path = key if isinstance(key, tuple) else (key,)
        for length in range(1, len(path)):
            container = target.get(path[:length])
            if container is None:
                break
            if not is_tensor_collection(container) or is_non_tensor(container):
                raise InputError(
                    f"{key!r} cannot be written: there is a {type(container).__name__} at {path[:length]!r}; give the "
                    "output another key, or use inplace=False"
                )
