"""Pictures of the measures: each draws what it is given, with any backend, and says what is missing."""

from __future__ import annotations

import io
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from matplotlib.figure import Figure

from torchrl_sglang_hidden import CapabilityError, InputError
from torchrl_sglang_hidden.rl import (
    effective_rank,
    layer_sweep,
    linear_probe,
    pairwise_cosine,
    plot_cosines,
    plot_layers,
    plot_map,
    plot_probe,
    plot_spectrum,
    plot_variance,
    singular_values,
    state_variance,
)

STATES = torch.randn(40, 6, generator=torch.Generator().manual_seed(0))
CLASSES = torch.arange(40) % 2
LAYERS = STATES[:, None].expand(-1, 2, -1)

PICTURES: dict[str, tuple[Callable[[], Figure], list[str]]] = {
    "variance": (lambda: plot_variance(state_variance(STATES)), ["6 of 6 dimensions are active"]),
    "still": (lambda: plot_variance(state_variance(torch.ones(4, 3))), ["0 of 3 dimensions are active"]),
    "spectrum": (lambda: plot_spectrum(singular_values(STATES), effective_rank(STATES)), ["directions"]),
    "cosines": (lambda: plot_cosines(pairwise_cosine(STATES)), ["alike"]),
    "layers": (lambda: plot_layers(layer_sweep(LAYERS, (3, -1))), ["effective rank", "mean cosine"]),
    "probed": (lambda: plot_layers(layer_sweep(LAYERS, (3, -1), CLASSES)), ["effective rank", "cosine", "accuracy"]),
    "probe": (lambda: plot_probe(linear_probe(STATES, STATES[:, 0])), ["p = "]),
    "map": (lambda: plot_map(STATES, CLASSES, label="class"), ["40 vectors in a plane"]),
    "equal": (lambda: plot_map(torch.ones(4, 3)), ["4 vectors in a plane"]),
}


def png_of(figure: Figure) -> bytes:
    stream = io.BytesIO()
    figure.savefig(stream, format="png")
    return stream.getvalue()


@pytest.mark.parametrize("name", PICTURES)
def test_draws(name: str) -> None:
    make, words = PICTURES[name]
    figure = make()
    titles = " ".join(axes.get_title() for axes in figure.axes)
    for word in words:
        assert word in titles
    assert all(axes.lines or axes.patches or axes.collections for axes in figure.axes)
    assert png_of(figure).startswith(b"\x89PNG")


def test_the_numbers_are_those_measured() -> None:
    cosines = pairwise_cosine(STATES)
    (axes,) = plot_cosines(cosines).axes
    assert axes.patches[0].get_data().values.tolist() == cosines.counts.tolist()
    (axes,) = plot_spectrum(torch.tensor([2.0, 1.0, 0.0]), 1.9).axes
    assert axes.lines[0].get_ydata().tolist() == pytest.approx([0.8, 1.0, 1.0])
    assert list(axes.lines[1].get_xdata()) == [1.9, 1.9]
    probe = linear_probe(STATES, CLASSES)
    (axes,) = plot_probe(probe).axes
    heights = [patch.get_height() for patch in axes.patches]
    assert heights[:2] == pytest.approx([probe.score, probe.zero_score])
    assert list(axes.lines[0].get_ydata()) == list(probe.shuffle_scores)
    sweep = layer_sweep(LAYERS, (3, -1))
    first, second = plot_layers(sweep).axes
    assert list(first.lines[0].get_ydata()) == [layer.effective_rank for layer in sweep]
    assert [label.get_text() for label in second.get_xticklabels()] == ["3", "-1"]


def test_the_map_keeps_distances_in_a_plane() -> None:
    plane = torch.randn(20, 2, generator=torch.Generator().manual_seed(1))
    turned = torch.cat([plane, torch.zeros(20, 3)], -1)
    axes = plot_map(turned).axes[0]
    points = torch.as_tensor(axes.collections[0].get_offsets().data)
    torch.testing.assert_close(torch.cdist(points, points), torch.cdist(plane, plane).double(), rtol=1e-5, atol=1e-5)


def test_says_what_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in sys.modules if name.startswith("matplotlib")]:
        monkeypatch.setitem(sys.modules, name, None)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(CapabilityError, match=r"matplotlib draws the pictures.*install it with pip install"):
        plot_cosines(pairwise_cosine(STATES))


@pytest.mark.parametrize(
    ("draw", "words"),
    [
        (lambda: plot_layers([]), "0 layers; pass at least 1"),
        (lambda: plot_map(STATES[:, :1]), "D=1; expected at least 2"),
        (lambda: plot_map(STATES, torch.arange(3)), "3 values for 40 vectors; pass one for each"),
        (lambda: plot_map(STATES[0]), r"expected \[N, D\]"),
    ],
)
def test_refuses(draw: Any, words: str) -> None:
    with pytest.raises(InputError, match=words):
        draw()
