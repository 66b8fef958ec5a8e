"""`ShardWriter`: shards and manifest on disk, so that what counts is whole whenever the process or the machine stops.

A shard is one memory-mapped TensorDict archive. It is written and synced; then a manifest that lists it is written
beside the old one, synced, and renamed over it. Whatever the manifest does not list is removed by the next run. Knows
nothing of what is recorded.
"""

from __future__ import annotations

import errno
import hashlib
import os
import shutil
import struct
import zipfile
import zlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from filelock import FileLock, Timeout
from tensordict import TensorDict, TensorDictBase

from torchrl_sglang_hidden.errors import RecordingError
from torchrl_sglang_hidden.rl.manifest import NAME, Failure, Manifest, Shard, read_manifest

__all__ = ["ShardWriter", "open_shard", "reading", "writing"]

SHARDS, LOCK, NEW = "shards", ".lock", f"{NAME}.new"
# A full disk, a quota, and the limit of a file's size.
NO_SPACE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)

# What is raised of an archive whose files are not those that a recording has.
DAMAGE = (
    OSError, EOFError, ValueError, TypeError, LookupError, AttributeError, ArithmeticError, RuntimeError,
    AssertionError, struct.error, zlib.error, zipfile.BadZipFile,
)  # fmt: skip


class ShardWriter:
    """Writes one recording, as a context manager: one process at a time.

    Args:
        path: the recording's directory, which is made if it is not there.

    Attributes:
        manifest: as it is on disk; None for a new recording.

    Raises:
        RecordingError: the directory has other files, cannot be written, or another process records there.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self.manifest: Manifest | None = None

    def __enter__(self) -> Self:
        with writing(self._path):
            self._path.mkdir(parents=True, exist_ok=True)
            self._lock = FileLock(self._path / LOCK, timeout=0)
            try:
                self._lock.acquire()
            except Timeout as error:
                raise RecordingError(
                    f"{self._path}: another process records there; use another path, or wait"
                ) from error
        try:
            self.manifest = read_manifest(self._path)
            others = sorted({entry.name for entry in self._path.iterdir()} - {LOCK, NEW})
            if self.manifest is None and others:
                raise RecordingError(
                    f"{self._path} has {others[:3]} and no {NAME}; expected an empty directory or a recording: use "
                    "another path"
                )
        except BaseException:
            self._lock.release()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._lock.release()

    def begin(self, about: Mapping[str, Any]) -> None:
        """Begin a recording, or go on with one, and remove what a run before left half-written.

        Raises:
            RecordingError: the recording is of something else, or cannot be written.
        """
        if self.manifest is not None:
            self.manifest.check_same(self._path, about)
        with writing(self._path):
            # The manifest first: without one a directory is not known as a recording's.
            if self.manifest is None:
                _sync(self._path.resolve().parent)
                self._write(Manifest(about))
            (self._path / SHARDS).mkdir(exist_ok=True)
            counted = {shard.file for shard in self.known.shards}
            for entry in (self._path / SHARDS).iterdir():
                if f"{SHARDS}/{entry.name}" not in counted:
                    shutil.rmtree(entry) if entry.is_dir() else entry.unlink()

    def add(self, content: TensorDict, num_rows: int, failures: Sequence[Failure], rows_sha256: str) -> None:
        """Add a shard. It counts when this returns; until then, nothing of it does.

        Args:
            content: its tensors.
            num_rows: how many rows they are.
            failures: those without a label.
            rows_sha256: the digest of the rows, see `Shard`.

        Raises:
            RecordingError: it cannot be written. The shards before it stay.
        """
        name = f"{SHARDS}/{len(self.known.shards):06d}.tdz"
        target = self._path / name
        with writing(self._path):
            content.save(target, archive=True)
            _sync(target)
            _sync(target.parent)
            with target.open("rb") as file:
                checksum = hashlib.file_digest(file, "sha256").hexdigest()
            shard = Shard(name, num_rows, target.stat().st_size, checksum, tuple(failures), rows_sha256)
            self._write(replace(self.known, shards=(*self.known.shards, shard), complete=False))

    def finish(self) -> None:
        """Note that the data set was recorded to its end."""
        with writing(self._path):
            self._write(replace(self.known, complete=True))

    @property
    def known(self) -> Manifest:
        """The manifest, once `begin` was called."""
        if self.manifest is None:
            raise AssertionError("begin comes first")
        return self.manifest

    def _write(self, manifest: Manifest) -> None:
        new = self._path / NEW
        with new.open("wb") as file:
            file.write(manifest.to_json())
            file.flush()
            os.fsync(file.fileno())
        new.replace(self._path / NAME)
        _sync(self._path)
        self.manifest = manifest


def _sync(path: Path) -> None:
    """Wait until a file's bytes, or a directory's names, are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Turn what the system says of a full disk or a missing permission into an error of this package.

    Raises:
        RecordingError: what is written inside the block could not be written.
    """
    try:
        yield
    except (OSError, RuntimeError) as error:
        # PyTorch makes files too, and says the system's reason in a RuntimeError: by text it is found in both.
        if any(os.strerror(number) in str(error) for number in NO_SPACE):
            raise RecordingError(
                f"{path}: no space left ({error}); what was recorded is whole: free some, and run it again to go on"
            ) from error
        if isinstance(error, OSError):
            raise RecordingError(
                f"{path}: it cannot be written ({error}); use another path, or allow writing there"
            ) from error
        raise


def open_shard(path: Path, shard: Shard) -> TensorDictBase:
    """Return the content of a shard, memory-mapped.

    Args:
        path: the recording's directory.
        shard: as the manifest has it.

    Raises:
        RecordingError: the file is not there, or is another one than was written.
    """
    file = path / shard.file
    try:
        nbytes = file.stat().st_size
        if nbytes != shard.nbytes:
            raise RecordingError(
                f"{file} has {nbytes} bytes, and {path / NAME} expected {shard.nbytes}: a part is missing, or it was "
                "changed; copy it again, or record again"
            )
        with file.open("rb") as opened:
            found = hashlib.file_digest(opened, "sha256").hexdigest()
    except OSError as error:
        raise RecordingError(f"{file}: {error}; copy the whole directory of the recording") from error
    if found != shard.sha256:
        raise RecordingError(
            f"{file}: its checksum is {found}, and {path / NAME} expected {shard.sha256}: the file was changed or "
            "damaged; copy it again, or record again"
        )
    with reading(file):
        return TensorDict.load_memmap(file, allow_pickle=False)


@contextmanager
def reading(file: Path) -> Iterator[None]:
    """Turn what TensorDict and PyTorch say of a damaged shard into an error of this package.

    Its checksum was right: somebody wrote it so, and the checksum too.

    Raises:
        RecordingError: what is read inside the block is no shard.
    """
    try:
        yield
    except DAMAGE as error:
        raise RecordingError(
            f"{file}: it is no shard of a recording ({type(error).__name__}: {error}); copy it again, or record again"
        ) from error
