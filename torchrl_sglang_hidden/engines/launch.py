"""A managed server on this machine: started, waited for, and ended with whoever started it.

Knows processes, ports and logs; nothing of requests, which are `SGLangServer`'s.
"""

from __future__ import annotations

import importlib.util
import ipaddress
import os
import re
import signal
import socket
import subprocess
import sys
import time
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from datetime import datetime
from pathlib import Path
from types import MappingProxyType
from typing import Any, NoReturn

import httpx
import platformdirs
from rich.console import Console
from rich.markup import escape

from torchrl_sglang_hidden.engines.http import SGLangServer
from torchrl_sglang_hidden.errors import (
    CapabilityError,
    EngineError,
    InputError,
    InputTypeError,
    LaunchError,
    UnknownOptionError,
)
from torchrl_sglang_hidden.protocol import LAYERS_ENV
from torchrl_sglang_hidden.protocol.shared_memory import remove_leftovers
from torchrl_sglang_hidden.server.__main__ import API_KEY_ENV, PARENT_PID_ENV, command_line
from torchrl_sglang_hidden.server.config import check_layers, check_modules

__all__ = ["LaunchedServer", "launch"]

DEVICES = ("auto", "cpu", "cuda", "xpu", "hpu", "npu", "musa")

# Server arguments that launch sets itself, and what to do instead.
OWNED_ARGUMENTS = MappingProxyType(
    {
        "model_path": "pass the model as the first argument",
        "enable_return_hidden_states": "it is always on; leave it out",
    }
)

_SERVER_MODULE = "torchrl_sglang_hidden.server"
_TAIL_LINES = 20
_TAIL_BYTES = 64 * 1024
_POLL_INTERVAL_S = 0.25
# SGLang's health check itself waits a second for the token it asks for.
_PROBE_TIMEOUT_S = 10.0
_TERMINATE_TIMEOUT_S = 10.0


def launch(
    model: str | os.PathLike[str],
    *,
    device: str = "auto",
    layers: int | Sequence[int] = (-1,),
    constraint_modules: Sequence[str] = (),
    host: str = "127.0.0.1",
    port: int | None = None,
    api_key: str | None = None,
    timeout_s: float = 600.0,
    log_file: str | os.PathLike[str] | None = None,
    progress: bool = True,
    **server_args: Any,
) -> LaunchedServer:
    """Starts an SGLang server on this machine and returns a client of it once it generates.

    The server is a child process that ends with this one, however this one ends, and with ``close()`` or the ``with``
    block. Hidden-state pooling is switched on in it.

    Args:
        model: directory with a ``config.json``, or a model hub's name.
        device: ``"auto"`` takes the accelerator, and SGLang's CPU engine where there is none; or one of SGLang's
            device names.
        layers: the layers whose states can be asked for, ids as in `HiddenSpec`; the last one's always can. Each costs
            an addition and a copy per step in which somebody asks for it.
        constraint_modules: modules that define `LogitConstraint`s of yours, by their full names. The server imports
            them: requests name constraints, and never carry code.
        host: address to bind. Anything but loopback needs an ``api_key``.
        port: TCP port, or None for a free one.
        api_key: key that clients must send. It appears in no process listing and in no log.
        timeout_s: seconds until the server must have generated its first token.
        log_file: the server's stdout and stderr are appended here; by default a new file in the user's log directory.
        progress: show a status line while the server starts, in terminals and notebooks.
        **server_args: SGLang server arguments by their Python names: ``chunked_prefill_size=64`` becomes
            ``--chunked-prefill-size 64``. ``True`` is the bare flag, ``False`` and ``None`` leave it out, lists are
            several values, mappings become JSON. A name that SGLang does not know fails the start.

    Returns:
        A connected client that owns the process. Copies and pickles of it are plain clients of the same server.

    Raises:
        InputError: a model directory, layer, module, device, host, port or timeout that cannot work; nothing was
            started.
        UnknownOptionError: a server argument that ``launch`` sets itself.
        CapabilityError: SGLang is not installed.
        LaunchError: the server ended or did not generate in time; with exit code, log file and last log lines.
    """
    _check_arguments(device=device, host=host, port=port, api_key=api_key, timeout_s=timeout_s, server_args=server_args)
    model = check_model(model)
    chosen = check_layers(layers, model)
    modules = check_modules(constraint_modules)
    require_sglang()
    port = _free_port(host, port)
    arguments = {"model_path": model, "host": host, "port": port, **server_args}
    if device != "auto":
        arguments["device"] = device
    with ExitStack() as stack:
        log_path = _log_path(log_file, port)
        process = ServerProcess(
            command_line(arguments), log_path=log_path, api_key=api_key, layers=chosen, modules=modules
        )
        stack.callback(process.stop)
        url = f"http://{_client_host(host)}:{port}"
        process.wait_until_ready(url, timeout_s=timeout_s, progress=progress)
        server = LaunchedServer(url, process=process, api_key=api_key)
        stack.pop_all()
    return server


