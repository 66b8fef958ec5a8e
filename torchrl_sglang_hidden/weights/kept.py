"""What a server was given since its start, kept for its next start: the last weights, and the adapters that it has.

Knows directories and their files, nothing of servers or processes.
"""

from __future__ import annotations

import logging
import os
import shutil
import tempfile
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

from torchrl_sglang_hidden.errors import InputError, InputTypeError
from torchrl_sglang_hidden.protocol.served_weights import PUSHED_PREFIX
from torchrl_sglang_hidden.protocol.server_files import lock_directory, sweep_checkpoints

__all__ = ["BASE", "KeptWeights", "Resumption", "check_keep"]

logger = logging.getLogger(__name__)

# Names the model's own weights among what is kept. No adapter has an empty name.
BASE = ""


@dataclass(frozen=True, slots=True)
class Resumption:
    """What a server is to have at its next start.

    Args:
        version: the name of the last weights or adapter; None where nothing was given.
        weights: a checkpoint of the model's weights; None for those of the model's own directory.
        adapters: directories of adapters by name.
        dropped: adapters that were unloaded.
        lost: why something that was given cannot be brought back, by its name.
    """

    version: str | None = None
    weights: Path | None = None
    adapters: dict[str, Path] = field(default_factory=dict)
    dropped: frozenset[str] = frozenset()
    lost: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class _Kept:
    """One checkpoint: where it is, whether it is to be deleted, and what it was, or why it is not there.

    ``lock`` is the descriptor that keeps others from sweeping it.
    """

    directory: Path | None
    is_users: bool
    files: dict[str, tuple[int, int, int]] = field(default_factory=dict)
    problem: str = ""
    lock: int | None = None


class KeptWeights:
    """Keeps checkpoints as files; the process itself holds none of them in its memory.

    Args:
        place: ``"memory"`` keeps a pushed checkpoint where it was written, in shared memory (tmpfs) where there is
            space: one copy of the weights between two updates, two during an update. A directory keeps a copy there.
            ``"nothing"`` keeps none.
    """

    def __init__(self, place: str | os.PathLike[str]) -> None:
        self._place = place
        self._kept: dict[str, _Kept] = {}
        self._dropped: set[str] = set()
        self._version: str | None = None
        if place not in ("memory", "nothing"):
            sweep_checkpoints(Path(place))

    @property
    def copies(self) -> bool:
        """Whether pushed weights are kept, so that a checkpoint of them must be written."""
        return self._place != "nothing"

    def keep(self, name: str, directory: Path | None, version: str, *, is_users: bool) -> None:
        """Keep one checkpoint in the place of the last one of that name.

        A checkpoint that cannot be kept is no error before it is needed: the server has it.

        Args:
            name: an adapter's name, or `BASE`.
            directory: the checkpoint, which is deleted soon; None where none was written.
            version: what the server calls its weights from now on.
            is_users: whether the directory is the user's own, of which no copy is made.
        """
        before = self._kept.get(name)
        self._kept[name] = self._keep(directory, is_users=is_users)
        self._version = version
        self._dropped.discard(name)
        _delete(before)
        if problem := self._kept[name].problem:
            logger.warning("version %s would not survive a restart of its server: %s", version, problem)

    def miss(self, version: str) -> None:
        """Note a version that the server served in the end, if it is another than the last one that was kept."""
        if version != self._version:
            _delete(self._kept.get(BASE))
            problem = f"version {version!r} came from another client or an update that did not end, and was not kept"
            self._kept[BASE] = _Kept(None, is_users=False, problem=problem)
            self._version = version

    def drop(self, name: str) -> None:
        """Forget an adapter."""
        _delete(self._kept.pop(name, None))
        self._dropped.add(name)

    def resume(self) -> Resumption:
        """Return what the next start is to have. A checkpoint that has changed since it was given is lost."""
        lost = {name: problem for name, kept in self._kept.items() if (problem := _problem(kept))}
        found = {name: kept.directory for name, kept in self._kept.items() if kept.directory and name not in lost}
        weights = found.pop(BASE, None)
        return Resumption(self._version, weights, found, frozenset(self._dropped), lost)

    def close(self) -> None:
        """Delete everything that was kept, except directories of the user's."""
        while self._kept:
            _delete(self._kept.popitem()[1])

    def _keep(self, directory: Path | None, *, is_users: bool) -> _Kept:
        if directory is None or (self._place == "nothing" and not is_users):
            return _Kept(None, is_users, problem="Restart(keep='nothing') keeps none")
        try:
            lock = None
            if not is_users:
                directory, lock = self._copy(directory)
            return _Kept(directory, is_users, _fingerprint(directory), lock=lock)
        except OSError as error:
            return _Kept(None, is_users, problem=f"it could not be kept: {error}")

    def _copy(self, directory: Path) -> tuple[Path, int | None]:
        # In its name this process's id, so that another process can sweep it when this one was killed.
        place = directory.parent if self._place == "memory" else Path(self._place)
        kept = Path(tempfile.mkdtemp(prefix=f"{PUSHED_PREFIX}{os.getpid()}-kept-", dir=place))
        lock = lock_directory(kept)
        try:
            for file in directory.iterdir():
                if self._place == "memory":
                    os.link(file, kept / file.name)  # the same bytes, which stay when the other name goes
                else:
                    shutil.copy2(file, kept)
        except OSError:
            shutil.rmtree(kept, ignore_errors=True)
            if lock is not None:
                os.close(lock)
            raise
        return kept, lock


def check_keep(place: object) -> None:
    """Check where weights are to be kept.

    Raises:
        InputTypeError: ``place`` is no text and no path.
        InputError: ``place`` is neither a directory that can be written nor one of the two words.
    """
    if not isinstance(place, (str, os.PathLike)):
        raise InputTypeError(f"keep={place!r}: expected 'memory', 'nothing' or a directory")
    if place not in ("memory", "nothing") and not os.access(place, os.W_OK | os.X_OK):
        raise InputError(
            f"keep={str(place)!r}: no directory that can be written; pass one that exists, 'memory' or 'nothing'"
        )


def _problem(kept: _Kept) -> str:
    if kept.problem or kept.directory is None:
        return kept.problem
    try:
        same = _fingerprint(kept.directory) == kept.files
    except OSError as error:
        return f"{kept.directory} cannot be read any more: {error}"
    return "" if same else f"the files in {kept.directory} are no longer those that were given to the server"


def _fingerprint(directory: Path) -> dict[str, tuple[int, int, int]]:
    """Return size, time of change and inode of each file: a checkpoint that was written anew has others."""
    found = {}
    for file in sorted(directory.iterdir()):
        stat = file.stat()
        found[file.name] = (stat.st_size, stat.st_mtime_ns, stat.st_ino)
    return found


def _delete(kept: _Kept | None) -> None:
    if kept is not None and kept.directory is not None and not kept.is_users:
        with suppress(OSError):
            shutil.rmtree(kept.directory)
        if kept.lock is not None:
            os.close(kept.lock)
