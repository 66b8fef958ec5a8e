"""New weights for a running engine: what they are, whether they fit, and the order of SGLang's calls.

Knows SGLang's control routes by name and payload, not how they are called: `http` and `offline` pass that in. All
checks come first, for SGLang 0.5.23 checks nothing: a missing name leaves the old tensor in place without a word, and a
wrong shape ends the whole server (it "rolls back" by loading the same wrong checkpoint again).
"""

from __future__ import annotations

import os
import re
import shutil
import tempfile
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any, Literal, get_args

import torch

from torchrl_sglang_hidden.errors import EngineError, InputError, InputTypeError, RequestRejectedError, WeightsError
from torchrl_sglang_hidden.protocol.served_weights import PUSHED_PREFIX, ServedWeights, read_header, safetensors_files

__all__ = [
    "Call",
    "Running",
    "Transport",
    "Weights",
    "check_options",
    "check_weights",
    "checkpoint",
    "load_from_disk",
    "new_version",
    "next_version",
    "open_weights",
    "paused",
    "succeeded",
]

Weights = str | os.PathLike[str] | Mapping[str, torch.Tensor] | torch.nn.Module
Transport = Literal["auto", "disk", "network"]
Running = Literal["finish", "continue"]

# A control route of SGLang's and its payload → its answer.
Call = Callable[[str, dict[str, Any]], dict[str, Any]]

HEAD = "lm_head.weight"
# Computed from the config. Old checkpoints carry it, and so does what TensorDict.from_module takes; no model loads it.
CONSTANT = re.compile(r"rotary_emb\.(original_)?inv_freq$")
TMPFS = Path("/dev/shm")
NOT_FLUSHED = "Weights were updated, but the cache was not flushed"


def check_options(version: object, transport: object, running: object) -> None:
    """Refuses options of ``update_weights`` that mean nothing."""
    if version is not None and not (isinstance(version, str) and version.strip()):
        raise InputTypeError(f"version={version!r}: expected a name, such as 'step-10', or None to count on")
    if transport not in get_args(Transport):
        raise InputError(f"transport={transport!r}: expected one of {get_args(Transport)}")
    if running not in get_args(Running):
        raise InputError(f"running={running!r}: expected one of {get_args(Running)}")


def new_version(served: Collection[str]) -> str:
    """A version that none of several servers has, which may differ after an update that failed on some."""
    version = next_version(next(iter(served)))
    while version in served:
        version = next_version(version)
    return version


def next_version(current: str) -> str:
    """The version after ``current``: its last number plus one; SGLang's first one, "default", is followed by "1"."""
    if current == "default":
        return "1"
    match = re.fullmatch(r"(.*?)(\d+)", current, flags=re.DOTALL)
    return f"{match[1]}{int(match[2]) + 1}" if match else f"{current}-1"


# --- what they are --------------------------------------------------------------------------------------------------


def open_weights(weights: Weights) -> Mapping[str, torch.Tensor]:
    """Any kind of weights as tensors by Hugging Face's checkpoint names; those of a directory are read one by one.

    Raises:
        WeightsError: a directory without readable safetensors, or an adapter that is not merged.
        InputTypeError: neither a path, nor a mapping of tensors, nor a module.
    """
    if isinstance(weights, (str, os.PathLike)):
        return _Directory(Path(weights).expanduser().absolute())
    if isinstance(weights, torch.nn.Module):
        return _state_dict(weights)
    if isinstance(weights, Mapping):
        wrong = [name for name, value in weights.items() if not isinstance(value, torch.Tensor)]
        if wrong or not all(isinstance(name, str) for name in weights):
            raise InputTypeError(f"weights: {(wrong or list(weights))[0]!r} is no tensor under a name")
        return weights
    raise InputTypeError(
        f"weights is a {type(weights).__name__}; expected a checkpoint directory, a state dict or a torch.nn.Module"
    )


class _Directory(Mapping[str, torch.Tensor]):
    """The tensors of a checkpoint directory, each read when it is asked for."""

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
    # A Hugging Face model has a `.model` too: the one without its head.
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

        # transformers 5 holds some models' weights under other names than their checkpoints, the experts fused.
        state = revert_weight_conversion(module, state)
    return state


# --- whether they fit -----------------------------------------------------------------------------------------------


def check_weights(tensors: Mapping[str, torch.Tensor], served: ServedWeights) -> Mapping[str, torch.Tensor]:
    """Holds names, shapes, kinds and values against the checkpoint that is served.

    Returns:
        The same weights, without the second name of a tied head where the served checkpoint has none.

    Raises:
        WeightsError: they do not fit, or have a value that is not finite.
    """
    expected = {name: entry for name, entry in served.tensors.items() if not CONSTANT.search(name)}
    found = {name for name in tensors if not CONSTANT.search(name)}
    if served.tied:
        # The head is the embedding. Either checkpoint may name it or not; a head of its own would be ignored.
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
        # Eight bits know no order.
        values = tensor.detach().float() if tensor.element_size() == 1 else tensor.detach()
        low, high = (float(extreme) for extreme in values.aminmax())
        if not (abs(low) < float("inf") and abs(high) < float("inf")):
            raise WeightsError(
                f"{name} has values from {low} to {high}; weights must be finite, look at the trainer's last step. The "
                "server keeps its weights"
            )


