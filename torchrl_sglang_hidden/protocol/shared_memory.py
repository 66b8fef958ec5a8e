"""Shares files in memory between a server and a client on one machine, for large results.

The server writes a file into tmpfs, and the client reads and removes it. Files that no client fetches are bounded in
bytes for each process that writes. The server removes them after their lifetime, when the next answer or status is
asked for, and at its own end. The next server that starts removes the files of a server that was killed.

Used on both sides. Knows nothing of SGLang, nor of what the bytes mean.
"""

from __future__ import annotations

import atexit
import logging
import os
import re
import secrets
import shutil
import stat
import threading
import time
from collections import deque
from contextlib import suppress
from pathlib import Path

from torchrl_sglang_hidden.protocol.excerpts import excerpt
from torchrl_sglang_hidden.records import MAX_ANSWER_BYTES

__all__ = ["SharedFiles", "discard", "fetch", "is_shared", "remove_leftovers"]

logger = logging.getLogger(__name__)

DIRECTORY = Path("/dev/shm")
_PREFIX = "torchrl_sglang_hidden"
_SIGN = re.compile(rf"{_PREFIX}-[0-9a-f]{{16}}-here")
_DATA = re.compile(rf"{_PREFIX}-[0-9a-f]{{16}}-[0-9]{{1,20}}")

# A smaller result costs less as text in the answer than as a file.
MIN_BYTES = 256 * 1024
# Longer than any client takes to read the answer of a request that has ended.
LIFETIME_S = 600.0


