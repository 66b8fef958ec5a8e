"""Ridge regression in closed form, whose strength is chosen by leaving out one row at a time.

Knows nothing of hidden states. One decomposition of the features serves every strength and every set of targets.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

__all__ = ["Ridge", "RidgeFit"]

# Strengths that are tried, in units of the mean squared singular value of the features.
_STRENGTHS = tuple(10.0**power for power in range(-6, 4))
# A deviation, over the dimension's own size, that is the rounding of float32: scaled to 1, it would be told apart, and
# the next row that differs by more than rounding would be millions of deviations away.
_LEAST_SPREAD = 1e-5


class RidgeFit(NamedTuple):
    """A fitted linear map.

    Args:
        strength: the one with the least leave-one-out error.
        weights_DM: float64 ``[D, M]``, for features with the training rows' mean subtracted.
        feature_mean_D: the training rows' mean.
        target_mean_M: that of their targets.
    """

    strength: float
    weights_DM: torch.Tensor
    feature_mean_D: torch.Tensor
    target_mean_M: torch.Tensor

    def predict(self, features_ND: torch.Tensor) -> torch.Tensor:
        """Return what it predicts of rows ``[N, D]``, float64 ``[N, M]``."""
        return self.target_mean_M + (features_ND - self.feature_mean_D) @ self.weights_DM


class Ridge:
    """Ridge regression on standardised features.

    Args:
        train_ND: features to fit to, float64 ``[N, D]``, N at least 2.
    """

    def __init__(self, train_ND: torch.Tensor) -> None:
        self._mean, deviation = train_ND.mean(0), train_ND.std(0)
        # A dimension that does not vary tells nothing, and would be divided by nothing.
        size = train_ND.square().mean(0).sqrt()
        varies = (deviation > 1e-9 * deviation.max()) & (deviation > _LEAST_SPREAD * size)
        self._scale = torch.where(varies, 1 / deviation, 0)
        self._left, self._values, self._right = torch.linalg.svd(
            (train_ND - self._mean) * self._scale, full_matrices=False
        )
        self._unit = self._values.square().mean().clamp(min=torch.finfo(torch.float64).tiny)

    def fit(self, targets_NM: torch.Tensor) -> RidgeFit:
        """Return the map with the least leave-one-out error of all strengths.

        The error of a row that is left out is its residual over ``1 - h``, with h its leverage (Hastie et al. 2009,
        "The Elements of Statistical Learning", section 7.10; the mean is fitted too, so that h has a 1 / N).
        """
        mean = targets_NM.mean(0)
        projected = self._left.T @ (targets_NM - mean)
        best: tuple[float, float] | None = None
        for strength in _STRENGTHS:
            shrunk = self._values.square() / (self._values.square() + strength * self._unit)
            residual = targets_NM - mean - self._left @ (shrunk[:, None] * projected)
            leverage = self._left.square() @ shrunk + 1 / len(targets_NM)
            error = float((residual / (1 - leverage).clamp(min=1e-9)[:, None]).square().sum())
            if best is None or error < best[0]:
                best = error, strength
        assert best is not None  # there are strengths
        inverse = self._values / (self._values.square() + best[1] * self._unit)
        weights_DM = self._scale[:, None] * (self._right.T @ (inverse[:, None] * projected))
        return RidgeFit(best[1], weights_DM, self._mean, mean)
