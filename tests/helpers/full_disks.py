"""Disks that are full: a small one of this test's own where the system lets it mount one, else a limit on files."""

from __future__ import annotations

import resource
import shutil
import subprocess
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from pathlib import Path


@contextmanager
def files_of_at_most(nbytes: int, pid: int = 0) -> Iterator[None]:
    """Let the system refuse files over a size, as it refuses them on a full disk, to this process or another."""
    before = resource.prlimit(pid, resource.RLIMIT_FSIZE)
    resource.prlimit(pid, resource.RLIMIT_FSIZE, (nbytes, before[1]))
    try:
        yield
    finally:
        resource.prlimit(pid, resource.RLIMIT_FSIZE, before)


@contextmanager
def small_disk(path: Path, nbytes: int) -> Iterator[Callable[[], None]]:
    """Let ``path`` be a disk of a few bytes for the length of the block; yield what gives it more space."""
    path.mkdir(exist_ok=True)
    with ExitStack() as stack:
        if _mount(path, "-t", "tmpfs", "-o", f"size={max(nbytes, 4096)}", "tmpfs"):
            # Lazily: an exception that is still looked at keeps files open.
            stack.callback(subprocess.run, ["umount", "-l", str(path)], check=True)
            yield lambda: subprocess.run(["mount", "-o", "remount,size=1g", str(path)], check=True) and None
        else:
            limit = stack.enter_context(ExitStack())
            limit.enter_context(files_of_at_most(nbytes))
            yield limit.close


def _mount(path: Path, *options: str) -> bool:
    if shutil.which("mount") is None:
        return False
    return subprocess.run(["mount", *options, str(path)], capture_output=True, check=False).returncode == 0


@contextmanager
def full_memory(nbytes: int, pid: int, directory: Path = Path("/dev/shm")) -> Iterator[None]:
    """Leave ``nbytes`` free in shared memory where it is small and so this test's own, else limit one process."""
    free = shutil.disk_usage(directory).free
    balloon = directory / f"balloon-{pid}"
    with nullcontext() if free < 2**29 else files_of_at_most(nbytes, pid):
        if free < 2**29:
            balloon.write_bytes(b"\1" * max(free - nbytes, 0))
        try:
            yield
        finally:
            balloon.unlink(missing_ok=True)
