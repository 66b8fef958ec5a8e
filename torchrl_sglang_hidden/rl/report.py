"""`write_report`: what a recording's hidden states hold, as one HTML page with its pictures inside.

Knows nothing of how states are measured or drawn: it says of which rows, and puts the results on a page.
"""

from __future__ import annotations

import base64
import io
import os
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from jinja2 import Environment, StrictUndefined
from tensordict import LazyStackedTensorDict, TensorDictBase, is_leaf_nontensor
from tensordict.utils import NestedKey, unravel_key

from torchrl_sglang_hidden._version import __version__
from torchrl_sglang_hidden.errors import InputError, InputTypeError, MissingKeyError
from torchrl_sglang_hidden.rl.drift import state_drift
from torchrl_sglang_hidden.rl.layer_sweep import LayerMeasures, layer_sweep
from torchrl_sglang_hidden.rl.measures import (
    pairwise_cosine,
    rank_of,
    singular_values,
    state_variance,
    take_rows,
)
from torchrl_sglang_hidden.rl.plots import (
    plot_cosines,
    plot_layers,
    plot_map,
    plot_probe,
    plot_spectrum,
    plot_variance,
)
from torchrl_sglang_hidden.rl.probe import ProbeResult, linear_probe
from torchrl_sglang_hidden.rl.prompts import value_of
from torchrl_sglang_hidden.rl.recording import LABEL_ROW, Recording, load_recording

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["write_report"]

# Targets that are probed where none are named and the data has them.
_USUAL_TARGETS: tuple[NestedKey, ...] = ("action", "reward", ("next", "reward"))
_PROBED_ROWS, _DRAWN_ROWS, _LISTED_FAILURES = 5000, 2000, 20
# Of a recording without episodes: neighbours in it stay on one side of the probe's split.
_BLOCKS = 20


@dataclass
class _Picture:
    caption: str
    uri: str


@dataclass
class _Section:
    title: str
    note: str = ""
    header: tuple[str, ...] = ()
    rows: list[tuple[str, ...]] = field(default_factory=list)
    pictures: list[_Picture] = field(default_factory=list)


def write_report(
    recording: Recording | str | os.PathLike[str],
    path: str | os.PathLike[str] | None = None,
    *,
    targets: Sequence[NestedKey] = (),
    against: Recording | str | os.PathLike[str] | None = None,
) -> Path:
    """Write a page about the hidden states of a recording: measures, pictures, probes, and the rows that failed.

    Rows that failed are left out, and of rows that share a label one is taken. Probes are split by episode where the
    data has ``("next", "done")`` or ``"done"``, else by blocks of neighbouring rows. With several layers, each is
    measured, and the pictures are of the last one named.

    Args:
        recording: what `record_hidden_states` or `load_recording` returned, or its directory.
        path: the HTML file; one that is there is replaced. By default the recording's directory with ``.html`` behind
            it.
        targets: fields of the data that a linear probe reads from the states, such as ``"reward"``; by default
            ``"action"``, ``"reward"`` and ``("next", "reward")`` where they are there.
        against: another recording, or its directory, such as one of live states: how far its states are from these.

    Returns:
        The path.

    Raises:
        InputError: fewer than 2 rows with states, ``against`` without such states, or a file that cannot be written.
        InputTypeError: ``targets`` that is one text.
        MissingKeyError: the recording has no such target.
        RecordingError: no recording, or a shard that is damaged.
        CapabilityError: matplotlib is not installed.
    """
    recording = _load(recording)
    # "." and ".." have no name of their own.
    directory = recording.path if recording.path.name.strip(".") else recording.path.resolve()
    target = directory.with_name(f"{directory.name}.html") if path is None else Path(path)
    data = recording.tensordict
    chosen = _choose_targets(data, targets)
    sections = []
    for key in _state_keys(data):
        sections += _sections(recording, data, key, chosen, None if against is None else _load(against))
    sections.append(_failures(recording))
    text = files(__package__).joinpath("report.html.jinja").read_text(encoding="utf-8")
    page = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True).from_string(
        text
    )
    html = page.render(
        title=f"Hidden states of {directory.name}",
        about=_about(recording),
        sections=sections,
        footer=f"Written by torchrl-sglang-hidden {__version__}.",
    )
    part = target.with_name(f".{target.name}.part")
    try:
        # A field's text may have half of a surrogate pair, for which HTML has no bytes.
        part.write_text(html, encoding="utf-8", errors="replace")
        part.replace(target)
    except OSError as error:
        with suppress(OSError):  # on a full disk what was written so far would stay
            part.unlink(missing_ok=True)
        raise InputError(f"{target}: {error}; choose a file in a directory that can be written") from error
    return target


