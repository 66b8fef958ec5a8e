"""The process of a launched server: started, awaited until it is ready, and ended together with its parent.

Knows processes and logs. Knows nothing of a user's arguments, which `launch` checks, or of requests.
"""

from __future__ import annotations

import importlib.util
import json
import logging
import os
import re
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any, NoReturn

import httpx
from rich.console import Console
from rich.markup import escape

from torchrl_sglang_hidden.errors import EngineError, LaunchError
from torchrl_sglang_hidden.protocol import ALL_LAYERS, LAYERS_ENV
from torchrl_sglang_hidden.protocol.server_files import FILES_ENV, ServerFiles
from torchrl_sglang_hidden.protocol.shared_memory import remove_leftovers
from torchrl_sglang_hidden.server.__main__ import API_KEY_ENV, PARENT_PID_ENV, SECRETS_ENV

__all__ = ["ServerProcess"]

logger = logging.getLogger(__name__)

HEADERS_ENV = "TORCHINDUCTOR_CPP_CACHE_PRECOMPILE_HEADERS"
_SERVER_MODULE = "torchrl_sglang_hidden.server"
_TAIL_LINES = 20
_PROBE = "/health_generate"
_TAIL_BYTES = 64 * 1024
_POLL_INTERVAL_S = 0.25
# SGLang's health check itself waits a second for the token it asks for.
_PROBE_TIMEOUT_S = 10.0
_TERMINATE_TIMEOUT_S = 10.0


