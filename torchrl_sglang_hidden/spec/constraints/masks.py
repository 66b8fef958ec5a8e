"""Defines masks, the constraints that remove tokens, and checks that several masks leave a token.

Knows nothing of requests or of the server.
"""

from __future__ import annotations

import base64
import math
from abc import abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Self

import numpy as np
import torch

from torchrl_sglang_hidden.errors import ConstraintError, InputError, InputTypeError, TokenIdError
from torchrl_sglang_hidden.spec.constraints.base import ConstraintStep, LogitConstraint

__all__ = ["ActionMask", "DisallowedTokens", "TokenConstraint", "check_constraints"]

MAX_IDS = 2**20  # more than any vocabulary
# Ids are written as runs, which people can read, unless bits are shorter and there are more runs than these.
MIN_RUN_BITS = 32
READABLE_RUNS = 8
_BITS = "base64:"
# The ids once more, as an array: a mask of half a vocabulary is read and built in a millisecond instead of thirty.
_IDS = "_ids_N"


class TokenConstraint(LogitConstraint):
    """Removes tokens and changes nothing else: the base of `ActionMask` and `DisallowedTokens`."""

    @abstractmethod
    def allowed(self, vocab_size: int) -> torch.Tensor:
        """Return bool ``[V]``, True where a token may be chosen."""

    def apply(self, logits_V: torch.Tensor, step: ConstraintStep) -> torch.Tensor:
        """See `LogitConstraint.apply`."""
        return logits_V.masked_fill(~self.allowed(len(logits_V)).to(logits_V.device), -math.inf)


@dataclass(frozen=True)
class ActionMask(TokenConstraint, name="action_mask"):
    """Allows only these tokens.

    Without the model's end-of-sequence token among them, a response ends at ``max_new_tokens`` or a stop string.

    Args:
        valid_token_ids: the allowed token ids, in any order: a list, a set, a range or an integer tensor.

    Raises:
        ConstraintError: no ids.
        TokenIdError: a negative id.
        InputTypeError: a value that is no integer; or more than two values, all 0 or 1, which are a mask.
    """

    valid_token_ids: Sequence[int]

    def __post_init__(self) -> None:
        super().__post_init__()
        ids_N = _read_ids("ActionMask(valid_token_ids=…)", self.valid_token_ids)
        if not len(ids_N):
            raise ConstraintError("ActionMask(valid_token_ids=()): 0 tokens are allowed; give at least 1")
        object.__setattr__(self, "valid_token_ids", tuple(ids_N.tolist()))
        object.__setattr__(self, _IDS, ids_N)

    @classmethod
    def from_mask(
        cls, mask_V: torch.Tensor, *, first_tokens: int | None = None, positions: tuple[int, ...] | None = None
    ) -> Self:
        """Make an `ActionMask` of a bool tensor ``[V]``, True where a token may be chosen."""
        return cls(_where(mask_V), first_tokens=first_tokens, positions=positions)

    def allowed(self, vocab_size: int) -> torch.Tensor:
        """See `TokenConstraint.allowed`."""
        return torch.from_numpy(_marked(vars(self)[_IDS], vocab_size))

    def check(self, vocab_size: int) -> None:
        """See `LogitConstraint.check`."""
        _check_ids("ActionMask", self.valid_token_ids, vocab_size)

    def fields(self) -> dict[str, Any]:
        """See `LogitConstraint.fields`; ids as runs, such as ``"3-7,9"``, or as bits."""
        return {**super().fields(), "valid_token_ids": _to_text(vars(self)[_IDS])}

    @classmethod
    def from_fields(cls, fields: Mapping[str, Any]) -> Self:
        """See `LogitConstraint.from_fields`."""
        return super().from_fields({**fields, "valid_token_ids": _from_text(fields["valid_token_ids"])})


