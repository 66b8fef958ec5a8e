"""Hooks on SGLang's tokenizer manager for new weights: which the model takes, its path, and holding requests back.

Knows nothing of states, logits or the scheduler.
"""

from __future__ import annotations

import asyncio
import copy
import dataclasses
from collections.abc import Callable, Coroutine
from pathlib import PurePath
from typing import Any

from torchrl_sglang_hidden.protocol import CHANNEL
from torchrl_sglang_hidden.protocol.head_call import HeadCall
from torchrl_sglang_hidden.protocol.served_weights import (
    DRAIN,
    PUSHED_PREFIX,
    WAS_PAUSED,
    ServedWeights,
    served_weights,
)
from torchrl_sglang_hidden.protocol.update_lease import LeaseCall
from torchrl_sglang_hidden.server.update_watch import UpdateWatch

__all__ = [
    "AFTER_WEIGHT_ROUTES",
    "after_get_weights",
    "after_model_path",
    "after_weight_control",
    "list_weights",
    "read_adapters",
]

_watch = UpdateWatch()


def after_model_path(result: None, manager: Any, model_path: str, load_format: str) -> None:
    """Keep the server's model path after an update from a temporary directory, which is deleted right after.

    Clients that connect later read the model's configuration, tokenizer and tensor names from the model path.
    """
    if PurePath(model_path).name.startswith(PUSHED_PREFIX):
        manager.model_path = manager.server_args.model_path
        manager.served_model_name = manager.server_args.served_model_name or manager.model_path


def after_get_weights(result: Coroutine[Any, Any, Any], manager: Any, obj: Any, request: Any = None) -> Any:
    """Answer requests for weights that no model has.

    `CHANNEL` stands for the list of weights that a client may send, see `ServedWeights`; `DRAIN` for the end of the
    requests under way; a `LeaseCall` for the right to change the weights. A `HeadCall` goes on to the schedulers.
    """
    if HeadCall.is_packed(obj.name):
        return _push_head(result)
    lease_call = LeaseCall.unpack(obj.name)
    if lease_call is None and obj.name not in (CHANNEL, DRAIN):
        return None
    result.close()
    if lease_call is not None:
        return _watch.answer(lease_call, manager, request)
    return _watch.noted(_drain(manager), obj) if obj.name == DRAIN else _list(manager)


def after_weight_control(
    result: Coroutine[Any, Any, Any], manager: Any, obj: Any, request: Any = None
) -> Coroutine[Any, Any, Any]:
    """Note what a trainer does to the weights, so that its update can be ended should it die."""
    return _watch.noted(result, obj)


async def _push_head(control: Coroutine[Any, Any, Any]) -> dict[str, Any]:
    await control  # what a scheduler refuses is raised here
    return {"success": True, "message": ""}


async def _list(manager: Any) -> dict[str, Any]:
    # In a thread: naming the weights of a large model that has no checkpoint takes a while.
    return (await asyncio.to_thread(list_weights, manager)).pack()


def list_weights(manager: Any) -> ServedWeights:
    """Return names, dtypes and shapes of the weights that the model of a tokenizer manager takes.

    Raises:
        OSError, ValueError: see `served_weights`.
    """
    # Read from the path that the server was started with: the directory of an update may be gone. Shapes are equal.
    config = manager.model_config
    found = served_weights(manager.server_args.model_path, config.hf_config)
    return dataclasses.replace(found, quantization=str(config.quantization or found.quantization))


async def _drain(manager: Any) -> dict[str, Any]:
    """Hold new requests back, as SGLang's own pause does, and return when those under way have ended."""
    async with manager.is_pause_cond:
        was_paused, manager.is_pause = manager.is_pause, True
    # Somebody paused the engine: what is under way stands still, and would be waited for in vain.
    if not was_paused:
        async with manager.model_update_lock.writer_lock:
            pass
    return {"success": True, "message": "", WAS_PAUSED: was_paused}


def read_adapters(options: dict[str, Any]) -> dict[str, Any]:
    """Return the arguments of SGLang's LoRA manager, which reads adapters also where the model was made up."""
    config = options.get("load_config")
    if config is None or config.load_format != "dummy":
        return options
    config = copy.copy(config)
    config.load_format = type(config.load_format)("auto")
    return {**options, "load_config": config}


_MANAGER = "sglang.srt.managers.tokenizer_manager.TokenizerManager"
_CONTROLS = (
    "pause_generation", "init_weights_update_group", "destroy_weights_update_group", "begin_weight_update",
    "end_weight_update", "update_weights_from_distributed", "update_weights_from_disk", "update_weight_version",
)  # fmt: skip
AFTER_WEIGHT_ROUTES: dict[str, Callable[..., Any]] = {
    f"{_MANAGER}._update_model_path_info": after_model_path,
    f"{_MANAGER}.get_weights_by_name": after_get_weights,
    **{f"{_MANAGER}.{name}": after_weight_control for name in _CONTROLS},
}
