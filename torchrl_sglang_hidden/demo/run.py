"""The demo: a TorchRL collector over a launched SGLang server, then a table, a picture and the TensorDict on disk.

Each part is a function that the first tutorial uses too. Knows the policy and `launch`, nothing beneath them.
"""

from __future__ import annotations

import os
import shutil
import sys
import time
import warnings
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from rich import box
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table
from rich.text import Text
from tensordict import TensorDictBase, lazy_stack
from torch.utils.data import DataLoader
from torchrl.collectors.llm import LLMCollector
from torchrl.envs.llm import ChatEnv

from torchrl_sglang_hidden.demo.model import demo_model
from torchrl_sglang_hidden.demo.prompts import MAX_NEW_TOKENS, PROMPTS, SYSTEM_PROMPT
from torchrl_sglang_hidden.engines.launch import launch
from torchrl_sglang_hidden.errors import CapabilityError, InputError
from torchrl_sglang_hidden.policy.wrapper import SGLangHiddenWrapper
from torchrl_sglang_hidden.spec.hidden import HiddenSpec

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["DemoResult", "plot_pooled", "project", "rollout_table", "run_demo", "save_rollout"]

# Three batches of the two dozen prompts: SGLang decodes the rows of one together, and the bar moves.
_BATCH_SIZE = 8
_PLAIN_WIDTH = 100

# Okabe and Ito's palette, told apart with every common colour blindness (jfly.uni-koeln.de/color), without the yellow,
# which is faint on white. Six markers against seven colours: 42 kinds differ in one or the other.
_COLOURS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#000000", "#D55E00", "#56B4E9")
_MARKERS = ("o", "s", "^", "D", "P", "v")


@dataclass(frozen=True, slots=True)
class DemoResult:
    """The collected rollout, and the paths of what was written.

    Args:
        rollout: batch size ``[24]``, in the order of ``PROMPTS``; ``query`` and ``kind`` beside the policy's outputs.
        rollout_path: directory from which ``TensorDict.load_memmap`` reads the rollout.
        picture_path: PNG file.
    """

    rollout: TensorDictBase
    rollout_path: Path
    picture_path: Path


def run_demo(
    *,
    output_dir: str | os.PathLike[str] = "demo_output",
    model: Any = None,
    max_new_tokens: int = MAX_NEW_TOKENS,
    temperature: float = 0.0,
    console: Console | None = None,
) -> DemoResult:
    """Run two dozen prompts through ``ChatEnv`` and ``LLMCollector``; print a table, save the rollout and a picture.

    Args:
        output_dir: directory in which ``rollouts`` and ``hidden_states.png`` are written; files of an earlier run are
            replaced.
        model: an engine or a URL; by default a server with the demo model is launched, and ended after the run.
        max_new_tokens: most tokens of one response.
        temperature: 0 is greedy.
        console: prints the table; by default on stdout.

    Returns:
        The rollout, and the paths of what was written.

    Raises:
        InputError: an option outside its limits, or ``rollouts`` in ``output_dir`` is no saved TensorDict.
        CapabilityError: SGLang or matplotlib is not installed.
        DemoModelError: the demo model could not be made.
        EngineError: the server did not start, or failed.
    """
    console = console or _console()
    directory = Path(output_dir)
    rollout_path, picture_path = directory / "rollouts", directory / "hidden_states.png"
    # Before the half minute that a server takes to start.
    _require_matplotlib()
    _check_replaceable(rollout_path)
    with ExitStack() as stack:
        if model is None:
            model = _launch(stack, console)
        policy = SGLangHiddenWrapper(
            model,
            input_mode="history",
            hidden=HiddenSpec(segments=("prompt", "response")),
            generate_kwargs={"max_new_tokens": max_new_tokens, "temperature": temperature},
        )
        rollout = _collect_with_progress(policy, console)
    console.print(rollout_table(rollout))
    save_rollout(rollout, rollout_path)
    figure = plot_pooled(
        rollout["hidden_states"].prompt,
        list(rollout["kind"]),
        title=f"Mean-pooled hidden states of {len(rollout)} prompts",
    )
    figure.savefig(picture_path)
    console.print(_farewell(rollout_path, picture_path))
    return DemoResult(rollout, rollout_path, picture_path)


