"""Which weights and options an update takes, and whether the weights fit the served model, before any tensor is sent.

SGLang 0.5.23 checks nothing: a missing name leaves the old tensor in place without a word, and a wrong shape ends the
whole server (SGLang "rolls back" by loading the same wrong checkpoint again). Knows nothing of how weights travel.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal, get_args

import torch

from torchrl_sglang_hidden.errors import (
    CapabilityError,
    IncompleteWeightsError,
    InputError,
    InputTypeError,
    WeightsError,
)
from torchrl_sglang_hidden.protocol.served_weights import INCOMPLETE, ServedWeights, read_header, safetensors_files
from torchrl_sglang_hidden.weights.trainers import LazyWeights, inner_model, named_weights, plain_names, to_checkpoint

__all__ = [
    "BUCKET_BYTES",
    "CheckpointDirectory",
    "Running",
    "ShardedWeights",
    "Transport",
    "Weights",
    "check_options",
    "check_weights",
    "choose_version",
    "new_version",
    "next_version",
    "open_weights",
]

Weights = str | os.PathLike[str] | Mapping[str, torch.Tensor] | torch.nn.Module
Transport = Literal["auto", "disk", "network", "nccl"]
Running = Literal["finish", "continue"]
# Most bytes of weights that wait in main memory for their turn, where they are written or sent in several parts.
BUCKET_BYTES = 2 * 1024**3

HEAD = "lm_head.weight"
# What a name of a state dict says when the weights of the model are not all in it, or not as they are.
NOT_OF_A_MODEL = {
    ".lora_A.": "an adapter's state dict does not say how strongly it acts; pass the adapted model itself, which is "
    "merged on the way, or give the adapter alone to load_adapter",
    "_flat_param": "FSDP1 keeps flat parameters, which carry no weight's name; pass FSDP's whole state dict "
    "(StateDictType.FULL_STATE_DICT), or shard with FSDP2's torch.distributed.fsdp.fully_shard",
}
# Computed from the config. Old checkpoints and TensorDict.from_module have this tensor; no model loads it.
CONSTANT = re.compile(r"rotary_emb\.(original_)?inv_freq$")


def check_options(version: object, transport: object, running: object, bucket_bytes: object = BUCKET_BYTES) -> None:
    """Check the options of `Engine.update_weights`.

    Raises:
        InputTypeError: ``version`` is no name, or ``bucket_bytes`` no whole number.
        InputError: an unknown transport, an unknown choice for running requests, or no room in a bucket.
    """
    if not isinstance(bucket_bytes, int) or isinstance(bucket_bytes, bool):
        raise InputTypeError(f"bucket_bytes={bucket_bytes!r}: expected a whole number of bytes, such as 2 * 1024**3")
    if bucket_bytes < 1:
        raise InputError(f"bucket_bytes={bucket_bytes}: expected at least 1, such as 2 * 1024**3")
    if version is not None and not (isinstance(version, str) and version.strip()):
        raise InputTypeError(f"version={version!r}: expected a name, such as 'step-10', or None to count on")
    if version is not None and version.endswith(INCOMPLETE):
        raise InputError(f"version={version!r}: {INCOMPLETE!r} at the end is for weights of two versions; leave it out")
    if transport not in get_args(Transport):
        raise InputError(f"transport={transport!r}: expected one of {get_args(Transport)}")
    if running not in get_args(Running):
        raise InputError(f"running={running!r}: expected one of {get_args(Running)}")


def choose_version(version: str | None, served: Collection[str], *, whole: bool = False) -> str:
    """Return the version of new weights, which no server may have.

    Args:
        version: the user's name for it; None counts on.
        served: as for `new_version`.
        whole: whether the new weights come beside the served ones, which must then be whole.

    Raises:
        InputError: the servers have that version already.
        IncompleteWeightsError: an adapter would give a mixture of weights another name.
    """
    if whole and any(one.endswith(INCOMPLETE) for one in served):
        raise IncompleteWeightsError(
            f"the servers' weights are of versions {list(served)}, of which a mixture would get another name with the "
            "adapter; call update_weights first"
        )
    if version is None:
        return new_version(served)
    if set(served) == {version}:
        raise InputError(
            f"version={version!r} is that of the weights already served, so that no sample could tell the two apart; "
            "pass another, or None"
        )
    return version


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
    current = current.removesuffix(INCOMPLETE)  # what comes after a mixture of weights is whole
    if current == "default":
        return "1"
    match = re.fullmatch(r"(.*?)(\d+)", current, flags=re.DOTALL)
    return f"{match[1]}{int(match[2]) + 1}" if match else f"{current}-1"


@dataclass(frozen=True, slots=True)
class ShardedWeights:
    """Weights that several processes hold together as DTensors, as the trainer names them.

    Args:
        parts: this process's parts by name, in the same order in every process; computing one may need all processes.
        convert: renames gathered weights as Hugging Face's checkpoints do.
    """

    parts: LazyWeights
    convert: Callable[[Mapping[str, torch.Tensor]], Mapping[str, torch.Tensor]]


def open_weights(weights: Weights) -> Mapping[str, torch.Tensor] | ShardedWeights:
    """Return any kind of weights as tensors by Hugging Face's checkpoint names, or as `ShardedWeights`.

    Args:
        weights: see `Engine.update_weights`. The tensors of a directory are read one by one, when they are used; so are
            adapters merged.

    Raises:
        WeightsError: a directory without readable safetensors, or a trainer or state dict that does not have the
            model's weights.
        InputTypeError: ``weights`` is neither a path, nor a mapping of tensors, nor a module.
    """
    if isinstance(weights, (str, os.PathLike)):
        return CheckpointDirectory(Path(weights).expanduser().absolute())
    if isinstance(weights, CheckpointDirectory):
        return weights
    if isinstance(weights, torch.nn.Module):
        model = inner_model(weights)
        return _whole_or_sharded(named_weights(model), partial(to_checkpoint, model))
    if isinstance(weights, Mapping):
        wrong = [name for name, value in weights.items() if not isinstance(value, torch.Tensor)]
        if wrong or not all(isinstance(name, str) for name in weights):
            raise InputTypeError(
                f"weights: {(wrong or list(weights))[0]!r} is no tensor under a name; pass tensors by checkpoint names"
            )
        for mark, remedy in NOT_OF_A_MODEL.items():
            if (name := next((name for name in weights if mark in name), None)) is not None:
                raise WeightsError(f"weights: {name!r} is no weight of a model: {remedy}")
        return _whole_or_sharded(LazyWeights(weights).renamed(plain_names(weights)), lambda gathered: gathered)
    raise InputTypeError(
        f"weights is a {type(weights).__name__}; expected a checkpoint directory, a state dict or a torch.nn.Module"
    )


def _whole_or_sharded(
    weights: LazyWeights, convert: Callable[[Mapping[str, torch.Tensor]], Mapping[str, torch.Tensor]]
) -> Mapping[str, torch.Tensor] | ShardedWeights:
    if any(hasattr(value, "full_tensor") for value in weights.like.values()):
        return ShardedWeights(weights, convert)
    return convert(weights)


class CheckpointDirectory(Mapping[str, torch.Tensor]):
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


def check_weights(tensors: Mapping[str, torch.Tensor], served: ServedWeights) -> Mapping[str, torch.Tensor]:
    """Compare names, shapes, kinds and values of new weights with the served checkpoint.

    Args:
        tensors: the new weights, from `open_weights`.
        served: names, dtypes and shapes of the served checkpoint.

    Returns:
        The same weights. A tied head and constants that no model loads are left out, except from a directory, which is
        read as it is.

    Raises:
        CapabilityError: the server quantises its weights.
        WeightsError: a name, shape or kind does not fit, or a value is not finite.
    """
    if served.quantization:
        # SGLang 0.5.23 loads new weights over those that it packed or scaled, which none of its checks notices.
        raise CapabilityError(
            f"the server quantises its weights ({served.quantization}), and new ones cannot be loaded over them; start "
            "it without --quantization, from a checkpoint that is not quantised"
        )
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
    if isinstance(tensors, CheckpointDirectory):
        return tensors
    lazy = tensors if isinstance(tensors, LazyWeights) else LazyWeights(tensors)
    return lazy.renamed({name: name for name in sorted(found)})


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
