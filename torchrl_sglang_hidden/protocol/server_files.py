"""Keeps what a server leaves on this machine in one place, and removes it however the server ended.

SGLang unlinks few of its files: a server that ends, and more so one that is killed, leaves its ZeroMQ sockets among the
temporary files and its load table in shared memory. `ServerFiles` gives each server a temporary directory of its own,
and notes there what the server has in shared memory. The directory is locked while its owner lives, so that `sweep` can
remove what belongs to servers whose owner was killed, and nothing else. A server that is started by hand is its own
owner. Checkpoints on their way to a server are locked while their trainer lives.

Used on both sides. Knows nothing of SGLang but the names of its files, and imports no torch.
"""

from __future__ import annotations

import os
import re
import shutil
import tempfile
import time
from collections.abc import Iterable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

from torchrl_sglang_hidden.protocol.served_weights import PUSHED_PREFIX

__all__ = [
    "FILES_ENV",
    "ServerFiles",
    "files_of",
    "lock_directory",
    "note_shared_memory",
    "note_version",
    "remove_files",
    "sweep",
    "sweep_checkpoints",
]

# Names the directory to the server, which removes it when its owner was killed.
FILES_ENV = "TORCHRL_SGLANG_HIDDEN_FILES"
SHARED_MEMORY = Path("/dev/shm")
_PREFIX = "torchrl-sglang-hidden-server-"
_NOTES = "shared-memory"
_VERSION = "weight-version"
# What SGLang 0.5.23 and Python's multiprocessing call their files in shared memory. Never by the name alone: a server
# of this package must have had the file in its memory, and nobody else's process may.
_FAMILIES = re.compile(
    r"sglang_loads_\S+|sglang_host_pool_\S+|sgl_shm_\S+|multi_tokenizer_args_\d+|sem\.mp-\S+|psm_\S+"
)
_PROCESSES = Path("/proc")
# Longer than it takes to lock a directory that was just made.
_UNLOCKED_S = 60.0


class ServerFiles:
    """The temporary directory of one server, and the list of what the server has in shared memory.

    Attributes:
        directory: the server's temporary directory; a file in it lists what is removed together with it.
    """

    def __init__(self) -> None:
        sweep()
        # Locked before it has the name by which `sweep` finds it.
        unnamed = Path(tempfile.mkdtemp(prefix=f".{_PREFIX}"))
        self._lock = lock_directory(unnamed)
        self.directory = unnamed.with_name(unnamed.name.removeprefix("."))
        unnamed.rename(self.directory)

    def note(self, session: int) -> None:
        """Write down what the processes of a session have in shared memory now."""
        if not self.directory.is_dir():
            return
        found = {path for pid in _processes_of(session) for path in _mapped(pid)}
        _append(self.directory, found - set(_noted(self.directory)))

    def version(self) -> str | None:
        """Return what the server said last that it serves; None if nobody gave it weights since its start."""
        try:
            return (self.directory / _VERSION).read_text()
        except OSError:
            return None

    def remove(self) -> None:
        """Remove the directory and everything that was noted; a second call does nothing."""
        lock, self._lock = self._lock, None
        if lock is not None:
            remove_files(self.directory)
            os.close(lock)


def note_shared_memory() -> None:
    """Write down, in the server, what it has in shared memory; nothing where no owner asks."""
    directory = os.environ.get(FILES_ENV)
    if directory:
        with suppress(OSError):
            found = {path for pid in (os.getpid(), os.getppid()) for path in _mapped(pid)}
            _append(Path(directory), found - set(_noted(Path(directory))))


def note_version(version: str) -> None:
    """Write down, in the server, which version of weights it serves from now on; nothing where no owner asks."""
    directory = os.environ.get(FILES_ENV)
    if directory:
        # Several ranks may write, and the owner may read, at any moment. An exception would end the server.
        with suppress(OSError):
            unnamed = Path(directory, f"{_VERSION}-{os.getpid()}")
            unnamed.write_text(version)
            unnamed.replace(Path(directory, _VERSION))


def remove_files(directory: Path, *, session: int | None = None) -> None:
    """Remove a server's temporary directory, and what is noted in it and in nobody's memory any more.

    Args:
        directory: the directory.
        session: a session whose processes are about to be killed, and do not count.
    """
    noted = set(_noted(directory))
    others = set(_processes()) - set(() if session is None else _processes_of(session)) if noted else set()
    in_use = {path for pid in others for path in _mapped(pid)}
    for path in noted - in_use:
        with suppress(OSError):
            path.unlink(missing_ok=True)
    shutil.rmtree(directory, ignore_errors=True)


