"""Lists the tensors of a checkpoint directory, read from the files' headers.

Used on both sides. Knows nothing of requests or of how weights travel, and imports no SGLang.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

__all__ = ["PUSHED_PREFIX", "ServedWeights", "is_readable", "read_header", "safetensors_files", "served_weights"]

# Begins the name of a directory that an engine writes for one update and deletes afterwards. SGLang would go on
# reporting it as the path of its model.
PUSHED_PREFIX = "torchrl-sglang-hidden-weights-"
INDEX = "model.safetensors.index.json"


@dataclass(frozen=True, slots=True)
class ServedWeights:
    """Lists the tensors that a server was started from.

    Args:
        tensors: by name, safetensors' name of the dtype (such as ``"BF16"``) and the shape.
        tied: whether the model's head is its embedding, even where the checkpoint holds both.
    """

    tensors: Mapping[str, tuple[str, tuple[int, ...]]]
    tied: bool

    def pack(self) -> dict[str, Any]:
        """Return the fields as JSON carries them."""
        return {
            "tensors": {name: [dtype, list(shape)] for name, (dtype, shape) in self.tensors.items()},
            "tied": self.tied,
        }

    @classmethod
    def unpack(cls, fields: Mapping[str, Any]) -> ServedWeights:
        """Read what `pack` wrote."""
        tensors = {name: (str(dtype), tuple(map(int, shape))) for name, (dtype, shape) in fields["tensors"].items()}
        return cls(tensors, bool(fields["tied"]))


def served_weights(model: str) -> ServedWeights:
    """Read the headers of a model's checkpoint; the weights themselves are not read.

    Args:
        model: a directory, or a model hub's name that is in the local cache.

    Raises:
        OSError: the checkpoint cannot be read on this machine, or has no safetensors files.
        ValueError: a header or the config cannot be parsed.
    """
    from transformers import AutoConfig

    directory = _directory(model)
    tensors: dict[str, tuple[str, tuple[int, ...]]] = {}
    for file in safetensors_files(directory):
        tensors |= read_header(file)
    return ServedWeights(tensors, bool(AutoConfig.from_pretrained(directory).get_text_config().tie_word_embeddings))


def is_readable(model: str) -> bool:
    """Return whether this machine has the model's files."""
    try:
        _directory(model)
    except (OSError, ValueError):
        return False
    return True


def _directory(model: str) -> Path:
    from huggingface_hub import snapshot_download

    return Path(model) if Path(model).is_dir() else Path(snapshot_download(model, local_files_only=True))


def safetensors_files(directory: Path) -> list[Path]:
    """List the safetensors files of a checkpoint: the files that its index names, or all.

    Raises:
        OSError: there is none.
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
    """Read each tensor's dtype and shape by name, from the JSON in front of the data.

    Raises:
        OSError: the file cannot be read.
        ValueError: the file is no safetensors file, or was cut short.
    """
    with file.open("rb") as stream:
        size = int.from_bytes(stream.read(8), "little")
        if size > file.stat().st_size:
            raise ValueError(f"{file} is no safetensors file, or was cut short")
        header = json.loads(stream.read(size))
    header.pop("__metadata__", None)
    return {name: (entry["dtype"], tuple(entry["shape"])) for name, entry in header.items()}
