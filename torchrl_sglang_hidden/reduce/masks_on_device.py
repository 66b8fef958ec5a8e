"""Keep masks on the device: each once, however many requests have it, and those of a whole step together.

Pure torch; knows nothing of batches or requests.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence

import torch

from torchrl_sglang_hidden.reduce.bounded import Bounded
from torchrl_sglang_hidden.reduce.device import on_device
from torchrl_sglang_hidden.spec.constraints import TokenConstraint

__all__ = ["MaskKey", "denied_rows", "serial_of"]

# Names the masks that act on one token, in order.
MaskKey = tuple[int, ...]

_SERIALS = itertools.count(1)
_SERIAL = "_torchrl_sglang_hidden_serial"
# By key and device: what the masks of one token deny. In bytes of the device.
_DENIED: Bounded[torch.Tensor] = Bounded(2**26)
# By the keys of all rows of a step and device. In bytes of the device: one or two steps of 256 rows.
_MATRICES: Bounded[torch.Tensor] = Bounded(2**26)


def serial_of(mask: TokenConstraint) -> int:
    """Name a mask object by a number that is never used again, under which what was made of the mask is kept.

    Equal masks of several requests are one object where they were read from equal text.
    """
    try:
        attributes = vars(mask)
    except TypeError:  # a user's class with slots
        return next(_SERIALS)
    found: int = attributes.get(_SERIAL) or attributes.setdefault(_SERIAL, next(_SERIALS))
    return found


def denied_rows(
    keys: Sequence[MaskKey],
    allowed_of: Sequence[Callable[[], tuple[torch.Tensor, bool]]],
    vocab_size: int,
    device: torch.device,
) -> torch.Tensor | None:
    """Return what the masks of each row deny: bool ``[N, V]``; ``[1, V]`` where all rows have the same; or None.

    Args:
        keys: the masks of each row; an empty key where none act.
        allowed_of: for each row, makes bool ``[V]`` on the host, what all its masks allow, and says whether every mask
            could be asked. What could not is this row's alone, and is not kept.
        vocab_size: V.
        device: the logits' device.
    """
    if not any(keys):
        return None
    step = (tuple(keys), vocab_size, device)
    found_NV = _MATRICES.get(step)
    if found_NV is not None:
        return found_NV
    places: dict[MaskKey, int] = {}
    denied: list[torch.Tensor] = []
    index, whole = [], True
    for n, key in enumerate(keys):
        if key not in places:
            denied_V, kept = _denied(key, allowed_of[n], vocab_size, device)
            whole &= kept
            denied.append(denied_V)
            # Each row with a mask that fails must learn it.
            places[key if kept else (-n - 1,)] = len(denied) - 1
        index.append(places[key] if key in places else len(denied) - 1)
    found_NV = torch.stack(denied)
    if len(denied) > 1:
        found_NV = found_NV.index_select(0, on_device(index, device))
    return _MATRICES.put(step, found_NV, found_NV.nbytes) if whole else found_NV


def _denied(
    key: MaskKey, allowed_of: Callable[[], tuple[torch.Tensor, bool]], vocab_size: int, device: torch.device
) -> tuple[torch.Tensor, bool]:
    if not key:
        return torch.zeros(vocab_size, dtype=torch.bool, device=device), True
    found_V = _DENIED.get((key, vocab_size, device))
    if found_V is not None:
        return found_V, True
    allowed_V, kept = allowed_of()
    found_V = on_device(~allowed_V, device)
    if kept:
        _DENIED.put((key, vocab_size, device), found_V, found_V.nbytes)
    return found_V, kept
