"""The speed table's record as a table for the terminal, as Markdown for the README, and as a plot.

Knows nothing of how its lines are measured.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from rich.table import Table

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"
RECORD = RESULTS / "speed_table.json"
BEGIN, END = "<!-- speed table -->", "<!-- end of the speed table -->"
HEADINGS = ("what", "against", "measured", "aim")
# The sizes that grow, as the plot names them.
AXES = {"rows": "rows", "prompt_tokens": "prompt tokens", "new_tokens": "response tokens", "hidden_size": "D"}


@dataclass(frozen=True)
class Line:
    """One line of the table.

    Args:
        what: this package's side.
        against: the other side.
        value: what was measured.
        aim: what it should come to.
        sense: whether it should be at least that much, or at most.
        unit: stands behind value and aim.
    """

    what: str
    against: str
    value: float
    aim: float
    sense: Literal["≥", "≤"] = "≥"
    unit: str = "×"

    @property
    def holds(self) -> bool:
        """Whether the aim is reached."""
        return self.value >= self.aim if self.sense == "≥" else self.value <= self.aim

    def cells(self) -> tuple[str, str, str, str]:
        """Return the line's cells, by `HEADINGS`."""
        digits = 2 if self.value < 10 else 1 if self.value < 100 else 0
        measured = f"{self.value:,.{digits}f}{self.unit}{'' if self.holds else ' (missed)'}"
        return self.what, self.against, measured, f"{self.sense} {self.aim:,g}{self.unit}"


def lines_of(record: Mapping[str, Any]) -> list[Line]:
    """Return the lines of all parts of a record."""
    return [Line(**line) for part in record["parts"].values() for line in part["lines"]]


def to_table(record: Mapping[str, Any]) -> Table:
    """Return the table for a terminal."""
    table = Table(title="speed")
    for heading in HEADINGS:
        table.add_column(heading)
    for line in lines_of(record):
        table.add_row(*line.cells())
    return table


def to_markdown(record: Mapping[str, Any]) -> str:
    """Return the table of a record as Markdown, with the machine that it was measured on."""
    machine, versions = record["machine"], record["versions"]
    rows = [line.cells() for line in lines_of(record)]
    table = [f"| {' | '.join(cells)} |" for cells in (HEADINGS, ("---",) * len(HEADINGS), *rows)]
    where = (
        f"`make bench` on {machine['cores']} cores ({machine['cpu']}, {machine['memory_gib']:.0f} GiB), float32: "
        f"SGLang {versions['sglang']} with its CPU engine, PyTorch {versions['torch']}, TorchRL {versions['torchrl']}."
    )
    return "\n".join([*table, "", where])


def draw(scaling: Mapping[str, Sequence[Mapping[str, float]]], path: Path) -> None:
    """Draw time and memory of the client, a column for each size that grows."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot
    from matplotlib.ticker import NullFormatter

    figure, axes = pyplot.subplots(2, len(scaling), figsize=(11, 5), sharex="col", sharey="row", squeeze=False)
    for column, (name, points) in zip(axes.T, scaling.items(), strict=True):
        sizes = [point["size"] for point in points]
        times, peaks = [point["seconds"] * 1e3 for point in points], [point["peak_bytes"] / 2**20 for point in points]
        for axis, values in zip(column, (times, peaks), strict=True):
            axis.loglog(sizes, values, marker="o")
            # Through the last point: what lies above it on the left grows more slowly than its size.
            axis.loglog(sizes, [values[-1] * size / sizes[-1] for size in sizes], linestyle=":", color="grey")
            axis.grid(alpha=0.3)
            axis.xaxis.set_minor_formatter(NullFormatter())  # they stand on each other where the axis is short
        column[1].set_xlabel(AXES[name])
    axes[0, 0].set_ylabel("client time, ms")
    axes[1, 0].set_ylabel("client memory, MiB")
    figure.suptitle("From the JSON of an answer to the TensorDict; dotted: in proportion to the size")
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


def merge(new: Mapping[str, Any], old: Mapping[str, Any] | None, order: Sequence[str]) -> dict[str, Any]:
    """Return a record with the new parts in the place of the old ones.

    Args:
        new: a record, perhaps of some parts only.
        old: the record that is kept, or None.
        order: names of all parts, in the order of the table.

    Raises:
        SystemExit: parts of the old record would stay that are of other versions, or of another machine.
    """
    kept = {} if old is None else {name: part for name, part in old["parts"].items() if name not in new["parts"]}
    for what in ("versions", "machine") if old is not None and kept else ():
        if new[what] != old[what]:
            raise SystemExit(
                f"{what} were {old[what]} and are {new[what]}: the parts {list(kept)} would not be comparable with the "
                "new ones; measure all parts, without --only"
            )
    parts = {**kept, **new["parts"]}
    scaling = new["scaling"] or (old or {}).get("scaling", {})
    return {**new, "scaling": scaling, "parts": {name: parts[name] for name in order if name in parts}}


def write(new: Mapping[str, Any], order: Sequence[str], *, keep_others: bool) -> None:
    """Write a record, its table and its plot to `RESULTS`, and the table into the README.

    Args:
        new: the record.
        order: names of all parts, in the order of the table.
        keep_others: whether the parts that the new record lacks stay as they were; see `merge`.
    """
    RESULTS.mkdir(exist_ok=True)
    old = json.loads(RECORD.read_text(encoding="utf-8")) if keep_others and RECORD.exists() else None
    record = merge(new, old, order)
    RECORD.write_text(json.dumps(record, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    table = to_markdown(record)
    (RESULTS / "speed_table.md").write_text(f"{table}\n", encoding="utf-8")
    if new["scaling"]:
        draw(new["scaling"], RESULTS / "speed_table.png")
    readme = ROOT / "README.md"
    before, rest = readme.read_text(encoding="utf-8").split(BEGIN)
    readme.write_text(f"{before}{BEGIN}\n{table}\n{END}{rest.split(END)[1]}", encoding="utf-8")
