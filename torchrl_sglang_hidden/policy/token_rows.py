"""Reading rows of token ids: which of them are pads, by masks, or by what is known of where the ids come from.

Knows nothing of text, chats or tokenizers.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from tensordict import TensorDictBase
from tensordict.utils import NestedKey, unravel_key

from torchrl_sglang_hidden.errors import InputError, InputTypeError

__all__ = ["TokenReader", "TokenRow", "check_ids", "strip_pads", "warn_of_pads"]


class TokenRow(NamedTuple):
    """The ids of one row without its pads.

    Args:
        ids: P ids.
        assistant_mask: for scoring, which of the ids the assistant wrote; None where nothing says so.
        placement: the places of the ids tensor: True at an id, False at a pad; None where nothing says which are pads,
            and every place is taken for an id.
    """

    ids: tuple[int, ...]
    assistant_mask: tuple[bool, ...] | None
    placement: tuple[bool, ...] | None


@dataclass(frozen=True, slots=True)
class TokenReader:
    """Reads rows of ids. Arguments that are not described here are those of `PolicyConfig`.

    Args:
        generate: True reads prompts, False whole sequences to score.
        padding_value: the id that pads a ``Tokens`` that says it is padded.
    """

    input_key: NestedKey
    attention_mask_key: NestedKey | None
    masks_key: NestedKey | None
    generate: bool
    padding_value: int

    def read(self, name: str, row: TensorDictBase, ids: Any) -> TokenRow:
        """Read the ids of one row, a TensorDict without batch dimensions, and which of them are pads.

        Args:
            name: the row and its key, for errors.
            row: where masks are read.
            ids: what stands at the input key.

        Raises:
            InputTypeError: something that is not a tensor of ids.
            InputError: a mask of another length, or padding that cannot be told from ids.
        """
        check_ids(name, ids)
        real = assistant_mask = None
        if not self.generate and self.masks_key is not None:
            # Read before the user's own mask, which may cover the prompt alone.
            real = self._read_mask(name, row, ids, unravel_key((self.masks_key, "all_attention_mask")))
            assistant_mask = self._read_mask(name, row, ids, unravel_key((self.masks_key, "all_assistant_mask")))
        if real is None:
            real = self._attention_mask(name, row, ids)
        if real is None:
            real = self._guess_padding(name, row, ids)
        if real is None:
            mask = None if assistant_mask is None else tuple(assistant_mask.tolist())
            return TokenRow(tuple(ids.tolist()), mask, None)
        return TokenRow(
            tuple(ids[real].tolist()),
            None if assistant_mask is None else tuple(assistant_mask[real].tolist()),
            tuple(real.tolist()),
        )

    def _attention_mask(self, name: str, row: TensorDictBase, ids: torch.Tensor) -> torch.Tensor | None:
        """Return the user's own mask: at `attention_mask_key`, or by the same name beside the ids."""
        key = self.attention_mask_key
        if key is None:
            return None
        mask = self._read_mask(name, row, ids, key)
        if not isinstance(key, str) or not isinstance(self.input_key, tuple):
            return mask
        beside = (*self.input_key[:-1], key)
        other = self._read_mask(name, row, ids, beside)
        if mask is not None and other is not None and not torch.equal(mask.cpu(), other.cpu()):
            raise InputError(f"{name} {key!r} and {beside!r} are both there and differ; leave one of them out")
        return other if mask is None else mask

    def _read_mask(self, name: str, row: TensorDictBase, ids: torch.Tensor, key: NestedKey) -> torch.Tensor | None:
        try:
            mask = row.get(key)
        except ValueError as error:  # a tensor where the key's path has a container
            raise InputTypeError(f"{key!r} cannot be read: {error}; tokens mode reads a mask there") from error
        if mask is not None and mask.shape != ids.shape:
            raise InputError(
                f"{name} of shape {tuple(ids.shape)}, and {key!r} of {tuple(mask.shape)}; give both the same"
            )
        return None if mask is None else mask.bool()

    def _guess_padding(self, name: str, row: TensorDictBase, ids: torch.Tensor) -> torch.Tensor | None:
        """Return which ids are real without a mask of the user's; None where nothing says so.

        The mask of the turn in which the ids were written says so, or else a ``Tokens`` that says it is padded, on the
        left.
        """
        mask = self._mask_of_turn(row, ids)
        if mask is not None or not self._is_padded(row):
            return mask
        if not self.generate and len(ids) and ids[-1] == self.padding_value:
            raise InputError(
                f"{name} is padded and ends with the pad id {self.padding_value}, which may be padding or a token that "
                f"was sampled; give the mask, at {self.attention_mask_key!r} or in {self.masks_key!r}"
            )
        return (ids != self.padding_value).cumsum(0).bool()

    def _mask_of_turn(self, row: TensorDictBase, ids: torch.Tensor) -> torch.Tensor | None:
        """Return the part of the row's ``all_attention_mask`` that belongs to a prompt; None if it is of other ids.

        A policy's output can be its next input: the prompt of it again, or ``full``, which torchrl's ChatEnv makes the
        next prompt, and forgets that it is padded. A pad id in it may be a token, where BOS or EOS is the pad id too.
        """
        if not self.generate or self.masks_key is None:
            return None
        try:
            mask = row.get(unravel_key((self.masks_key, "all_attention_mask")))
        except ValueError:  # a tensor of the user's where the key's path has a container
            return None
        if not isinstance(mask, torch.Tensor) or mask.ndim != 1:
            return None
        full = row.get((*self.input_key[:-1], "full")) if isinstance(self.input_key, tuple) else None
        wrote_these = (
            isinstance(full, torch.Tensor)
            and full.shape == mask.shape
            and len(full) >= len(ids)
            and torch.equal(full[: len(ids)], ids)
        )
        if not wrote_these and mask.shape != ids.shape:
            return None
        mask = mask[: len(ids)].bool()
        # What it leaves out must be pads; and one that leaves out nothing fits any ids of its length.
        if not bool((ids[~mask] == self.padding_value).all()) or (mask.all() and not wrote_these):
            return None
        return mask

    def _is_padded(self, row: TensorDictBase) -> bool:
        """Whether the ids come from a ``Tokens`` that says it is padded."""
        parent = row.get(self.input_key[:-1]) if isinstance(self.input_key, tuple) else None
        return getattr(parent, "padded", None) is True


