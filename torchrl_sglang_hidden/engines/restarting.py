"""Starts a launched server again when it has died, with what it was given since its start.

`Restart` says how often and what is kept, `Supervisor` does it, in a thread of its own. Knows processes and the states
of a server; what it asks of requests is only to wait. How a process is started, and how a client reads a server's
description, is passed in.
"""

from __future__ import annotations

import asyncio
import logging
import math
import os
import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from torchrl_sglang_hidden.engines.process import ServerProcess
from torchrl_sglang_hidden.engines.supervision import Supervision
from torchrl_sglang_hidden.errors import EngineError, InputError, RestartError, ServerRestartingError
from torchrl_sglang_hidden.weights.heads import KeptHeads
from torchrl_sglang_hidden.weights.kept import BASE, KeptWeights, Resumption, check_keep

__all__ = ["Restart", "Start", "Supervisor"]

logger = logging.getLogger(__name__)

_ASYNC_POLL_S = 0.05

# Starts a process that has what a `Resumption` says.
Start = Callable[[Resumption], ServerProcess]


@dataclass(frozen=True, slots=True, kw_only=True)
class Restart:
    """How `launch` starts a server again that has died.

    Args:
        limit: most restarts within ``window_s``. One more death, and the server stays down.
        window_s: seconds after which a restart no longer counts.
        backoff_s: seconds before the first restart; each further one within the window waits twice as long.
        max_backoff_s: most seconds before a restart.
        wait_s: seconds that a call waits for the server to come back, before it raises `ServerRestartingError`.
        keep: where the last weights that were pushed, and adapters, are kept. ``"memory"``: in shared memory (tmpfs),
            where an update writes them anyway; this costs the size of the weights between two updates, and twice that
            during an update. A directory: a copy there, which costs no memory, and the time to write it in each update.
            ``"nothing"``: after a restart calls raise `RestartError` until weights are pushed again. A checkpoint
            directory of yours that was passed to ``update_weights`` is read again where it is, and must stay as it is.
            Heads that were pushed are kept in this process's own memory, except with ``"nothing"``, and pushed again.

    Raises:
        InputError: a number out of range, or a directory that cannot be written.
        InputTypeError: ``keep`` is no text and no path.
    """

    limit: int = 5
    window_s: float = 600.0
    backoff_s: float = 1.0
    max_backoff_s: float = 60.0
    wait_s: float = 600.0
    keep: str | os.PathLike[str] = "memory"

    def __post_init__(self) -> None:
        if not isinstance(self.limit, int) or isinstance(self.limit, bool) or self.limit < 1:
            raise InputError(f"Restart(limit={self.limit!r}): expected a whole number from 1 on; or leave restart out")
        for name in ("window_s", "backoff_s", "max_backoff_s", "wait_s"):
            value = getattr(self, name)
            if not (isinstance(value, (int, float)) and 0 <= value < math.inf):
                raise InputError(f"Restart({name}={value!r}): expected seconds, from 0 on")
        check_keep(self.keep)


