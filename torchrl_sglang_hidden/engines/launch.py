"""`launch`: starts a server on this machine and returns a client that owns it.

Knows and checks the arguments that a server is started with. The process is `ServerProcess`'s, requests are
`SGLangServer`'s.
"""

from __future__ import annotations

import ipaddress
import logging
import os
import socket
import time
import weakref
from collections.abc import Sequence
from contextlib import ExitStack
from datetime import datetime
from pathlib import Path
from types import MappingProxyType
from typing import Any, NoReturn

import platformdirs

from torchrl_sglang_hidden.engines.http import SGLangServer
from torchrl_sglang_hidden.engines.process import ServerProcess
from torchrl_sglang_hidden.engines.server_options import (
    require_sglang,
    resolve_layers,
    resolve_model,
    resolve_modules,
)
from torchrl_sglang_hidden.errors import (
    InputError,
    LaunchError,
    UnknownOptionError,
)
from torchrl_sglang_hidden.server.__main__ import (
    SECRET_ARGUMENTS,
    check_tokenizer_processes,
    command_line,
    is_loopback,
)

__all__ = ["LaunchedServer", "launch"]

logger = logging.getLogger(__name__)

DEVICES = ("auto", "cpu", "cuda", "xpu", "hpu", "npu", "musa")

# Server arguments that launch sets itself, and what to do instead.
OWNED_ARGUMENTS = MappingProxyType(
    {
        "model_path": "pass the model as the first argument",
        "enable_return_hidden_states": "it is always on; leave it out",
    }
)


def launch(
    model: str | os.PathLike[str],
    *,
    device: str = "auto",
    layers: int | Sequence[int] | None = None,
    constraint_modules: Sequence[str] = (),
    host: str = "127.0.0.1",
    port: int | None = None,
    api_key: str | None = None,
    timeout_s: float = 600.0,
    log_file: str | os.PathLike[str] | None = None,
    progress: bool = True,
    **server_args: Any,
) -> LaunchedServer:
    """Start an SGLang server with hidden-state pooling on this machine, and return a client once the server generates.

    The server is a child process. It ends with ``close()``, at the end of a ``with`` block, and with this process,
    however this process ends.

    Args:
        model: directory with a ``config.json``, or a model hub's name.
        device: ``"auto"`` takes the accelerator, and SGLang's CPU engine where there is none; or one of SGLang's
            device names.
        layers: ids of the layers that the server's CUDA graphs record, as in `HiddenSpec`; those alone can be asked
            for where such graphs run, and the last layer always. A recorded layer costs an addition in every decode
            step, whoever asks, and with tensor parallelism a collective. None records every layer where these take up
            to 1 GiB of the device's memory and ``tp_size`` is 1, else the last alone. Without graphs, as on the CPU,
            every layer can be asked for, and costs nothing until it is.
        constraint_modules: full names of modules that define `LogitConstraint`s of yours. The server imports the
            modules: requests name constraints, and never carry code.
        host: address to bind. Anything but loopback needs an ``api_key``.
        port: TCP port, or None for a free one.
        api_key: key that clients must send. It appears in no process listing and in no log.
        timeout_s: seconds until the server must have generated its first token.
        log_file: file to which the server's stdout and stderr are appended; by default a new file in the user's log
            directory.
        progress: show a status line while the server starts, in terminals and notebooks.
        **server_args: SGLang server arguments by their Python names: ``chunked_prefill_size=64`` becomes
            ``--chunked-prefill-size 64``. ``True`` is the bare flag, ``False`` and ``None`` leave it out, lists are
            several values, mappings become JSON. A name that SGLang does not know fails the start. A key or a
            password among them, such as ``admin_api_key``, goes the way of ``api_key``.

    Returns:
        A connected client that owns the process. Its copies and pickles are plain clients of the same server.

    Raises:
        InputError: a model directory, layer, module, device, host, port or timeout that cannot work; nothing was
            started.
        UnknownOptionError: a server argument that ``launch`` sets itself.
        CapabilityError: SGLang is not installed; or ``tokenizer_worker_num`` is over 1.
        LaunchError: the server ended or did not generate in time; the message has exit code, log file and last log
            lines.
    """
    _check_arguments(device=device, host=host, port=port, api_key=api_key, timeout_s=timeout_s, server_args=server_args)
    model = resolve_model(model)
    chosen_layers = resolve_layers(layers, model)
    modules = resolve_modules(constraint_modules)
    require_sglang()
    port = _free_port(host, port)
    arguments = {"model_path": model, "host": host, "port": port, **server_args}
    if device != "auto":
        arguments["device"] = device
    secrets = {name: str(arguments.pop(name)) for name in SECRET_ARGUMENTS if arguments.get(name) is not None}
    start = time.monotonic()
    with ExitStack() as stack:
        log_path = _log_path(log_file, port)
        process = ServerProcess(
            command_line(arguments),
            log_path=log_path,
            api_key=api_key,
            layers=chosen_layers,
            modules=modules,
            secrets=secrets,
        )
        stack.callback(process.stop)
        url = f"http://{_client_host(host)}:{port}"
        process.wait_until_ready(url, timeout_s=timeout_s, progress=progress)
        server = LaunchedServer(url, process=process, api_key=api_key)
        stack.pop_all()
    logger.info(
        "%s serves %s, process %d, after %.0f s; its log: %s",
        url,
        model,
        server.pid,
        time.monotonic() - start,
        log_path,
    )
    return server