def _some(names: list[str]) -> str:
    return f"{len(names)} ({', '.join(names[:3])}{', …' if len(names) > 3 else ''})" if names else "0"


# --- how they get there ---------------------------------------------------------------------------------------------


@contextmanager
def checkpoint(tensors: Mapping[str, torch.Tensor]) -> Iterator[Path]:
    """Writes weights as a checkpoint that is deleted afterwards: to memory (tmpfs) where it has room, else to disk.

    Raises:
        EngineError: no room for it.
    """
    from safetensors.torch import save_file

    size = sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
    rooms = {place: _room(place) for place in (TMPFS, Path(tempfile.gettempdir())) if os.access(place, os.W_OK)}
    place = next((place for place, room in rooms.items() if room > 1.05 * size), None)
    if place is None:
        room = ", ".join(f"{room} in {place}" for place, room in rooms.items())
        raise EngineError(
            f"the weights take {size} bytes, and there is room for {room}; free some, set TMPDIR, or use "
            "transport='network'"
        )
    _sweep(place)
    directory = Path(tempfile.mkdtemp(prefix=f"{PUSHED_PREFIX}{os.getpid()}-", dir=place))
    try:
        save_file(_apart(tensors), directory / "model.safetensors", metadata={"format": "pt"})
        yield directory
    finally:
        shutil.rmtree(directory)


def _sweep(place: Path) -> None:
    """Deletes what processes left that were killed in the middle of an update."""
    for directory in place.glob(f"{PUSHED_PREFIX}*"):
        pid = directory.name.removeprefix(PUSHED_PREFIX).split("-")[0]
        try:
            os.kill(int(pid), 0)
        except ProcessLookupError:
            shutil.rmtree(directory, ignore_errors=True)
        except (PermissionError, ValueError):
            continue  # another user's, or nothing of ours


def _room(place: Path) -> int:
    free = shutil.disk_usage(place).free
    if place != TMPFS:
        return free
    # What is in it is in memory, whatever its own limit says. Half stays for the server, which loads from it.
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        return 0
    available_kb = next((int(line.split()[1]) for line in lines if line.startswith("MemAvailable:")), 0)
    return min(free, available_kb * 1024 // 2)


def _apart(tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The tensors in main memory, each with a storage of its own, as safetensors wants them."""
    apart: dict[str, torch.Tensor] = {}
    storages: set[int] = set()
    for name, tensor in tensors.items():
        value = tensor.detach().cpu().contiguous()
        apart[name] = value.clone() if value.untyped_storage().data_ptr() in storages else value
        storages.add(apart[name].untyped_storage().data_ptr())
    return apart


def succeeded(answer: Mapping[str, Any], what: str) -> None:
    """Raises when a control route says that it failed."""
    if not answer.get("success"):
        raise RequestRejectedError(f"SGLang refused to {what}: {answer.get('message')}")


@contextmanager
def paused(call: Call) -> Iterator[None]:
    """Stops generation. Running requests are retracted, and computed again from their tokens when it goes on."""
    # Inside: the server may have paused although its answer did not come.
    try:
        call("pause_generation", {"mode": "retract"})
        yield
    finally:
        call("continue_generation", {"torch_empty_cache": False})


def load_from_disk(call: Call, path: Path, version: str, running: Running) -> None:
    """Has a server load a checkpoint that was checked before.

    Raises:
        RequestRejectedError: it did not, and keeps its weights.
    """
    with paused(call) if running == "continue" else nullcontext():
        answer = call("update_weights_from_disk", {"model_path": str(path), "weight_version": version})
    finish_update(call, answer, version, f"load {path}, which it must see under that path, else transport='network'")


def finish_update(call: Call, answer: Mapping[str, Any], version: str, what: str) -> None:
    """Reads the answer of an update; where only the flush of the prefix cache failed, makes up for it.

    SGLang's update waits for the requests that clients wait for. One whose client hung up in the middle of a stream may
    still run: then the weights are in, the cache is the old ones', and the version that clients see has not moved.
    """
    if str(answer.get("message")).startswith(NOT_FLUSHED):
        with paused(call):
            succeeded(call("flush_cache", {}), "flush its cache after an update")
            call("update_weight_version", {"new_version": version, "abort_all_requests": False})
        return
    succeeded(answer, what)
