"""The random projection of hidden states, the same in every process and program."""

from __future__ import annotations

import math

import torch

from torchrl_sglang_hidden.errors import InputError, InputTypeError

__all__ = ["make_projection"]

SEED = 0


def make_projection(size: int, project: int | None) -> torch.Tensor | None:
    """Return the matrix ``[D, d]`` that keeps the lengths of vectors in expectation."""
    if project is None:
        return None
    if type(project) is not int:
        raise InputTypeError(f"project={project!r:.80}: expected an integer of at least 1, or None")
    if project < 1:
        raise InputError(f"project={project}: expected an integer of at least 1")
    generator = torch.Generator().manual_seed(SEED)
    return torch.randn(size, project, generator=generator) / math.sqrt(project)