class LaunchedServer(SGLangServer):
    """A client that owns its server. `launch` makes one; ``close()`` closes the client and ends the server.

    Attributes:
        pid: the server's process id, which is also the id of its process group and session.
        log_path: file with the server's stdout and stderr.
    """

    def __init__(self, url: str, *, process: ServerProcess, api_key: str | None) -> None:
        self.pid = process.pid
        self.log_path = process.log_path
        # Runs once: at close, when the last reference goes, or when the interpreter exits.
        self._stop = weakref.finalize(self, process.stop)
        self._process = process
        super().__init__(url, api_key=api_key)
        self._endpoints[0].how_it_ended = process.how_it_ended

    def wait(self) -> NoReturn:
        """Block for as long as the server runs.

        Raises:
            EngineError: the server ended by itself; the message has exit code, log file and last log lines.
        """
        self._process.wait()

    def close(self) -> None:
        """Close the client and end the server. A second call does nothing."""
        super().close()
        if self._stop.alive:
            self._stop()
            logger.info("%s was stopped, process %d", self.url, self.pid)


def _check_arguments(
    *, device: str, host: str, port: int | None, api_key: str | None, timeout_s: float, server_args: dict[str, Any]
) -> None:
    for name in sorted(server_args.keys() & OWNED_ARGUMENTS.keys()):
        raise UnknownOptionError(f"launch({name}=…): launch sets this server argument itself; {OWNED_ARGUMENTS[name]}")
    check_tokenizer_processes(server_args.get("tokenizer_worker_num"))
    if device not in DEVICES:
        raise InputError(f"launch(device={device!r}): expected one of {DEVICES}")
    if port is not None and not (type(port) is int and 0 < port < 65536):
        raise InputError(f"launch(port={port!r}): expected 1..65535, or None for a free port")
    if not timeout_s > 0:
        raise InputError(f"launch(timeout_s={timeout_s!r}): expected seconds, more than 0")
    if api_key is not None and not api_key.strip():
        raise InputError("launch(api_key=''): an empty key protects nothing; pass a real one, or None")
    if api_key is None and not is_loopback(host):
        raise InputError(
            f"launch(host={host!r}): reachable from other machines, and no api_key given; "
            "pass api_key=…, or keep to host='127.0.0.1'"
        )
    if server_args.get("enable_custom_logit_processor") and not is_loopback(host):
        raise InputError(
            f"launch(host={host!r}, enable_custom_logit_processor=True): SGLang unpickles the processors that clients "
            "send, so that whoever has the key runs code on this machine; leave it out and define a LogitConstraint "
            "with constraint_modules=…, or keep to host='127.0.0.1'"
        )


def _client_host(host: str) -> str:
    try:
        address = ipaddress.ip_address(host)
    except ValueError:
        return host
    if address.is_unspecified:
        return "127.0.0.1" if address.version == 4 else "[::1]"
    return f"[{host}]" if address.version == 6 else host


def _free_port(host: str, port: int | None) -> int:
    # Bound here although SGLang binds later: another server on this port would answer the readiness probe.
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port or 0, type=socket.SOCK_STREAM)[0]
        with socket.socket(family, kind, protocol) as probe:
            # As uvicorn does: a port whose last connection is in TIME_WAIT is free.
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(address)
            return int(probe.getsockname()[1])
    except OSError as error:
        raise LaunchError(
            f"launch(host={host!r}, port={port!r}): cannot be bound: {error}; pass port=None for a free port, and an "
            "address of this machine"
        ) from error


def _log_path(log_file: str | os.PathLike[str] | None, port: int) -> Path:
    if log_file is not None:
        return Path(log_file).expanduser().absolute()
    directory = platformdirs.user_log_path("torchrl-sglang-hidden", appauthor=False)
    return directory / f"server-{datetime.now():%Y%m%d-%H%M%S}-{port}.log"