class ServerProcess:
    """The child process of a server, with its process group, its log, and the pipe whose end tells of a dead parent.

    Args:
        arguments: command line of ``python -m torchrl_sglang_hidden.server``.
        log_path: file to which the server's output is appended; made, with its directory, if it does not exist.
        api_key: passed in the environment, where no process listing shows it.
        layers: passed in the environment, as `resolve_layers` writes them.
        modules: environment variables from `resolve_modules`.
        secrets: SGLang's arguments that go the same way as ``api_key``.
        more: further environment variables.

    Raises:
        LaunchError: the log file cannot be written.
    """

    def __init__(
        self,
        arguments: list[str],
        *,
        log_path: Path,
        api_key: str | None,
        layers: str = ALL_LAYERS,
        modules: Mapping[str, str] | None = None,
        secrets: Mapping[str, str] | None = None,
        more: Mapping[str, str] | None = None,
    ) -> None:
        self.log_path = log_path
        self._secrets = tuple(filter(None, (api_key, *(secrets or {}).values())))
        self._owner_pid = os.getpid()
        self._is_known_dead = False
        # Whoever watches the process and whoever closes it may both end it: the first does.
        self._ending = threading.RLock()
        self._ended = False
        environment = {**os.environ, PARENT_PID_ENV: str(self._owner_pid), "PYTHONUNBUFFERED": "1"}
        environment |= {LAYERS_ENV: layers, **(modules or {}), **(more or {})}
        # Not the parent's: the server would want a key that its own client does not send.
        for name in (API_KEY_ENV, SECRETS_ENV):
            environment.pop(name, None)
        if api_key is not None:
            environment[API_KEY_ENV] = api_key
        if secrets:
            environment[SECRETS_ENV] = json.dumps(dict(secrets))
        with _open_log(log_path) as log, ExitStack() as stack:
            self._log_start = log.tell()
            self._files = ServerFiles()
            stack.callback(self._files.remove)
            environment |= _temporary(self._files.directory)
            self._process = subprocess.Popen(
                [sys.executable, "-m", _SERVER_MODULE, *arguments],
                stdin=subprocess.PIPE,
                stdout=log,
                stderr=subprocess.STDOUT,
                env=environment,
                # A group of its own: Ctrl-C in the terminal is the parent's to handle, and one kill ends all of SGLang.
                start_new_session=True,
            )
            stack.pop_all()

    @property
    def pid(self) -> int:
        """Process id, which is also the id of the process group and session."""
        return self._process.pid

    def wait_until_ready(self, url: str, *, timeout_s: float, progress: bool) -> None:
        """Block until the server has generated a token.

        Args:
            url: the server's address.
            timeout_s: seconds until the server must have generated a token.
            progress: show a status line, in terminals and notebooks.

        Raises:
            LaunchError: the process ended, or ``timeout_s`` passed.
        """
        start = time.monotonic()
        # A proxy from the environment is never on the way to this machine.
        with httpx.Client(timeout=_PROBE_TIMEOUT_S, trust_env=False) as client, _status_line(progress) as show:
            while not _generates(client, url):
                self._files.note(self.pid)
                elapsed_s = time.monotonic() - start
                if elapsed_s > timeout_s:
                    raise LaunchError(
                        f"the server generated nothing within timeout_s={timeout_s:g}; raise timeout_s, or read why in "
                        f"{self.log_path}.{self._last_words()}"
                    )
                with suppress(subprocess.TimeoutExpired):
                    code = self._process.wait(_POLL_INTERVAL_S)
                    raise LaunchError(
                        f"the server ended with {_exit_reason(code)} after {elapsed_s:.0f} s, before it was ready; "
                        f"read the whole log in {self.log_path}.{self._last_words()}"
                    )
                last_line = (self.log_tail(1) or ["Python starts"])[0]
                show(f"Starting SGLang, {elapsed_s:.0f} s: {_without_timestamp(last_line)}")
        self._files.note(self.pid)

    def join(self) -> None:
        """Block until the process has ended."""
        self._process.wait()

    def wait(self) -> NoReturn:
        """Block until the process has ended.

        Raises:
            EngineError: always, with the exit code and the last log lines.
        """
        while not (ended := self.how_it_ended()):
            pass
        raise EngineError(ended)

    def how_it_ended(self) -> str:
        """Return exit code, log file and last log lines; "" if the process still runs after a short wait."""
        # Short waits: Python handles a signal that arrives just before a wait only after the wait.
        with suppress(subprocess.TimeoutExpired):
            code = self._process.wait(_POLL_INTERVAL_S)
            if not self._is_known_dead:
                self._is_known_dead = True
                logger.error("the server of process %d ended by itself, with %s", self.pid, _exit_reason(code))
            return (
                f"the server ended by itself, with {_exit_reason(code)}; read the whole log in {self.log_path}."
                f"{self._last_words()}"
            )
        return ""

    def served_version(self) -> str | None:
        """Return the version of the weights that the server was given last; None for those of its start."""
        return self._files.version()

    def log_tail(self, limit: int = _TAIL_LINES) -> list[str]:
        """Return the last lines of the log since this start, oldest first, without blank lines and keys."""
        with self.log_path.open("rb") as log:
            log.seek(max(self._log_start, log.seek(0, os.SEEK_END) - _TAIL_BYTES))
            text = log.read().decode(errors="replace")
        for secret in self._secrets:
            text = text.replace(secret, "***")
        # Progress bars rewrite their line with \r: each rewrite is a line here.
        return [line.rstrip() for line in re.split(r"[\r\n]+", text) if line.strip()][-limit:]

    def stop(self) -> None:
        """End the process and its group: SIGINT, then SIGKILL. In a forked child, or when called again, do nothing."""
        if os.getpid() != self._owner_pid:
            return
        with self._ending:
            if not self._ended:
                self._end()
                # Another group may have the id some day.
                self._ended = True

    def _end(self) -> None:
        if self._process.poll() is None:
            self._files.note(self.pid)
            # To the leader alone: SGLang reports a crash when its workers end before the leader. On SIGINT uvicorn ends
            # in about 2 s; on SIGTERM SGLang polls and drains for 5 to 10 s.
            with suppress(ProcessLookupError):
                os.kill(self.pid, signal.SIGINT)
            with suppress(subprocess.TimeoutExpired):
                self._process.wait(_TERMINATE_TIMEOUT_S)
        # Also where the leader has ended by itself: SGLang's workers outlive a leader that was killed.
        with suppress(ProcessLookupError):
            os.killpg(self.pid, signal.SIGKILL)
        self._process.wait()
        if self._process.stdin is not None:
            self._process.stdin.close()
        self._files.remove()
        remove_leftovers()

    def _last_words(self) -> str:
        # What `wait_until_ready` asks, several times a second, would push out what says why.
        lines = [line for line in self.log_tail(4 * _TAIL_LINES) if f"GET {_PROBE} " not in line][-_TAIL_LINES:]
        return "\nLast log lines:\n" + "\n".join(f"    {line}" for line in lines) if lines else " The log is empty."


def _temporary(directory: Path) -> dict[str, str]:
    """Return the variables that give a server a temporary directory of its own."""
    # What PyTorch compiles serves the next start too, and so is not among what is removed with this one.
    compiled = os.environ.get("TORCHINDUCTOR_CACHE_DIR") or f"{tempfile.gettempdir()}/torchinductor_{os.getuid()}"
    # PyTorch keeps its precompiled headers under TMPDIR alone, and makes them before it looks whether a kernel is there
    # already: 7 s of processor time in each start with a model that compiles one, as those that read images do.
    headers = os.environ.get(HEADERS_ENV) or "0"
    return {
        "TMPDIR": str(directory),
        FILES_ENV: str(directory),
        "TORCHINDUCTOR_CACHE_DIR": compiled,
        HEADERS_ENV: headers,
    }


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
        return client.get(f"{url}{_PROBE}").status_code == 200
    except httpx.TransportError:
        return False


def _exit_reason(code: int) -> str:
    return f"exit code {code}" if code >= 0 else f"signal {-code} ({signal.strsignal(-code)})"


def _without_timestamp(line: str) -> str:
    return re.sub(r"^\[[\d: .-]+[^\]]*\]\s*", "", line)
