"""What tensors a checkpoint directory has, read from its headers. Used on both sides; imports no SGLang."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

__all__ = ["PUSHED_PREFIX", "ServedWeights", "is_readable", "read_header", "safetensors_files", "served_weights"]

# Directories that an engine writes for one update and deletes after it. SGLang would go on naming them as its model.
PUSHED_PREFIX = "torchrl-sglang-hidden-weights-"
INDEX = "model.safetensors.index.json"


@dataclass(frozen=True, slots=True)
class ServedWeights:
    """The tensors that a server was started from.

    Args:
        tensors: name → safetensors dtype and shape.
        tied: whether the model's head is its embedding, whatever the checkpoint holds.
    """

    tensors: Mapping[str, tuple[str, tuple[int, ...]]]
    tied: bool

    def pack(self) -> dict[str, Any]:
        """As JSON."""
        return {
            "tensors": {name: [dtype, list(shape)] for name, (dtype, shape) in self.tensors.items()},
            "tied": self.tied,
        }

    @classmethod
    def unpack(cls, fields: Mapping[str, Any]) -> ServedWeights:
        """Reads what `pack` wrote."""
        tensors = {name: (str(dtype), tuple(map(int, shape))) for name, (dtype, shape) in fields["tensors"].items()}
        return cls(tensors, bool(fields["tied"]))


def served_weights(model: str) -> ServedWeights:
    """Reads the headers of a model's checkpoint; the weights themselves are not read.

    Args:
        model: a directory, or a model hub's name that is in the local cache.

    Raises:
        OSError: it cannot be read from here, or has no safetensors.
        ValueError: a header or the config cannot be parsed.
    """
    from transformers import AutoConfig

    directory = _directory(model)
    tensors: dict[str, tuple[str, tuple[int, ...]]] = {}
    for file in safetensors_files(directory):
        tensors |= read_header(file)
    return ServedWeights(tensors, bool(AutoConfig.from_pretrained(directory).get_text_config().tie_word_embeddings))


def is_readable(model: str) -> bool:
    """Whether this machine has the model's files."""
    try:
        _directory(model)
    except (OSError, ValueError):
        return False
    return True


def _directory(model: str) -> Path:
    from huggingface_hub import snapshot_download

    return Path(model) if Path(model).is_dir() else Path(snapshot_download(model, local_files_only=True))


def safetensors_files(directory: Path) -> list[Path]:
    """The files of a checkpoint: those of its index, or all of them.

    Raises:
        OSError: there are none.
        ValueError: the index cannot be parsed.
    """
    index = directory / INDEX
    if index.is_file():
        # Some repositories carry the same weights a second time under another name.
        return [directory / name for name in sorted(set(json.loads(index.read_text())["weight_map"].values()))]
    files = sorted(directory.glob("*.safetensors"))
    if not files:
        raise FileNotFoundError(f"{directory} has no *.safetensors")
    return files


def read_header(file: Path) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Name → dtype and shape, from the JSON in front of the data.

    Raises:
        OSError: the file cannot be read.
        ValueError: it is no safetensors file.
    """
    with file.open("rb") as stream:
        size = int.from_bytes(stream.read(8), "little")
        if size > file.stat().st_size:
            raise ValueError(f"{file} is no safetensors file, or was cut short")
        header = json.loads(stream.read(size))
    header.pop("__metadata__", None)
    return {name: (entry["dtype"], tuple(entry["shape"])) for name, entry in header.items()}
