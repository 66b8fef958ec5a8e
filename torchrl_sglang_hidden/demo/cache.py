"""The user's cache of checkpoints: each is written once, whole or not at all. Knows nothing of models."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path

import platformdirs
from filelock import FileLock

from torchrl_sglang_hidden.errors import DemoModelError

__all__ = ["CACHE_ENV", "cached_path", "make_once"]

CACHE_ENV = "TORCHRL_SGLANG_HIDDEN_CACHE"


def cached_path(name: str) -> Path:
    """Return where a checkpoint of this name is kept. A directory that exists there is complete."""
    if override := os.environ.get(CACHE_ENV):
        return Path(override).expanduser().absolute() / name
    return platformdirs.user_cache_path("torchrl-sglang-hidden", appauthor=False) / name


def make_once(target: Path, make: Callable[[Path, Path], object], *, megabytes: int) -> Path:
    """Make a checkpoint unless it is there. Of several processes that ask at once one makes it, and the others wait.

    Args:
        target: the checkpoint's directory, from `cached_path`.
        make: gets a directory to work in, which is removed, and inside it the empty directory that becomes the target.
        megabytes: what this needs on the disk, for the error where there is no space.

    Raises:
        DemoModelError: the cache cannot be written.
    """
    cache = target.parent
    try:
        cache.mkdir(parents=True, exist_ok=True)
        with FileLock(cache / f"{target.name}.lock"):
            # Another process may have made it while this one waited.
            if not target.is_dir():
                _make(target, make)
    except OSError as error:
        raise DemoModelError(
            f"the demo model cannot be written to {cache}: {error}; free {megabytes} MB there, or set {CACHE_ENV} to a "
            "directory that has them"
        ) from error
    return target


def _make(target: Path, make: Callable[[Path, Path], object]) -> None:
    # Beside the target, so that the rename at the end stays on one file system and is atomic. One name for every run:
    # the lock is held, so that anything found there was left by an interrupted run.
    work = target.with_name(f"{target.name}.partial")
    shutil.rmtree(work, ignore_errors=True)
    checkpoint = work / "checkpoint"
    checkpoint.mkdir(parents=True)
    try:
        make(work, checkpoint)
        os.rename(checkpoint, target)
    finally:
        shutil.rmtree(work, ignore_errors=True)
