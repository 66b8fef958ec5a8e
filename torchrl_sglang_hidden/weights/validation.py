"""Which weights and options an update takes, and whether the weights fit the served model, before any tensor is sent.

SGLang 0.5.23 checks nothing: a missing name leaves the old tensor in place without a word, and a wrong shape ends the
whole server (SGLang "rolls back" by loading the same wrong checkpoint again). Knows nothing of how weights travel.
"""

from __future__ import annotations

import os
import re
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Literal, get_args

import torch

from torchrl_sglang_hidden.errors import InputError, InputTypeError, WeightsError
from torchrl_sglang_hidden.protocol.served_weights import ServedWeights, read_header, safetensors_files

__all__ = [
    "Running",
    "Transport",
    "Weights",
    "check_options",
    "check_weights",
    "new_version",
    "next_version",
    "open_weights",
]

Weights = str | os.PathLike[str] | Mapping[str, torch.Tensor] | torch.nn.Module
Transport = Literal["auto", "disk", "network"]
Running = Literal["finish", "continue"]

HEAD = "lm_head.weight"
# Computed from the config. Old checkpoints and TensorDict.from_module have this tensor; no model loads it.
CONSTANT = re.compile(r"rotary_emb\.(original_)?inv_freq$")


def check_options(version: object, transport: object, running: object) -> None:
    """Check the options of `Engine.update_weights`.

    Raises:
        InputTypeError: ``version`` is no name.
        InputError: an unknown transport, or an unknown choice for running requests.
    """
    if version is not None and not (isinstance(version, str) and version.strip()):
        raise InputTypeError(f"version={version!r}: expected a name, such as 'step-10', or None to count on")
    if transport not in get_args(Transport):
        raise InputError(f"transport={transport!r}: expected one of {get_args(Transport)}")
    if running not in get_args(Running):
        raise InputError(f"running={running!r}: expected one of {get_args(Running)}")


def new_version(served: Collection[str]) -> str:
    """Return a version that no server has.

    Args:
        served: the versions of several servers, which may differ after an update that failed on some of them.
    """
    version = next_version(next(iter(served)))
    while version in served:
        version = next_version(version)
    return version


def next_version(current: str) -> str:
    """Return the version after ``current``: its last number plus one; "1" after SGLang's first version, "default"."""
    if current == "default":
        return "1"
    match = re.fullmatch(r"(.*?)(\d+)", current, flags=re.DOTALL)
    return f"{match[1]}{int(match[2]) + 1}" if match else f"{current}-1"


def open_weights(weights: Weights) -> Mapping[str, torch.Tensor]:
    """Return any kind of weights as tensors by Hugging Face's checkpoint names.

    Args:
        weights: see `Engine.update_weights`. The tensors of a directory are read one by one, when they are used.

    Raises:
        WeightsError: a directory without readable safetensors, or an adapter that is not merged.
        InputTypeError: ``weights`` is neither a path, nor a mapping of tensors, nor a module.
    """
    if isinstance(weights, (str, os.PathLike)):
        return _Directory(Path(weights).expanduser().absolute())
    if isinstance(weights, torch.nn.Module):
        return _state_dict(weights)
    if isinstance(weights, Mapping):
        wrong = [name for name, value in weights.items() if not isinstance(value, torch.Tensor)]
        if wrong or not all(isinstance(name, str) for name in weights):
            raise InputTypeError(
                f"weights: {(wrong or list(weights))[0]!r} is no tensor under a name; pass tensors by checkpoint names"
            )
        return weights
    raise InputTypeError(
        f"weights is a {type(weights).__name__}; expected a checkpoint directory, a state dict or a torch.nn.Module"
    )


class _Directory(Mapping[str, torch.Tensor]):
    """The tensors of a checkpoint directory, each read from its file when it is used."""

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            files = safetensors_files(path)
            self._file_of = {name: file for file in files for name in read_header(file)}
        except (OSError, ValueError, KeyError) as error:
            raise WeightsError(
                f"weights={str(path)!r}: {error}; pass a directory written by save_pretrained, which this machine can "
                "read. Pickled *.bin checkpoints are not loaded"
            ) from error

    def __getitem__(self, name: str) -> torch.Tensor:
        from safetensors import safe_open

        with safe_open(self._file_of[name], framework="pt") as file:
            tensor: torch.Tensor = file.get_tensor(name)
        return tensor

    def __iter__(self) -> Iterator[str]:
        return iter(self._file_of)

    def __len__(self) -> int:
        return len(self._file_of)


