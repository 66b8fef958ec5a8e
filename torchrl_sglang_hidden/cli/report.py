"""``report``: how its options become a call of `write_report`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

__all__ = ["report"]


def report(
    recording: Annotated[Path, typer.Argument(help="Directory that record wrote.")],
    out: Annotated[Path | None, typer.Option(help="By default RECORDING.html.", show_default=False)] = None,
    target: Annotated[
        list[str] | None,
        typer.Option(
            help="A field to probe for, such as next.reward; several, each with --target.", show_default=False
        ),
    ] = None,
    against: Annotated[
        Path | None, typer.Option(help="A recording of live states: how far they are from these.", show_default=False)
    ] = None,
) -> None:
    """Write a page on what a recording's hidden states hold, with its pictures inside."""
    from torchrl_sglang_hidden.rl.report import write_report

    page = write_report(recording, out, targets=[tuple(name.split(".")) for name in target or ()], against=against)
    typer.echo(f"Wrote {page}")