def sweep(temporary: Path | None = None, *, ended: int | None = None) -> None:
    """Remove the files of this user's servers and trainers that have ended, however they ended, and no others.

    Args:
        temporary: where servers have their directories; None is where temporary files of their owners are.
        ended: a process that has ended, although the system may not say so yet.
    """
    if temporary is None:
        # In a server that was launched, the directory of temporary files is its own.
        own = os.environ.get(FILES_ENV)
        temporary = Path(own).parent if own else Path(tempfile.gettempdir())
    for directory in temporary.glob(f"{_PREFIX}*"):
        # Another process may be removing the same files, or another user's directory may have the name.
        with suppress(OSError):
            if directory.lstat().st_uid != os.getuid():
                continue
            lock = lock_directory(directory)
            if lock is not None:
                try:
                    remove_files(directory)
                finally:
                    os.close(lock)
    for place in (SHARED_MEMORY, temporary):
        sweep_checkpoints(place, ended=ended)


def sweep_checkpoints(place: Path, *, ended: int | None = None) -> None:
    """Delete the checkpoints of processes that were killed: in the middle of an update, or while they kept one.

    Args:
        place: the directory in which the checkpoints are.
        ended: see `sweep`.
    """
    for directory in place.glob(f"{PUSHED_PREFIX}*"):
        pid = directory.name.removeprefix(PUSHED_PREFIX).split("-")[0]
        # Another user's directory, or one that another process removes at the moment.
        with suppress(OSError):
            found = directory.lstat()
            if not pid.isdigit() or found.st_uid != os.getuid():
                continue
            if int(pid) == ended:
                shutil.rmtree(directory, ignore_errors=True)
                continue
            # A process id alone says little: another process may have it by now, or a process of another container.
            just_made = time.time() - found.st_mtime < _UNLOCKED_S
            if just_made and not _has_ended(pid):
                continue
            lock = lock_directory(directory)
            if lock is not None:
                shutil.rmtree(directory, ignore_errors=True)
                os.close(lock)


def _has_ended(pid: str) -> bool:
    try:
        os.kill(int(pid), 0)
    except ProcessLookupError:
        return True
    except PermissionError:
        return False
    # A process that was killed and that nobody has waited for has an id, and nothing else.
    with suppress(OSError):
        return (_PROCESSES / pid / "stat").read_text().rpartition(")")[2].split()[0] == "Z"
    return False


def lock_directory(directory: Path) -> int | None:
    """Lock a directory for as long as this process lives, so that nobody removes it.

    A lock ends with the process that holds it, even when that process is killed.

    Returns:
        The descriptor to close afterwards; None where there are no such locks, or another process has this one.

    Raises:
        OSError: there is no such directory, or it is a link.
    """
    try:
        import fcntl
    except ImportError:
        return None
    descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:  # some file systems have no locks
        os.close(descriptor)
        return None
    return descriptor


def _append(directory: Path, paths: Iterable[Path]) -> None:
    if paths:
        with (directory / _NOTES).open("a") as file:
            file.writelines(f"{path}\n" for path in sorted(paths))


def _noted(directory: Path) -> Iterator[Path]:
    try:
        lines = (directory / _NOTES).read_text().splitlines()
    except OSError:
        return
    for path in map(Path, lines):
        if path.parent == SHARED_MEMORY and _FAMILIES.fullmatch(path.name):
            yield path


def _processes() -> list[int]:
    with suppress(OSError):
        return [int(entry.name) for entry in _PROCESSES.iterdir() if entry.name.isdigit()]
    return []


def _processes_of(session: int) -> Iterator[int]:
    for pid in _processes():
        with suppress(OSError):
            if os.getsid(pid) == session:
                yield pid


def _mapped(pid: int) -> Iterator[Path]:
    """List the files of the known families that a process has in its memory."""
    try:
        lines = (_PROCESSES / str(pid) / "maps").read_text().splitlines()
    except (OSError, ValueError):  # it has ended, or is another user's
        return
    for line in lines:
        _, found, name = line.partition(f"{SHARED_MEMORY}/")
        # A file that was deleted has " (deleted)" behind its name.
        if found and _FAMILIES.fullmatch(name):
            yield SHARED_MEMORY / name


def files_of(port_args: Any) -> list[Path]:
    """List the files that SGLang makes for an engine and leaves behind: its sockets, and its load in shared memory."""
    fields = vars(port_args) if port_args is not None else {}
    names = [value for value in fields.values() if isinstance(value, str)]
    sockets = [Path(name.removeprefix("ipc://")) for name in names if name.startswith("ipc://")]
    instance = fields.get("instance_id")
    return [*sockets, *(SHARED_MEMORY.glob(f"sglang_loads_{instance}_*.shm") if instance else ())]