def _state_dict(module: torch.nn.Module) -> Mapping[str, torch.Tensor]:
    inner = getattr(module, "model", None)
    # A Hugging Face model has a `.model` too, which lacks the head.
    if not hasattr(module, "save_pretrained") and isinstance(inner, torch.nn.Module):
        module = inner
    if hasattr(module, "merge_and_unload"):
        raise WeightsError(
            f"weights is a {type(module).__name__} with adapters apart from the weights; pass a merged copy, such as "
            "copy.deepcopy(model).merge_and_unload()"
        )
    state = module.state_dict()
    if hasattr(module, "save_pretrained"):
        from transformers.core_model_loading import revert_weight_conversion

        # transformers 5 fuses the experts of some models, and names their weights otherwise than the checkpoints do.
        state = revert_weight_conversion(module, state)
    return state


def check_weights(tensors: Mapping[str, torch.Tensor], served: ServedWeights) -> Mapping[str, torch.Tensor]:
    """Compare names, shapes, kinds and values of new weights with the served checkpoint.

    Args:
        tensors: the new weights, from `open_weights`.
        served: names, dtypes and shapes of the served checkpoint.

    Returns:
        The same weights. A tied head and constants that no model loads are left out, except from a directory, which is
        read as it is.

    Raises:
        WeightsError: a name, shape or kind does not fit, or a value is not finite.
    """
    expected = {name: entry for name, entry in served.tensors.items() if not CONSTANT.search(name)}
    found = {name for name in tensors if not CONSTANT.search(name)}
    if served.tied:
        # The head is the embedding. Either checkpoint may name the head or not; a head that differs would be ignored.
        expected.pop(HEAD, None)
        if HEAD in found:
            found.remove(HEAD)
            _check_tied(tensors, found)
    missing, unknown = sorted(expected.keys() - found), sorted(found - expected.keys())
    if missing or unknown:
        raise WeightsError(
            f"the names do not fit the served model: {_some(missing)} missing, {_some(unknown)} unknown, of "
            f"{len(expected)}; pass the whole model's weights under Hugging Face's checkpoint names. The server keeps "
            "its weights"
        )
    for name in sorted(found):
        _check_tensor(name, tensors[name], *expected[name])
    return {name: tensors[name] for name in found} if not isinstance(tensors, _Directory) else tensors


def _check_tied(tensors: Mapping[str, torch.Tensor], others: set[str]) -> None:
    head = tensors[HEAD]
    candidates = (tensors[name] for name in others if name.endswith(("embed_tokens.weight", "wte.weight")))
    if not any(other.shape == head.shape and (other is head or torch.equal(other, head)) for other in candidates):
        raise WeightsError(
            f"{HEAD} differs from the embedding, and the served model ties the two: it would be ignored; tie them in "
            "the trainer too, or serve a model whose config has tie_word_embeddings=false"
        )


def _check_tensor(name: str, tensor: torch.Tensor, dtype: str, shape: tuple[int, ...]) -> None:
    if tuple(tensor.shape) != shape:
        raise WeightsError(
            f"{name} has shape {tuple(tensor.shape)}, and {shape} in the served model; train from the served "
            "checkpoint. The server keeps its weights"
        )
    if tensor.is_floating_point() != dtype.startswith(("F", "BF")) or tensor.device.type == "meta":
        raise WeightsError(
            f"{name} is {tensor.dtype} on {tensor.device}, and {dtype} in the served model; pass real weights of the "
            "same kind. The server keeps its weights"
        )
    if hasattr(tensor, "full_tensor"):
        raise WeightsError(
            f"{name} is one shard of a {type(tensor).__name__}; gather the weights, such as by full_tensor()"
        )
    # One pass, and no copy: the extremes of a tensor with a NaN are NaN.
    if tensor.is_floating_point() and tensor.numel():
        # torch compares no 8-bit floats.
        values = tensor.detach().float() if tensor.element_size() == 1 else tensor.detach()
        low, high = (float(extreme) for extreme in values.aminmax())
        if not (abs(low) < float("inf") and abs(high) < float("inf")):
            raise WeightsError(
                f"{name} has values from {low} to {high}; weights must be finite; look at the trainer's last step. The "
                "server keeps its weights"
            )


def _some(names: list[str]) -> str:
    return f"{len(names)} ({', '.join(names[:3])}{', …' if len(names) > 3 else ''})" if names else "0"
