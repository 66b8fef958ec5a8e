"""Lists the tensors that a server takes, from its checkpoint's headers or from the model that its config describes.

Used on both sides. Knows nothing of requests or of how weights travel, and imports no SGLang.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path, PurePath
from typing import Any

from torchrl_sglang_hidden.errors import ProtocolError
from torchrl_sglang_hidden.protocol.excerpts import as_count, excerpt

__all__ = [
    "KEPT_ENV",
    "PUSHED_PREFIX",
    "ServedWeights",
    "is_readable",
    "read_header",
    "safetensors_files",
    "served_weights",
]

# Begins the name of a directory that an engine writes for one update and deletes afterwards. SGLang would go on
# reporting it as the path of its model.
PUSHED_PREFIX = "torchrl-sglang-hidden-weights-"
INDEX = "model.safetensors.index.json"
MAX_HEADER_BYTES = 100_000_000
# Names a checkpoint that a server loads over its model's weights when it starts.
KEPT_ENV = "TORCHRL_SGLANG_HIDDEN_KEPT_WEIGHTS"
# Ends the version of weights of which a server has a part only.
INCOMPLETE = "-incomplete"
# Begins SGLang's message of an update that is done but for the prefix cache, which holds states of the old weights.
NOT_FLUSHED = "Weights were updated, but the cache was not flushed"
# The name of a weight that no model has: asked for it, a server half holds new requests back, and answers when those
# under way have ended. `continue_generation` lets them go on.
DRAIN = "torchrl_sglang_hidden:drain"
# The field of the answer that says whether somebody had paused the engine before: then nothing under way ends.
WAS_PAUSED = "was_paused"


@dataclass(frozen=True, slots=True)
class ServedWeights:
    """Lists the tensors that a server was started from.

    Args:
        tensors: by name, safetensors' name of the dtype (such as ``"BF16"``) and the shape.
        tied: whether the model's head is its embedding, even where the checkpoint holds both.
        quantization: how the server quantises weights, such as ``"fp8"``; empty where it serves them as they are.
    """

    tensors: Mapping[str, tuple[str, tuple[int, ...]]]
    tied: bool
    quantization: str = ""

    def pack(self) -> dict[str, Any]:
        """Return the fields as JSON carries them."""
        return {
            "tensors": {name: [dtype, list(shape)] for name, (dtype, shape) in self.tensors.items()},
            "tied": self.tied,
            "quantization": self.quantization,
        }

    @classmethod
    def unpack(cls, fields: Mapping[str, Any]) -> ServedWeights:
        """Read what `pack` wrote.

        Raises:
            ProtocolError: a field is missing, or of another type.
        """
        try:
            tensors = {name: _entry_of(name, *entry) for name, entry in fields["tensors"].items()}
            tied, quantization = fields["tied"], fields["quantization"]
            if not isinstance(tied, bool) or not isinstance(quantization, str):
                raise TypeError(f"tied is {excerpt(tied)} and quantization {excerpt(quantization)}")
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise ProtocolError(
                f"the server does not say which weights it serves ({error}); use the same version of "
                "torchrl_sglang_hidden here and there"
            ) from error
        return cls(tensors, tied, quantization)


def served_weights(model: str, config: Any = None) -> ServedWeights:
    """Read the headers of a model's checkpoint; the weights themselves are not read.

    A directory without safetensors, as rollout servers with ``load_format="dummy"`` are started from, has the names and
    shapes of the model that its config describes.

    Args:
        model: a directory, or a model hub's name that is in the local cache.
        config: the served model's transformers config; None reads the directory's.

    Raises:
        OSError: the directory cannot be read on this machine, or has no config.
        ValueError: a header or the config cannot be parsed, or transformers does not know the model.
    """
    from transformers import AutoConfig

    directory = _directory(model)
    if config is None:
        config = AutoConfig.from_pretrained(directory)
    try:
        files = safetensors_files(directory)
    except FileNotFoundError:
        tensors = _tensors_of(config)
    else:
        tensors = {name: entry for file in files for name, entry in read_header(file).items()}
    quantization = getattr(config, "quantization_config", None) or {}
    method = quantization.get("quant_method") if isinstance(quantization, dict) else quantization.quant_method
    tied = bool(config.get_text_config().tie_word_embeddings)
    return ServedWeights(tensors, tied, str(getattr(method, "value", method) or ""))


def _tensors_of(config: Any) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Return the checkpoint's names, dtypes and shapes of the model that a config describes, without any memory for it.

    Raises:
        ValueError: transformers has no such model.
    """
    import torch
    import transformers
    from transformers.core_model_loading import revert_weight_conversion

    architecture = next(iter(config.architectures or ()), None)
    kind = getattr(transformers, str(architecture), None)
    if kind is None:
        raise ValueError(f"no *.safetensors, and transformers knows no {architecture} to name the weights by")
    with torch.device("meta"):
        model = kind._from_config(config)
    state = revert_weight_conversion(model, model.state_dict())
    return {name: ("F32" if value.is_floating_point() else "I64", tuple(value.shape)) for name, value in state.items()}


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
        try:
            names = set(json.loads(index.read_bytes())["weight_map"].values())
            # In the checkpoint's own directory: an index from elsewhere is not to name any file of this machine.
            if not all(isinstance(name, str) and PurePath(name).name == name not in ("", "..") for name in names):
                raise TypeError(f"its files are {excerpt(names)}")
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise ValueError(f"{index} names no safetensors ({type(error).__name__}: {error})") from error
        return [directory / name for name in sorted(names)]
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
        # The limit is safetensors' own.
        if size > min(file.stat().st_size, MAX_HEADER_BYTES):
            raise ValueError(f"{file} is no safetensors file, or was cut short")
        data = stream.read(size)
    try:
        header = json.loads(data)
        header.pop("__metadata__", None)
        return {name: _entry_of(name, entry["dtype"], entry["shape"]) for name, entry in header.items()}
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(f"{file} is no safetensors file ({type(error).__name__}: {error})") from error


def _entry_of(name: object, dtype: object, shape: object) -> tuple[str, tuple[int, ...]]:
    if not isinstance(name, str) or not isinstance(dtype, str) or not isinstance(shape, (list, tuple)):
        raise TypeError(f"{excerpt(name)} is of the dtype {excerpt(dtype)} and the shape {excerpt(shape)}")
    return dtype, tuple(as_count(size, "a size") for size in shape)
