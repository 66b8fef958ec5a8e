"""Hooks on SGLang's tokenizer manager for new weights: which the model takes, its path, and holding requests back.

Knows nothing of states, logits or the scheduler.
"""

from __future__ import annotations

import asyncio
import copy
import dataclasses
from collections.abc import Coroutine
from pathlib import PurePath
from typing import Any

from torchrl_sglang_hidden.protocol import CHANNEL
from torchrl_sglang_hidden.protocol.served_weights import (
    DRAIN,
    PUSHED_PREFIX,
    WAS_PAUSED,
    ServedWeights,
    served_weights,
)

__all__ = ["after_get_weights", "after_model_path", "list_weights", "read_adapters"]


def after_model_path(result: None, manager: Any, model_path: str, load_format: str) -> None:
    """Keep the server's model path after an update from a temporary directory, which is deleted right after.

    Clients that connect later read the model's configuration, tokenizer and tensor names from the model path.
    """
    if PurePath(model_path).name.startswith(PUSHED_PREFIX):
        manager.model_path = manager.server_args.model_path
        manager.served_model_name = manager.server_args.served_model_name or manager.model_path


def after_get_weights(result: Coroutine[Any, Any, Any], manager: Any, obj: Any, request: Any = None) -> Any:
    """Answer requests for two weights that no model has.

    `CHANNEL` stands for the list of weights that a client may send, see `ServedWeights`; `DRAIN` for the end of the
    requests under way.
    """
    if obj.name not in (CHANNEL, DRAIN):
        return None
    result.close()
    return _drain(manager) if obj.name == DRAIN else _list(manager)


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