class Supervisor(Supervision):
    """Watches a server's process, and starts it again when it has ended.

    Args:
        start: starts a process at the same address.
        process: the first process, which serves already.
        restart: how often, and what is kept.
        url: the server's address.
        timeout_s: seconds until a new process must have generated its first token.

    Attributes:
        keeps: whether weights that are pushed must be written as a checkpoint.
        heads: those that the server has.
        start: number of the present process, from 0.
    """

    def __init__(self, start: Start, process: ServerProcess, restart: Restart, *, url: str, timeout_s: float) -> None:
        self._start, self._restart, self._url, self._timeout_s = start, restart, url, timeout_s
        self.process = process
        self._kept = KeptWeights(restart.keep)
        self.keeps = self._kept.copies
        self.heads = KeptHeads()
        self.start = 0
        # Of all that follows. Waited on by calls; notified at each change.
        self._changed = threading.Condition()
        self._state: Literal["up", "down", "failed", "closed"] = "up"
        self._since = 0.0
        self._why = ""
        self._lost: dict[str, str] = {}
        self._starts: deque[float] = deque()
        self._stopping = threading.Event()
        self._owner_pid = os.getpid()
        self._reconnect: Callable[[], str] = str
        self._thread = threading.Thread(target=self._watch, name="sglang-restart", daemon=True)

    def watch(self, reconnect: Callable[[], str]) -> None:
        """Begin to watch.

        Args:
            reconnect: has the client read the server's description again and push its heads, and returns the version of
                its weights. May raise `EngineError`, which counts as a failed start.
        """
        self._reconnect = reconnect
        self._thread.start()

    def how_it_ended(self) -> str:
        """See `Supervision.how_it_ended`."""
        return self.process.how_it_ended()

    def admit(self, *, generates: bool) -> None:
        """See `Supervision.admit`."""
        if self._state != "up" or self._lost:
            with self._changed:
                self._changed.wait_for(lambda: self._state != "down", timeout=self._restart.wait_s)
                self._refuse(generates)

    async def aadmit(self, *, generates: bool) -> None:
        """See `Supervision.aadmit`."""
        deadline = time.monotonic() + self._restart.wait_s
        while self._state == "down" and time.monotonic() < deadline:
            await asyncio.sleep(_ASYNC_POLL_S)
        # Without a need for it no lock, which another thread may hold while it copies the weights of an update.
        if self._state != "up" or self._lost:
            with self._changed:
                self._refuse(generates)

    def keep_weights(self, directory: Path | None, version: str, start: int, *, is_users: bool) -> None:
        """See `Supervision.keep_weights`."""
        self._keep(BASE, directory, version, start, is_users=is_users)

    def keep_adapter(self, name: str, directory: Path, version: str, start: int, *, is_users: bool) -> None:
        """See `Supervision.keep_adapter`."""
        self._keep(name, directory, version, start, is_users=is_users)

    def drop_adapter(self, name: str) -> None:
        """See `Supervision.drop_adapter`."""
        with self._changed:
            self._kept.drop(name)
            self._lost.pop(name, None)

    def keep_head(self, name: str, packed: str | None, start: int) -> None:
        """See `Supervision.keep_head`."""
        with self._changed:
            self._check_served(f"head {name!r}", start, "push it again")
            self.heads.keep(name, packed if self.keeps else None)

    def wait(self) -> None:
        """Block until the server does not come back, or `stop`.

        Raises:
            RestartError: the server does not come back.
        """
        with self._changed:
            # Short waits: Python handles a signal that comes just before a wait only after the wait.
            while not self._changed.wait_for(lambda: self._state in ("failed", "closed"), timeout=1.0):
                pass
            if self._state == "failed":
                raise RestartError(self._why)

    def stop(self) -> None:
        """End the process, the watching and what was kept. In a forked child, or when called again, do nothing."""
        if os.getpid() != self._owner_pid or self._stopping.is_set():
            return
        self._stopping.set()
        with self._changed:
            self._state = "closed"
            self._changed.notify_all()
            process = self.process
        process.stop()
        if self._thread.is_alive() and threading.current_thread() is not self._thread:
            self._thread.join()
        self._kept.close()

    def _refuse(self, generates: bool) -> None:
        """Raise if a call cannot be sent now."""
        if self._state == "failed":
            raise RestartError(self._why)
        if self._state == "down":
            raise ServerRestartingError(
                f"{self._url} ended {time.monotonic() - self._since:.0f} s ago and is being started again (restart "
                f"{len(self._starts)} of at most {self._restart.limit} within {self._restart.window_s:g} s), and was "
                f"not back within wait_s={self._restart.wait_s:g}; call again later, or raise Restart(wait_s=…). "
                f"{self._why}"
            )
        if self._lost and generates and self._state == "up":
            whats = "; ".join(
                f"{f'the adapter {name!r}' if name else 'the weights'}: {problem}"
                for name, problem in self._lost.items()
            )
            raise RestartError(
                f"{self._url} was started again, and what was pushed before could not be brought back ({whats}); call "
                "update_weights or load_adapter with what it is to serve, before you generate"
            )

    def _keep(self, name: str, directory: Path | None, version: str, start: int, *, is_users: bool) -> None:
        with self._changed:
            self._check_served(f"version {version!r}", start, "update again")
            self._kept.keep(name, directory, version, is_users=is_users)
            self._lost.pop(name, None)

    def _check_served(self, what: str, start: int, remedy: str) -> None:
        """Raise if the process that took something is not the one that serves."""
        if start != self.start or self._state != "up":
            raise EngineError(
                f"{self._url} ended right after it took {what}, which it will not have when it is back; {remedy}"
            )

    # --- the thread -------------------------------------------------------------------------------------------------

    def _watch(self) -> None:
        while True:
            self.process.join()
            if self._stopping.is_set():
                return
            with self._changed:
                self._state, self._since = "down", time.monotonic()
                self._why = self.process.how_it_ended()
                if (served := self.process.served_version()) is not None:
                    self._kept.miss(served)
            logger.warning("%s: %s", self._url, self._why)
            # The rest of its group, and its files.
            self.process.stop()
            if not self._bring_back():
                return

    def _bring_back(self) -> bool:
        """Start the server until it serves; return whether it does."""
        while (delay_s := self._delay()) is not None:
            if self._stopping.wait(delay_s):
                return False
            try:
                if self._start_again():
                    return True
            except (EngineError, OSError) as error:  # OSError: no memory or no space for a process
                logger.warning("%s did not come back: %s", self._url, error)
                self._why = str(error)
                self.process.stop()
            if self._stopping.is_set():
                return False
        return False

    def _delay(self) -> float | None:
        """Return the seconds before the next start, and count it; None where the limit is reached."""
        now = time.monotonic()
        with self._changed:
            while self._starts and now - self._starts[0] > self._restart.window_s:
                self._starts.popleft()
            if len(self._starts) >= self._restart.limit:
                self._state = "failed"
                self._why = (
                    f"{self._url} was started again {len(self._starts)} times within {self._restart.window_s:g} s, "
                    f"which is the limit, and stays down; look into {self.process.log_path}, mend what ends it, and "
                    f"launch it again, or raise Restart(limit=…). {self._why}"
                )
                self._changed.notify_all()
                logger.error("%s", self._why)
                return None
            delay_s = min(self._restart.backoff_s * 2.0 ** len(self._starts), self._restart.max_backoff_s)
            self._starts.append(now)
            return delay_s

    def _start_again(self) -> bool:
        """Start a process with what was kept, and let calls go on when it serves; return whether it does."""
        # What is kept and the process that has it change together, see `_keep`.
        with self._changed:
            if self._stopping.is_set():
                return False
            resumption = self._kept.resume()
            process = self.process = self._start(resumption)
            self.start += 1
        process.wait_until_ready(self._url, timeout_s=self._timeout_s, progress=False)
        version = self._reconnect()
        with self._changed:
            if self._state != "down":
                return False
            self._state, self._lost = "up", dict(resumption.lost)
            down_s = time.monotonic() - self._since
            self._changed.notify_all()
        logger.warning("%s is back after %.0f s, with weights of version %s", self._url, down_s, version)
        return True
