"""What the parts of `rl` that read states of a group must come to: plain loops in float64, without the package."""

from __future__ import annotations

import math
from typing import Any

import torch

STRENGTHS = [10.0**power for power in range(-6, 4)]


def solve(features: torch.Tensor, targets: torch.Tensor, alpha: Any, row: torch.Tensor) -> torch.Tensor:
    """Predict one row by (XᵀX + α) w = Xᵀy on centred features and targets."""
    centre = features.mean(0)
    gram = (features - centre).T @ (features - centre) + alpha * torch.eye(features.shape[1], dtype=torch.float64)
    weights = torch.linalg.solve(gram, (features - centre).T @ (targets - targets.mean()))
    return targets.mean() + (row - centre) @ weights


class Probe:
    """Ridge regression, whose strength is chosen by leaving out one row after the other."""

    def __init__(self, features: torch.Tensor, targets: torch.Tensor) -> None:
        self.mean, self.deviation = features.mean(0), features.std(0)
        self.features, self.targets = self._standard(features), targets
        unit = torch.linalg.svdvals(self.features - self.features.mean(0)).square().mean()
        errors = {}
        for strength in STRENGTHS:
            left_out = []
            for row in range(len(targets)):
                kept = torch.arange(len(targets)) != row
                # The fitted mean is that of the other rows; features stay as all rows standardised them.
                value = solve(self.features[kept], targets[kept], strength * unit, self.features[row])
                left_out.append(float(targets[row] - value) ** 2)
            errors[strength] = sum(left_out)
        self.alpha = min(errors, key=lambda key: errors[key]) * unit

    def _standard(self, features: torch.Tensor) -> torch.Tensor:
        return (features - self.mean) / torch.where(self.deviation > 0, self.deviation, 1)

    def __call__(self, row: torch.Tensor) -> float:
        value = float(solve(self.features, self.targets, self.alpha, self._standard(row)))
        return min(max(value, float(self.targets.min())), float(self.targets.max()))


def bonuses(states: torch.Tensor, ridge: float) -> list[float]:
    """sqrt(phi^T (lambda I + sum of the others' phi phi^T)^-1 phi), with an inverse for each."""
    centred = states.double() - states.double().mean(0)
    strength = ridge * centred.square().sum(-1).mean()
    found = []
    for own in range(len(centred)):
        matrix = strength * torch.eye(centred.shape[1], dtype=torch.float64)
        for other in range(len(centred)):
            if other != own:
                matrix += torch.outer(centred[other], centred[other])
        found.append(math.sqrt(float(centred[own] @ torch.linalg.inv(matrix) @ centred[own])))
    return found


def closeness(states: torch.Tensor, iterations: int, bandwidth: float) -> list[float]:
    """exp(-d / (bandwidth median d)) to the centroid, which is estimated with these as weights again and again."""
    units = [state / math.sqrt(float(state @ state)) for state in states.double()]
    weights = [1.0] * len(units)
    for _ in range(iterations + 1):
        total = sum(weight * unit for weight, unit in zip(weights, units, strict=True))
        centroid = total / math.sqrt(float(total @ total))
        far = [1 - float(unit @ centroid) for unit in units]
        ordered = sorted(far)
        half = len(far) // 2
        median = ordered[half] if len(far) % 2 else (ordered[half - 1] + ordered[half]) / 2
        weights = [math.exp(-one / (bandwidth * median)) for one in far]
    return weights


def rank(states: torch.Tensor, centre: bool = True) -> float:
    """Roy and Vetterli 2007, by a decomposition of the matrix itself."""
    if len(states) < 2:
        return math.nan
    rows = states.double() - states.double().mean(0) * centre
    values = torch.linalg.svdvals(rows)
    shares = [float(value / values.sum()) for value in values if value > 1e-8 * values[0]]
    return math.exp(-sum(share * math.log(share) for share in shares))
