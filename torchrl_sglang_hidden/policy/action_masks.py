"""Which tokens a policy may choose: what the user gives as arguments, options and rows of a TensorDict, as constraints.

Knows nothing of engines or wires. Whether the constraints of a request fit the model, and leave anything together, is
decided where it is sent.
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


def read_constraints(name: str, given: Any) -> tuple[LogitConstraint, ...]:
    """Constraints as a user may give them: one or a list; each a `LogitConstraint`, or the text that it writes.

    Args:
        name: of the argument.
        given: its value.

    Raises:
        InputTypeError: something else.
        InputError: text that no constraint writes.
    """
    return tuple(_read_constraint(name, one) for one in (given if isinstance(given, (list, tuple)) else [given]))


def _read_constraint(name: str, given: Any) -> LogitConstraint:
    if isinstance(given, LogitConstraint):
        return given
    if not isinstance(given, str):
        raise InputTypeError(
            f"{name}={given!r:.80} is a {type(given).__name__}; expected a LogitConstraint, such as "
            "ActionMask([…]), its to_str(), or a list of them"
        )
    if _is_json(given):
        raise InputError(
            f"{name}={given!r:.80}: SGLang's own processor goes alone, into the option {PROCESSOR}; give a "
            "LogitConstraint here"
        )
    return LogitConstraint.from_str(given)


# --- options ---------------------------------------------------------------------------------------------------------


def read_options(options: Mapping[str, Any], vocab_size: int) -> dict[str, Any]:
    """The options with those that are of constraints read: an `ActionMask`, a `DisallowedTokens`, and for
    ``custom_logit_processor`` a tuple of constraints, or SGLang's own string.

    Raises:
        InputError: a mask of another length than the vocabulary, or text that nobody can read.
        InputTypeError: a value of the wrong type.
        ConstraintError: a mask that allows nothing.
    """
    readers: dict[str, Callable[[Any, int], Any]] = {
        "action_mask": _read_action_mask,
        "disallowed_tokens": lambda ids, _: ids if isinstance(ids, DisallowedTokens) else DisallowedTokens(ids),
        PROCESSOR: lambda given, _: _read_processor(given),
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


def _read_action_mask(given: Any, vocab_size: int) -> ActionMask:
    if isinstance(given, ActionMask):
        return given
    if isinstance(given, torch.Tensor) and given.dtype == torch.bool:
        if given.shape != (vocab_size,):
            raise InputError(f"a mask of shape {tuple(given.shape)}, and {vocab_size} tokens; give one of {vocab_size}")
        return ActionMask.from_mask(given)
    return ActionMask(given)


def _read_processor(given: Any) -> str | tuple[LogitConstraint, ...]:
    if not isinstance(given, str) or not _is_json(given):
        return read_constraints(PROCESSOR, given)
    # What is in it is never read: SGLang runs it, here it stays text.
    try:
        found = json.loads(given)
        code = found.get("callable") if isinstance(found, dict) else None
    except (ValueError, RecursionError) as error:
        raise InputError(f"{given!r:.80} is no JSON ({error}); give what SGLang's to_str() writes") from error
    if not isinstance(code, str) or not _HEX.fullmatch(code):
        raise InputError(f"{given!r:.80} has no 'callable' in hex; give what SGLang's to_str() writes")
    return given


def _is_json(text: str) -> bool:
    return text.lstrip().startswith("{")


def native_processor(options: Mapping[str, Any]) -> str | None:
    """SGLang's own processor among options that `read_options` has read."""
    found = options.get(PROCESSOR)
    return found if isinstance(found, str) else None


def option_constraints(options: Mapping[str, Any]) -> tuple[LogitConstraint, ...]:
    """The constraints among options that `read_options` has read, without SGLang's own processor."""
    own = () if native_processor(options) is not None else options.get(PROCESSOR, ())
    masks = (options.get(name) for name in ("action_mask", "disallowed_tokens"))
    return (*own, *(mask for mask in masks if mask is not None))


# --- rows of a TensorDict --------------------------------------------------------------------------------------------


def read_action_ids(given: Any, key: NestedKey | None, vocab_size: int) -> tuple[int, ...] | None:
    """The token ids that the columns of a row's mask stand for.

    Raises:
        InputTypeError: something that is no integer.
        InputError: none at all, or no key to read masks from.
        TokenIdError: an id outside the vocabulary, or one that is there twice.
    """
    if given is None:
        return None
    if isinstance(given, torch.Tensor) and given.dtype != torch.bool:
        given = given.tolist()
    if not isinstance(given, (list, tuple, range)) or any(type(token_id) is not int for token_id in given):
        raise InputTypeError(f"action_token_ids={given!r:.80}: expected token ids, in the order of a mask's columns")
    ids = tuple(given)
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
    """Reads the action masks of one call's rows. Equal ones become one object: V may be 150 000.

    Args:
        key: where they are.
        vocab_size: V.
        token_ids: the ids that the columns of a bool mask stand for; None for all V.
    """

    key: NestedKey
    vocab_size: int
    token_ids: tuple[int, ...] | None = None
    _seen: dict[Any, ActionMask] = field(default_factory=dict, repr=False, compare=False)

    def read(self, given: Any) -> ActionMask:
        """The mask of one row: bool ``[V]`` or ``[A]``, or token ids as a tensor or a list.

        Raises:
            InputTypeError: something else.
            InputError: a bool mask of another length, or an id that is not among ``token_ids``.
            ConstraintError: it allows nothing.
            TokenIdError: a negative id.
        """
        if isinstance(given, torch.Tensor):
            narrow = given.dtype in (torch.int8, torch.uint8)  # as which environments write masks too
            if given.ndim != 1 or narrow or given.is_floating_point() or given.is_complex():
                raise InputTypeError(
                    f"a tensor of {given.dtype} and shape {tuple(given.shape)}; expected one row per prompt: a mask as "
                    "torch.bool (mask.bool()), or token ids as torch.int64"
                )
            if given.dtype == torch.bool:
                mask = given.cpu()
                return self._once(mask.numpy().tobytes(), lambda: self._of_columns(mask))
            given = given.tolist()
        if not isinstance(given, (list, tuple, set, range)) or any(type(token_id) is not int for token_id in given):
            raise InputTypeError(f"a {type(given).__name__}, {given!r:.80}; expected a bool mask, or token ids")
        ids = tuple(given)
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
        places: list[int] = mask.nonzero().flatten().tolist()
        if not places:
            raise ConstraintError(f"all {columns} columns are False, 0 tokens are allowed; leave at least 1")
        return ActionMask(places if self.token_ids is None else [self.token_ids[place] for place in places])

    def _of_ids(self, ids: tuple[int, ...]) -> ActionMask:
        mask = ActionMask(ids)
        # Places in the action set, taken for ids, would choose other tokens without a word.
        other = set(mask.valid_token_ids) - set(self.token_ids or mask.valid_token_ids)
        if other:
            raise InputError(
                f"{min(other)} is not among the {len(self.token_ids or ())} action_token_ids; integers are token ids "
                "here, for places give a bool mask"
            )
        return mask


def responses_of(assistant_mask: Sequence[bool]) -> tuple[tuple[int, int], ...]:
    """The runs of True, ``(start, stop)`` each, without token 0, which nothing is before."""
    edges = [False, *assistant_mask[1:], False]
    changes = [place for place in range(1, len(edges)) if edges[place] != edges[place - 1]]
    return tuple(zip(changes[::2], changes[1::2], strict=True))
