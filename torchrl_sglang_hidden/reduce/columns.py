"""Select the columns of logits that requests ask for: a few operations for any number of rows that ask alike.

Pure torch; knows nothing of batches or requests.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch

from torchrl_sglang_hidden.records import TokenLogits
from torchrl_sglang_hidden.reduce.bounded import Bounded
from torchrl_sglang_hidden.reduce.device import on_device
from torchrl_sglang_hidden.spec.logits import LogitsSpec, Stage

__all__ = ["Columns", "columns_of", "select_columns", "select_rows"]


class Columns(NamedTuple):
    """What decides which requests are served together: rows with the same columns in kind and number.

    Args:
        kind: ``"top_k"``, ``"token_ids"`` or ``"full"``.
        width: C; 0 for the whole vocabulary.
        dtype: the dtype that travels.
        stage: the logits that the columns are taken from.
        token_ids: the ids of the columns, where they are given.
        serial: names the token ids: equal for equal ids while they are in use, and never used again for others.
    """

    kind: str
    width: int
    dtype: torch.dtype
    stage: Stage
    token_ids: tuple[int, ...]
    serial: int

    @property
    def group(self) -> tuple[str, int, torch.dtype, Stage]:
        """What rows that are served together have in common; their token ids may differ."""
        return self[:4]


_SERIALS = itertools.count(1)
_NAMED: Bounded[int] = Bounded(2**20)  # by the ids; the limit counts ids
# By device and the serials of the rows: their column ids on the device.
_ON_DEVICE: Bounded[torch.Tensor] = Bounded(2**25)


def columns_of(spec: LogitsSpec) -> Columns:
    """Describe the columns that a spec asks for."""
    token_ids: tuple[int, ...] = ()
    serial = 0
    match spec:
        case LogitsSpec(top_k=int(top_k)):
            kind, width = "top_k", top_k
        case LogitsSpec(token_ids=tuple(token_ids)):
            kind, width = "token_ids", len(token_ids)
            serial = _NAMED.get(token_ids) or _NAMED.put(token_ids, next(_SERIALS), len(token_ids))
        case LogitsSpec(full=True):
            kind, width = "full", 0
        case _:
            raise NotImplementedError(f"{spec}: no columns are selected for this; add a case to columns_of")
    return Columns(kind=kind, width=width, dtype=spec.dtype, stage=spec.stage, token_ids=token_ids, serial=serial)


def select_columns(logits_NV: torch.Tensor, spec: LogitsSpec) -> TokenLogits:
    """Copy the columns that ``spec`` asks for.

    Args:
        logits_NV: float ``[N, V]``.
        spec: the columns, and the dtype.

    Returns:
        ``[N, C]`` in the spec's dtype, for ``top_k`` with the columns' token ids.
    """
    return select_rows(logits_NV, None, [columns_of(spec)], logits_NV.shape[1])


def select_rows(
    logits_BV: torch.Tensor,
    rows: Sequence[int] | None,
    columns: Sequence[Columns],
    vocab_size: int,
    temperatures_B1: torch.Tensor | None = None,
) -> TokenLogits:
    """Copy columns of some rows.

    Args:
        logits_BV: float ``[B, ≥V]``.
        rows: the R rows in increasing order; None for all.
        columns: the columns of each row, or one for all. All are of one ``Columns.group``.
        vocab_size: V.
        temperatures_B1: the rows are divided by these; None for no division.

    Returns:
        ``[R, C]`` in the columns' dtype, for ``top_k`` with the columns' token ids.
    """
    device = logits_BV.device
    rows_R = None if rows is None or len(rows) == len(logits_BV) else on_device(rows, device)
    ids_RC = None
    match columns[0].kind:
        case "top_k":
            logits_RV = logits_BV[:, :vocab_size] if rows_R is None else logits_BV[rows_R, :vocab_size]
            values_RC, ids_RC = logits_RV.topk(columns[0].width, dim=-1)
        case "token_ids":
            columns_RC = _column_ids(columns, device)
            if len(columns_RC) == 1:
                values_RC = logits_BV[:, columns_RC[0]] if rows_R is None else logits_BV[rows_R[:, None], columns_RC]
            elif rows_R is None:
                values_RC = logits_BV.gather(1, columns_RC)
            else:
                values_RC = logits_BV[rows_R[:, None], columns_RC]
        case _:
            values_RC = logits_BV[:, :vocab_size] if rows_R is None else logits_BV[rows_R, :vocab_size]
    if temperatures_B1 is not None:
        values_RC = values_RC.float() / (temperatures_B1 if rows_R is None else temperatures_B1[rows_R])
    # A copy even where nothing changes: the logits are a buffer that the next step overwrites.
    whole = columns[0].kind == "full" and rows_R is None and temperatures_B1 is None
    return TokenLogits(values_NC=values_RC.to(columns[0].dtype, copy=whole), token_ids_NC=ids_RC)


def _column_ids(columns: Sequence[Columns], device: torch.device) -> torch.Tensor:
    """Return the token ids of each row, ``[R, C]``; ``[1, C]`` where all rows have the same."""
    serials = tuple(found.serial for found in columns)
    if serials.count(serials[0]) == len(serials):
        serials = serials[:1]
    found_RC = _ON_DEVICE.get((serials, device))
    if found_RC is None:
        found_RC = on_device(np.array([found.token_ids for found in columns[: len(serials)]]), device, torch.int64)
        _ON_DEVICE.put((serials, device), found_RC, found_RC.nbytes)
    return found_RC