def rollout_table(rollout: TensorDictBase) -> Table:
    """Make a table with one line per row, grouped by kind: prompt, response, and what was measured of the response.

    Args:
        rollout: batch size ``[B]``, with ``query`` and ``kind`` beside the policy's outputs.
    """
    table = Table(
        box=box.SIMPLE_HEAD,
        title="What the collector brought back",
        title_style="bold",
        caption="Pooled: the mean of the states that produced the response's tokens, one row per token.",
        caption_justify="left",
        pad_edge=False,
        collapse_padding=True,
        expand=True,
    )
    table.add_column("prompt", no_wrap=True, overflow="ellipsis", ratio=10)
    table.add_column("response", no_wrap=True, overflow="ellipsis", ratio=11)
    for name in ("tokens", "mean\nlog-prob", "rows\npooled", "vector\nnorm"):
        table.add_column(name, no_wrap=True, justify="right", min_width=max(map(len, name.split("\n"))))
    responses = rollout.get(("tokens", "response"), as_list=True)
    log_probs = rollout.get(("log_probs", "response"), as_list=True)
    hidden = rollout["hidden_states"]
    kinds = list(rollout["kind"])
    for row, kind in enumerate(kinds):
        if row == 0 or kind != kinds[row - 1]:
            table.add_row(Text(kind, style="bold cyan"))
        table.add_row(
            _one_line(rollout["query"][row]),
            _one_line(rollout["text"].response[row]),
            str(len(responses[row])),
            f"{log_probs[row].mean().item():.2f}",
            str(hidden.response_count[row].item()),
            f"{hidden.response[row].norm().item():.1f}",
        )
    return table


