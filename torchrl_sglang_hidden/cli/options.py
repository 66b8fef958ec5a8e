"""Options that several commands share: how they are written, and what they stand for.

A command imports what it runs when it runs, so that ``--help`` appears at once; so does this module.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from torchrl_sglang_hidden.errors import InputError

if TYPE_CHECKING:
    from torchrl_sglang_hidden.engines.base import Engine

__all__ = [
    "API_KEY_ENV",
    "SECRETS_ENV",
    "SECRET_ARGUMENTS",
    "ModelOption",
    "UrlOption",
    "open_engine",
    "parse_layers",
    "served_model",
]

# Those of `server.__main__`, with which torch would be imported before the help appears.
API_KEY_ENV = "TORCHRL_SGLANG_HIDDEN_API_KEY"
SECRETS_ENV = "TORCHRL_SGLANG_HIDDEN_SECRETS"
SECRET_ARGUMENTS = ("api_key", "admin_api_key", "ssl_keyfile_password")

UrlOption = Annotated[
    list[str] | None,
    typer.Option(
        "--url", help="Address of a running server; several, each with --url, share the rows.", show_default=False
    ),
]
ModelOption = Annotated[
    str | None,
    typer.Option(
        "--model", help="A model to serve meanwhile: a directory, a model hub's name, or demo.", show_default=False
    ),
]


@contextmanager
def open_engine(
    command: str, url: Sequence[str] | None, model: str | None, api_key: str | None, layers: int | tuple[int, ...]
) -> Iterator[Engine]:
    """Connect to running servers, or start one that ends with the block.

    Args:
        command: whose options these are, for errors.
        url: addresses of running servers.
        model: a model to serve; ``"demo"`` is the demo model. Either this or ``url`` is given.
        api_key: key that the servers want, or None.
        layers: layers whose states are asked for, as in `HiddenSpec`.

    Raises:
        InputError: both of them, or neither.
        EngineError: the server does not start, or none answers.
    """
    if url and model is None:
        from torchrl_sglang_hidden.engines.http import connect

        with connect(list(url) if len(url) > 1 else url[0], api_key=api_key) as engine:
            yield engine
    elif model is not None and not url:
        from torchrl_sglang_hidden.engines.launch import launch

        with launch(
            served_model(model), layers=layers if isinstance(layers, tuple) else (layers,), api_key=api_key
        ) as server:
            yield server
    else:
        raise InputError(
            f"{command} --url {url} --model {model}: expected one of the two; pass the server, or the model"
        )


def served_model(model: str | None) -> str | Path:
    """Return what to serve: the directory of the demo model for ``"demo"`` or None, and else the model as it is named.

    Raises:
        DemoModelError: the demo model cannot be loaded.
    """
    if model is not None and model != "demo":
        return model
    from torchrl_sglang_hidden.demo.model import demo_model

    return demo_model()


def parse_layers(text: str, command: str) -> tuple[int, ...]:
    """Read the layer ids of ``--layers``: ``"7,15,-1"`` → ``(7, 15, -1)``.

    Args:
        text: the option's value.
        command: whose option it is, for errors.

    Raises:
        InputError: a part is no integer.
    """
    if not re.fullmatch(r"-?\d+(,-?\d+)*", text):
        raise InputError(f"{command} --layers {text}: expected integers with commas between, such as 7,15,-1")
    return tuple(int(layer) for layer in text.split(","))