def check_ids(name: str, ids: Any) -> None:
    """Check that something is a tensor of token ids, [P].

    Raises:
        InputTypeError: it is not.
    """
    if not isinstance(ids, torch.Tensor) or ids.ndim != 1:
        shape = f" of shape {tuple(ids.shape)}" if isinstance(ids, torch.Tensor) else ""
        raise InputTypeError(f"{name} a {type(ids).__name__}{shape}; expected ids [P] per row: use ragged(tokens=…)")
    if ids.is_floating_point() or ids.is_complex() or ids.dtype == torch.bool:
        raise InputTypeError(f"{name} of dtype {ids.dtype}; token ids are integers, such as torch.int64")


def warn_of_pads(rows: Sequence[Sequence[int]], pad_id: int, bos_id: int | None, eos_id: int | None) -> None:
    """Warn if rows of one length, of which nothing says which ids are pads, look as if they were padded.

    They do if a row begins or ends with more pad ids than a text may: one, where it is BOS or EOS too.

    Args:
        rows: the ids of all rows of a batch.
        pad_id: the id that pads.
        bos_id: the tokenizer's, or None.
        eos_id: the tokenizer's, or None.
    """
    if len({len(ids) for ids in rows}) != 1 or not rows[0]:
        return
    for side, own_id, sided in (("begins", bos_id, rows), ("ends", eos_id, [ids[::-1] for ids in rows])):
        runs = [next((i for i, token_id in enumerate(ids) if token_id != pad_id), len(ids)) for ids in sided]
        # Not every row ends with an EOS, but all begin with BOS or none does.
        genuine = int(pad_id == own_id and (side == "ends" or min(runs) > 0))
        row = max(range(len(runs)), key=runs.__getitem__)
        if runs[row] > genuine:
            warnings.warn(
                f"row {row} {side} with {runs[row]} times the id {pad_id}, which pads, and no mask says which ids are "
                "pads, so all of them are sent as words; give a bool mask at attention_mask_key or beside the ids, "
                'such as {"prompt": ids, "attention_mask": mask}, all True if they are words',
                stacklevel=2,
            )


def strip_pads(ids: tuple[int, ...], pad_id: int) -> tuple[int, ...]:
    """Return the ids without the pads at both ends."""
    real = [index for index, token_id in enumerate(ids) if token_id != pad_id]
    return ids[real[0] : real[-1] + 1] if real else ()
