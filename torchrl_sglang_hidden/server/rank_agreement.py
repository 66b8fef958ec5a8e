"""Lets no tensor-parallel rank answer for the others: new weights are there when every rank has them.

SGLang's rank 0 answers an update from files, or the load of an adapter, when it has read them itself. The client then
deletes the files, and a slower rank finds none: it serves the old weights beside the others' new ones, or ends the
server. So the ranks wait for each other, and a part of them that failed is the update's failure.

Knows SGLang's results by their fields, and nothing of states, logits or requests.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from torchrl_sglang_hidden.protocol.served_weights import INCOMPLETE, NOT_FLUSHED

__all__ = ["AFTER_UPDATES", "after_adapter_load", "after_weight_update"]


def after_weight_update(result: Any, updater: Any, request: Any) -> None:
    """Wait until every rank has loaded the weights of an update, or fail on all of them.

    A mixture of old and new weights is called ``<version>-incomplete`` in what requests get from then on.
    """
    loaded = result.success or result.message.startswith(NOT_FLUSHED)
    failures = _failures("" if loaded else result.message, updater.tp_cpu_group)
    if failures:
        result.success = False
        result.message = (
            f"{failures}the others have the new weights, and what the server answers is of neither; update again, or "
            "start the server again"
        )
        # On every rank: those that have the weights have emptied theirs, and ranks whose prefix caches differ compute
        # different parts of a prompt, and wait for each other for ever.
        updater.flush_cache()
        updater.record_weight_version_after_update(f"{request.weight_version or 'unnamed'}{INCOMPLETE}")


def after_adapter_load(result: Any, scheduler: Any, request: Any) -> None:
    """Wait until every rank has loaded an adapter, or fail on all of them."""
    failures = _failures("" if result.success else str(result.error_message), scheduler.tp_group.cpu_group)
    if failures:
        result.success = False
        result.error_message = f"{failures}the others have the adapter; unload it, and load it again"
        # SGLang refuses to unload what no answer named, which rank 0 does not where it is the one that failed.
        result.loaded_adapters = {**(result.loaded_adapters or {}), request.lora_name: request.lora_path}


def _failures(failure: str, group: Any) -> str:
    """Return which ranks failed and why, if some did and others did not; else "", for then rank 0 says it.

    Args:
        failure: why this rank failed; "" if it did not.
        group: the ranks of one model, on their processors.
    """
    size = torch.distributed.get_world_size(group)
    if size == 1:
        return ""
    told: list[str] = [""] * size
    torch.distributed.all_gather_object(told, failure, group=group)
    if all(told) or not any(told):
        return ""
    return "".join(f"rank {rank} of {size} failed: {text}; " for rank, text in enumerate(told) if text)


_UPDATER = "sglang.srt.managers.scheduler_components.weight_updater.SchedulerWeightUpdaterManager"
AFTER_UPDATES: dict[str, Callable[..., Any]] = {
    f"{_UPDATER}.update_weights_from_disk": after_weight_update,
    f"{_UPDATER}.update_weights_from_distributed": after_weight_update,
    "sglang.srt.managers.scheduler.Scheduler.load_lora_adapter": after_adapter_load,
}
