"""``doctor``: asks a server what it can do, and says what it lacks and how to start it right.

The examination is `engines.examination`'s; this writes it as a table or as JSON.
"""

from __future__ import annotations

import json
from typing import Annotated

import typer

from torchrl_sglang_hidden.cli.options import API_KEY_ENV

__all__ = ["doctor"]


def doctor(
    url: Annotated[str, typer.Argument(metavar="URL", help="Address of a server, such as http://127.0.0.1:30000.")],
    api_key: Annotated[
        str | None,
        typer.Option(envvar=API_KEY_ENV, help="Key that the server wants, if it wants one.", show_default=False),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object, for programs.")] = False,
) -> None:
    """Say what a server can do, what it lacks, and how to start it right.

    Ends with exit code 0 where the server gives hidden states through the server half of this version, else with 1.

    Example: torchrl-sglang-hidden doctor http://127.0.0.1:30000
    """
    from torchrl_sglang_hidden.engines.examination import examine

    found = examine(url, api_key)
    if as_json:
        typer.echo(json.dumps(found.as_dict(), indent=2, ensure_ascii=False))
    else:
        from rich.console import Console
        from rich.markup import escape
        from rich.table import Table

        marks = {"yes": "[green]yes[/]", "no": "[red]no[/]", "warn": "[yellow]![/]", "": ""}
        table = Table(title=escape(found.url), box=None, title_justify="left", show_header=False)
        for finding in found.findings:
            table.add_row(finding.name, marks[finding.mark], escape(finding.says))
        console = Console(highlight=False)
        console.print(table)
        for number, remedy in enumerate(found.remedies, 1):
            console.print(f"\n{number}. {escape(remedy)}", soft_wrap=True)
        if found.healthy and not found.remedies:
            console.print("\nNothing is missing.")
    if not found.healthy:
        raise typer.Exit(1)
