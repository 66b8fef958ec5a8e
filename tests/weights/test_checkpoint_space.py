"""The place of an update's checkpoint: space that ends while it is written, and who may remove it."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
from helpers.full_disks import files_of_at_most

from torchrl_sglang_hidden import EngineError
from torchrl_sglang_hidden.protocol.server_files import sweep_checkpoints
from torchrl_sglang_hidden.weights import disk
from torchrl_sglang_hidden.weights.disk import checkpoint


# Nothing fits; a part of the first file; the files, and not the index of them.
@pytest.mark.parametrize(("nbytes", "bucket_bytes"), [(0, 2**30), (5000, 2**30), (45_000, 2**30), (350, 1)])
def test_space_that_ends_is_an_error_and_leaves_nothing(
    nbytes: int, bucket_bytes: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(disk, "TMPFS", tmp_path)
    size = 10 if bucket_bytes == 1 else 10_000
    weights = {f"{name}-{'x' * 100}": torch.ones(size) for name in "abcd"}
    with (
        files_of_at_most(nbytes),
        pytest.raises(EngineError, match=r"cannot be written to .*free some space there"),
        checkpoint(weights, bucket_bytes=bucket_bytes),
    ):
        raise AssertionError("the block must not run")
    assert list(tmp_path.iterdir()) == []


def test_nobody_removes_it_meanwhile(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """However long ago its process began: process ids are those of this container."""
    monkeypatch.setattr(disk, "TMPFS", tmp_path)
    with checkpoint({"a": torch.ones(1)}) as directory:
        os.utime(directory, (0, 0))
        sweep_checkpoints(tmp_path)
        assert directory.exists()
    assert list(tmp_path.iterdir()) == []
