"""Constraints on the tokens that a policy may choose, read from its arguments, its options and rows of a TensorDict.

Knows nothing of engines or wire formats. Whether the constraints of a request fit the model, and together leave any
token, is checked where the request is sent.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

import torch
from tensordict.utils import NestedKey

from torchrl_sglang_hidden.errors import ConstraintError, InputError, InputTypeError, TokenIdError
from torchrl_sglang_hidden.spec.constraints import ActionMask, DisallowedTokens, LogitConstraint

__all__ = [
    "ActionMaskReader",
    "native_processor",
    "option_constraints",
    "read_action_ids",
    "read_constraints",
    "read_options",
    "responses_of",
]

PROCESSOR: Final = "custom_logit_processor"
_HEX = re.compile(r"([0-9a-fA-F]{2})+")


def read_constraints(name: str, value: Any) -> tuple[LogitConstraint, ...]:
    """Read one constraint or a list; each is a `LogitConstraint`, or the text that its ``to_str`` writes.

    Args:
        name: of the argument or option.
        value: its value, as the user wrote it.

    Raises:
        InputTypeError: something else.
        InputError: text that no constraint writes.
    """
    return tuple(_read_constraint(name, item) for item in (value if isinstance(value, (list, tuple)) else [value]))


def _read_constraint(name: str, value: Any) -> LogitConstraint:
    if isinstance(value, LogitConstraint):
        return value
    if not isinstance(value, str):
        raise InputTypeError(
            f"{name}={value!r:.80} is a {type(value).__name__}; expected a LogitConstraint, such as "
            "ActionMask([…]), its to_str(), or a list of them"
        )
    if _is_json(value):
        raise InputError(
            f"{name}={value!r:.80}: SGLang's own processor goes alone, into the option {PROCESSOR}; give a "
            "LogitConstraint here"
        )
    return LogitConstraint.from_str(value)


# --- options ---------------------------------------------------------------------------------------------------------


def read_options(options: Mapping[str, Any], vocab_size: int) -> dict[str, Any]:
    """Return the options with the values of the three that constrain tokens read.

    ``action_mask`` becomes an `ActionMask`, ``disallowed_tokens`` a `DisallowedTokens`, and ``custom_logit_processor``
    a tuple of constraints; a native SGLang processor stays the string that it is.

    Raises:
        InputError: a mask of another length than the vocabulary, or text that nobody can read.
        InputTypeError: a value of the wrong type.
        ConstraintError: a mask that allows nothing.
    """
    readers: dict[str, Callable[[Any, int], Any]] = {
        "action_mask": _read_action_mask,
        "disallowed_tokens": lambda ids, _: ids if isinstance(ids, DisallowedTokens) else DisallowedTokens(ids),
        PROCESSOR: lambda value, _: _read_processor(value),
    }
    out = dict(options)
    for name, read in readers.items():
        if out.get(name) is None:
            continue
        try:
            out[name] = read(out[name], vocab_size)
        except (InputError, ConstraintError) as error:
            raise type(error)(f"{name}: {error}") from error
    return out


def _read_action_mask(value: Any, vocab_size: int) -> ActionMask:
    if isinstance(value, ActionMask):
        return value
    if isinstance(value, torch.Tensor) and value.dtype == torch.bool:
        if value.shape != (vocab_size,):
            raise InputError(f"a mask of shape {tuple(value.shape)}, and {vocab_size} tokens; give one of {vocab_size}")
        return ActionMask.from_mask(value)
    return ActionMask(value)


def _read_processor(value: Any) -> str | tuple[LogitConstraint, ...]:
    if not isinstance(value, str) or not _is_json(value):
        return read_constraints(PROCESSOR, value)
    # The code inside is never run here: SGLang runs it, and here it stays text.
    try:
        parsed = json.loads(value)
        code = parsed.get("callable") if isinstance(parsed, dict) else None
    except (ValueError, RecursionError) as error:
        raise InputError(f"{value!r:.80} is no JSON ({error}); give what SGLang's to_str() writes") from error
    if not isinstance(code, str) or not _HEX.fullmatch(code):
        raise InputError(f"{value!r:.80} has no 'callable' in hex; give what SGLang's to_str() writes")
    return value


def _is_json(text: str) -> bool:
    return text.lstrip().startswith("{")


def native_processor(options: Mapping[str, Any]) -> str | None:
    """Return the native SGLang processor among options that `read_options` has read, or None."""
    processor = options.get(PROCESSOR)
    return processor if isinstance(processor, str) else None


def option_constraints(options: Mapping[str, Any]) -> tuple[LogitConstraint, ...]:
    """Return the constraints among options that `read_options` has read, without a native SGLang processor."""
    own = () if native_processor(options) is not None else options.get(PROCESSOR, ())
    masks = (options.get(name) for name in ("action_mask", "disallowed_tokens"))
    return (*own, *(mask for mask in masks if mask is not None))


# --- rows of a TensorDict --------------------------------------------------------------------------------------------


def read_action_ids(value: Any, key: NestedKey | None, vocab_size: int) -> tuple[int, ...] | None:
    """Read ``action_token_ids``, the token ids that the columns of a row's mask stand for.

    Raises:
        InputTypeError: something that is no integer.
        InputError: no ids at all, or no key to read masks from.
        TokenIdError: an id outside the vocabulary, or an id that is there twice.
    """
    if value is None:
        return None
    if isinstance(value, torch.Tensor) and value.dtype != torch.bool:
        value = value.tolist()
    if not isinstance(value, (list, tuple, range)) or any(type(token_id) is not int for token_id in value):
        raise InputTypeError(f"action_token_ids={value!r:.80}: expected token ids, in the order of a mask's columns")
    ids = tuple(value)
    if not ids:
        raise InputError("action_token_ids=(): 0 actions; give at least 1 id")
    if min(ids) < 0 or max(ids) >= vocab_size or len(set(ids)) < len(ids):
        raise TokenIdError(f"action_token_ids={ids!r:.80}: ids are in 0..{vocab_size - 1}, each once")
    if key is None:
        raise InputError(
            f"action_token_ids={ids!r:.80} without action_mask_key: they are the columns of the masks there; give both"
        )
    return ids


@dataclass(frozen=True, slots=True)
class ActionMaskReader:
    """Reads the action masks of one call's rows. Equal masks become one object, because V may be 150 000.

    Args:
        key: where the masks stand.
        vocab_size: V.
        token_ids: the ids that the columns of a bool mask stand for; None for all V.
    """

    key: NestedKey
    vocab_size: int
    token_ids: tuple[int, ...] | None = None
    _seen: dict[Any, ActionMask] = field(default_factory=dict, repr=False, compare=False)

    def read(self, value: Any) -> ActionMask:
        """Read the mask of one row: bool ``[V]`` or ``[A]``, or token ids as a tensor or a list.

        Raises:
            InputTypeError: something else.
            InputError: a bool mask of another length, or an id that is not among ``token_ids``.
            ConstraintError: a mask that allows nothing.
            TokenIdError: a negative id.
        """
        if isinstance(value, torch.Tensor):
            narrow = value.dtype in (torch.int8, torch.uint8)  # some environments write masks in these
            if value.ndim != 1 or narrow or value.is_floating_point() or value.is_complex():
                raise InputTypeError(
                    f"a tensor of {value.dtype} and shape {tuple(value.shape)}; expected one row per prompt: a mask as "
                    "torch.bool (mask.bool()), or token ids as torch.int64"
                )
            if value.dtype == torch.bool:
                mask = value.cpu()
                return self._once(mask.numpy().tobytes(), lambda: self._of_columns(mask))
            value = value.tolist()
        if not isinstance(value, (list, tuple, set, range)) or any(type(token_id) is not int for token_id in value):
            raise InputTypeError(f"a {type(value).__name__}, {value!r:.80}; expected a bool mask, or token ids")
        ids = tuple(value)
        return self._once(ids, lambda: self._of_ids(ids))

    def _once(self, name: bytes | tuple[int, ...], make: Callable[[], ActionMask]) -> ActionMask:
        if name not in self._seen:
            self._seen[name] = make()
        return self._seen[name]

    def _of_columns(self, mask: torch.Tensor) -> ActionMask:
        columns = self.vocab_size if self.token_ids is None else len(self.token_ids)
        if len(mask) != columns:
            remedy = (
                f"the model has {columns} tokens; give a mask over all of them, or action_token_ids, the ids that its "
                f"{len(mask)} columns stand for"
                if self.token_ids is None
                else f"action_token_ids has {columns}; give both the same length"
            )
            raise InputError(f"a mask of {len(mask)} columns, and {remedy}")
        allowed: list[int] = mask.nonzero().flatten().tolist()
        if not allowed:
            raise ConstraintError(f"all {columns} columns are False, 0 tokens are allowed; leave at least 1")
        return ActionMask(allowed if self.token_ids is None else [self.token_ids[column] for column in allowed])

    def _of_ids(self, ids: tuple[int, ...]) -> ActionMask:
        mask = ActionMask(ids)
        # Column numbers that are mistaken for token ids would choose other tokens without an error.
        other = set(mask.valid_token_ids) - set(self.token_ids or mask.valid_token_ids)
        if other:
            raise InputError(
                f"{min(other)} is not among the {len(self.token_ids or ())} action_token_ids; integers are token ids "
                "here; for places pass a bool mask"
            )
        return mask


def responses_of(assistant_mask: Sequence[bool]) -> tuple[tuple[int, int], ...]:
    """Return the runs of True, ``(start, stop)`` each, without token 0, which no token precedes."""
    edges = [False, *assistant_mask[1:], False]
    changes = [index for index in range(1, len(edges)) if edges[index] != edges[index - 1]]
    return tuple(zip(changes[::2], changes[1::2], strict=True))
