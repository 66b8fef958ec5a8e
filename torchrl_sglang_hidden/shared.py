"""Shared memory between a server and a client on one machine, for states that are many bytes.

A file per answer in tmpfs: the server writes it, the client reads and removes it. What no client fetches is bounded in
bytes and in time, and goes with the server; what a killed server leaves goes with the next one that starts.

Used on both sides. Knows nothing of SGLang.
"""

from __future__ import annotations

import atexit
import fcntl
import os
import re
import secrets
import shutil
import time
from collections import deque
from contextlib import suppress
from pathlib import Path

__all__ = ["SharedFiles", "fetch", "is_shared", "remove_leftovers"]

DIRECTORY = Path("/dev/shm")
_PREFIX = "torchrl_sglang_hidden"
_NAME = re.compile(rf"{_PREFIX}-[0-9a-f]{{16}}-(\d+|here)")

# Below this a file costs more than the text in the answer.
MIN_BYTES = 256 * 1024
MAX_BYTES = 2 * 2**30
# Longer than a client takes from the end of its request to reading the answer.
LIFETIME_S = 600.0


class SharedFiles:
    """A server's side.

    Args:
        directory: tmpfs.
        max_bytes: of files that nobody fetched yet.
        lifetime_s: after which an unfetched file is removed.

    Attributes:
        sign: the name of a file that is there as long as the server: who finds it is on this machine. Empty where
            there is no such directory.
    """

    def __init__(self, directory: Path = DIRECTORY, max_bytes: int = MAX_BYTES, lifetime_s: float = LIFETIME_S) -> None:
        self._directory, self._max_bytes, self._lifetime_s = directory, max_bytes, lifetime_s
        self._token = f"{_PREFIX}-{secrets.token_hex(8)}"
        self._written: deque[tuple[float, Path, int]] = deque()
        self._count = 0
        self.sign = ""
        with suppress(OSError):
            remove_leftovers(directory)
            self._create(f"{self._token}-here", self._token.encode())
            # Held while this process lives: a lock ends with its process, also with one that was killed.
            self._lock = os.open(directory / f"{self._token}-here", os.O_RDONLY | os.O_NOFOLLOW)
            fcntl.flock(self._lock, fcntl.LOCK_EX)
            self.sign = f"{self._token}-here"
            atexit.register(self.close)

    def share(self, data: bytes) -> str | None:
        """Writes a file and gives its name; None where it is not worth it, or there is no room."""
        if not self.sign or len(data) < MIN_BYTES:
            return None
        self._forget_gone()
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

    def _forget_gone(self) -> None:
        now = time.monotonic()
        for written_at, path, _ in self._written:
            if now - written_at > self._lifetime_s:
                path.unlink(missing_ok=True)
        self._written = deque(entry for entry in self._written if entry[1].exists())


def is_shared(sign: str, directory: Path = DIRECTORY) -> bool:
    """Whether the server that gave this sign is on this machine, and its files can be read."""
    if not _NAME.fullmatch(sign):
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
    if not _NAME.fullmatch(name):
        raise ValueError(f"{name!r} is no file of shared states")
    path = directory / name
    try:
        return path.read_bytes()
    finally:
        path.unlink(missing_ok=True)


def remove_leftovers(directory: Path = DIRECTORY) -> None:
    """Removes the files of servers that have ended, however they ended, and of nobody else."""
    for sign in directory.glob(f"{_PREFIX}-*-here"):
        # Another process may be removing the same ones.
        with suppress(OSError):
            if not _NAME.fullmatch(sign.name) or sign.lstat().st_uid != os.getuid():
                continue
            descriptor = os.open(sign, os.O_RDONLY | os.O_NOFOLLOW)
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)  # fails while the server lives
                for path in (*directory.glob(f"{sign.name.removesuffix('here')}[0-9]*"), sign):
                    path.unlink(missing_ok=True)
            finally:
                os.close(descriptor)