@dataclass(frozen=True)
class DisallowedTokens(TokenConstraint, name="disallowed_tokens"):
    """Removes these tokens.

    Args:
        ids: the removed token ids, in any order: a list, a set, a range or an integer tensor. An empty list removes
            no token.

    Raises:
        TokenIdError: a negative id.
        InputTypeError: a value that is no integer; or more than two values, all 0 or 1, which are a mask.
    """

    ids: Sequence[int]

    def __post_init__(self) -> None:
        super().__post_init__()
        ids_N = _read_ids("DisallowedTokens(ids=…)", self.ids)
        object.__setattr__(self, "ids", tuple(ids_N.tolist()))
        object.__setattr__(self, _IDS, ids_N)

    def allowed(self, vocab_size: int) -> torch.Tensor:
        """See `TokenConstraint.allowed`."""
        return torch.from_numpy(~_marked(vars(self)[_IDS], vocab_size))

    def check(self, vocab_size: int) -> None:
        """See `LogitConstraint.check`."""
        _check_ids("DisallowedTokens", self.ids, vocab_size)
        if len(self.ids) == vocab_size:
            raise ConstraintError(f"DisallowedTokens: all {vocab_size} tokens of the vocabulary are denied; leave some")

    def fields(self) -> dict[str, Any]:
        """See `LogitConstraint.fields`; ids as runs, such as ``"3-7,9"``, or as bits."""
        return {**super().fields(), "ids": _to_text(vars(self)[_IDS])}

    @classmethod
    def from_fields(cls, fields: Mapping[str, Any]) -> Self:
        """See `LogitConstraint.from_fields`."""
        return super().from_fields({**fields, "ids": _from_text(fields["ids"])})


def check_constraints(constraints: Sequence[LogitConstraint], vocab_size: int, max_new_tokens: int) -> None:
    """Check the constraints of one request against the model, and its masks against one another.

    Args:
        constraints: the request's constraints.
        vocab_size: V.
        max_new_tokens: most tokens of the response.

    Raises:
        TokenIdError: an id that the model does not have.
        ConstraintError: the masks leave no token to choose somewhere in the response.
    """
    for constraint in constraints:
        constraint.check(vocab_size)
    masks = [constraint for constraint in constraints if isinstance(constraint, TokenConstraint)]
    if len(masks) < 2:
        return
    # Only token 0 and the explicit positions need checking: anywhere else the active masks are a subset of the masks at
    # token 0. For example a mask with first_tokens=3 acts at token 0, and no mask begins to act at token 3.
    indices = {0, *(index for mask in masks for index in mask.positions or ())}
    checked = set()
    for index in sorted(indices):
        acting = tuple(i for i, mask in enumerate(masks) if mask.acts_on(index))
        if index >= max(max_new_tokens, 1) or len(acting) < 2 or acting in checked:
            continue
        checked.add(acting)
        left = masks[acting[0]].allowed(vocab_size)
        for i in acting[1:]:
            left = left & masks[i].allowed(vocab_size)  # not in place: the mask may keep the tensor
        if not left.any():
            names = " and ".join(type(masks[i]).__name__ for i in acting)
            raise ConstraintError(
                f"{names} together leave 0 of {vocab_size} tokens for token {index} of the response; allow one that is "
                "not denied"
            )


def _read_ids(what: str, ids: object) -> np.ndarray:
    """Return the ids as int64 ``[N]``, sorted and each once."""
    if isinstance(ids, torch.Tensor):
        # Environments write masks as int8 and uint8 too. No vocabulary is small enough for ids of these dtypes.
        if ids.dtype in (torch.bool, torch.int8, torch.uint8) or ids.is_floating_point() or ids.is_complex():
            raise InputTypeError(
                f"{what}: a tensor of {ids.dtype}; expected token ids, or for a mask ActionMask.from_mask(mask.bool())"
            )
        read_N = ids.detach().flatten().cpu().numpy().astype(np.int64)
    else:
        read_N = _read_list(what, ids)
    if len(read_N) and read_N.min() < 0:
        raise TokenIdError(f"{what}: {read_N.min()} is negative; token ids are at least 0")
    ids_N = read_N if (read_N[1:] > read_N[:-1]).all() else np.unique(read_N)
    if len(read_N) > 2 and len(ids_N) <= 2 and ids_N[-1] <= 1:
        raise InputTypeError(f"{what}: {len(read_N)} zeros and ones, which is a mask; pass it as bool (mask.bool())")
    return ids_N