class LaunchedServer(SGLangServer):
    """A client that owns its server: `launch` makes it, ``close()`` ends both.

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

    def wait(self) -> NoReturn:
        """Blocks for as long as the server runs.

        Raises:
            EngineError: the server ended by itself; with exit code, log file and last log lines.
        """
        self._process.wait()

    def close(self) -> None:
        """Closes the client and ends the server. A second call does nothing."""
        super().close()
        self._stop()


class ServerProcess:
    """The child process, its group, its log and the pipe that tells it that its parent lives.

    Args:
        arguments: of ``python -m torchrl_sglang_hidden.server``.
        log_path: file that its output is appended to; made, with its directory, if it is not there.
        api_key: handed over in the environment.
        layers: likewise, as `check_layers` writes them.
        modules: likewise, as `check_modules` writes them.

    Raises:
        LaunchError: the log file cannot be written.
    """

    def __init__(
        self,
        arguments: list[str],
        *,
        log_path: Path,
        api_key: str | None,
        layers: str = "-1",
        modules: Mapping[str, str] | None = None,
    ) -> None:
        self.log_path = log_path
        self._api_key = api_key
        self._owner_pid = os.getpid()
        environment = {**os.environ, PARENT_PID_ENV: str(self._owner_pid), "PYTHONUNBUFFERED": "1"}
        environment |= {LAYERS_ENV: layers, **(modules or {})}
        # Not the parent's: the server would want a key that its own client does not send.
        environment.pop(API_KEY_ENV, None)
        if api_key is not None:
            environment[API_KEY_ENV] = api_key
        with _open_log(log_path) as log:
            self._log_start = log.tell()
            self._process = subprocess.Popen(
                [sys.executable, "-m", _SERVER_MODULE, *arguments],
                stdin=subprocess.PIPE,
                stdout=log,
                stderr=subprocess.STDOUT,
                env=environment,
                # A group of its own: Ctrl-C in the terminal is the parent's to handle, and one kill ends all of SGLang.
                start_new_session=True,
            )

    @property
    def pid(self) -> int:
        return self._process.pid

    def wait_until_ready(self, url: str, *, timeout_s: float, progress: bool) -> None:
        """Returns once the server at ``url`` has generated a token.

        Raises:
            LaunchError: the process ended, or ``timeout_s`` passed.
        """
        start = time.monotonic()
        # A proxy from the environment is never on the way to this machine.
        with httpx.Client(timeout=_PROBE_TIMEOUT_S, trust_env=False) as client, _status_line(progress) as show:
            while not _generates(client, url):
                elapsed_s = time.monotonic() - start
                if elapsed_s > timeout_s:
                    raise LaunchError(
                        f"the server generated nothing within timeout_s={timeout_s:g}; raise timeout_s, or read why in "
                        f"{self.log_path}. {self._last_words()}"
                    )
                with suppress(subprocess.TimeoutExpired):
                    code = self._process.wait(_POLL_INTERVAL_S)
                    raise LaunchError(
                        f"the server ended with {_exit_reason(code)} after {elapsed_s:.0f} s, before it was ready; the "
                        f"whole log is {self.log_path}. {self._last_words()}"
                    )
                last_line = (self.log_tail(1) or ["Python starts"])[0]
                show(f"Starting SGLang, {elapsed_s:.0f} s: {_without_timestamp(last_line)}")

    def wait(self) -> NoReturn:
        """Blocks until the process has ended, and raises an `EngineError` that tells how."""
        while (code := self._process.poll()) is None:
            # Short waits: a signal that comes just before one is seen only after it.
            with suppress(subprocess.TimeoutExpired):
                self._process.wait(_POLL_INTERVAL_S)
        raise EngineError(
            f"the server ended by itself, with {_exit_reason(code)}; the whole log is {self.log_path}. "
            f"{self._last_words()}"
        )

    def log_tail(self, limit: int = _TAIL_LINES) -> list[str]:
        """The last ``limit`` lines that this start wrote, oldest first, without blank ones and without the API key."""
        with self.log_path.open("rb") as log:
            log.seek(max(self._log_start, log.seek(0, os.SEEK_END) - _TAIL_BYTES))
            text = log.read().decode(errors="replace")
        if self._api_key is not None:
            text = text.replace(self._api_key, "***")
        # Progress bars rewrite their line with \r: each rewrite is a line here, the last one stays.
        return [line.rstrip() for line in re.split(r"[\r\n]+", text) if line.strip()][-limit:]

    def stop(self) -> None:
        """Ends the process and its group: SIGINT, then SIGKILL. Idempotent; does nothing in a forked child."""
        if os.getpid() != self._owner_pid:
            return
        if self._process.poll() is None:
            # To the leader alone: SGLang reports a crash when its workers end before it. SIGINT is uvicorn's way out,
            # about 2 s; SIGTERM has SGLang poll and drain for 5 to 10.
            with suppress(ProcessLookupError):
                os.kill(self.pid, signal.SIGINT)
            with suppress(subprocess.TimeoutExpired):
                self._process.wait(_TERMINATE_TIMEOUT_S)
        # Also where the leader has ended by itself: SGLang's workers outlive it when it was killed.
        with suppress(ProcessLookupError):
            os.killpg(self.pid, signal.SIGKILL)
        self._process.wait()
        if self._process.stdin is not None:
            self._process.stdin.close()
        remove_leftovers()

    def _last_words(self) -> str:
        lines = self.log_tail()
        return "Last log lines:\n" + "\n".join(f"    {line}" for line in lines) if lines else "The log is empty."


def check_model(model: str | os.PathLike[str]) -> str:
    """The model as SGLang takes it: an absolute directory, or a model hub's name, which is left as it is.

    Raises:
        InputTypeError: neither a string nor a path.
        InputError: it looks like a path (it exists, starts with ``.``, ``~`` or ``/``, or is a path object) and is no
            directory with a ``config.json``.
    """
    if not isinstance(model, (str, os.PathLike)) or not os.fspath(model):
        raise InputTypeError(f"model={model!r}: expected a model directory or a model hub's name")
    name = os.fspath(model)
    path = Path(name).expanduser()
    if isinstance(model, str) and not name.startswith((".", "~", "/")) and not path.exists():
        return name
    if (path / "config.json").is_file():
        return str(path.absolute())
    found = "does not exist" if not path.exists() else "is not a directory with a config.json"
    raise InputError(
        f"model={name!r}: {path.absolute()} {found}; pass a directory written by save_pretrained, a model hub's name "
        "such as 'Qwen/Qwen3-0.6B', or demo_model()"
    )


def require_sglang() -> None:
    """Looks for SGLang without importing it.

    Raises:
        CapabilityError: it is not installed.
    """
    if importlib.util.find_spec("sglang") is None:
        raise CapabilityError(
            "sglang is not installed in this environment; "
            "install it with pip install 'torchrl-sglang-hidden[sglang]', or connect to a server that runs elsewhere"
        )


def _check_arguments(
    *, device: str, host: str, port: int | None, api_key: str | None, timeout_s: float, server_args: dict[str, Any]
) -> None:
    for name in sorted(server_args.keys() & OWNED_ARGUMENTS.keys()):
        raise UnknownOptionError(f"launch({name}=…): launch sets this server argument itself; {OWNED_ARGUMENTS[name]}")
    if device not in DEVICES:
        raise InputError(f"launch(device={device!r}): expected one of {DEVICES}")
    if port is not None and not (type(port) is int and 0 < port < 65536):
        raise InputError(f"launch(port={port!r}): expected 1..65535, or None for a free port")
    if not timeout_s > 0:
        raise InputError(f"launch(timeout_s={timeout_s!r}): expected seconds, more than 0")
    if api_key is not None and not api_key.strip():
        raise InputError("launch(api_key=''): an empty key protects nothing; pass a real one, or None")
    if api_key is None and not _is_loopback(host):
        raise InputError(
            f"launch(host={host!r}): reachable from other machines, and no api_key given; "
            "pass api_key=…, or keep to host='127.0.0.1'"
        )


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _client_host(host: str) -> str:
    try:
        address = ipaddress.ip_address(host)
    except ValueError:
        return host
    if address.is_unspecified:
        return "127.0.0.1" if address.version == 4 else "[::1]"
    return f"[{host}]" if address.version == 6 else host


def _free_port(host: str, port: int | None) -> int:
    # Tried here although SGLang binds later: another server on a given port would answer the readiness probe.
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


@contextmanager
def _open_log(path: Path) -> Iterator[Any]:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        # Readable by its owner only: prompts and settings end up in it.
        log = open(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600), "ab")  # noqa: SIM115
    except OSError as error:
        raise LaunchError(f"the log file {path} cannot be written: {error}; pass log_file=…") from error
    with log:
        yield log


@contextmanager
def _status_line(progress: bool) -> Iterator[Callable[[str], None]]:
    console = Console(stderr=True)
    # rich's live display in a notebook needs ipywidgets, and warns in every cell without it.
    live = importlib.util.find_spec("ipywidgets") is not None if console.is_jupyter else console.is_terminal
    if not progress or not live:
        yield lambda text: None
        return
    with console.status("Starting SGLang") as status:
        yield lambda text: status.update(escape(text[: max(20, console.width - 4)]))


def _generates(client: httpx.Client, url: str) -> bool:
    try:
        return client.get(f"{url}/health_generate").status_code == 200
    except httpx.TransportError:
        return False


def _exit_reason(code: int) -> str:
    return f"exit code {code}" if code >= 0 else f"signal {-code} ({signal.strsignal(-code)})"


def _without_timestamp(line: str) -> str:
    return re.sub(r"^\[[\d: .-]+[^\]]*\]\s*", "", line)
