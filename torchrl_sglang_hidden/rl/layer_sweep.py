"""`layer_sweep`: the measures of every layer of one set of prompts, side by side.

Knows nothing of where the vectors come from.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from torchrl_sglang_hidden.errors import InputError, InputTypeError
from torchrl_sglang_hidden.rl.measures import effective_rank, pairwise_cosine, state_variance
from torchrl_sglang_hidden.rl.probe import ProbeResult, linear_probe

__all__ = ["LayerMeasures", "layer_sweep"]


@dataclass(frozen=True, slots=True)
class LayerMeasures:
    """What was measured of one layer.

    Args:
        layer: its id.
        variance: the sum of the variances of its dimensions.
        num_active: see `Variance`.
        effective_rank: see `effective_rank`.
        mean_cosine: of all pairs of rows.
        probe: see `linear_probe`; None without targets.
    """

    layer: int
    variance: float
    num_active: int
    effective_rank: float
    mean_cosine: float
    probe: ProbeResult | None


def layer_sweep(
    states_NKD: torch.Tensor,
    layers: Sequence[int],
    targets: torch.Tensor | Sequence[Any] | None = None,
    **probe_options: Any,
) -> list[LayerMeasures]:
    """Measure each of K layers.

    Args:
        states_NKD: floating ``[N, K, D]``, as a policy with K layers writes them.
        layers: the K layer ids, as in ``HiddenSpec(layers=...)``.
        targets: see `linear_probe`; None probes nothing. Every layer gets the same split.
        **probe_options: of `linear_probe`.

    Returns:
        K records, in the order of ``layers``.

    Raises:
        InputError: another shape than ``[N, K, D]``, options without targets, or what the measures raise.
        InputTypeError: no floating tensor.
    """
    if not isinstance(states_NKD, torch.Tensor):
        raise InputTypeError(f"states_NKD: a {type(states_NKD).__name__}; expected a floating tensor [N, K, D]")
    if states_NKD.ndim != 3 or states_NKD.shape[1] != len(layers):
        raise InputError(
            f"states_NKD has shape {tuple(states_NKD.shape)} and there are {len(layers)} layers; expected [N, K, D] "
            "with a layer id for each of K"
        )
    if probe_options and targets is None:
        raise InputError(f"{sorted(probe_options)} without targets: nothing is probed; pass targets, or leave them out")
    found = []
    for layer, states_ND in zip(layers, states_NKD.unbind(1), strict=True):
        variance = state_variance(states_ND)
        found.append(
            LayerMeasures(
                layer=layer,
                variance=variance.total,
                num_active=variance.num_active,
                effective_rank=effective_rank(states_ND),
                mean_cosine=pairwise_cosine(states_ND, max_rows=2).mean,
                probe=None if targets is None else linear_probe(states_ND, targets, **probe_options),
            )
        )
    return found
