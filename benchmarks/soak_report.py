"""The record of a soak as a table for the terminal, and as Markdown.

Knows nothing of how it was measured.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from rich.table import Table

Cells = tuple[str, str, str, str, str]
HEADINGS: Cells = ("side", "what", "first third", "last third", "most")


def to_table(record: Mapping[str, Any]) -> Table:
    """Return the table for a terminal."""
    table = Table(title=f"{record['right']:,} rows right, {record['ties']} ties, {record['num_wrong']} wrong")
    for heading in (*HEADINGS, "grew"):
        table.add_column(heading, justify="left" if heading in ("side", "what") else "right")
    for cells, grew in _rows(record):
        table.add_row(*cells, "yes" if grew else "no")
    return table


def to_markdown(record: Mapping[str, Any]) -> str:
    """Return figures and table as Markdown, with the machine that they were measured on."""
    machine, versions, pressure = record["machine"], record["versions"], record["back_pressure"]
    figures = (
        f"{record['right']:,} rows right, {record['ties']} ties, {record['num_wrong']} wrong",
        f"worst relative distance of a state {record['worst_state']:.1e}, worst of a log-prob "
        f"{record['worst_log_prob']:.1e}",
        f"{record['threads']} threads at once: {record['threads_s']:.1f} s",
        f"{record['rows']} rows in one call: {record['rows_s']:.1f} s",
        f"{record['concurrent']} requests side by side: {record['concurrent_s']:.1f} s",
        f"then {record['turns']} turns of everything in {record['seconds']:.0f} s; left over: "
        f"{sum(record['left_over'].values())}",
        f"more requests at once than a server runs and queues: {pressure['answered']} answered, {pressure['refused']} "
        "refused by name",
    )
    table = [HEADINGS, ("---",) * len(HEADINGS), *(cells for cells, _ in _rows(record))]
    where = (
        f"`make load` on {machine['cores']} cores ({machine['cpu']}, {machine['memory_gib']:.0f} GiB), a random Llama "
        f"of 3 layers and D = 64, float32: SGLang {versions['sglang']} with its CPU engine."
    )
    lines = [
        *(f"- {figure}" for figure in figures),
        "",
        *(f"| {' | '.join(cells)} |" for cells in table),
        "",
        where,
        "",
    ]
    return "\n".join(lines)


def _rows(record: Mapping[str, Any]) -> Iterator[tuple[Cells, bool]]:
    for side in ("client", "server"):
        for name, row in record[side].items():
            scale, unit = (2**20, " MiB") if name.endswith("bytes") else (1, "")
            first, last, most = (f"{row[key] / scale:,.0f}{unit}" for key in ("first", "last", "most"))
            yield (side, name.removesuffix("_bytes"), first, last, most), bool(row["grew"])
