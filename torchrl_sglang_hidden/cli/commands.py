"""Puts the commands together: their names, what all of them share, and how errors are printed.

Each command is a module of its own, whose function says its options and help. Knows nothing of what a command does.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Sequence
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from torchrl_sglang_hidden._version import __version__
from torchrl_sglang_hidden.cli.demo import demo
from torchrl_sglang_hidden.cli.doctor import doctor
from torchrl_sglang_hidden.cli.options import API_KEY_ENV, SECRET_ARGUMENTS, SECRETS_ENV
from torchrl_sglang_hidden.cli.record import record
from torchrl_sglang_hidden.cli.report import report
from torchrl_sglang_hidden.cli.serve import serve
from torchrl_sglang_hidden.errors import SGLangHiddenError

__all__ = ["app", "main", "take_secrets"]


class _ErrorsAsOneLine(TyperGroup):
    """Prints this package's errors on stderr, without a traceback, unless ``--debug`` asks for it."""

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except SGLangHiddenError as error:
            if ctx.params["debug"]:
                raise
            typer.secho(f"Error: {error}", fg="red", err=True)
            raise typer.Exit(1) from error


app = typer.Typer(
    name="torchrl-sglang-hidden",
    cls=_ErrorsAsOneLine,
    help="A TorchRL policy over SGLang that returns text, tokens, log-probs and mean-pooled hidden states.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
# In the order of the help.
app.command()(demo)
app.command()(record)
app.command()(report)
app.command()(doctor)
# What SGLang's server takes is none of ours.
app.command(context_settings={"ignore_unknown_options": True})(serve)


def main() -> None:
    """Run the command line; the entry point of the console script."""
    arguments, secrets = take_secrets(sys.argv[1:])
    if secrets:
        # Every user of the machine reads command lines: the same program starts again, in this process, without them.
        api_key = secrets.pop("api_key", None)
        os.environ |= {} if api_key is None else {API_KEY_ENV: api_key}
        os.environ |= {SECRETS_ENV: json.dumps(secrets)} if secrets else {}
        before = len(sys.orig_argv) - len(sys.argv) + 1
        os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:before], *arguments])
    app()


def take_secrets(arguments: Sequence[str]) -> tuple[list[str], dict[str, str]]:
    """Take keys and passwords out of a command line. Empty ones stay, to be refused: a variable that was not set.

    Returns:
        The other arguments, and the secrets by their Python names.
    """
    rest, secrets = [], {}
    waiting = iter(arguments)
    for argument in waiting:
        flag, equals, value = argument.partition("=")
        name = flag.removeprefix("--").replace("-", "_")
        if not (flag.startswith("--") and name in SECRET_ARGUMENTS):
            rest.append(argument)
            continue
        found = value if equals else next(waiting, None)
        if found is None:  # typer says what is missing
            rest.append(argument)
        elif not found.strip():  # from the environment, typer would take it for no key, and the server would have none
            rest += [argument] if equals else [argument, found]
        else:
            secrets[name] = found
    return rest, secrets


def _show_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"torchrl-sglang-hidden {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")] = False,
    version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Show the version and exit.")
    ] = False,
) -> None:
    pass
