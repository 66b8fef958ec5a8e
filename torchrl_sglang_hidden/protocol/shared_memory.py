"""Shared memory between a server and a client on one machine, for states that are many bytes.

A file per answer in tmpfs: the server writes it, the client reads and removes it. What no client fetches is bounded in
bytes, per process that writes; it goes with the first answer or status that is asked for after its time, and with the
server. What a killed server leaves goes with the next one that starts.

Used on both sides. Knows nothing of SGLang.
"""

from __future__ import annotations

import atexit
import os
import re
import secrets
import shutil
import time
from collections import deque
from contextlib import suppress
from pathlib import Path

from torchrl_sglang_hidden.records import MAX_ANSWER_BYTES

__all__ = ["SharedFiles", "discard", "fetch", "is_shared", "remove_leftovers"]

DIRECTORY = Path("/dev/shm")
_PREFIX = "torchrl_sglang_hidden"
_SIGN = re.compile(rf"{_PREFIX}-[0-9a-f]{{16}}-here")
_DATA = re.compile(rf"{_PREFIX}-[0-9a-f]{{16}}-[0-9]+")

# Below this a file costs more than the text in the answer.
MIN_BYTES = 256 * 1024
# Longer than a client takes from the end of its request to reading the answer.
LIFETIME_S = 600.0


class SharedFiles:
    """A server's side; one per process that writes answers.

    Args:
        directory: tmpfs.
        max_bytes: of this process's files that nobody fetched yet.
        lifetime_s: after which `tidy` removes an unfetched file.

    Attributes:
        sign: the name of a file that is there as long as the process: who finds it is on this machine. Empty where
            there is no such directory, or no file locks.
    """

    def __init__(
        self, directory: Path = DIRECTORY, max_bytes: int = MAX_ANSWER_BYTES, lifetime_s: float = LIFETIME_S
    ) -> None:
        self._directory, self._max_bytes, self._lifetime_s = directory, max_bytes, lifetime_s
        self._token = f"{_PREFIX}-{secrets.token_hex(8)}"
        self._written: deque[tuple[float, Path, int]] = deque()
        self._count = 0
        self.sign = ""
        with suppress(OSError, ImportError):
            remove_leftovers(directory)
            self._lock = self._put_sign(f"{self._token}-here")
            self.sign = f"{self._token}-here"
            atexit.register(self.close)

    def share(self, data: bytes) -> str | None:
        """Writes a file and gives its name; None where it is not worth it, or there is no room."""
        if not self.sign or len(data) < MIN_BYTES:
            return None
        self.tidy()
        self._written = deque(entry for entry in self._written if entry[1].exists())
        if sum(size for _, _, size in self._written) + len(data) > self._max_bytes:
            return None
        self._count += 1
        name = f"{self._token}-{self._count}"
        try:
            if shutil.disk_usage(self._directory).free < 2 * len(data):
                return None
            self._create(name, data)
        except OSError:
            (self._directory / name).unlink(missing_ok=True)
            return None
        self._written.append((time.monotonic(), self._directory / name, len(data)))
        return name

    def tidy(self) -> None:
        """Removes what nobody fetched in its lifetime. Looks at the oldest only, so it can be called at any answer."""
        while self._written and time.monotonic() - self._written[0][0] > self._lifetime_s:
            _, path, _ = self._written.popleft()
            # An error in the scheduler would end the server.
            with suppress(OSError):
                path.unlink(missing_ok=True)

    def close(self) -> None:
        """Removes all files."""
        for _, path, _ in self._written:
            path.unlink(missing_ok=True)
        if self.sign:
            (self._directory / self.sign).unlink(missing_ok=True)
            os.close(self._lock)
            self.sign = ""

    def _create(self, name: str, data: bytes) -> None:
        # For the owner only, and never through a link that somebody else put there.
        descriptor = os.open(self._directory / name, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        with os.fdopen(descriptor, "wb") as file:
            file.write(data)

    def _put_sign(self, name: str) -> int:
        """Puts the sign there and gives the descriptor that holds its lock."""
        import fcntl

        # Locked before it has its name: another server that starts removes signs that nobody holds.
        unnamed = self._directory / f"{self._token}-new"
        try:
            self._create(unnamed.name, self._token.encode())
            # Held while this process lives: a lock ends with its process, also with one that was killed.
            lock = os.open(unnamed, os.O_RDONLY | os.O_NOFOLLOW)
            try:
                fcntl.flock(lock, fcntl.LOCK_EX)
                # A rename would replace what somebody else put there.
                os.link(unnamed, self._directory / name)
            except OSError:
                os.close(lock)
                raise
            return lock
        finally:
            unnamed.unlink(missing_ok=True)


def is_shared(sign: str, directory: Path = DIRECTORY) -> bool:
    """Whether the server that gave this sign is on this machine, and its files can be read."""
    if not _SIGN.fullmatch(sign):
        return False
    try:
        return (directory / sign).read_text() == sign.removesuffix("-here")
    except (OSError, ValueError):
        return False


def fetch(name: str, directory: Path = DIRECTORY) -> bytes:
    """Reads a server's file, and removes it.

    Raises:
        OSError: it is not there.
        ValueError: that is no name of such a file.
    """
    path = _data_path(name, directory)
    try:
        return path.read_bytes()
    finally:
        path.unlink(missing_ok=True)


def discard(name: str, directory: Path = DIRECTORY) -> None:
    """Removes a server's file unread, if it is there.

    Raises:
        ValueError: that is no name of such a file.
    """
    _data_path(name, directory).unlink(missing_ok=True)


def _data_path(name: str, directory: Path) -> Path:
    # The name comes from the network. A sign is none: its file is the server's.
    if not _DATA.fullmatch(name):
        raise ValueError(f"{name!r} is no file of shared states")
    return directory / name


def remove_leftovers(directory: Path = DIRECTORY) -> None:
    """Removes the files of servers that have ended, however they ended, and of nobody else."""
    try:
        import fcntl
    except ImportError:  # no server shares memory here
        return
    for sign in directory.glob(f"{_PREFIX}-*-here"):
        # Another process may be removing the same ones.
        with suppress(OSError):
            if not _SIGN.fullmatch(sign.name) or sign.lstat().st_uid != os.getuid():
                continue
            descriptor = os.open(sign, os.O_RDONLY | os.O_NOFOLLOW)
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)  # fails while the server lives
                for path in (*directory.glob(f"{sign.name.removesuffix('here')}[0-9]*"), sign):
                    path.unlink(missing_ok=True)
            finally:
                os.close(descriptor)
