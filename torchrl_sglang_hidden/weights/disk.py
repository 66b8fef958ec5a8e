"""Weights through a directory that the engine reads: a checkpoint in memory (tmpfs), or the user's own.

Knows directories and one control route. Which engine gets weights this way is decided in `transports`.
"""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import torch

from torchrl_sglang_hidden.errors import EngineError
from torchrl_sglang_hidden.protocol.served_weights import INDEX, PUSHED_PREFIX
from torchrl_sglang_hidden.protocol.server_files import lock_directory, sweep_checkpoints
from torchrl_sglang_hidden.weights.control import ControlCall, finish_update, running_requests
from torchrl_sglang_hidden.weights.trainers import size_of
from torchrl_sglang_hidden.weights.validation import BUCKET_BYTES, Running

__all__ = ["CheckpointWriter", "checkpoint", "checkpoint_directory", "load_from_disk"]

TMPFS = Path("/dev/shm")


@contextmanager
def checkpoint(tensors: Mapping[str, torch.Tensor], bucket_bytes: int = BUCKET_BYTES) -> Iterator[Path]:
    """Write weights as a checkpoint for the length of a ``with`` block: to memory (tmpfs) if they fit, else to disk.

    Args:
        tensors: the weights, by Hugging Face's checkpoint names.
        bucket_bytes: as for `CheckpointWriter`.

    Yields:
        The checkpoint's directory, which is deleted at the end of the block.

    Raises:
        EngineError: neither memory nor disk has space for the checkpoint, or it ended meanwhile.
    """
    with checkpoint_directory(sum(size_of(tensors, name) for name in tensors)) as directory:
        writer = CheckpointWriter(directory, bucket_bytes)
        for name in tensors:
            writer.add(name, tensors[name])
        writer.close()
        yield directory


@contextmanager
def checkpoint_directory(size: int) -> Iterator[Path]:
    """Make an empty directory in memory (tmpfs) or on disk that has space for ``size`` bytes, and delete it afterwards.

    Raises:
        EngineError: there is no such space.
    """
    free = {place: _free_bytes(place) for place in (TMPFS, Path(tempfile.gettempdir())) if os.access(place, os.W_OK)}
    place = next((place for place, space in free.items() if space > 1.05 * size), None)
    if place is None:
        found = ", ".join(f"{space} in {place}" for place, space in free.items())
        raise EngineError(
            f"the weights take {size} bytes, and {found} are free; free some, set TMPDIR, or use transport='network'"
        )
    sweep_checkpoints(place)
    directory = Path(tempfile.mkdtemp(prefix=f"{PUSHED_PREFIX}{os.getpid()}-", dir=place))
    lock = lock_directory(directory)
    try:
        yield directory
    finally:
        shutil.rmtree(directory)
        if lock is not None:
            os.close(lock)


class CheckpointWriter:
    """Writes a checkpoint tensor by tensor, in several files where it is large.

    Args:
        directory: an empty directory.
        bucket_bytes: most bytes of tensors that wait in main memory for their file, one tensor more at most.
    """

    def __init__(self, directory: Path, bucket_bytes: int) -> None:
        self._directory, self._bucket_bytes = directory, bucket_bytes
        self._waiting: dict[str, torch.Tensor] = {}
        self._storages: set[int] = set()
        self._size = 0
        self._file_of: dict[str, str] = {}
        self._files = 0

    def add(self, name: str, tensor: torch.Tensor) -> None:
        """Take one tensor: a copy of it in main memory, unless it is there already."""
        value = tensor.detach().cpu().contiguous()
        # safetensors requires a storage of its own for each.
        if value.untyped_storage().data_ptr() in self._storages:
            value = value.clone()
        self._storages.add(value.untyped_storage().data_ptr())
        self._waiting[name] = value
        self._size += value.numel() * value.element_size()
        if self._size >= self._bucket_bytes:
            self._write()

    def _write(self) -> None:
        from safetensors.torch import save_file

        self._files += 1
        file = f"model-{self._files:05d}.safetensors"
        with _named(self._directory):
            save_file(self._waiting, self._directory / file, metadata={"format": "pt"})
        self._file_of |= dict.fromkeys(self._waiting, file)
        self._waiting.clear()
        self._storages.clear()
        self._size = 0

    def close(self) -> None:
        """Write the last file, and the index of several."""
        if self._waiting or not self._files:
            self._write()
        if self._files == 1:
            next(self._directory.glob("*.safetensors")).rename(self._directory / "model.safetensors")
        else:
            with _named(self._directory):
                (self._directory / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": self._file_of}))


@contextmanager
def _named(directory: Path) -> Iterator[None]:
    """Turn the system's refusal to write into this package's error: space may end after it was looked for."""
    from safetensors import SafetensorError

    try:
        yield
    except (OSError, SafetensorError) as error:
        raise EngineError(
            f"the weights cannot be written to {directory} ({error}); free some space there, set TMPDIR, or use "
            "transport='network'"
        ) from error


def _free_bytes(place: Path) -> int:
    free = shutil.disk_usage(place).free
    if place != TMPFS:
        return free
    # A tmpfs lives in memory, whatever its own limit says. Half stays for the server, which loads from there.
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        return 0
    available_kb = next((int(line.split()[1]) for line in lines if line.startswith("MemAvailable:")), 0)
    return min(free, available_kb * 1024 // 2)


def load_from_disk(call: ControlCall, path: Path, version: str, running: Running) -> None:
    """Have an engine load a checkpoint that was checked before.

    Args:
        call: calls one of the engine's control routes.
        path: the checkpoint's directory, as the engine sees it.
        version: the name of the new weights.
        running: what becomes of requests under way; see `Engine.update_weights`.

    Raises:
        RequestRejectedError: the engine refused the checkpoint, and keeps its weights.
    """
    # A server that was started without weights goes on with load_format="dummy", if it is not told otherwise.
    payload = {"model_path": str(path), "weight_version": version, "load_format": "safetensors"}
    with running_requests(running, call):
        answer = call("update_weights_from_disk", payload)
    finish_update(call, answer, version, f"load {path}, which it must see under that path, else transport='network'")