def project(vectors_BD: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Project vectors onto their first two principal components.

    Args:
        vectors_BD: floating ``[B, D]``, B and D at least 2.

    Returns:
        Points, float32 ``[B, 2]``, and the share of the variance that each axis explains, float32 ``[2]``.

    Raises:
        InputError: ``vectors_BD`` has another shape.
    """
    if vectors_BD.ndim != 2 or min(vectors_BD.shape) < 2:
        raise InputError(f"vectors_BD has shape {tuple(vectors_BD.shape)}; expected two dimensions, each of at least 2")
    vectors_BD = vectors_BD.float().cpu()
    centred_BD = vectors_BD - vectors_BD.mean(0)
    _, singular, components = torch.linalg.svd(centred_BD, full_matrices=False)
    axes_2D = components[:2]
    # The sign of a component is arbitrary; fixed, so that two runs give one picture.
    largest_2 = axes_2D.gather(1, axes_2D.abs().argmax(1, keepdim=True))
    axes_2D = axes_2D * largest_2.sign()
    variance = singular.square()
    # Equal vectors have no variance at all.
    return centred_BD @ axes_2D.T, (variance / variance.sum().clamp(min=torch.finfo(torch.float32).tiny))[:2]


def plot_pooled(vectors_BD: torch.Tensor, kinds: Sequence[str], *, title: str) -> Figure:
    """Plot vectors in the plane of their first two principal components, with a colour and a marker for each kind.

    Args:
        vectors_BD: pooled hidden states, floating ``[B, D]``, B and D at least 2.
        kinds: the kind of each row, B strings.
        title: title of the picture.

    Returns:
        A figure drawn by Agg, whatever backend the caller's pyplot has. ``figure.savefig(path)`` writes the picture.

    Raises:
        InputError: ``vectors_BD`` has another shape, or another length than ``kinds``.
        CapabilityError: matplotlib is not installed.
    """
    _require_matplotlib()
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    if len(kinds) != len(vectors_BD):
        raise InputError(f"{len(kinds)} kinds for {len(vectors_BD)} vectors; pass one kind per vector")
    points_B2, explained_2 = project(vectors_BD)
    figure = Figure(figsize=(9, 6), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    for index, kind in enumerate(dict.fromkeys(kinds)):
        rows = [row for row, other in enumerate(kinds) if other == kind]
        axes.scatter(
            points_B2[rows, 0].numpy(),
            points_B2[rows, 1].numpy(),
            s=110,
            color=_COLOURS[index % len(_COLOURS)],
            marker=_MARKERS[index % len(_MARKERS)],
            edgecolors="white",
            linewidths=0.8,
            alpha=0.9,
            label=kind,
        )
    axes.set_title(title, fontsize=14, pad=12)
    for set_label, number in ((axes.set_xlabel, 0), (axes.set_ylabel, 1)):
        share = explained_2[number].item()
        set_label(f"principal component {number + 1} ({share:.0%} of the variance)", fontsize=12)
    axes.tick_params(labelsize=11)
    axes.grid(color="0.9")
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(title="kind of prompt", fontsize=12, title_fontsize=12, loc="center left", bbox_to_anchor=(1.01, 0.5))
    return figure


def save_rollout(rollout: TensorDictBase, path: Path) -> None:
    """Write a TensorDict as memory-mapped files, with ragged rows; an earlier rollout at the path is replaced.

    ``TensorDict.load_memmap`` reads the rollout back, once ``torchrl_sglang_hidden.HiddenStates`` was imported:
    TensorDict finds TensorClasses by name, among those that the process has imported.

    Args:
        rollout: the TensorDict to save.
        path: directory to write.

    Raises:
        InputError: ``path`` exists and is no saved TensorDict.
    """
    _check_replaceable(path)
    # Rows of a longer rollout would otherwise stay and be read again with the new ones.
    shutil.rmtree(path, ignore_errors=True)
    path.parent.mkdir(parents=True, exist_ok=True)
    rollout.memmap(path)


def _launch(stack: ExitStack, console: Console) -> Any:
    model = demo_model()
    console.print("Starting the embedded SGLang server, about half a minute on two cores.")
    start = time.monotonic()
    # On a CPU float32 costs nothing, and gives the model's states to the last digit.
    engine = stack.enter_context(launch(model, dtype="float32"))
    console.print(f"Ready after {time.monotonic() - start:.0f} s: {engine.url}")
    return engine


def _collect_with_progress(policy: SGLangHiddenWrapper, console: Console) -> TensorDictBase:
    columns = (TextColumn("Collecting"), BarColumn(), MofNCompleteColumn(), TextColumn("prompts"), TimeElapsedColumn())
    with Progress(*columns, console=console) as progress:
        task = progress.add_task("", total=len(PROMPTS))
        return _collect(policy, on_batch=lambda rows: progress.advance(task, rows))


def _collect(policy: SGLangHiddenWrapper, on_batch: Callable[[int], None]) -> TensorDictBase:
    samples = [{"query": prompt.text, "kind": prompt.kind} for prompt in PROMPTS]
    loader: DataLoader[dict[str, str]] = DataLoader(samples, batch_size=_BATCH_SIZE)  # type: ignore[arg-type]
    # The loader's other keys stay in the TensorDict: each row keeps its kind.
    env = ChatEnv.from_dataloader(loader, batch_size=(_BATCH_SIZE,), system_prompt=SYSTEM_PROMPT)
    with warnings.catch_warnings():
        # torchrl 0.14 announces InitTracker for 0.15, and its LLMCollector has no argument to decline it.
        warnings.filterwarnings("ignore", message="The env passed to LLMCollector", category=FutureWarning)
        collector = LLMCollector(
            env,
            policy=policy,
            dialog_turns_per_batch=_BATCH_SIZE,
            total_dialog_turns=len(PROMPTS),
            # A ChatEnv is never done: without a reset the second batch would be a second turn of the first.
            reset_at_each_iter=True,
        )
    rows = []
    for batch in collector:
        rows.extend(batch[:, 0].unbind(0))
        on_batch(len(batch))
    collector.shutdown()
    # The collector resets the environment once before it collects, so that the loader's second batch comes first.
    position = {prompt.text: index for index, prompt in enumerate(PROMPTS)}
    return lazy_stack(sorted(rows, key=lambda row: position[row["query"]]))


def _farewell(rollout_path: Path, picture_path: Path) -> Text:
    return Text(
        f"\nPicture     {picture_path}\n"
        f"TensorDict  {rollout_path}{os.sep}, to be read with\n\n"
        "    from tensordict import TensorDict\n"
        "    from torchrl_sglang_hidden import HiddenStates  # the import makes its classes known\n"
        f'    rollout = TensorDict.load_memmap("{rollout_path.as_posix()}")\n',
        overflow="ignore",
        no_wrap=True,
    )


def _console() -> Console:
    # Piped output has no width of its own, and rich would take 80 columns.
    narrow = not sys.stdout.isatty() and "COLUMNS" not in os.environ
    return Console(width=_PLAIN_WIDTH if narrow else None, highlight=False)


def _one_line(text: str) -> Text:
    return Text(" ".join(text.split()))


def _check_replaceable(path: Path) -> None:
    if path.exists() and not (path / "meta.json").is_file():
        raise InputError(
            f"{path} is there and is no saved TensorDict; choose another output directory, or move it away"
        )


def _require_matplotlib() -> None:
    try:
        import matplotlib  # noqa: F401
    except ImportError as error:
        raise CapabilityError(
            f"matplotlib draws the picture, and cannot be imported: {error}; "
            "install it with pip install 'torchrl-sglang-hidden[demo]'"
        ) from error
