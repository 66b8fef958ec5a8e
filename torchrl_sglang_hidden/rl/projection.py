"""Random projections of hidden states, the same in every process and program."""

from __future__ import annotations

import math

import torch

from torchrl_sglang_hidden.errors import InputError, InputTypeError

__all__ = ["make_projection", "make_sparse_projection"]

SEED = 0


def make_projection(size: int, project: int | None) -> torch.Tensor | None:
    """Return the matrix ``[D, d]`` that keeps the lengths of vectors in expectation."""
    if project is None:
        return None
    _check_size(project)
    generator = torch.Generator().manual_seed(SEED)
    return torch.randn(size, project, generator=generator) / math.sqrt(project)


def make_sparse_projection(size: int, project: int | None, density: float | None) -> torch.Tensor | None:
    """Return the matrix ``[D, d]`` of which a share is ``±1 / sqrt(density · d)``, and the rest 0.

    Achlioptas 2003, "Database-friendly random projections" (density 1/3); Li et al. 2006, "Very sparse random
    projections" (``1 / sqrt(D)``, which None stands for). It keeps the lengths of vectors in expectation.
    """
    if density is not None:
        if isinstance(density, bool) or not isinstance(density, int | float):
            raise InputTypeError(f"density={density!r:.80}: expected a number above 0 and at most 1, or None")
        if not 0 < density <= 1:
            raise InputError(f"density={density}: expected a number above 0 and at most 1")
    if project is None:
        return None
    _check_size(project)
    share = 1 / math.sqrt(size) if density is None else density
    generator = torch.Generator().manual_seed(SEED)
    drawn = torch.rand(size, project, generator=generator, dtype=torch.float64)
    signs = torch.where(drawn < share / 2, -1.0, torch.where(drawn < share, 1.0, 0.0))
    return (signs / math.sqrt(share * project)).to(torch.float32)


def _check_size(project: int) -> None:
    if type(project) is not int:
        raise InputTypeError(f"project={project!r:.80}: expected an integer of at least 1, or None")
    if project < 1:
        raise InputError(f"project={project}: expected an integer of at least 1")
