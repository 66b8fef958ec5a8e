"""`state_drift`: how far live hidden vectors are from those of a data set, by three measures of the literature.

Knows nothing of where the vectors come from.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from torchrl_sglang_hidden.errors import InputError
from torchrl_sglang_hidden.rl.measures import check_rows, state_variance, take_rows

__all__ = ["Drift", "state_drift"]


@dataclass(frozen=True, slots=True)
class Drift:
    """How far live vectors are from reference vectors.

    Args:
        mean_shift: root mean square over the reference's active dimensions of the difference of the two means, in
            standard deviations of the reference (Cohen's d of each dimension). 0 without any difference.
        most_shifted: the dimension that differs most, and its shift in standard deviations, with its sign.
        frechet: Fréchet distance of the two Gaussians with the sets' means and covariances (Dowson and Landau 1982;
            Heusel et al. 2017, as the FID of images). It grows with the scale of the vectors, and with few rows:
            compare it with that of two halves of the reference, ``frechet_within``. Dimensions that do not vary in the
            reference are in it, and not in ``mean_shift``.
        frechet_within: the Fréchet distance of two random halves of the reference; of sets half as large.
        mmd: squared maximum mean discrepancy, unbiased (Gretton et al. 2012), with a Gaussian kernel whose width is the
            median distance. Near 0, and at times below, for sets of one distribution.
        p_value: how often a random exchange of rows between the sets gave an ``mmd`` as large: at most 0.05 says that
            the sets differ.
        num_rows: rows of each set that ``mmd`` looked at.
    """

    mean_shift: float
    most_shifted: tuple[int, float]
    frechet: float
    frechet_within: float
    mmd: float
    p_value: float
    num_rows: tuple[int, int]


def state_drift(
    reference_ND: torch.Tensor, live_MD: torch.Tensor, *, max_rows: int = 1000, permutations: int = 200
) -> Drift:
    """Compare live vectors with those of a data set.

    Args:
        reference_ND: the data set's, floating ``[N, D]``, N at least 4, not all equal.
        live_MD: those of now, floating ``[M, D]``, M at least 2.
        max_rows: most rows of each set for ``mmd``, whose time and memory grow with their square; drawn with a fixed
            seed.
        permutations: random exchanges for ``p_value``, which is at least 1 / (permutations + 1).

    Raises:
        InputError: sets of different D, too few rows, values that are not finite, or reference vectors that are equal.
        InputTypeError: no floating tensors.
    """
    for name, value, fewest in (("max_rows", max_rows, 2), ("permutations", permutations, 1)):
        if type(value) is not int or value < fewest:
            raise InputError(f"{name}={value!r:.80}: expected an integer of at least {fewest}")
    reference_ND = check_rows("reference_ND", reference_ND, fewest=4)
    live_MD = check_rows("live_MD", live_MD, fewest=2)
    if reference_ND.shape[1] != live_MD.shape[1]:
        raise InputError(
            f"reference_ND has D={reference_ND.shape[1]} and live_MD D={live_MD.shape[1]}; expected one model's: give "
            "vectors of the same model and layer"
        )
    spread = state_variance(reference_ND)
    if not spread.total > 0:
        raise InputError(f"reference_ND: all {len(reference_ND)} rows are equal; give vectors that differ")
    active_D = spread.variance_D >= spread.threshold * spread.variance_D.mean()
    shift_D = (state_variance(live_MD).mean_D - spread.mean_D) / spread.variance_D.sqrt()
    shift_D = torch.where(active_D, shift_D, 0)
    most = int(shift_D.abs().argmax())
    order = torch.randperm(len(reference_ND), generator=torch.Generator().manual_seed(0)).to(reference_ND.device)
    first, second = order.tensor_split(2)
    some, other = take_rows(reference_ND, max_rows).double(), take_rows(live_MD, max_rows).double()
    mmd, p_value = _mmd(some, other, permutations)
    return Drift(
        mean_shift=float(shift_D.square().sum() / active_D.sum()) ** 0.5,
        most_shifted=(most, float(shift_D[most])),
        frechet=_frechet(reference_ND, live_MD),
        frechet_within=_frechet(reference_ND[first], reference_ND[second]),
        mmd=mmd,
        p_value=p_value,
        num_rows=(len(some), len(other)),
    )


def _frechet(reference_ND: torch.Tensor, live_MD: torch.Tensor) -> float:
    """Return ``‖μ₁ - μ₂‖² + tr(Σ₁) + tr(Σ₂) - 2 tr((Σ₁ Σ₂)^½)``.

    With centred rows X and Y, each over the square root of its number less one, ``tr((Σ₁ Σ₂)^½)`` is the sum of the
    singular values of ``X Yᵀ``.
    """
    means, roots, traces = [], [], []
    for rows in (reference_ND.double(), live_MD.double()):
        means.append(rows.mean(0))
        centred = (rows - means[-1]) / (len(rows) - 1) ** 0.5
        # The triangular factor has the same products with itself, and at most D rows.
        roots.append(torch.linalg.qr(centred, mode="r").R)
        traces.append(float(centred.square().sum()))
    common = float(torch.linalg.svdvals(roots[0] @ roots[1].T).sum())
    distance = float((means[0] - means[1]).square().sum()) + sum(traces) - 2 * common
    return max(distance, 0.0)  # of two equal sets the rounding remains


def _mmd(reference_ND: torch.Tensor, live_MD: torch.Tensor, permutations: int) -> tuple[float, float]:
    """Return the squared discrepancy, and its p-value by permutation."""
    both = torch.cat([reference_ND, live_MD])
    # Centred, so that the differences of long vectors keep their digits.
    squares = torch.cdist(both - both.mean(0), both - both.mean(0)).square()
    median = squares[torch.ones_like(squares, dtype=torch.bool).triu(1)].median()
    kernel = torch.exp(-squares / median.clamp(min=torch.finfo(torch.float64).tiny))
    kernel.fill_diagonal_(0)
    generator = torch.Generator().manual_seed(0)
    count, total = len(reference_ND), len(both)
    orders = [torch.arange(total)]
    orders += [torch.randperm(total, generator=generator) for _ in range(permutations)]
    of_first = torch.zeros(len(orders), total, dtype=torch.float64, device=kernel.device)
    for row, order in enumerate(orders):
        of_first[row, order[:count]] = 1
    within = of_first @ kernel
    first = (within * of_first).sum(-1)
    across = within.sum(-1) - first
    second = kernel.sum() - first - 2 * across
    rest = total - count
    found = first / (count * (count - 1)) + second / (rest * (rest - 1)) - 2 * across / (count * rest)
    as_large = int((found[1:] >= found[0]).sum())
    return float(found[0]), (1 + as_large) / (1 + permutations)
