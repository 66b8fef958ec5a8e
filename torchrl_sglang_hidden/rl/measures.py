"""Measures of a set of hidden vectors ``[N, D]``: how they spread, in how many directions, and how alike they are.

Knows nothing of where the vectors come from. All sums are in float64, and memory is bounded: D × D numbers, or a block
of rows at a time.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch

from torchrl_sglang_hidden.errors import InputError, InputTypeError

__all__ = [
    "Cosines",
    "Variance",
    "check_rows",
    "effective_rank",
    "pairwise_cosine",
    "rank_of",
    "singular_values",
    "state_variance",
    "take_rows",
]

# Rows of a block: 4096 × 4096 cosines in float64 are 128 MiB.
_BLOCK = 4096
COSINE_BINS = 80


@dataclass(frozen=True, slots=True)
class Variance:
    """How a set of vectors spreads.

    Args:
        mean_D: the mean vector, float64 ``[D]``.
        variance_D: the variance of each dimension, with N - 1 in the denominator, float64 ``[D]``.
        num_active: dimensions whose variance is at least ``threshold`` times the mean variance of all.
        threshold: see ``num_active``.
        largest_share: the part of the total variance that the dimension with the most has. Language models have a few
            such dimensions (Kovaleva et al. 2021, "BERT Busters"; Timkey and van Schijndel 2021, "All Bark and No
            Bite").
    """

    mean_D: torch.Tensor
    variance_D: torch.Tensor
    num_active: int
    threshold: float
    largest_share: float

    @property
    def total(self) -> float:
        """The sum of the variances: the mean squared distance to the mean vector."""
        return float(self.variance_D.sum())


def state_variance(states_ND: torch.Tensor, *, threshold: float = 0.01) -> Variance:
    """Measure how much each dimension varies, and how many do.

    Args:
        states_ND: floating ``[N, D]``, N at least 2.
        threshold: a dimension is active whose variance is at least so many times the mean variance of all dimensions.

    Raises:
        InputError: another shape, values that are not finite, or a threshold that is not above 0.
        InputTypeError: no floating tensor.
    """
    if not threshold > 0:
        raise InputError(f"threshold={threshold}: expected a number above 0, such as 0.01")
    states_ND = check_rows("states_ND", states_ND, fewest=2)
    mean_D = _sum(states_ND, lambda block: block) / len(states_ND)
    variance_D = _sum(states_ND, lambda block: (block - mean_D).square()) / (len(states_ND) - 1)
    total = float(variance_D.sum())
    active_D = (variance_D >= threshold * variance_D.mean()) & (variance_D > 0)
    return Variance(
        mean_D=mean_D,
        variance_D=variance_D,
        num_active=int(active_D.sum()),
        threshold=threshold,
        largest_share=float(variance_D.max()) / total if total else 0.0,
    )


def singular_values(states_ND: torch.Tensor, *, centre: bool = True) -> torch.Tensor:
    """Return the singular values of the vectors as a matrix, largest first, float64 ``[min(N, D)]``.

    Those below about 1e-8 of the largest are rounding, and are given as 0.

    Args:
        states_ND: floating ``[N, D]``.
        centre: whether the mean vector is taken off first.

    Raises:
        InputError, InputTypeError: see `state_variance`.
    """
    states_ND = check_rows("states_ND", states_ND, fewest=2 if centre else 1)
    num_rows, size = states_ND.shape
    mean_D = _sum(states_ND, lambda block: block if centre else 0 * block) / num_rows
    if num_rows < size:
        rows = states_ND.double() - mean_D
        gram = rows @ rows.T
    else:
        gram = torch.zeros(size, size, dtype=torch.float64, device=states_ND.device)
        for block in _blocks(states_ND):
            block = block - mean_D
            gram += block.T @ block
    squares = torch.linalg.eigvalsh(gram).flip(0)
    # eigvalsh errs by about this much in each of its values.
    rounding = torch.finfo(torch.float64).eps * len(gram) * squares[0].clamp(min=0)
    return torch.where(squares > rounding, squares, 0).sqrt()


def effective_rank(states_ND: torch.Tensor, *, centre: bool = True) -> float:
    """Return in how many directions the vectors spread, from 1 to min(N, D).

    The definition of Roy and Vetterli 2007, "The effective rank: a measure of effective dimensionality" (EUSIPCO): the
    exponential of the entropy of the singular values, each divided by their sum. A set that spreads equally in all
    dimensions has D, one on a line has 1.

    Args:
        states_ND: floating ``[N, D]``.
        centre: whether the mean vector is taken off first, which otherwise is the largest direction of most models.

    Returns:
        The effective rank; 0 where all vectors are equal (with ``centre``) or zero, which have no direction.

    Raises:
        InputError, InputTypeError: see `state_variance`.
    """
    return rank_of(singular_values(states_ND, centre=centre))


def rank_of(values: torch.Tensor) -> float:
    """Return the effective rank of vectors from what `singular_values` returned of them."""
    total = values.sum()
    if not total > 0:
        return 0.0
    shares = values / total
    return float(torch.special.entr(shares).sum().exp())


@dataclass(frozen=True, slots=True)
class Cosines:
    """The cosines of the pairs of different vectors.

    Args:
        mean: of all pairs of all rows. Near 1 means that the vectors point one way (Ethayarajh 2019, "How Contextual
            are Contextualized Word Representations?").
        std, lowest, highest: of the pairs of ``num_rows`` rows.
        counts: pairs in each of 80 equal parts of -1 … 1, int64 ``[80]``.
        num_rows: rows whose pairs were looked at one by one.
    """

    mean: float
    std: float
    lowest: float
    highest: float
    counts: torch.Tensor
    num_rows: int


def pairwise_cosine(states_ND: torch.Tensor, *, max_rows: int = 4096) -> Cosines:
    """Measure how alike the directions of the vectors are.

    The mean is that of all N (N - 1) / 2 pairs, from the sum of the unit vectors. The rest is of the pairs of at most
    ``max_rows`` rows, drawn with a fixed seed where there are more. A block of pairs at a time is in memory.

    Args:
        states_ND: floating ``[N, D]``, N at least 2, no row all zeros.
        max_rows: at least 2.

    Raises:
        InputError: see `state_variance`; or a row that is all zeros, or fewer rows than 2.
        InputTypeError: no floating tensor.
    """
    if type(max_rows) is not int or max_rows < 2:
        raise InputError(f"max_rows={max_rows!r:.80}: expected an integer of at least 2")
    states_ND = check_rows("states_ND", states_ND, fewest=2)
    zero = (states_ND == 0).all(-1).nonzero().flatten().tolist()
    if zero:
        raise InputError(f"states_ND: {len(zero)} rows are all zeros, the first is row {zero[0]}; leave them out")
    count = len(states_ND)
    sum_D = _sum(states_ND, _units)
    mean = (float(sum_D.square().sum()) - count) / (count * (count - 1))
    units = _units(take_rows(states_ND, max_rows).double())
    counts = torch.zeros(COSINE_BINS, dtype=torch.int64)
    total = squares = 0.0
    lowest, highest = 1.0, -1.0
    for start in range(0, len(units), _BLOCK):
        for other in range(start, len(units), _BLOCK):
            pairs = units[start : start + _BLOCK] @ units[other : other + _BLOCK].T
            if other == start:
                pairs = pairs[torch.ones_like(pairs, dtype=torch.bool).triu(1)]
            if not pairs.numel():
                continue
            pairs = pairs.flatten().clamp(-1, 1)
            counts += torch.histc(pairs, COSINE_BINS, -1, 1).long().cpu()
            total, squares = total + float(pairs.sum()), squares + float(pairs.square().sum())
            lowest, highest = min(lowest, float(pairs.min())), max(highest, float(pairs.max()))
    num_pairs = len(units) * (len(units) - 1) / 2
    variance = max(squares / num_pairs - (total / num_pairs) ** 2, 0.0)
    return Cosines(mean, variance**0.5, lowest, highest, counts, len(units))


def take_rows(states_ND: torch.Tensor, max_rows: int) -> torch.Tensor:
    """Return all rows, or ``max_rows`` of them, drawn with a fixed seed, in their order."""
    if len(states_ND) <= max_rows:
        return states_ND
    drawn = torch.randperm(len(states_ND), generator=torch.Generator().manual_seed(0))[:max_rows]
    return states_ND[drawn.sort().values.to(states_ND.device)]


def check_rows(name: str, states_ND: Any, *, fewest: int) -> torch.Tensor:
    """Return vectors ``[N, D]``, detached.

    Raises:
        InputError: another shape, fewer rows, or values that are not finite.
        InputTypeError: no floating tensor.
    """
    if not isinstance(states_ND, torch.Tensor) or not states_ND.is_floating_point():
        kind = str(states_ND.dtype) if isinstance(states_ND, torch.Tensor) else type(states_ND).__name__
        raise InputTypeError(f"{name}: a {kind}; expected a floating tensor [N, D]")
    if states_ND.ndim != 2 or len(states_ND) < fewest or not states_ND.shape[1]:
        raise InputError(
            f"{name} has shape {tuple(states_ND.shape)}; expected [N, D] with N of at least {fewest}: flatten batch "
            "and time into N, and choose one of several layers"
        )
    bad = sum(int((~block.isfinite()).any(-1).sum()) for block in _blocks(states_ND.detach()))
    if bad:
        raise InputError(
            f"{name}: {bad} of {len(states_ND)} rows are not finite; leave out the rows that failed, such as with "
            "states[states.isfinite().all(-1)]"
        )
    return states_ND.detach()


def _blocks(states_ND: torch.Tensor) -> Iterator[torch.Tensor]:
    """Yield the rows in float64, some at a time."""
    for start in range(0, len(states_ND), _BLOCK):
        yield states_ND[start : start + _BLOCK].double()


def _sum(states_ND: torch.Tensor, part: Callable[[torch.Tensor], torch.Tensor]) -> torch.Tensor:
    """Return the sum over all rows of what a function makes of a block of them, float64 ``[D]``."""
    total_D = torch.zeros(states_ND.shape[1], dtype=torch.float64, device=states_ND.device)
    for block in _blocks(states_ND):
        total_D += part(block).sum(0)
    return total_D


def _units(rows: torch.Tensor) -> torch.Tensor:
    """Return rows of length 1."""
    # By a row's largest value first: squares of very small numbers would vanish.
    rows = rows / rows.abs().amax(-1, keepdim=True)
    units: torch.Tensor = rows / rows.norm(dim=-1, keepdim=True)
    return units