class SharedFiles:
    """Writes files into shared memory; one object for each server process that writes answers.

    Args:
        directory: a tmpfs directory.
        max_bytes: most bytes of files that no client has fetched yet.
        lifetime_s: seconds after which `tidy` removes a file that no client fetched.

    Attributes:
        sign: the name of a file that exists as long as this process. A client that finds the file is on this machine.
            Empty where the directory or file locks do not exist.
    """

    def __init__(
        self, directory: Path = DIRECTORY, max_bytes: int = MAX_ANSWER_BYTES, lifetime_s: float = LIFETIME_S
    ) -> None:
        self._directory, self._max_bytes, self._lifetime_s = directory, max_bytes, lifetime_s
        self._token = f"{_PREFIX}-{secrets.token_hex(8)}"
        self._written: deque[tuple[float, Path, int]] = deque()
        self._count = 0
        # Files are written in another thread than the one that tidies.
        self._guard = threading.RLock()
        self.sign = ""
        with suppress(OSError, ImportError):
            remove_leftovers(directory)
            self._lock = self._put_sign(f"{self._token}-here")
            self.sign = f"{self._token}-here"
            atexit.register(self.close)

    def share(self, data: bytes) -> str | None:
        """Write a file and return its name; None where the bytes are few, or do not fit."""
        if not self.sign or len(data) < MIN_BYTES:
            return None
        with self._guard:
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
            # Another user may have put a file of that name there, which is not ours to remove.
            with suppress(OSError):
                (self._directory / name).unlink(missing_ok=True)
            return None
        with self._guard:
            self._written.append((time.monotonic(), self._directory / name, len(data)))
        return name

    def tidy(self) -> None:
        """Remove files that no client fetched in their lifetime. Cheap: looks at the oldest file only."""
        with self._guard:
            while self._written and time.monotonic() - self._written[0][0] > self._lifetime_s:
                _, path, _ = self._written.popleft()
                # An exception in the scheduler would end the server.
                with suppress(OSError):
                    path.unlink(missing_ok=True)

    def close(self) -> None:
        """Remove all files of this process."""
        with self._guard:
            for _, path, _ in self._written:
                path.unlink(missing_ok=True)
        if self.sign:
            (self._directory / self.sign).unlink(missing_ok=True)
            os.close(self._lock)
            self.sign = ""

    def _create(self, name: str, data: bytes) -> None:
        # Readable by the owner only, and never written through a link that another user put there.
        descriptor = os.open(self._directory / name, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        with os.fdopen(descriptor, "wb") as file:
            file.write(data)

    def _put_sign(self, name: str) -> int:
        """Create the sign and return the descriptor that holds its lock."""
        import fcntl

        # Locked before it has its name: another server that starts removes every sign that is not locked.
        unnamed = self._directory / f"{self._token}-new"
        try:
            self._create(unnamed.name, self._token.encode())
            # Held while this process lives: a lock ends with its process, even when the process is killed.
            lock = os.open(unnamed, os.O_RDONLY | os.O_NOFOLLOW)
            try:
                fcntl.flock(lock, fcntl.LOCK_EX)
                # A rename would replace a file that another user put there.
                os.link(unnamed, self._directory / name)
            except OSError:
                os.close(lock)
                raise
            return lock
        finally:
            unnamed.unlink(missing_ok=True)


def is_shared(sign: str, directory: Path = DIRECTORY) -> bool:
    """Return whether the server with this sign is on this machine, and its files can be read."""
    if not _SIGN.fullmatch(sign):
        return False
    token = sign.removesuffix("-here").encode()
    try:
        return _read_own(directory / sign, len(token)) == token
    except (OSError, ValueError):
        return False


def fetch(name: str, size: int, directory: Path = DIRECTORY) -> bytes:
    """Read a server's file, and remove it.

    Args:
        name: the file's.
        size: how many bytes it must have.
        directory: where it is.

    Raises:
        OSError: the file does not exist, or is a link.
        ValueError: the name is not of a shared file; or the file has another size, or is not as a server writes it.
        TypeError: the name is no text.
    """
    path = _data_path(name, directory)
    try:
        return _read_own(path, size)
    finally:
        # It may be another user's, which is not ours to remove.
        with suppress(OSError):
            path.unlink(missing_ok=True)


def _read_own(path: Path, size: int) -> bytes:
    """Read a file that a server wrote: everybody may put files there, and links and pipes that one would wait at.

    Raises:
        OSError: it does not exist, or is a link.
        ValueError: it has another size, or is no plain file that its owner alone can read.
    """
    descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    with os.fdopen(descriptor, "rb", closefd=True) as file:
        found = os.fstat(file.fileno())
        if not stat.S_ISREG(found.st_mode) or stat.S_IMODE(found.st_mode) & 0o077:
            raise ValueError(f"{path} has the mode {stat.filemode(found.st_mode)}, expected -rw-------")
        # A superuser reads the files of a server that runs as somebody else.
        if os.geteuid() not in (0, found.st_uid):
            raise ValueError(f"{path} is of user {found.st_uid}, and this process of {os.geteuid()}")
        if found.st_size != size:
            raise ValueError(f"{path} has {found.st_size} bytes, expected {size}")
        return file.read(size)


def discard(name: str, directory: Path = DIRECTORY) -> None:
    """Remove a server's file unread, if it exists.

    Raises:
        ValueError: the name is not of a shared file.
    """
    _data_path(name, directory).unlink(missing_ok=True)


def _data_path(name: str, directory: Path) -> Path:
    # The name comes from the network: accept nothing but data files. A sign belongs to its server.
    if not isinstance(name, str):
        raise TypeError(f"{excerpt(name)} is no name of a file")
    if not _DATA.fullmatch(name):
        raise ValueError(f"{excerpt(name)} is no file of shared states")
    return directory / name


def remove_leftovers(directory: Path = DIRECTORY) -> None:
    """Remove the files of servers that have ended, however they ended, and no others."""
    try:
        import fcntl
    except ImportError:  # no server shares memory here
        return
    for sign in directory.glob(f"{_PREFIX}-*-here"):
        # Another process may be removing the same files.
        with suppress(OSError):
            if not _SIGN.fullmatch(sign.name) or sign.lstat().st_uid != os.getuid():
                continue
            descriptor = os.open(sign, os.O_RDONLY | os.O_NOFOLLOW)
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)  # fails while the server lives
                left = [*directory.glob(f"{sign.name.removesuffix('here')}[0-9]*"), sign]
                for path in left:
                    path.unlink(missing_ok=True)
                logger.info("a server that ended left %d files in %s; they are removed", len(left), directory)
            finally:
                os.close(descriptor)
