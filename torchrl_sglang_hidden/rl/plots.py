"""Pictures of the measures: each function takes what was measured, and returns a matplotlib figure.

Knows nothing of files or pages. Figures are drawn by Agg, whatever backend the caller's pyplot has.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch

from torchrl_sglang_hidden.errors import CapabilityError, InputError
from torchrl_sglang_hidden.rl.layer_sweep import LayerMeasures
from torchrl_sglang_hidden.rl.measures import Cosines, Variance, check_rows
from torchrl_sglang_hidden.rl.probe import ProbeResult

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["plot_cosines", "plot_layers", "plot_map", "plot_probe", "plot_spectrum", "plot_variance"]

# Of Okabe and Ito's palette, told apart with every common colour blindness (jfly.uni-koeln.de/color).
_BLUE, _ORANGE, _GREEN, _GREY = "#0072B2", "#D55E00", "#009E73", "0.6"


def plot_variance(variance: Variance) -> Figure:
    """Plot the variance of each dimension, largest first, with the limit of those that are active."""
    figure, (axes,) = _figure(1)
    sorted_D = variance.variance_D.sort(descending=True).values.cpu()
    axes.plot(range(1, len(sorted_D) + 1), sorted_D.numpy(), color=_BLUE)
    limit = variance.threshold * float(sorted_D.mean())
    axes.axhline(limit, color=_GREY, linestyle="--", label=f"{variance.threshold:g} × the mean")
    if limit > 0:
        axes.set_yscale("log")
    axes.set_xlabel("dimensions, by their variance")
    axes.set_ylabel("variance")
    axes.set_title(f"{variance.num_active} of {len(sorted_D)} dimensions are active")
    axes.legend()
    return figure


def plot_spectrum(values: torch.Tensor, rank: float) -> Figure:
    """Plot singular values, as `singular_values` returns them, with the effective rank."""
    figure, (axes,) = _figure(1)
    shares = (values.square() / values.square().sum().clamp(min=1e-300)).cumsum(0).cpu()
    axes.plot(range(1, len(shares) + 1), shares.numpy(), color=_BLUE)
    axes.axvline(rank, color=_ORANGE, linestyle="--", label=f"effective rank {rank:.1f}")
    axes.set_xlabel("directions, by their variance")
    axes.set_ylabel("share of the variance, summed up")
    axes.set_ylim(0, 1.02)
    axes.set_title("In how many directions the vectors spread")
    axes.legend()
    return figure


def plot_cosines(cosines: Cosines) -> Figure:
    """Plot how often the pairs of vectors have each cosine."""
    figure, (axes,) = _figure(1)
    edges = torch.linspace(-1, 1, len(cosines.counts) + 1)
    axes.stairs(cosines.counts.numpy(), edges.numpy(), fill=True, color=_BLUE)
    axes.axvline(cosines.mean, color=_ORANGE, linestyle="--", label=f"mean {cosines.mean:.2f}")
    axes.set_xlabel("cosine of two vectors")
    axes.set_ylabel(f"pairs of {cosines.num_rows} rows")
    axes.set_title("How alike the directions are")
    axes.legend()
    return figure


def plot_layers(layers: Sequence[LayerMeasures]) -> Figure:
    """Plot the measures of each layer, in the order given; with probes, their scores and controls."""
    if not layers:
        raise InputError("0 layers; pass at least 1")
    probed = [layer.probe for layer in layers if layer.probe is not None]
    figure, all_axes = _figure(3 if probed else 2)
    places, names = range(len(layers)), [str(layer.layer) for layer in layers]
    all_axes[0].plot(places, [layer.effective_rank for layer in layers], "o-", color=_BLUE)
    all_axes[0].set_title("effective rank")
    all_axes[1].plot(places, [layer.mean_cosine for layer in layers], "o-", color=_BLUE)
    all_axes[1].set_title("mean cosine")
    if probed:
        axes = all_axes[2]
        axes.plot(places, [probe.score for probe in probed], "o-", color=_BLUE, label="probe")
        axes.plot(places, [probe.zero_score for probe in probed], "s--", color=_GREY, label="zeros")
        means = [sum(probe.shuffle_scores) / len(probe.shuffle_scores) for probe in probed]
        axes.plot(places, means, "^--", color=_ORANGE, label="shuffled")
        axes.set_title(_score_name(probed[0]))
        axes.legend()
    for axes in all_axes:
        axes.set_xticks(places, names)
        axes.set_xlabel("layer")
    return figure


def plot_probe(probe: ProbeResult) -> Figure:
    """Plot the score of a probe beside its controls."""
    figure, (axes,) = _figure(1)
    scores = [probe.score, probe.zero_score, sum(probe.shuffle_scores) / len(probe.shuffle_scores)]
    axes.bar(["vectors", "zeros", "shuffled"], scores, color=[_BLUE, _GREY, _ORANGE])
    axes.plot([2] * len(probe.shuffle_scores), probe.shuffle_scores, "k.", markersize=5)
    axes.axhline(0, color="black", linewidth=0.8)
    axes.set_ylabel(f"{_score_name(probe)} on {probe.num_test} test rows")
    axes.set_title(f"What a linear map reads (p = {probe.p_value:.2g})")
    return figure


def plot_map(states_ND: torch.Tensor, values_N: torch.Tensor | None = None, *, label: str = "row") -> Figure:
    """Plot the vectors in the plane of their first two principal components, coloured by a number of each.

    Args:
        states_ND: floating ``[N, D]``, N and D at least 2.
        values_N: N numbers; by default the number of the row.
        label: what they are.

    Raises:
        InputError: another shape, or another number of values.
    """
    states_ND = check_rows("states_ND", states_ND, fewest=2).double().cpu()
    if states_ND.shape[1] < 2:
        raise InputError(f"states_ND has D={states_ND.shape[1]}; expected at least 2 for a plane")
    values_N = torch.arange(len(states_ND)) if values_N is None else values_N.reshape(-1)
    if len(values_N) != len(states_ND):
        raise InputError(f"{len(values_N)} values for {len(states_ND)} vectors; pass one for each")
    centred = states_ND - states_ND.mean(0)
    _, values, components = torch.linalg.svd(centred, full_matrices=False)
    points = centred @ components[:2].T
    shares = values.square() / values.square().sum().clamp(min=1e-300)
    figure, (axes,) = _figure(1)
    colours = axes.scatter(points[:, 0], points[:, 1], c=values_N.double().cpu(), s=14, cmap="viridis", alpha=0.8)
    figure.colorbar(colours, ax=axes, label=label)
    axes.set_xlabel(f"principal component 1 ({shares[0]:.0%} of the variance)")
    axes.set_ylabel(f"principal component 2 ({shares[1]:.0%} of the variance)")
    axes.set_title(f"{len(points)} vectors in a plane")
    return figure


def _score_name(probe: ProbeResult) -> str:
    return "accuracy" if probe.task == "classification" else "R²"


def _figure(columns: int) -> tuple[Figure, list[Axes]]:
    """Return a figure with plots side by side."""
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise CapabilityError(
            f"matplotlib draws the pictures, and cannot be imported: {error}; "
            "install it with pip install 'torchrl-sglang-hidden[demo]'"
        ) from error
    figure = Figure(figsize=(6.4 if columns == 1 else 4.2 * columns, 4.2), dpi=110, layout="constrained")
    FigureCanvasAgg(figure)
    all_axes = [figure.add_subplot(1, columns, column + 1) for column in range(columns)]
    for axes in all_axes:
        axes.grid(color="0.9")
        axes.set_axisbelow(True)
        axes.spines[["top", "right"]].set_visible(False)
    return figure, all_axes
