"""Weights through a directory that the engine reads: a checkpoint in memory (tmpfs), or the user's own.

Knows directories and one control route. Which engine gets weights this way is decided in `transports`.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import torch

from torchrl_sglang_hidden.errors import EngineError
from torchrl_sglang_hidden.protocol.served_weights import PUSHED_PREFIX
from torchrl_sglang_hidden.weights.control import ControlCall, finish_update, running_requests
from torchrl_sglang_hidden.weights.validation import Running

__all__ = ["checkpoint", "load_from_disk"]

TMPFS = Path("/dev/shm")


@contextmanager
def checkpoint(tensors: Mapping[str, torch.Tensor]) -> Iterator[Path]:
    """Write weights as a checkpoint for the length of a ``with`` block: to memory (tmpfs) if they fit, else to disk.

    Yields:
        The checkpoint's directory, which is deleted at the end of the block.

    Raises:
        EngineError: neither memory nor disk has space for the checkpoint.
    """
    from safetensors.torch import save_file

    size = sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
    free = {place: _free_bytes(place) for place in (TMPFS, Path(tempfile.gettempdir())) if os.access(place, os.W_OK)}
    place = next((place for place, space in free.items() if space > 1.05 * size), None)
    if place is None:
        found = ", ".join(f"{space} in {place}" for place, space in free.items())
        raise EngineError(
            f"the weights take {size} bytes, and {found} are free; free some, set TMPDIR, or use transport='network'"
        )
    _sweep(place)
    directory = Path(tempfile.mkdtemp(prefix=f"{PUSHED_PREFIX}{os.getpid()}-", dir=place))
    try:
        save_file(_apart(tensors), directory / "model.safetensors", metadata={"format": "pt"})
        yield directory
    finally:
        shutil.rmtree(directory)


def _sweep(place: Path) -> None:
    """Delete the checkpoints of processes that were killed in the middle of an update."""
    for directory in place.glob(f"{PUSHED_PREFIX}*"):
        pid = directory.name.removeprefix(PUSHED_PREFIX).split("-")[0]
        try:
            os.kill(int(pid), 0)
        except ProcessLookupError:
            shutil.rmtree(directory, ignore_errors=True)
        except (PermissionError, ValueError):
            continue  # another user's, or nothing of ours


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


def _apart(tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Return the tensors in main memory, each with a storage of its own, as safetensors requires."""
    apart: dict[str, torch.Tensor] = {}
    storages: set[int] = set()
    for name, tensor in tensors.items():
        value = tensor.detach().cpu().contiguous()
        apart[name] = value.clone() if value.untyped_storage().data_ptr() in storages else value
        storages.add(apart[name].untyped_storage().data_ptr())
    return apart


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
    with running_requests(running, call):
        answer = call("update_weights_from_disk", {"model_path": str(path), "weight_version": version})
    finish_update(call, answer, version, f"load {path}, which it must see under that path, else transport='network'")