def _read_list(what: str, ids: object) -> np.ndarray:
    if isinstance(ids, (str, bytes, Mapping)) or not isinstance(ids, Iterable):
        raise InputTypeError(f"{what}: {ids!r:.80} is a {type(ids).__name__}; expected token ids")
    read = list(ids)
    wrong = [value for value in read if type(value) is not int] if set(map(type, read)) - {int} else []
    if wrong:
        raise InputTypeError(f"{what}: {wrong[0]!r:.80} is a {type(wrong[0]).__name__}; token ids are integers")
    try:
        return np.array(read, dtype=np.int64)
    except OverflowError:
        largest = max(read, key=abs)
        kind = "negative" if largest < 0 else "no token's"
        raise TokenIdError(
            f"{what}: {largest} is {kind}; token ids are at least 0 and less than the vocabulary"
        ) from None


def _where(mask_V: object) -> list[int]:
    if not isinstance(mask_V, torch.Tensor) or mask_V.dtype != torch.bool or mask_V.ndim != 1:
        raise InputTypeError(f"ActionMask.from_mask({mask_V!r:.80}): expected a bool tensor [V]")
    ids: list[int] = mask_V.nonzero().flatten().tolist()
    return ids


def _check_ids(kind: str, ids: Sequence[int], vocab_size: int) -> None:
    if ids and ids[-1] >= vocab_size:
        raise TokenIdError(
            f"{kind}: id {ids[-1]} is outside the vocabulary of {vocab_size}; ids are 0..{vocab_size - 1}. Was it made "
            "by another model's tokenizer?"
        )


def _marked(ids_N: np.ndarray, vocab_size: int) -> np.ndarray:
    marked_V = np.zeros(vocab_size, dtype=np.bool_)
    marked_V[ids_N] = True
    return marked_V


def _to_text(ids_N: np.ndarray) -> str:
    """Write sorted ids as runs, ``"3-7,9"``, or as bits, ``"base64:…"`` with id 0 in the lowest bit, if shorter."""
    if not len(ids_N):
        return ""
    starts_N = np.concatenate([[True], np.diff(ids_N) != 1])
    firsts, lasts = ids_N[starts_N].tolist(), ids_N[np.roll(starts_N, -1)].tolist()
    last = int(ids_N[-1])
    # More runs than this are longer than the bits, and making their text would take long.
    if len(firsts) <= last // MIN_RUN_BITS + READABLE_RUNS:
        text = ",".join(str(a) if a == b else f"{a}-{b}" for a, b in zip(firsts, lasts, strict=True))
        if len(firsts) <= READABLE_RUNS or len(text) <= len(_BITS) + 4 * (last // 24 + 1):
            return text
    packed = np.packbits(_marked(ids_N, last // 8 * 8 + 8), bitorder="little")
    return _BITS + base64.b64encode(packed.tobytes()).decode("ascii")


def _from_text(text: object) -> torch.Tensor:
    if not isinstance(text, str):
        raise InputTypeError(f"{text!r:.80}: expected token ids as runs, such as '3-7,9', or 'base64:…'")
    if text.startswith(_BITS):
        if len(text) > MAX_IDS // 6:
            raise InputError(f"{text!r:.80}: more than {MAX_IDS} token ids; pass fewer")
        data = base64.b64decode(text.removeprefix(_BITS), validate=True)
        bits = np.unpackbits(np.frombuffer(data, dtype=np.uint8), bitorder="little")
        return torch.from_numpy(np.flatnonzero(bits))
    runs: list[np.ndarray] = []
    count = 0
    for run in text.split(",") if text else ():
        first, dash, last = run.partition("-")
        start, stop = int(first), int(last if dash else first) + 1
        if stop <= start:
            raise InputError(f"{text!r:.80}: {run!r} ends before it begins; expected runs such as '3-7,9'")
        count += stop - start
        # The text may come from the network: a few characters must not become a list that fills the memory.
        if count > MAX_IDS:
            raise InputError(f"{text!r:.80}: more than {MAX_IDS} token ids; pass fewer")
        runs.append(np.arange(start, stop))
    return torch.from_numpy(np.concatenate(runs) if runs else np.empty(0, dtype=np.int64))
