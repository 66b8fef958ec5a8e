"""Runs the command line in this process, as a terminal of 100 columns without colours would show it."""

from __future__ import annotations

from typer.testing import CliRunner, Result

from torchrl_sglang_hidden.cli import app
from torchrl_sglang_hidden.cli.options import API_KEY_ENV

__all__ = ["invoke"]


def invoke(*arguments: str, env: dict[str, str] | None = None) -> Result:
    """Run a command, given word by word, with environment variables beside the usual ones."""
    return CliRunner().invoke(
        app, list(arguments), env={"COLUMNS": "100", "TERM": "dumb", API_KEY_ENV: "", **(env or {})}
    )
