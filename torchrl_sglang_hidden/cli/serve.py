"""``serve``: how its arguments become a call of `launch`, which it waits for."""

from __future__ import annotations

import json
import os
import re
import signal
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from torchrl_sglang_hidden.cli.options import API_KEY_ENV, SECRETS_ENV, parse_layers, served_model
from torchrl_sglang_hidden.errors import InputError, UnknownOptionError

if TYPE_CHECKING:
    from torchrl_sglang_hidden.engines.launch import LaunchedServer

__all__ = ["parse_server_arguments", "serve"]

_SNIPPET = """\
from torchrl_sglang_hidden import SGLangHiddenWrapper{connect_import}, ragged

policy = SGLangHiddenWrapper({engine}, input_mode="text", generate_kwargs={{"max_new_tokens": 16}})
out = policy(ragged(text=["The capital of France is"]))
print(out["text"].response, out["hidden_states", "response"].shape)
"""


def serve(
    arguments: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="MODEL|SGLANG_ARGUMENT",
            help="First the model: a directory, a model hub's name, or demo, the default. Then any arguments of "
            "SGLang's server, such as --dtype float32 --tp-size 2.",
            show_default=False,
        ),
    ] = None,
    device: Annotated[
        str,
        typer.Option(
            help="A device name such as cuda or cpu; auto takes the accelerator, or SGLang's CPU engine where there is "
            "none."
        ),
    ] = "auto",
    layers: Annotated[
        str,
        typer.Option(
            help="Layers that the server's CUDA graphs record, such as 7,15,-1; -1, the last, is always included. By "
            "default all where that is cheap. Without such graphs clients can ask for every layer."
        ),
    ] = "all",
    constraints: Annotated[
        str,
        typer.Option(help="Modules with your own logit constraints, such as my.module,other.", show_default=False),
    ] = "",
    host: Annotated[str, typer.Option(help="Address to bind. Any address but loopback needs --api-key.")] = "127.0.0.1",
    port: Annotated[int | None, typer.Option(help="TCP port; by default a free one.", show_default=False)] = None,
    api_key: Annotated[
        str | None,
        typer.Option(
            envvar=API_KEY_ENV,
            help="Key that clients must send. Shell histories keep the option, but not the variable.",
            show_default=False,
        ),
    ] = None,
    log_file: Annotated[
        Path | None,
        typer.Option(
            help="File for the server's output; by default a new file in the user's log directory.", show_default=False
        ),
    ] = None,
) -> None:
    """Serve a model through SGLang with hidden-state pooling, until Ctrl-C or SIGTERM.

    Prints the address and the Python lines that use the server once the server generates.

    Example: torchrl-sglang-hidden serve Qwen/Qwen3-0.6B --port 30000 --layers 7,15,-1 --mem-fraction-static 0.8
    """
    model, server_args = parse_server_arguments(arguments or [])
    server_args |= json.loads(os.environ.pop(SECRETS_ENV, "{}"))
    options = {
        "device": device,
        "layers": None if layers == "all" else parse_layers(layers, "serve"),
        "constraint_modules": tuple(filter(None, constraints.split(","))),
        "host": host,
        "port": port,
        "api_key": api_key,
        "log_file": log_file,
    }
    _serve_until_ended(model, options, server_args)


def _serve_until_ended(model: str | None, options: dict[str, Any], server_args: dict[str, Any]) -> None:
    previous = signal.signal(signal.SIGTERM, _interrupt)
    try:
        from torchrl_sglang_hidden.engines.launch import launch

        with launch(served_model(model), **options, **server_args) as server:
            _announce(server, with_key=options["api_key"] is not None)
            server.wait()
    except KeyboardInterrupt:
        typer.echo("Stopped.")
    finally:
        signal.signal(signal.SIGTERM, previous)


def parse_server_arguments(arguments: Sequence[str]) -> tuple[str | None, dict[str, Any]]:
    """Split the arguments of ``serve`` into the model and keyword arguments of ``launch``.

    ``--chunked-prefill-size 64`` and ``--chunked-prefill-size=64`` become ``chunked_prefill_size="64"``, several values
    become a list, a bare flag becomes True. SGLang checks the names.

    Args:
        arguments: the command line behind ``serve``, without the options that ``serve`` reads itself.

    Returns:
        The model, None for the demo model; and SGLang's server arguments by their Python names.

    Raises:
        UnknownOptionError: a second model, or an argument that is neither a value nor ``--name``.
        InputError: a name appears twice.
    """
    rest = list(arguments)
    model = rest.pop(0) if rest and not rest[0].startswith("-") else None
    values: dict[str, list[str]] = {}
    current: list[str] | None = None
    for argument in rest:
        # A negative number is a value.
        if not argument.startswith("-") or re.fullmatch(r"-[\d.]+", argument):
            if current is None:
                raise UnknownOptionError(f"serve {argument}: one model only; use --name value for server arguments")
            current.append(argument)
            continue
        flag, equals, value = argument.partition("=")
        if not re.fullmatch(r"--[A-Za-z][\w-]*", flag):
            raise UnknownOptionError(f"serve {argument}: use --name value, or --name=value, for server arguments")
        name = flag[2:].replace("-", "_")
        if name == "model":
            raise UnknownOptionError("serve --model: pass the model first, serve MODEL --name value")
        if name in values:
            raise InputError(f"serve {flag}: given twice; give it once, with all its values")
        current = values[name] = [value] if equals else []
    return model, {name: _value(found) for name, found in values.items()}


def _value(found: list[str]) -> str | list[str] | bool:
    if not found:
        return True
    return found[0] if len(found) == 1 else found


def _interrupt(signum: int, frame: object) -> None:
    raise KeyboardInterrupt


def _announce(server: LaunchedServer, *, with_key: bool) -> None:
    engine, connect_import = f'"{server.url}"', ""
    if with_key:
        engine, connect_import = f'connect("{server.url}", api_key="…")', ", connect"
    typer.echo(f"Serving {server.info.model_path} at {server.url}")
    typer.echo(f"Log: {server.log_path}")
    typer.echo("Ctrl-C ends it. To use it, paste into Python:\n")
    typer.echo(_SNIPPET.format(engine=engine, connect_import=connect_import))
