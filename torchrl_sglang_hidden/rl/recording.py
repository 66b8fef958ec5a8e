"""`Recording`: what `record_hidden_states` wrote, as one TensorDict, a replay buffer, or a file of another library."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from tensordict import TensorDictBase
from torchrl.data import TensorDictReplayBuffer, TensorStorage

from torchrl_sglang_hidden.errors import RecordingError
from torchrl_sglang_hidden.rl.columns import Column, Key, Leaves, join_rows, repeat, unpack
from torchrl_sglang_hidden.rl.exports import write_hdf5, write_npz, write_safetensors, write_zarr
from torchrl_sglang_hidden.rl.manifest import Failure, Manifest, Shard, read_manifest
from torchrl_sglang_hidden.rl.shards import open_shard, reading

__all__ = ["LABELS", "LABEL_ROW", "ROWS", "Recording", "load_recording", "read_rows"]

# What a shard has: the fields of its rows, one label for each group of rows, and for each row the row of its label.
ROWS, LABELS, LABEL_ROW = "rows", "labels", "label_row"


class Recording:
    """A data set with text and hidden states, as `load_recording` and `record_hidden_states` return it.

    Attributes:
        path: its directory.

    Example:
        >>> recording = load_recording("walks")
        >>> recording.tensordict["hidden_states", "prompt"].shape
        torch.Size([10000, 576])
        >>> batch = recording.as_replay_buffer(batch_size=256).sample()
    """

    def __init__(self, path: Path, manifest: Manifest) -> None:
        self.path = path
        self._manifest = manifest

    def __len__(self) -> int:
        return self._manifest.num_rows

    def __repr__(self) -> str:
        return f"Recording({str(self.path)!r}, rows={len(self)}, failures={len(self.failures)})"

    @property
    def metadata(self) -> dict[str, Any]:
        """What was recorded with what: model, weight version, segments, layers, pooling, prompt, template, versions.

        Also ``hash``, of all of that; and ``complete``, whether the data set was recorded to its end.
        """
        return {**self._manifest.about, "hash": self._manifest.hash, "complete": self._manifest.complete}

    @property
    def failures(self) -> tuple[Failure, ...]:
        """The rows without a label, each a record with ``row`` and ``reason``. Their states are NaN."""
        return tuple(failure for shard in self._manifest.shards for failure in shard.failures)

    @functools.cached_property
    def tensordict(self) -> TensorDictBase:
        """All rows in the order of the data, as one TensorDict of batch size ``[N]``.

        - the fields of the data, each under its own key; what is no tensor as strings, lists and dicts.
        - ``("hidden_states", segment)``: float32 ``[N, D]``, or ``[N, K, D]``; NaN in a row that failed. Spans are at
          ``("hidden_states", "spans", name)``, and how many rows were pooled at ``(…, f"{segment}_count")``.
        - ``("head_scores", …)``, where the policy has heads, under the names of `HeadScores`: float32 ``[N]`` where
          they are pooled, else ragged, and the heads' versions as strings; NaN, or none, in a row that failed.
        - ``text_generated`` and ``finish_reason``, where the policy generates.
        - ``("token_hidden_states", segment)``, ``prompt_ids``, ``response_ids``, where tokens were recorded.
        - ``label_row``: int64 ``[N]``, the row whose label a row has, where ``every`` is over 1.

        In memory where all rows have the same shapes; of one shard, or with ragged leaves, memory-mapped. With ragged
        leaves it is a lazy stack: read these with ``get(key, as_list=True)``.
        """
        parts = self._parts
        with reading(self.path):
            return join_rows(parts)

    def as_replay_buffer(self, **options: Any) -> TensorDictReplayBuffer:
        """Return a replay buffer that samples the rows, without a copy of them.

        Args:
            **options: those of TorchRL's ``TensorDictReplayBuffer``, such as ``batch_size`` or ``sampler``.
        """
        return TensorDictReplayBuffer(storage=TensorStorage(self.tensordict), **options)

    def to_npz(self, path: str | Path) -> None:
        """Write a NPZ; nested keys have ``/`` between their parts.

        Args:
            path: a file that is not there yet.

        Raises:
            InputError: it is there; or it cannot hold a field, such as NUL in a text of HDF5.
            RecordingError: it cannot be written.
        """
        write_npz(self._parts, Path(path))

    def to_hdf5(self, path: str | Path) -> None:
        """Write a HDF5 file with h5py; nested keys are groups. Arguments and errors as for `to_npz`."""
        write_hdf5(self._parts, Path(path))

    def to_safetensors(self, path: str | Path) -> None:
        """Write a safetensors file; strings are UTF-8 bytes with lengths. Arguments and errors as for `to_npz`."""
        write_safetensors(self._parts, Path(path))

    def to_zarr(self, path: str | Path) -> None:
        """Write a directory with zarr; nested keys are groups. Arguments and errors as for `to_npz`."""
        write_zarr(self._parts, Path(path))

    @functools.cached_property
    def _parts(self) -> list[dict[Key, Column]]:
        """The columns of each shard, one value per row."""
        if not self._manifest.shards:
            raise RecordingError(f"{self.path} has 0 rows so far; run what records it again, to go on")
        return [self._read(shard) for shard in self._manifest.shards]

    def _read(self, shard: Shard) -> dict[Key, Column]:
        content, file = open_shard(self.path, shard), self.path / shard.file
        with reading(file):
            label_rows = content.get(LABEL_ROW)
            columns, labels = unpack(content.get(ROWS)), unpack(content.get(LABELS))
            if self._manifest.about["every"] != 1:
                _, places = torch.unique_consecutive(label_rows, return_inverse=True)
                labels = {key: repeat(column, places) for key, column in labels.items()} | {(LABEL_ROW,): label_rows}
            found = columns | labels
            lengths = sorted({len(column) for column in found.values()})
        if lengths != [shard.rows]:
            raise RecordingError(
                f"{file}: its leaves have {lengths} rows, and the manifest expected {shard.rows}; copy it again, or "
                "record again"
            )
        return found


def load_recording(path: str | Path) -> Recording:
    """Return a recording, complete or not.

    Args:
        path: the directory that `record_hidden_states` was given.

    Raises:
        RecordingError: there is no recording, or its manifest was changed. A shard that was changed, is damaged or is
            not there raises when its rows are read.
    """
    manifest = read_manifest(Path(path))
    if manifest is None:
        raise RecordingError(f"{path} has no recording; pass the directory that record_hidden_states was given")
    return Recording(Path(path), manifest)


def read_rows(path: Path, shard: Shard) -> Iterator[Leaves]:
    """Yield the fields of the data's rows in a shard."""
    content = open_shard(path, shard)
    with reading(path / shard.file):
        columns = unpack(content.get(ROWS))
    for place in range(shard.rows):
        yield {key: column[place] for key, column in columns.items()}
