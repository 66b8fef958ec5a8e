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
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from datetime import datetime
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import Any, NoReturn

import platformdirs

from torchrl_sglang_hidden.engines.endpoint import Endpoint
from torchrl_sglang_hidden.engines.http import SGLangServer
from torchrl_sglang_hidden.engines.process import ServerProcess
from torchrl_sglang_hidden.engines.restarting import Restart, Start, Supervisor
from torchrl_sglang_hidden.engines.server_options import (
    require_sglang,
    resolve_layers,
    resolve_model,
    resolve_modules,
)
from torchrl_sglang_hidden.engines.supervision import Supervision
from torchrl_sglang_hidden.errors import (
    InputError,
    InputTypeError,
    LaunchError,
    UnknownOptionError,
)
from torchrl_sglang_hidden.protocol.served_weights import INCOMPLETE, KEPT_ENV
from torchrl_sglang_hidden.server.__main__ import (
    SECRET_ARGUMENTS,
    check_tokenizer_processes,
    command_line,
    is_loopback,
)
from torchrl_sglang_hidden.weights.heads import KeptHeads
from torchrl_sglang_hidden.weights.kept import Resumption

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
    restart: bool | Restart = False,
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
        restart: start the server again, with the same arguments and at the same port, when it has died; True is
            `Restart()`, which says how often, after which waits, and where pushed weights are kept. The new process has
            the last weights that were pushed through this client, its adapters, heads and weight version before it
            answers anybody. A call under way at the death raises; one that begins while the server is coming back
            waits.
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
    if not isinstance(restart, (bool, Restart)):
        raise InputTypeError(f"launch(restart={restart!r:.80}): expected True, False or a Restart(…)")
    model = resolve_model(model)
    chosen_layers = resolve_layers(layers, model)
    modules = resolve_modules(constraint_modules)
    require_sglang()
    held = _hold_port(host, port)
    port = int(held.getsockname()[1])
    arguments = {"model_path": model, "host": host, "port": port, **server_args}
    if device != "auto":
        arguments["device"] = device
    secrets = {name: str(arguments.pop(name)) for name in SECRET_ARGUMENTS if arguments.get(name) is not None}
    log_path = _log_path(log_file, port)
    began = time.monotonic()

    def start(resumption: Resumption) -> ServerProcess:
        return ServerProcess(
            command_line(resumed_arguments(arguments, resumption)),
            log_path=log_path,
            api_key=api_key,
            layers=chosen_layers,
            modules=modules,
            secrets=secrets,
            more={} if resumption.weights is None else {KEPT_ENV: str(resumption.weights)},
        )

    with ExitStack() as stack:
        stack.callback(held.close)
        process = start(Resumption())
        stack.callback(process.stop)
        url = f"http://{_client_host(host)}:{port}"
        process.wait_until_ready(url, timeout_s=timeout_s, progress=progress)
        supervisor = _supervisor(restart, start, process, url=url, timeout_s=timeout_s)
        server = LaunchedServer(url, process=process, api_key=api_key, port=held, supervisor=supervisor)
        stack.pop_all()
    logger.info(
        "%s serves %s, process %d, after %.0f s; its log: %s",
        url,
        model,
        server.pid,
        time.monotonic() - began,
        log_path,
    )
    return server


class LaunchedServer(SGLangServer):
    """A client that owns its server. `launch` makes one; ``close()`` closes the client and ends the server.

    Attributes:
        log_path: file with the server's stdout and stderr.
    """

    def __init__(
        self,
        url: str,
        *,
        process: ServerProcess,
        api_key: str | None,
        port: socket.socket,
        supervisor: Supervisor | None = None,
    ) -> None:
        self.log_path = process.log_path
        # Runs once: at close, when the last reference goes, or when the interpreter exits.
        self._stop = weakref.finalize(self, _end, process.stop if supervisor is None else supervisor.stop, port)
        self._process, self._supervisor = process, supervisor
        super().__init__(url, api_key=api_key)
        (endpoint,) = self._endpoints
        if supervisor is None:
            endpoint.supervision = _Owned(process)
        else:
            endpoint.supervision = supervisor
            # The thread must not keep the client, which ends the server when nobody has it any more.
            supervisor.watch(partial(_read_again, weakref.ref(endpoint), supervisor.heads))

    @property
    def pid(self) -> int:
        """The server's process id, which is also the id of its process group and session; another after a restart."""
        return self._process.pid if self._supervisor is None else self._supervisor.process.pid

    @property
    def restarts(self) -> int:
        """How often the server was started again."""
        return 0 if self._supervisor is None else self._supervisor.start

    def wait(self) -> NoReturn:
        """Block for as long as the server runs, restarts included.

        Raises:
            EngineError: the server ended by itself, and does not come back; the message has exit code, log file and
                last log lines.
        """
        if self._supervisor is not None:
            self._supervisor.wait()
        self._process.wait()

    def close(self) -> None:
        """Close the client and end the server. A second call does nothing."""
        super().close()
        if self._stop.alive:
            self._stop()
            logger.info("%s was stopped, process %d", self.url, self.pid)


