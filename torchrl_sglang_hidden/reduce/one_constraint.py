"""Call one constraint for one token, and read what is the same for all tokens.

Pure torch; knows nothing of batches or requests.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch

from torchrl_sglang_hidden.reduce.device import on_device
from torchrl_sglang_hidden.spec.constraints import ConstraintStep, LogitConstraint, TemperatureScale

__all__ = ["always_acts", "apply_checked", "fixed_temperature"]


def always_acts(constraint: LogitConstraint) -> bool:
    """Return whether a constraint acts on every token, whichever; a class may decide for itself in `acts_on`."""
    plain = type(constraint).acts_on is LogitConstraint.acts_on
    return plain and constraint.first_tokens is None and constraint.positions is None


def fixed_temperature(scales: Sequence[TemperatureScale]) -> float | None:
    """Return the product of temperatures that are the same at every token; None where they are not."""
    product = 1.0
    for scale in scales:
        plain = type(scale).at is TemperatureScale.at and always_acts(scale)
        if not plain or not isinstance(scale.schedule, float):
            return None
        product *= scale.schedule
    return product


def apply_checked(constraint: LogitConstraint, logits_V: torch.Tensor, step: ConstraintStep) -> torch.Tensor:
    """Call a user's constraint with a copy of the logits, and check what it returns."""
    given_V = logits_V.clone()
    if constraint.on_host:
        given_V = given_V.cpu()
        step = replace(step, response_ids=step.response_ids.cpu())
    expected = given_V.shape, given_V.device  # read first: the user's code has the tensor
    changed_V = constraint.apply(given_V, step)
    _check_result(changed_V, *expected)
    if constraint.on_host:
        return on_device(changed_V, logits_V.device, logits_V.dtype)
    return changed_V.to(logits_V.dtype)


def _check_result(changed_V: object, shape: torch.Size, device: torch.device) -> None:
    """Check what a user's constraint returned, without a copy to the host, which its text would need."""
    if not isinstance(changed_V, torch.Tensor):
        raise TypeError(f"expected logits of shape {tuple(shape)}, got {changed_V!r:.80}")
    if changed_V.shape != shape:
        raise TypeError(f"expected logits of shape {tuple(shape)}, got {tuple(changed_V.shape)}")
    if changed_V.device != device:
        raise TypeError(f"expected logits on {device}, as they were given, got them on {changed_V.device}")
    if changed_V.dtype == torch.bool or changed_V.is_complex():
        raise TypeError(f"expected logits of a float dtype, got {changed_V.dtype}")
