"""What every benchmark does: its sides take turns, their answers are compared, and ratios are those of one round.

Round after round each side works on the same input; which of them goes first changes. Round 0 is for what is slow once,
and is not counted. The sides' answers are compared before any ratio is shown: sides that computed other things are not
compared in time. A ratio compares the two sides of one round, and what is shown is the median over the rounds.

Knows nothing of servers.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import platform
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, TypeVar

from rich.console import Console
from rich.progress import Progress
from rich.table import Table

# Piped output has no width of its own, and rich would take 80 columns.
CONSOLE = Console(width=None if Console().is_terminal else 140)
VERSIONS = ("torch", "sglang", "torchrl", "tensordict", "transformers", "torchrl-sglang-hidden")
HELP = {
    "model": "smollm2, wide, a directory or a hub name",
    "wide_layers": "layers of the wide model",
    "prompts": "prompts in a batch",
    "prompt_tokens": "tokens of each prompt",
    "new_tokens": "tokens generated from each prompt",
    "columns": "k: columns of top_k and token_ids",
    "envs": "environments side by side",
    "system_tokens": "tokens of the system prompt",
    "observation_tokens": "tokens of each observation",
    "steps": "steps of all environments while memory is watched, or 0",
    "rounds": "rounds that count",
    "dtype": "of weights and states",
}

Input = TypeVar("Input")


class DifferentAnswersError(SystemExit):
    """Two sides gave different answers, so that no ratio of their times means anything."""


@dataclass(frozen=True)
class Call:
    """One measured call of one side.

    Args:
        seconds: its time.
        found: what it came to, for the comparison.
        counts: numbers that are kept, such as bytes.
    """

    seconds: float
    found: Any = None
    counts: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Rounds:
    """The calls of all rounds that count, and how far the sides' answers were apart."""

    calls: Sequence[Mapping[str, Call]]
    worst: float

    @property
    def sides(self) -> list[str]:
        """Names of the sides."""
        return list(self.calls[0])

    def seconds(self, side: str) -> list[float]:
        """Return the times of a side."""
        return [calls[side].seconds for calls in self.calls]

    def speed(self, side: str, base: str) -> float:
        """Return how many times as fast a side is as another one."""
        return statistics.median(calls[base].seconds / calls[side].seconds for calls in self.calls)

    def count(self, side: str, key: str) -> float:
        """Return a number that the calls of a side kept."""
        return statistics.median(calls[side].counts[key] for calls in self.calls)

    def table(self, title: str, columns: Mapping[str, Callable[[str], str]], caption: str | None = None) -> Table:
        """Return a table with a row for each side; ``columns`` are those after the times, by their headings."""
        table = Table(title=title, caption=caption)
        table.add_column("side")
        for heading in ("s", "fastest – slowest", *columns):
            table.add_column(heading, justify="right")
        for side in self.sides:
            times = self.seconds(side)
            spread = f"{min(times):.3f} – {max(times):.3f}"
            cells = [column(side) for column in columns.values()]
            table.add_row(side, f"{statistics.median(times):.3f}", spread, *cells)
        return table

    def results(self) -> dict[str, dict[str, float]]:
        """Return the times and counts of each side, as medians."""
        return {
            side: {
                "seconds": statistics.median(self.seconds(side)),
                "fastest_s": min(self.seconds(side)),
                "slowest_s": max(self.seconds(side)),
                **{key: self.count(side, key) for key in self.calls[0][side].counts},
            }
            for side in self.sides
        }


def take_turns(
    title: str,
    sides: Mapping[str, Callable[[Input], Call]],
    make_input: Callable[[int], Input],
    *,
    rounds: int,
    compare: Callable[[Mapping[str, Call]], float],
) -> Rounds:
    """Let the sides take turns, each of them in each place as often as the others.

    Args:
        title: stands at the progress bar.
        sides: each calls what it measures, once, by name.
        make_input: makes the input of a round; round 0 is not counted, and may be shorter.
        rounds: those that count.
        compare: returns how far the answers of a round are apart, or raises `DifferentAnswersError`.
    """
    kept: list[Mapping[str, Call]] = []
    worst = 0.0
    with Progress(console=CONSOLE, transient=True) as progress:
        task = progress.add_task(title, total=(rounds + 1) * len(sides))
        for number in range(rounds + 1):
            value = make_input(number)
            calls: dict[str, Call] = {}
            first = number % len(sides)
            for name in [*list(sides)[first:], *list(sides)[:first]]:
                progress.update(task, description=f"{title}: round {number} of {rounds}, {name}")
                calls[name] = sides[name](value)
                progress.advance(task)
            worst = max(worst, compare(calls))
            # What was compared is let go: the states or logits of all rounds would fill the memory.
            if number:
                kept.append({name: replace(calls[name], found=None) for name in sides})
    return Rounds(kept, worst)


def same_tokens(calls: Mapping[str, Call], tokens_of: Callable[[Any], Sequence[Any]]) -> float:
    """Return 0, the distance of answers that are the same; raise where a side came to other tokens than another.

    Args:
        calls: of one round.
        tokens_of: returns the tokens of each row of what a side found.
    """
    names = list(calls)
    expected = [list(row) for row in tokens_of(calls[names[0]].found)]
    for name in names[1:]:
        found = [list(row) for row in tokens_of(calls[name].found)]
        wrong = [row for row, (a, b) in enumerate(zip(found, expected, strict=True)) if a != b]
        if wrong:
            raise DifferentAnswersError(
                f"{name!r} generated other tokens than {names[0]!r} in rows {wrong}; no ratio means anything"
            )
    return 0.0


def read_arguments(doc: str | None, **defaults: Any) -> argparse.Namespace:
    """Print what the benchmark is, and read its sizes from the command line.

    Args:
        doc: the module's docstring; its last paragraph is a command, and is left out.
        **defaults: of the arguments in `HELP` that the benchmark has. One with a tuple may be repeated.
    """
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in defaults.items():
        option = f"--{name.replace('_', '-')}"
        if isinstance(default, tuple):
            parser.add_argument(option, action="append", help=f"{HELP[name]}; may be repeated; default {default}")
        else:
            parser.add_argument(option, type=type(default), default=default, help=HELP[name])
    args = parser.parse_args()
    for name, default in defaults.items():
        if getattr(args, name) is None:
            setattr(args, name, default)
    CONSOLE.print((doc or "").rpartition("\n\n    python")[0].strip(), highlight=False, markup=False)
    return args


def print_record(benchmark: str, args: argparse.Namespace | None, results: Mapping[str, Any]) -> None:
    """Print everything as one line of JSON, the last of a benchmark's output."""
    print(json.dumps({"benchmark": benchmark, **(vars(args) if args else {}), **results, **environment()}))


def environment() -> dict[str, Any]:
    """Return what figures depend on: versions, and cores, memory and the name of the processor."""
    info = Path("/proc/cpuinfo").read_text().splitlines()
    names = [line.split(":", 1)[1].strip() for line in info if line.startswith("model name")]
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    machine = {
        "cpu": names[0] if names else platform.machine(),
        "cores": len(os.sched_getaffinity(0)),
        "memory_gib": round(memory / 2**30, 1),
        "python": platform.python_version(),
    }
    return {"versions": {name: importlib.metadata.version(name) for name in VERSIONS}, "machine": machine}