def _supervisor(
    restart: bool | Restart, start: Start, process: ServerProcess, *, url: str, timeout_s: float
) -> Supervisor | None:
    if restart is False:
        return None
    settings = Restart() if restart is True else restart
    return Supervisor(start, process, settings, url=url, timeout_s=timeout_s)


def _end(stop: Callable[[], None], port: socket.socket) -> None:
    try:
        stop()
    finally:
        port.close()


class _Owned(Supervision):
    """The supervision of a server that is not started again."""

    def __init__(self, process: ServerProcess) -> None:
        self.how_it_ended = process.how_it_ended  # type: ignore[method-assign]


def _read_again(endpoint: weakref.ReferenceType[Endpoint], heads: KeptHeads) -> str:
    alive = endpoint()
    if alive is None:
        return ""
    alive.read_description()
    heads.push_again(partial(alive.call, admitted=True))
    return alive.info.weight_version


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
    for name, secret in {**server_args, "api_key": api_key}.items():
        if name in SECRET_ARGUMENTS and secret is not None and not str(secret).strip():
            raise InputError(f"launch({name}=''): an empty one protects nothing; pass a real one, or None")
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


def resumed_arguments(arguments: dict[str, Any], resumption: Resumption) -> dict[str, Any]:
    """Return the arguments of a server that is to have what another had been given.

    The weights themselves travel in the environment: SGLang's arguments stay those of the model. A version of which
    something is lost is called incomplete, for whoever else asks this server.
    """
    if resumption.version is None:
        return arguments
    version = resumption.version.removesuffix(INCOMPLETE) + (INCOMPLETE if resumption.lost else "")
    given = arguments.get("lora_paths") or []
    given = [given] if isinstance(given, str) else list(given)
    gone = resumption.adapters.keys() | resumption.lost.keys() | resumption.dropped
    adapters = [entry for entry in given if _adapter_name(entry) not in gone]
    adapters += [f"{name}={path}" for name, path in resumption.adapters.items()]
    return {**arguments, "weight_version": version, "lora_paths": adapters or None}


def _adapter_name(entry: Any) -> str:
    """Return the name of one of SGLang's ``lora_paths``: ``name=path``, a path that is its own name, or a mapping."""
    if isinstance(entry, Mapping):
        return str(entry.get("lora_name"))
    return str(entry).partition("=")[0]


def _client_host(host: str) -> str:
    try:
        address = ipaddress.ip_address(host)
    except ValueError:
        return host
    if address.is_unspecified:
        return "127.0.0.1" if address.version == 4 else "[::1]"
    return f"[{host}]" if address.version == 6 else host


def _hold_port(host: str, port: int | None) -> socket.socket:
    """Bind a port, or a free one, and keep it for the server: SGLang binds it late, and again after a restart.

    Whoever took it meanwhile would answer in the server's place, and SGLang not end. Linux gives no other program a
    port that is bound, and lets the server bind it too, since this socket does not listen and both reuse addresses.
    """
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port or 0, type=socket.SOCK_STREAM)[0]
        with ExitStack() as stack:
            held = stack.enter_context(socket.socket(family, kind, protocol))
            held.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            held.bind(address)
            stack.pop_all()
    except OSError as error:
        raise LaunchError(
            f"launch(host={host!r}, port={port!r}): cannot be bound: {error}; pass port=None for a free port, and an "
            "address of this machine"
        ) from error
    return held


def _log_path(log_file: str | os.PathLike[str] | None, port: int) -> Path:
    if log_file is not None:
        return Path(log_file).expanduser().absolute()
    directory = platformdirs.user_log_path("torchrl-sglang-hidden", appauthor=False)
    return directory / f"server-{datetime.now():%Y%m%d-%H%M%S}-{port}.log"