def _load(recording: Recording | str | os.PathLike[str]) -> Recording:
    return recording if isinstance(recording, Recording) else load_recording(Path(recording))


# --- which rows -------------------------------------------------------------------------------------------------------


def _keys(data: TensorDictBase) -> set[NestedKey]:
    """Return the keys of all fields, texts too."""
    return set(data.keys(True, True, is_leaf=is_leaf_nontensor))


def _state_keys(data: TensorDictBase) -> list[NestedKey]:
    """Return the keys of the pooled states of a recording."""
    keys = [key for key in _keys(data) if isinstance(key, tuple) and key[0] == "hidden_states"]
    found = [key for key in keys if data.get(key).is_floating_point()]
    if not found:
        raise InputError("the recording has no pooled states; expected some: use a policy that pools")
    return sorted(found, key=str)


def _read_states(data: TensorDictBase, key: NestedKey) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the states of the rows that have their own label, and the numbers of these rows."""
    states = data.get(key)
    kept = states.flatten(1).isfinite().all(-1)
    sources = data.get(LABEL_ROW, None)
    if sources is not None:
        kept &= sources == torch.arange(len(states))
    rows = kept.nonzero().flatten()
    if len(rows) < 2:
        raise InputError(
            f"{key!r} has {len(rows)} rows with states of their own; expected at least 2: record more, or look at "
            "Recording.failures"
        )
    return states[rows], rows


def _choose_targets(data: TensorDictBase, targets: Sequence[NestedKey]) -> list[NestedKey]:
    if isinstance(targets, str):
        raise InputTypeError(f"targets={targets!r} is a str; expected a list of keys, such as ['reward']")
    there = _keys(data)
    named = [unravel_key(target) for target in targets]
    if missing := [target for target in named if target not in there]:
        raise MissingKeyError(f"targets {missing}: the recording has {sorted(map(str, there))}; name one of these")
    return named or [target for target in _USUAL_TARGETS if target in there]


def _column(data: TensorDictBase, key: NestedKey) -> torch.Tensor | list[Any]:
    """Return a field of every row: a tensor, or a list where it is no tensor or its rows have several shapes."""
    if not isinstance(data, LazyStackedTensorDict):
        values = data.get(key)
        return values if isinstance(values, torch.Tensor) else values.tolist()
    found = [value_of(row.get(key)) for row in data.tensordicts]
    is_dense = all(isinstance(value, torch.Tensor) for value in found) and len({value.shape for value in found}) == 1
    return torch.stack(found) if is_dense else found


def _groups(data: TensorDictBase) -> tuple[torch.Tensor, str]:
    """Return for each row its episode, or else its block of neighbours, and what that is."""
    there = [key for key in (("next", "done"), "done") if key in _keys(data)]
    done = _column(data, there[0]) if there else []
    if isinstance(done, torch.Tensor):
        ends = done.flatten(1).any(-1).long() if done.ndim > 1 else done.bool().long()
        episodes = ends.cumsum(0) - ends
        if int(episodes[-1]) >= 3:
            return episodes, "episode"
    return torch.arange(len(data)) * _BLOCKS // len(data), f"one of {_BLOCKS} blocks of neighbouring rows"


# --- sections ---------------------------------------------------------------------------------------------------------


def _about(recording: Recording) -> list[tuple[str, str]]:
    about = recording.metadata
    rows = f"{len(recording)}, of which {len(recording.failures)} failed"
    return [
        ("directory", str(recording.path)),
        ("model", about["model"]["path"]),
        ("weight version", str(about["weight_version"])),
        ("prompt", _prompt_of(about["prompt"])),
        ("pooling", str(about["pooling"])),
        ("layers", str(about["layers"])),
        ("rows", rows if about["complete"] else f"{rows}; the data set was not recorded to its end"),
        ("versions", ", ".join(f"{name} {version}" for name, version in about["versions"].items())),
        ("hash", about["hash"]),
    ]


def _prompt_of(prompt: str | Mapping[str, Any]) -> str:
    """Return a format string as it is, and of a function what it was made with, or its name."""
    return prompt if isinstance(prompt, str) else str(prompt["repr"] or prompt["name"])


def _sections(
    recording: Recording, data: TensorDictBase, key: NestedKey, targets: Sequence[NestedKey], against: Recording | None
) -> list[_Section]:
    """Return the sections about the states of one segment or span."""
    states, rows = _read_states(data, key)
    name = " · ".join(key[1:])
    layers = recording.metadata["layers"]
    sections = []
    groups, split = _groups(data)
    some = take_rows(torch.arange(len(rows)), _PROBED_ROWS)
    probed = [(target, _read_target(data, target, rows[some])) for target in targets]
    if states.ndim == 3:
        sections.append(_layers_section(name, states, layers))
        states, name = states[:, -1], f"{name}, layer {layers[-1]}"
    sections.append(_measures_section(name, states, rows, len(data)))
    if probed:
        results = [(target, _probe(states[some], values, groups[rows[some]])) for target, values in probed]
        sections.append(_probes_section(name, results, split))
    if against is not None:
        if against.metadata["layers"] != layers:
            raise InputError(
                f"{against.path} has the layers {against.metadata['layers']}, and the recording {layers}; expected the "
                "same: record it with the same policy"
            )
        sections.append(_drift_section(name, states, key, against))
    return sections


def _measures_section(name: str, states: torch.Tensor, rows: torch.Tensor, num_rows: int) -> _Section:
    """Return the section about states ``[N, D]``, whose places in the data are rows, int64 ``[N]``."""
    variance, values = state_variance(states), singular_values(states)
    rank = rank_of(values)
    section = _Section(
        f"What the states hold: {name}",
        note=f"Of {len(states)} rows with states of their own, among {num_rows}. "
        "Active: dimensions with at least 1 % of the mean variance. Effective rank: Roy and Vetterli 2007.",
        rows=[
            ("rows, dimensions", f"{len(states)}, {states.shape[1]}"),
            ("total variance", f"{variance.total:.4g}"),
            ("active dimensions", f"{variance.num_active} of {states.shape[1]}"),
            ("share of the largest dimension", f"{variance.largest_share:.1%}"),
            ("effective rank", f"{rank:.1f} of at most {min(len(states) - 1, states.shape[1])}"),
        ],
        pictures=[
            _picture(plot_variance(variance), "Variance of each dimension, largest first"),
            _picture(plot_spectrum(values, rank), "Variance in the first directions, summed up"),
        ],
    )
    directed = states[(states != 0).any(-1)]
    if len(directed) >= 2:
        cosines = pairwise_cosine(directed)
        section.rows.append(("mean cosine of two rows", f"{cosines.mean:.3f} ± {cosines.std:.3f}"))
        section.pictures.append(_picture(plot_cosines(cosines), "Cosines of pairs of rows"))
    if states.shape[1] >= 2:
        drawn = take_rows(torch.arange(len(states)), _DRAWN_ROWS)
        figure = plot_map(states[drawn], rows[drawn], label="row")
        section.pictures.append(_picture(figure, "The states in the plane of their first two principal components"))
    return section


def _layers_section(name: str, states: torch.Tensor, layers: Sequence[int]) -> _Section:
    found: list[LayerMeasures] = layer_sweep(states, layers)
    return _Section(
        f"Layers: {name}",
        header=("layer", "variance", "active dimensions", "effective rank", "mean cosine"),
        rows=[
            (
                str(layer.layer),
                f"{layer.variance:.4g}",
                str(layer.num_active),
                f"{layer.effective_rank:.1f}",
                f"{layer.mean_cosine:.3f}",
            )
            for layer in found
        ],
        pictures=[_picture(plot_layers(found), "Measures of each layer")],
    )


def _read_target(data: TensorDictBase, target: NestedKey, rows: torch.Tensor) -> Any:
    """Return a field of rows: numbers ``[N]`` or ``[N, M]``, or a list. One-hot vectors are the numbers of classes."""
    column = _column(data, target)
    if not isinstance(column, torch.Tensor):
        return [column[row] for row in rows.tolist()]
    values = column[rows].flatten(1) if column.ndim > 1 else column[rows]
    if values.ndim > 1 and values.shape[1] == 1:
        return values[:, 0]
    is_one_hot = values.ndim > 1 and not values.is_floating_point() and bool(((values != 0).sum(1) == 1).all())
    return (values != 0).long().argmax(1) if is_one_hot else values


def _probe(states: torch.Tensor, values: Any, groups: torch.Tensor) -> ProbeResult | str:
    """Return what a probe found, or why there is none."""
    try:
        return linear_probe(states, values, groups=groups)
    except InputError as error:
        return str(error)


def _probes_section(name: str, results: Sequence[tuple[NestedKey, ProbeResult | str]], split: str) -> _Section:
    section = _Section(
        f"What a linear map reads: {name}",
        note=f"Ridge regression on three quarters of the rows, scored on the others; every {split} is on one side. "
        "Zeros: the same without the states. Shuffled: the same with the states of other rows.",
        header=("target", "score", "zeros", "shuffled (mean)", "p", "test rows"),
    )
    for target, found in results:
        label = target if isinstance(target, str) else ".".join(target)
        if isinstance(found, str):
            section.rows.append((label, f"not probed: {found}", "", "", "", ""))
            continue
        kind = "accuracy" if found.task == "classification" else "R²"
        mean = sum(found.shuffle_scores) / len(found.shuffle_scores)
        section.rows.append(
            (
                label,
                f"{kind} {found.score:.3f}",
                f"{found.zero_score:.3f}",
                f"{mean:.3f}",
                f"{found.p_value:.2g}",
                str(found.num_test),
            )
        )
        section.pictures.append(_picture(plot_probe(found), f"{label}: the probe and its controls"))
    return section


def _drift_section(name: str, states: torch.Tensor, key: NestedKey, against: Recording) -> _Section:
    if key not in _keys(against.tensordict):
        raise InputError(f"{against.path} has no {key!r}; expected the same states: record it with the same policy")
    live, _ = _read_states(against.tensordict, key)
    live = live[:, -1] if live.ndim == 3 else live
    drift = state_drift(states, live)
    dimension, shift = drift.most_shifted
    return _Section(
        f"Drift of {against.path.resolve().name}: {name}",
        note="Shift of the mean in standard deviations; Fréchet distance of the two Gaussians; squared maximum mean "
        "discrepancy with a Gaussian kernel (Gretton et al. 2012), and how often a random exchange gave as much.",
        rows=[
            ("mean shift", f"{drift.mean_shift:.3f}"),
            ("most shifted dimension", f"{dimension}, by {shift:+.2f}"),
            ("Fréchet distance", f"{drift.frechet:.4g}"),
            ("Fréchet distance of two halves of this recording", f"{drift.frechet_within:.4g}"),
            (
                "discrepancy",
                f"{drift.mmd:.3g}, p = {drift.p_value:.2g}, of {drift.num_rows[0]} and {drift.num_rows[1]} rows",
            ),
        ],
    )


def _failures(recording: Recording) -> _Section:
    failures = recording.failures
    section = _Section("Rows that failed", note=f"{len(failures)} of {len(recording)}. Their states are NaN.")
    section.rows = [(str(failure.row), failure.reason) for failure in failures[:_LISTED_FAILURES]]
    if len(failures) > _LISTED_FAILURES:
        section.rows.append(("…", f"{len(failures) - _LISTED_FAILURES} more: see Recording.failures"))
    return section


def _picture(figure: Figure, caption: str) -> _Picture:
    """Return a figure as a data URI."""
    stream = io.BytesIO()
    figure.savefig(stream, format="png")
    return _Picture(caption, f"data:image/png;base64,{base64.b64encode(stream.getvalue()).decode('ascii')}")
